package keysvcd

import (
	"context"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/kmehsm/kmehsm/internal/testproc"
)

// A panic of background work is logged, and the work begins again.
func TestBesidePanics(t *testing.T) {
	log := testproc.Logged(t)
	var begun atomic.Int64
	stop := beside(t.Context(), func(ctx context.Context) {
		if begun.Add(1) < 3 {
			panic("in the background")
		}
		<-ctx.Done()
	})
	testproc.Await(t, "it begins again", func() bool { return begun.Load() == 3 })
	stop()
	if n := strings.Count(log.String(), `"cause":"in the background"`); n != 2 {
		t.Errorf("%d panics in the log: %s", n, log)
	}
}

// A panicky log panics over its first line that has some text.
type panicky struct {
	slog.Handler
	over     string
	panicked atomic.Bool
}

func (p *panicky) Handle(ctx context.Context, r slog.Record) error {
	if strings.Contains(r.Message, p.over) && p.panicked.CompareAndSwap(false, true) {
		panic("in the log")
	}
	return p.Handler.Handle(ctx, r)
}

// A panic of the registration at the NRF does not end the service, and the registration begins again.
func TestRegistrationPanics(t *testing.T) {
	testproc.Logged(t)
	s, log := newSite(t, nil), new(testproc.Log)
	cfg := *s.started
	cfg.EIR.NRF, cfg.EIR.Advertise = "https://127.0.0.1:1", "127.0.0.1:1"
	s.started = &cfg
	p := &panicky{Handler: slog.NewJSONHandler(log, nil), over: "the NRF has not answered"}
	s.live.log = slog.New(p)
	ctx, end := context.WithCancel(t.Context())
	d, ended := &daemon{live: s.live, leaving: &leaving{told: ctx}}, make(chan error, 1)
	go func() { ended <- d.run(ctx, nil) }()
	testproc.Await(t, "the NRF is asked again", func() bool { return strings.Contains(log.String(), p.over) })
	select {
	case err := <-ended:
		t.Fatalf("the service has ended: %v", err)
	default:
	}
	end()
	if err := <-ended; err != nil || !p.panicked.Load() {
		t.Errorf("panicked: %v; %v", p.panicked.Load(), err)
	}
}
