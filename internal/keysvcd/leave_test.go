package keysvcd

import (
	"context"
	"io"
	"log/slog"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/testproc"
)

// A service that is told to end serves on for the drain delay, if somebody has asked in as long whether it is ready.
func TestDrainDelay(t *testing.T) {
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	for name, c := range map[string]struct {
		delay        time.Duration
		asked, stays bool
	}{
		"nobody asks":       {time.Hour, false, false},
		"somebody asks":     {time.Hour, true, true},
		"the delay is over": {time.Millisecond, true, false},
		"no delay":          {0, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			told, end := context.WithCancel(t.Context())
			l := &leaving{told: told}
			serving, stop := l.stay(c.delay, log)
			defer stop()
			if c.asked && l.begun() {
				t.Error("nobody has told it to end")
			}
			end()
			if c.stays {
				time.Sleep(50 * time.Millisecond)
				if serving.Err() != nil {
					t.Error("it does not serve on")
				}
			} else {
				testproc.Await(t, "it ends", func() bool { return serving.Err() != nil })
			}
			if !l.begun() {
				t.Error("it says that it is ready")
			}
		})
	}
}
