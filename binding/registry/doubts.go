package registry

import (
	"context"
	"fmt"
	"time"

	"github.com/kmehsm/kmehsm/directory"
)

// A Doubt is why a key that a binding rests on is not to be trusted any more.
type Doubt struct {
	Why    Why       `json:"why"`
	Reason string    `json:"reason"` // as given by whoever decided it
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

// ReadManifests reads the manifest of each lot whose manufacturer is trusted. So a missing directory is an error, and
// does not look like one without revocations.
func (l *Lots) ReadManifests(ctx context.Context) error {
	for _, lot := range l.imported {
		if err := lot.readManifest(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (l *ImportedLot) readManifest(ctx context.Context) error {
	if l.TrustedLot == nil {
		return nil
	}
	if _, err := l.Reader.Manifest(ctx, l.Manifest.Lot); err != nil {
		return unknownRevocations(l.Manifest, err)
	}
	return nil
}

// Doubts gives the doubts about a binding's key. It needs the directory of the manufacturer, if that is trusted.
func (l *Lots) Doubts(ctx context.Context, b Basis) ([]Doubt, error) {
	if lot := l.imported[b.lotName()]; lot != nil {
		if err := lot.readManifest(ctx); err != nil {
			return nil, err
		}
	}
	return l.DoubtsOf(ctx, b)
}

func unknownRevocations(m *directory.Manifest, err error) error {
	return fmt.Errorf("which devices of lot %s manufacturer %s has revoked is not known: %w", m.Lot, m.Manufacturer,
		err)
}

// DoubtsOf is Doubts for many bindings. Call ReadManifests before.
func (l *Lots) DoubtsOf(ctx context.Context, b Basis) (doubts []Doubt, err error) {
	lot := l.imported[b.lotName()]
	if lot == nil {
		return nil, fmt.Errorf("IMSI %s is bound to a device of lot %s of manufacturer %s, which was not imported: "+
			"the database is damaged", b.IMSI, b.Lot, b.Manufacturer)
	}
	if v := lot.Retired; v.Withdrawn {
		doubts = append(doubts, Doubt{Why: LotRetired, Reason: v.Reason, Time: v.Time})
	}
	if v, distrusted := l.distrusted[b.Manufacturer]; distrusted {
		return append(doubts, Doubt{Why: ManufacturerDistrusted, Reason: v.Reason, Time: v.Time}), nil
	}
	history, whole, err := lot.Reader.RevocationsOf(ctx, lot.Manifest, b.IMEI)
	if err != nil {
		return nil, unknownRevocations(lot.Manifest, err)
	}
	if whole != nil {
		doubts = append(doubts, Doubt{Why: LotRevoked, Reason: whole.Reason, Time: whole.Time})
	}
	issued := 0
	for i, e := range history {
		if e.Key != nil {
			issued++
		}
		switch {
		case e.Key != nil && issued == b.DeviceKey+1:
			doubts = append(doubts, Doubt{Why: DeviceReissued, Reason: e.Reason, Time: e.Time})
		case e.Key == nil && i == len(history)-1:
			doubts = append(doubts, Doubt{Why: DeviceRevoked, Reason: e.Reason, Time: e.Time})
		}
	}
	return doubts, nil
}
