// Package registry is what the operator has imported: manufacturers and their lots, and the verdicts about them. Lots
// finds the lot of a device, and says whether a key that a binding rests on is still to be trusted: by the verdicts,
// and by the manufacturers' lists of revoked devices. It decides nothing, and keeps no bindings.
package registry

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// A Manufacturer is one whose enrolment this operator has imported.
type Manufacturer struct {
	KeyID     string    // RFC 7638 thumbprint of its signing key, which names it everywhere
	PEM       string    // the signing key itself, pinned
	Operator  string    // this operator's name there
	Directory string    // where its public keys are, in the form of --directory; empty for the service's default
	TACs      []kme.TAC // that its lots may have; none: any that is not pinned to another
	Enrolled  time.Time
	Verdict   Verdict // withdrawn: none of its lots is served any more
}

// State says in a word whether the manufacturer is trusted.
func (m *Manufacturer) State() string {
	if m.Verdict.Withdrawn {
		return "distrusted"
	}
	return "trusted"
}

// ManufacturerOf is the one of a key id; nil if there is none.
func ManufacturerOf(all []*Manufacturer, keyID string) *Manufacturer {
	if i := slices.IndexFunc(all, func(m *Manufacturer) bool { return m.KeyID == keyID }); i >= 0 {
		return all[i]
	}
	return nil
}

// A Lot is one whose private key is in the operator's token.
type Lot struct {
	Manufacturer string
	Manifest     *directory.Manifest
	ManifestJWS  string
	Imported     time.Time
	Retired      Verdict // about the lot itself
	Distrusted   Verdict // its manufacturer's
}

// Key names the lot's key in the operator's token.
func (l *Lot) Key() hsmkeys.Key {
	return hsmkeys.Key{Role: hsmkeys.RoleLot, Manufacturer: l.Manufacturer, Name: l.Manifest.Lot}
}

// Served says whether the lot's devices may be bound.
func (l *Lot) Served() bool { return !l.Retired.Withdrawn && !l.Distrusted.Withdrawn }

// State says in a word whether the lot is served, and why not.
func (l *Lot) State() string {
	switch {
	case l.Retired.Withdrawn:
		return "retired"
	case l.Distrusted.Withdrawn:
		return "distrusted"
	}
	return "served"
}

// LotOf is the lot that has a device; nil if there is none. The ranges of lots that are served do not overlap, but
// those of others may: of several lots it is the one that is served, else the one that was imported last.
func LotOf(lots []*Lot, imei kme.IMEI) (of *Lot) {
	for _, l := range lots {
		if _, has := l.Manifest.Position(imei); !has {
			continue
		}
		if of == nil || l.Served() || !of.Served() && l.Imported.After(of.Imported) {
			of = l
		}
	}
	return of
}

// A Verdict is the last decision about a manufacturer or a lot. The zero value means that there was none.
type Verdict struct {
	Withdrawn bool      `json:"withdrawn"` // it is served no more
	By        string    `json:"by"`
	Reason    string    `json:"reason"`
	Time      time.Time `json:"time"`
}

func (v Verdict) String() string {
	return fmt.Sprintf("by %s at %s: %s", v.By, v.Time.Format(time.RFC3339), v.Reason)
}

// ErrNotImported: the Store does not have it.
var ErrNotImported = errors.New("no such manufacturer is enrolled, or no such lot imported: see keysvc manufacturer " +
	"list and lot list")

// A Store keeps which manufacturers and lots the operator has imported.
type Store interface {
	// PutManufacturer enters or replaces a manufacturer; the verdict about it stays.
	PutManufacturer(ctx context.Context, m *Manufacturer) error
	Manufacturers(ctx context.Context) ([]*Manufacturer, error)
	// PutLot enters a lot; entering it again changes nothing. check is called with all lots entered before, in the
	// same transaction, and its error prevents it.
	PutLot(ctx context.Context, lot *Lot, check func([]*Lot) error) error
	Lots(ctx context.Context) ([]*Lot, error)
	// Decide enters a verdict about a lot, or about the manufacturer if lot is empty. If the present verdict says the
	// same, that stays. It gives the one that is valid then. check is as in PutLot. Fails with ErrNotImported.
	Decide(ctx context.Context, manufacturer, lot string, v Verdict, check func([]*Lot) error) (Verdict, error)
	// Bound counts the pending and active bindings of a manufacturer's devices; of one lot, unless lot is empty.
	Bound(ctx context.Context, manufacturer, lot string, now time.Time) (int, error)
}

// A Basis is the device's key that a binding rests on.
type Basis struct {
	IMSI         kme.IMSI // of the binding, for errors
	IMEI         kme.IMEI
	Manufacturer string
	Lot          string
	DeviceKey    int // which key of the device: 0 for its first, 1 for the next one that it was issued
}

func (b Basis) lotName() lotName { return lotName{manufacturer: b.Manufacturer, lot: b.Lot} }
