package keysvcd

import (
	"context"
	"time"

	"github.com/kmehsm/kmehsm/binding/refusals"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/keysvcd/operator"
)

// keepRefusals saves the last refusals again and again, for keysvc binding explain, until stop is called, which is
// after the last call. No call waits for that.
func (d *daemon) keepRefusals(ctx context.Context, r *refusals.Memory) (stop func()) {
	failed := false
	save := func() {
		err := r.Save(func(saved []byte) error {
			return durable.WriteFile(operator.RefusalsFile(d.started.State), saved, 0o600)
		})
		if err != nil && !failed { // it is tried again every two seconds
			d.log.Warn("the last refusals were not written down", "cause", err.Error())
		}
		failed = err != nil
	}
	return beside(context.WithoutCancel(ctx), func(ctx context.Context) {
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
	})
}
