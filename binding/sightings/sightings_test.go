package sightings

import (
	"context"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

func TestMain(m *testing.M) { testproc.Main(m.Run) }

// panicking is a store that panics at first, and whenever it forgets.
type panicking struct {
	Store
	seen atomic.Int64
}

func (p *panicking) See(context.Context, []Sighting) ([]Move, error) {
	if p.seen.Add(1) == 1 {
		panic("in the store")
	}
	return nil, nil
}

func (p *panicking) Forget(context.Context, time.Time, int) (int, error) { panic("in the store, too") }

// A panic of the store is a failure as others: what it did not write is counted, and written the next time.
func TestStorePanics(t *testing.T) {
	testproc.Logged(t)
	store := new(panicking)
	h := New(Options{Store: store, Now: time.Now, Log: slog.New(slog.DiscardHandler),
		Registry: prometheus.NewRegistry()})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); h.Run(ctx) }()
	defer func() { cancel(); <-ended }()
	saw := func() {
		h.Saw(must.Get[kme.IMSI](t)(kme.ParseIMSI("001010123456789")),
			must.Get[kme.IMEI](t)(kme.ParseIMEI("35209900176148")), Asserted)
	}
	saw()
	testproc.Await(t, "it is counted", func() bool { return testutil.ToFloat64(h.dropped) == 1 })
	testproc.Await(t, "it is written", func() bool { saw(); return store.seen.Load() > 1 })
}
