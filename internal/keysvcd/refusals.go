package keysvcd

import (
	"context"
	"log/slog"
	"time"

	"github.com/kmehsm/kmehsm/binding/refusals"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/keysvcd/operator"
)

// keepRefusals saves the last refusals again and again, for keysvc binding explain, until stop is called. No call waits
// for that.
func keepRefusals(r *refusals.Memory, state string, log *slog.Logger) (stop func()) {
	save := func() {
		saved, err := r.Save()
		if err == nil && saved != nil {
			err = durable.WriteFile(operator.RefusalsFile(state), saved, 0o600)
		}
		if err != nil {
			log.Warn("the last refusals were not written down", "cause", err.Error())
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	kept := make(chan struct{})
	go func() {
		defer close(kept)
		defer save()
		tick := time.NewTicker(2 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				save()
			}
		}
	}()
	return func() { cancel(); <-kept }
}
