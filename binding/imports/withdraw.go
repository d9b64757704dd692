package imports

import (
	"context"
	"fmt"
	"time"

	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/internal/usage"
)

// NewVerdict makes a verdict of this moment.
func NewVerdict(withdrawn bool, by, reason string) (v registry.Verdict, err error) {
	if reason, err = strict.Reason(reason); err != nil {
		return v, err
	}
	return registry.Verdict{Withdrawn: withdrawn, By: by, Reason: reason,
		Time: time.Now().UTC().Truncate(time.Millisecond)}, nil
}

func distrustedError(m *registry.Manufacturer) error {
	return fmt.Errorf("manufacturer %s is distrusted, %s; if that is over, run keysvc manufacturer trust first",
		m.KeyID, m.Verdict)
}

// Distrust ends the service of all lots of a manufacturer, and refuses its enrolments and grants. Bindings stay, and
// keys stay in the token. It gives the verdict that is valid now: an earlier one stays.
func Distrust(
	ctx context.Context, store registry.Store, manufacturer string, v registry.Verdict,
) (registry.Verdict, error) {
	return store.Decide(ctx, manufacturer, "", v, func([]*registry.Lot) error { return nil })
}

// DistrustLoss says what is lost when a manufacturer is distrusted: nothing, if it is not enrolled, or is distrusted
// already.
func DistrustLoss(ctx context.Context, store registry.Store, manufacturer string) (string, error) {
	manufacturers, err := store.Manufacturers(ctx)
	if err != nil {
		return "", err
	}
	m := registry.ManufacturerOf(manufacturers, manufacturer)
	if m == nil || m.Verdict.Withdrawn {
		return "", nil
	}
	lots, err := store.Lots(ctx)
	served := 0
	for _, l := range lots {
		if l.Manufacturer == manufacturer && l.Served() {
			served++
		}
	}
	return fmt.Sprintf("Manufacturer %s, enrolled as operator %s: none of its lots is served any more, %d by now, and "+
		"no device of theirs is bound any more.", manufacturer, m.Operator, served), err
}

// Trust undoes Distrust. It fails if IMEIs of a lot now belong to another lot, or a TAC to another manufacturer.
func Trust(
	ctx context.Context, store registry.Store, manufacturer string, v registry.Verdict,
) (registry.Verdict, error) {
	manufacturers, err := store.Manufacturers(ctx)
	if err != nil {
		return registry.Verdict{}, err
	}
	return store.Decide(ctx, manufacturer, "", v, func(all []*registry.Lot) error {
		if m := registry.ManufacturerOf(manufacturers, manufacturer); m != nil {
			if err := checkPins(all, manufacturers, m); err != nil {
				return err
			}
		}
		for _, l := range all {
			if l.Manufacturer == manufacturer && !l.Retired.Withdrawn {
				if err := checkLot(l, all, false); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// RetireLot ends the service of a lot, and destroys its key in the token. Bindings stay. It gives the verdict that is
// valid now, also if only destroying the key has failed: an earlier one stays, and the key is destroyed all the same. A
// factory's token has the lot's own key under the same name.
func RetireLot(
	ctx context.Context, token Token, store registry.Store, lot *registry.Lot, v registry.Verdict,
) (registry.Verdict, error) {
	if err := token.MustBe(ctx, hsmkeys.Operator); err != nil {
		return registry.Verdict{}, err
	}
	stands, err := store.Decide(ctx, lot.Manufacturer, lot.Manifest.Lot, v, func([]*registry.Lot) error {
		return nil
	})
	if err != nil {
		return registry.Verdict{}, err
	}
	return stands, token.RemoveLotKey(ctx, lot.Key())
}

// RetirementLoss says what is lost when a lot is retired, and its key in a token destroyed: nothing, if it is retired
// and that token does not have the key any more.
func RetirementLoss(ctx context.Context, store registry.Store, lot *registry.Lot, token interface {
	fmt.Stringer
	Has(ctx context.Context, k hsmkeys.Key) (bool, error)
}, now time.Time) (string, error) {
	has, err := token.Has(ctx, lot.Key())
	if err != nil || lot.Retired.Withdrawn && !has {
		return "", err
	}
	bound, err := store.Bound(ctx, lot.Manufacturer, lot.Manifest.Lot, now)
	return fmt.Sprintf("Lot %s of manufacturer %s: its key in %s will be destroyed, and none of its %d devices is "+
		"bound any more. %d bindings stand.", lot.Manifest.Lot, lot.Manufacturer, token, lot.Manifest.Devices(),
		bound), err
}

// FindLot gives the lot of a name. manufacturer may be empty if only one lot has that name.
func FindLot(ctx context.Context, store registry.Store, name, manufacturer string) (*registry.Lot, error) {
	lots, err := store.Lots(ctx)
	if err != nil {
		return nil, err
	}
	var found *registry.Lot
	for _, l := range lots {
		if l.Manifest.Lot != name || manufacturer != "" && l.Manufacturer != manufacturer {
			continue
		}
		if found != nil {
			return nil, usage.In("manufacturer", fmt.Errorf("lot %s is manufacturer %s's and also %s's: say "+
				"whose", name, found.Manufacturer, l.Manufacturer))
		}
		found = l
	}
	if found == nil {
		return nil, fmt.Errorf("lot %s was not imported: see keysvc lot list", name)
	}
	return found, nil
}
