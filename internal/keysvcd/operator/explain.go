package operator

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/explain"
	"github.com/kmehsm/kmehsm/binding/refusals"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/kme"
)

// RefusalsFile is where a service writes down what it remembers of refusals.
func RefusalsFile(state string) string { return filepath.Join(state, "refusals.json") }

// ReadRefusals gives what a service that has this state folder remembers of refusals: nothing, if it wrote none down.
func ReadRefusals(state string) (*refusals.Memory, error) {
	r := new(refusals.Memory)
	saved, err := os.ReadFile(RefusalsFile(state))
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err == nil {
		err = r.Load(saved)
	}
	if err != nil {
		return nil, fmt.Errorf("%s cannot be read; it can be removed, and the last refusals are then forgotten: %w",
			RefusalsFile(state), err)
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
