package binding

import (
	"context"
	"errors"
	"time"

	"github.com/kmehsm/kmehsm/binding/refusals"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/kme"
)

// directoryWait is how long Known waits for a directory.
const directoryWait = 2 * time.Second

// Known is what there is to explain a subscription by, see package explain.
type Known struct {
	IMSI         kme.IMSI
	Subscription *Subscription
	Damaged      error   // why there is no Subscription
	History      []Entry // about the IMSI
	Refused      *refusals.Past
	Doubts       []registry.Doubt // about its latest binding
	Unknown      error            // why nobody knows whether there are any
}

// Known is for a reader who is no administrator: it lacks the cause of the last refusal, which could make its reader an
// oracle about payloads.
func (s *Service) Known(ctx context.Context, imsi kme.IMSI) (k Known, err error) {
	k = Known{IMSI: imsi, Refused: s.refusals.Of(imsi)}
	if k.Refused != nil {
		k.Refused.Cause = ""
	}
	k.Subscription, err = s.store.Subscription(ctx, imsi, s.times.Now())
	if k.Damaged = Damage(err); err == nil {
		k.History, err = s.store.History(ctx, imsi.String())
	}
	if err != nil && k.Damaged == nil {
		return k, s.failed(ctx, "get", imsi, fromStore(ctx, err))
	}
	if k.Damaged == nil && k.Subscription.Standing() != nil {
		short, cancel := context.WithTimeout(ctx, directoryWait)
		defer cancel()
		k.Doubts, k.Unknown = s.lots.Doubts(short, k.Subscription.Standing().Basis())
	}
	s.log.InfoContext(ctx, "subscription explained", "imsi", imsi)
	return k, nil
}

// KnownDevice is what there is to explain a device by.
type KnownDevice struct {
	Manufacturer, Lot string           // empty if it is in no lot that was imported and whose manufacturer is trusted
	Retired           registry.Verdict // of the lot
	Revoked           bool             // by its manufacturer, as far as the list in memory says
	Unknown           error            // why nobody knows
	Bindings          []*Binding       // that it has, 100 at most
}

// KnownDevice looks at a device's lot, at the list of revoked devices, and at its bindings, of those that q asks for.
func (s *Service) KnownDevice(ctx context.Context, imei kme.IMEI, q BindingQuery) (k KnownDevice, err error) {
	q.IMEI, q.Limit = imei, 100
	if k.Bindings, err = s.ListBindings(ctx, q); err != nil {
		return k, err
	}
	lot := s.lots.Of(imei)
	if lot == nil {
		return k, nil
	}
	k.Manufacturer, k.Lot, k.Retired = lot.Manifest.Manufacturer, lot.Manifest.Lot, lot.Retired
	k.Revoked, k.Unknown = lot.Reader.Revoked(lot.Manifest, imei)
	return k, nil
}

// Damage is err if it says that rows of a subscription are damaged; else nil.
func Damage(err error) error {
	if errors.As(err, new(*DamagedRow)) {
		return err
	}
	return nil
}
