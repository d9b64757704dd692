package binding

import (
	"context"
	"time"

	"github.com/kmehsm/kmehsm/binding/refusals"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/kme"
)

// directoryWait is how long Known waits for a directory.
const directoryWait = 2 * time.Second

// Known is what package explain explains a subscription by.
type Known struct {
	IMSI         kme.IMSI
	Subscription *Subscription
	Damaged      error   // why there is no Subscription
	History      []Entry // about the IMSI
	Refused      *refusals.Past
	Doubts       []registry.Doubt // about its latest binding
	Unknown      error            // why nobody knows whether there are any
}

// ReadKnown reads what a store has of an IMSI, and adds its last refusal. doubts gives the doubts about a binding that
// stands.
func ReadKnown(
	ctx context.Context, store Store, imsi kme.IMSI, refused *refusals.Past, now time.Time,
	doubts func(context.Context, registry.Basis) ([]registry.Doubt, error),
) (k Known, err error) {
	k = Known{IMSI: imsi, Refused: refused}
	k.Subscription, err = store.Subscription(ctx, imsi, now)
	if IsDamaged(err) {
		k.Damaged = err
		return k, nil
	}
	if err == nil {
		k.History, err = store.History(ctx, imsi.String())
	}
	if err == nil && k.Subscription.Standing() != nil {
		k.Doubts, k.Unknown = doubts(ctx, k.Subscription.Standing().Basis())
	}
	return k, err
}

// Nothing says whether nothing is known of the IMSI: it was never bound, nor refused.
func (k Known) Nothing() bool {
	return k.Damaged == nil && k.Subscription.Latest() == nil && len(k.History) == 0 && k.Refused == nil
}

// Known is for a reader who is no administrator. It leaves out the cause of the last refusal: with that, the reader
// would be an oracle about payloads.
func (s *Service) Known(ctx context.Context, imsi kme.IMSI) (k Known, err error) {
	refused := s.refusals.Of(imsi)
	if refused != nil {
		refused.Cause = ""
	}
	k, err = ReadKnown(ctx, s.store, imsi, refused, s.times.Now(), func(
		ctx context.Context, b registry.Basis,
	) ([]registry.Doubt, error) {
		short, cancel := context.WithTimeout(ctx, directoryWait)
		defer cancel()
		return s.lots.Doubts(short, b)
	})
	if err != nil {
		return k, s.failed(ctx, "GetBinding", imsi, fromStore(ctx, err))
	}
	s.log.InfoContext(ctx, "subscription explained", "imsi", imsi)
	return k, nil
}

// KnownDevice is what package explain explains a device by.
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
