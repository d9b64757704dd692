package binding

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rsa"
	"fmt"
	"slices"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// Lots finds the lot of an IMEI: by the manifests' ranges, never by what a caller says. It does not change.
type Lots struct {
	ranges []lotRange // by first IMEI; they do not overlap
}

type lotRange struct {
	first, last string // IMEIs as 14 digits, which sort as numbers do
	lot         *servedLot
}

type servedLot struct {
	manifest *directory.Manifest
	public   *rsa.PublicKey
	key      hsmkeys.Key
	reader   *directory.Reader
}

func (l *servedLot) payload(imsi kme.IMSI, imei kme.IMEI, device crypto.PublicKey, bytes []byte) hsmkeys.Payload {
	return hsmkeys.Payload{
		Suite: l.manifest.Suite, Lot: l.key, N: l.public, Device: device,
		For: kme.Context{Lot: l.manifest.Lot, IMEI: imei, IMSI: imsi}, Bytes: bytes,
	}
}

// NewLots indexes lots. readers has the reader of each manufacturer's directory, by KeyID.
func NewLots(lots []*Lot, readers map[string]*directory.Reader) (*Lots, error) {
	index := new(Lots)
	for _, l := range lots {
		reader := readers[l.Manufacturer]
		if reader == nil {
			return nil, fmt.Errorf("lot %s is of manufacturer %s, who is not enrolled", l.Manifest.Lot, l.Manufacturer)
		}
		served := &servedLot{manifest: l.Manifest, public: l.Manifest.PublicKey(), key: lotKey(l.Manufacturer, l.Manifest.Lot), reader: reader}
		for _, r := range l.Manifest.Ranges {
			first, err := kme.NewIMEI(r.TAC, r.First)
			if err != nil {
				return nil, err
			}
			last, err := kme.NewIMEI(r.TAC, r.First+r.Count-1)
			if err != nil {
				return nil, err
			}
			index.ranges = append(index.ranges, lotRange{first.String(), last.String(), served})
		}
	}
	slices.SortFunc(index.ranges, func(a, b lotRange) int { return cmp.Compare(a.first, b.first) })
	return index, nil
}

func (l *Lots) find(imei kme.IMEI) *servedLot {
	digits := imei.String()
	i, found := slices.BinarySearchFunc(l.ranges, digits, func(r lotRange, d string) int { return cmp.Compare(r.first, d) })
	if !found {
		i--
	}
	if i < 0 || digits > l.ranges[i].last {
		return nil
	}
	return l.ranges[i].lot
}

func lotKey(manufacturer, lot string) hsmkeys.Key {
	return hsmkeys.Key{Role: hsmkeys.RoleLot, Manufacturer: manufacturer, Name: lot}
}

// Len is how many ranges of IMEIs are served.
func (l *Lots) Len() int { return len(l.ranges) }

// CheckDirectories reads one manifest of each manufacturer, and gives the errors by manufacturer.
func (l *Lots) CheckDirectories(ctx context.Context) map[string]error {
	checked, failed := map[*directory.Reader]bool{}, map[string]error{}
	for _, r := range l.ranges {
		if m := r.lot.manifest; !checked[r.lot.reader] {
			checked[r.lot.reader] = true
			if _, err := r.lot.reader.Manifest(ctx, m.Lot); err != nil {
				failed[m.Manufacturer] = err
			}
		}
	}
	return failed
}

// Overdue gives the lists of revoked devices that could not be read again when it was time, by manufacturer.
func (l *Lots) Overdue() map[string][]directory.Overdue {
	all := map[string][]directory.Overdue{}
	for _, r := range l.ranges {
		m := r.lot.manifest.Manufacturer
		if _, asked := all[m]; !asked { // its lots have one reader
			all[m] = r.lot.reader.Overdue()
		}
	}
	return all
}

// revoked says whether the directory has a device as revoked, as far as it can be asked: the binding of one is not served on. A
// device whose lot is not served any more, or whose directory is away, is not.
func (l *Lots) revoked(ctx context.Context, imei kme.IMEI) bool {
	lot := l.find(imei)
	if lot == nil {
		return false
	}
	revoked, err := lot.reader.Revoked(ctx, lot.manifest, imei)
	return err == nil && revoked
}

// Device is what the directory says of a device, and the manifest of its lot.
func (l *Lots) Device(ctx context.Context, imei kme.IMEI) (*directory.Manifest, directory.Device, error) {
	lot := l.find(imei)
	if lot == nil {
		return nil, directory.Device{}, fmt.Errorf("IMEI %s is in no lot that was imported", imei)
	}
	d, err := lot.reader.Device(ctx, lot.manifest, imei)
	return lot.manifest, d, err
}
