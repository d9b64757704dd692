package binding

import (
	"context"
	"time"

	"github.com/kmehsm/kmehsm/kme"
)

// directoryWait is how long an explanation waits for a directory.
const directoryWait = 2 * time.Second

// ExplainIMSI explains a subscription to who is no administrator: without the cause of the last refusal, which could
// make its reader an oracle about payloads.
func (s *Service) ExplainIMSI(ctx context.Context, imsi kme.IMSI) (*Explanation, error) {
	k := Known{IMSI: imsi, Refused: s.refusals.Of(imsi)}
	if k.Refused != nil {
		k.Refused.Cause = ""
	}
	var err error
	k.Subscription, err = s.store.Subscription(ctx, imsi, s.times.Now())
	if k.Damaged = Damage(err); err == nil {
		k.History, err = s.store.History(ctx, imsi.String())
	}
	if err != nil && k.Damaged == nil {
		return nil, s.failed(ctx, "get", imsi, fromStore(ctx, err))
	}
	if k.Damaged == nil && k.Subscription.Standing() != nil {
		short, cancel := context.WithTimeout(ctx, directoryWait)
		defer cancel()
		k.Doubts, k.Unknown = s.lots.Doubts(short, k.Subscription.Standing())
	}
	s.log.InfoContext(ctx, "subscription explained", "imsi", imsi)
	return Explain(k), nil
}

// A DeviceExplanation says in words how a device stands, and what is to be done.
type DeviceExplanation struct {
	Says, Next []string
	Bindings   []*Binding // that it has, 100 at most
}

// ExplainIMEI explains a device: by the lots that were imported and their lists of revoked devices in memory, and by
// its bindings, of those that q asks for.
func (s *Service) ExplainIMEI(ctx context.Context, imei kme.IMEI, q BindingQuery) (*DeviceExplanation, error) {
	q.IMEI, q.Limit = imei, 100
	bound, err := s.ListBindings(ctx, q)
	if err != nil {
		return nil, err
	}
	e := &DeviceExplanation{Bindings: bound}
	name, lot := s.lots.of(imei)
	switch {
	case lot == nil:
		e.Says = []string{"It is in no lot that was imported and whose manufacturer is trusted."}
		e.Next = []string{"if it is to be bound: have its manufacturer grant its lot, keysvc lot import it, and send " +
			"the service SIGHUP"}
		return e, nil
	case lot.retired.Withdrawn:
		e.Says = []string{"It is in lot " + name.lot + " of manufacturer " + name.manufacturer + ", which was " +
			"retired " + lot.retired.String() + ": no device of it is newly bound."}
		e.Next = []string{"keysvc lot import FILE --reinstate REASON takes that back"}
	default:
		e.Says = []string{"It is in lot " + name.lot + " of manufacturer " + name.manufacturer + ", which is served."}
	}
	switch revoked, err := lot.reader.Revoked(lot.manifest, imei); {
	case err != nil:
		e.Says = append(e.Says, "Whether the manufacturer has revoked it is not known, and so it is refused.")
		e.Next = append(e.Next, "see the directory's state, and max_revocation_age in the configuration")
	case revoked:
		e.Says = append(e.Says, "The manufacturer has revoked it: it is neither newly bound nor sent vectors.")
		e.Next = append(e.Next, "the subscriber needs another device")
	}
	return e, nil
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
