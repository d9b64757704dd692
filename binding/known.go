package binding

import (
	"context"
	"errors"
	"time"

	"github.com/kmehsm/kmehsm/binding/refusals"
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
	Doubts       []Doubt // about its latest binding
	Unknown      error   // why nobody knows whether there are any
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
		k.Doubts, k.Unknown = s.lots.Doubts(short, k.Subscription.Standing())
	}
	s.log.InfoContext(ctx, "subscription explained", "imsi", imsi)
	return k, nil
}

// KnownDevice is what there is to explain a device by.
type KnownDevice struct {
	Manufacturer, Lot string     // empty if it is in no lot that was imported and whose manufacturer is trusted
	Retired           Verdict    // of the lot
	Revoked           bool       // by its manufacturer, as far as the list in memory says
	Unknown           error      // why nobody knows
	Bindings          []*Binding // that it has, 100 at most
}

// KnownDevice looks at a device's lot, at the list of revoked devices, and at its bindings, of those that q asks for.
func (s *Service) KnownDevice(ctx context.Context, imei kme.IMEI, q BindingQuery) (k KnownDevice, err error) {
	q.IMEI, q.Limit = imei, 100
	if k.Bindings, err = s.ListBindings(ctx, q); err != nil {
		return k, err
	}
	name, lot := s.lots.of(imei)
	if lot == nil {
		return k, nil
	}
	k.Manufacturer, k.Lot, k.Retired = name.manufacturer, name.lot, lot.retired
	k.Revoked, k.Unknown = lot.reader.Revoked(lot.manifest, imei)
	return k, nil
}

// of is the imported lot of a device, served or not; nil if there is none whose manufacturer is trusted.
func (l *Lots) of(imei kme.IMEI) (name lotName, found *importedLot) {
	if lot := l.find(imei); lot != nil {
		name = lotName{lot.manifest.Manufacturer, lot.manifest.Lot}
		return name, l.imported[name]
	}
	for name, lot := range l.imported {
		if lot.servedLot != nil {
			if _, ok := lot.manifest.Position(imei); ok {
				return name, lot
			}
		}
	}
	return name, nil
}

// Doubts gives those about a binding. It needs the directory of its manufacturer, if that is trusted.
func (l *Lots) Doubts(ctx context.Context, b *Binding) ([]Doubt, error) {
	name := lotName{b.Manufacturer, b.Lot}
	if lot := l.imported[name]; lot != nil && lot.servedLot != nil {
		// A directory that is gone would have nothing revoked.
		if _, err := lot.reader.Manifest(ctx, b.Lot); err != nil {
			return nil, unknownRevocations(name, err)
		}
	}
	return l.doubts(ctx, b)
}

// Damage is err if it says that rows of a subscription are damaged; else nil.
func Damage(err error) error {
	if errors.As(err, new(*DamagedRow)) {
		return err
	}
	return nil
}
