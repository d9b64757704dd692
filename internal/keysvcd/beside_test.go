package keysvcd

import (
	"context"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// A panic of background work is logged, and the work begins again.
func TestBesidePanics(t *testing.T) {
	log := new(testproc.Log)
	d := &daemon{service: binding.NewService(binding.Options{Times: binding.DefaultTimes(),
		Log: slog.New(slog.NewJSONHandler(log, nil))})}
	var begun atomic.Int64
	stop := d.beside(t.Context(), func(ctx context.Context) {
		if begun.Add(1) < 3 {
			panic("in the background")
		}
		<-ctx.Done()
	})
	testproc.Await(t, "it begins again", func() bool { return begun.Load() == 3 })
	stop()
	if n := strings.Count(log.String(), `"cause":"panic: in the background"`); n != 2 {
		t.Errorf("%d panics in the log: %s", n, log)
	}
}
