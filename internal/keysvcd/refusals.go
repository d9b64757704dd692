package keysvcd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/explain"
	"github.com/kmehsm/kmehsm/binding/refusals"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/kme"
)

func refusalsFile(state string) string { return filepath.Join(state, "refusals.json") }

// ReadRefusals gives what a service that has this state folder remembers of refusals: nothing, if it wrote none down.
func ReadRefusals(state string) (*refusals.Memory, error) {
	r := new(refusals.Memory)
	saved, err := os.ReadFile(refusalsFile(state))
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err == nil {
		err = r.Load(saved)
	}
	if err != nil {
		return nil, fmt.Errorf("%s cannot be read; it can be removed, and the last refusals are then forgotten: %w",
			refusalsFile(state), err)
	}
	return r, nil
}

// Explain says how an IMSI stands, for a command beside a service that has this state folder. lots is called if it has
// a binding, which may rest on keys that are not to be trusted any more.
func Explain(
	ctx context.Context, store *sqlstore.Store, state string, imsi kme.IMSI, lots func() (*registry.Lots, error),
) (*explain.Subscription, error) {
	refused, err := ReadRefusals(state)
	if err != nil {
		return nil, err
	}
	k, err := binding.ReadKnown(ctx, store, imsi, refused.Of(imsi), time.Now(), func(
		ctx context.Context, b registry.Basis,
	) ([]registry.Doubt, error) {
		lots, err := lots()
		if err != nil {
			return nil, err
		}
		return lots.Doubts(ctx, b)
	})
	if err != nil {
		return nil, err
	}
	e := explain.OfSubscription(k)
	if k.Nothing() {
		lots, err := store.Lots(ctx)
		if err != nil {
			return nil, err
		}
		e.OrDevice(lots)
	}
	return e, nil
}

// keepRefusals writes down what is remembered of refusals, for keysvc binding explain, until stop is called. No call
// waits for that.
func keepRefusals(r *refusals.Memory, state string, log *slog.Logger) (stop func()) {
	save := func() {
		saved, err := r.Save()
		if err == nil && saved != nil {
			err = durable.WriteFile(refusalsFile(state), saved, 0o600)
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
