package binding

import (
	"context"
	"fmt"
	"iter"
	"time"
)

// A Doubt is why a key that a binding rests on is not to be trusted any more.
type Doubt struct {
	Why    Why       `json:"why"`
	Reason string    `json:"reason"` // whose decision it was has given it
	Time   time.Time `json:"time"`
}

// Why names the kinds of Doubt.
type Why string

const (
	ManufacturerDistrusted Why = "MANUFACTURER_DISTRUSTED"
	LotRetired             Why = "LOT_RETIRED"
	LotRevoked             Why = "LOT_REVOKED" // as a whole, by its manufacturer
	DeviceRevoked          Why = "DEVICE_REVOKED"
	DeviceReissued         Why = "DEVICE_REISSUED" // the device's key that signed the KME was replaced later
)

// Each gives Subscription.Latest of all IMSIs that a query asks for, in their order, page by page: there may be
// millions. It has no limit.
func Each(ctx context.Context, store Store, q BindingQuery) iter.Seq2[*Binding, error] {
	const page = 1000
	return func(yield func(*Binding, error) bool) {
		q := q
		for q.Limit = page; ; {
			list, err := store.Bindings(ctx, q)
			if err != nil {
				yield(nil, err)
				return
			}
			for _, b := range list {
				if q.After = b.IMSI.String(); !yield(b, nil) {
					return
				}
			}
			if len(list) < page {
				return
			}
		}
	}
}

// A Suspect is a binding that stands, and why it should not be relied on.
type Suspect struct {
	*Binding
	Doubts []Doubt
}

// Suspects gives all bindings, active and pending, that rest on a key which is not to be trusted any more. It needs the
// directories of the manufacturers that are trusted, and fails without.
func (l *Lots) Suspects(ctx context.Context, store Store, now time.Time) iter.Seq2[Suspect, error] {
	return func(yield func(Suspect, error) bool) {
		for name, lot := range l.imported {
			if lot.servedLot == nil {
				continue
			}
			// a directory that is gone would have nothing revoked
			if _, err := lot.reader.Manifest(ctx, name.lot); err != nil {
				yield(Suspect{}, unknownRevocations(name, err))
				return
			}
		}
		for b, err := range Each(ctx, store, BindingQuery{Now: now}) {
			var all []*Binding
			if err == nil {
				all, err = standing(ctx, store, b, now)
			}
			for _, b := range all {
				var doubts []Doubt
				if doubts, err = l.doubts(ctx, b); err != nil {
					break
				}
				if len(doubts) > 0 && !yield(Suspect{b, doubts}, nil) {
					return
				}
			}
			if err != nil {
				yield(Suspect{}, err)
				return
			}
		}
	}
}

// standing is what stands of an IMSI whose latest binding is b: beside a pending one there may be an active one.
func standing(ctx context.Context, store Store, b *Binding, now time.Time) ([]*Binding, error) {
	switch b.State {
	case Active:
		return []*Binding{b}, nil
	case Revoked:
		return nil, nil
	}
	sub, err := store.Subscription(ctx, b.IMSI, now)
	if err != nil {
		return nil, err
	}
	var all []*Binding
	for _, b := range []*Binding{sub.Active, sub.Pending} {
		if b != nil {
			all = append(all, b)
		}
	}
	return all, nil
}

func unknownRevocations(n lotName, err error) error {
	return fmt.Errorf("which devices of lot %s manufacturer %s has revoked is not known: %w", n.lot,
		n.manufacturer, err)
}

func (l *Lots) doubts(ctx context.Context, b *Binding) (doubts []Doubt, err error) {
	lot := l.imported[lotName{b.Manufacturer, b.Lot}]
	if lot == nil {
		return nil, fmt.Errorf("IMSI %s is bound to a device of lot %s of manufacturer %s, which was not imported: "+
			"the database is damaged",
			b.IMSI, b.Lot, b.Manufacturer)
	}
	if v := lot.retired; v.Withdrawn {
		doubts = append(doubts, Doubt{LotRetired, v.Reason, v.Time})
	}
	if v, distrusted := l.distrusted[b.Manufacturer]; distrusted {
		return append(doubts, Doubt{ManufacturerDistrusted, v.Reason, v.Time}), nil
	}
	history, whole, err := lot.reader.RevocationsOf(ctx, lot.manifest, b.IMEI)
	if err != nil {
		return nil, unknownRevocations(lotName{b.Manufacturer, b.Lot}, err)
	}
	if whole != nil {
		doubts = append(doubts, Doubt{LotRevoked, whole.Reason, whole.Time})
	}
	issued := 0
	for i, e := range history {
		if e.Key != nil {
			issued++
		}
		switch {
		case e.Key != nil && issued == b.DeviceKey+1:
			doubts = append(doubts, Doubt{DeviceReissued, e.Reason, e.Time})
		case e.Key == nil && i == len(history)-1:
			doubts = append(doubts, Doubt{DeviceRevoked, e.Reason, e.Time})
		}
	}
	return doubts, nil
}
