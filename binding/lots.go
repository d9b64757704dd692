package binding

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rsa"
	"fmt"
	"log/slog"
	"maps"
	"slices"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// Lots finds the lot of an IMEI: by the manifests' ranges, never by what a caller says. It does not change.
type Lots struct {
	ranges     []lotRange // by first IMEI; they do not overlap
	taken      map[lotName]*takenLot
	distrusted map[string]Verdict // manufacturers, by KeyID
}

type lotName struct{ manufacturer, lot string }

// A takenLot is one that was imported, whether it is served or not.
type takenLot struct {
	*servedLot // nil if its manufacturer is distrusted, whose directory is not asked any more
	retired    Verdict
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

// OpenLots indexes all lots of a registry. open gives the reader of a manufacturer's directory.
func OpenLots(ctx context.Context, registry Registry, open func(*Manufacturer) (*directory.Reader, error)) (*Lots, error) {
	manufacturers, err := registry.Manufacturers(ctx)
	if err != nil {
		return nil, err
	}
	readers := map[string]*directory.Reader{}
	for _, m := range manufacturers {
		if m.Verdict.Withdrawn {
			continue
		}
		if readers[m.KeyID], err = open(m); err != nil {
			return nil, err
		}
	}
	lots, err := registry.Lots(ctx)
	if err != nil {
		return nil, err
	}
	return NewLots(lots, readers)
}

// NewLots indexes lots. readers has the reader of each manufacturer's directory, by KeyID; of one that is distrusted,
// none is needed.
func NewLots(lots []*Lot, readers map[string]*directory.Reader) (*Lots, error) {
	index := &Lots{taken: map[lotName]*takenLot{}, distrusted: map[string]Verdict{}}
	for _, l := range lots {
		taken := &takenLot{retired: l.Retired}
		index.taken[lotName{l.Manufacturer, l.Manifest.Lot}] = taken
		if l.Distrusted.Withdrawn {
			index.distrusted[l.Manufacturer] = l.Distrusted
			continue
		}
		reader := readers[l.Manufacturer]
		if reader == nil {
			return nil, fmt.Errorf("lot %s is of manufacturer %s, who is not enrolled", l.Manifest.Lot, l.Manufacturer)
		}
		served := &servedLot{manifest: l.Manifest, public: l.Manifest.PublicKey(), key: lotKey(l.Manufacturer, l.Manifest.Lot), reader: reader}
		if taken.servedLot = served; !l.Served() {
			continue
		}
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

// LogWithdrawn logs what is not served, and by whose decision.
func (l *Lots) LogWithdrawn(log *slog.Logger) {
	for _, m := range slices.Sorted(maps.Keys(l.distrusted)) {
		v := l.distrusted[m]
		log.Warn("a manufacturer is distrusted: its lots are not served",
			"manufacturer", m, "by", v.By, "reason", v.Reason, "time", v.Time)
	}
	for name, taken := range l.taken {
		if v := taken.retired; v.Withdrawn {
			log.Warn("a lot is retired: it is not served", "manufacturer", name.manufacturer, "lot", name.lot,
				"by", v.By, "reason", v.Reason, "time", v.Time)
		}
	}
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

// revoked says whether the directory has a binding's device as revoked, as far as it can be asked: such a binding is not
// served on. It is asked for a lot that was retired too, but not if it is away, and not that of a distrusted manufacturer.
func (l *Lots) revoked(ctx context.Context, b *Binding) bool {
	lot := l.find(b.IMEI)
	if taken := l.taken[lotName{b.Manufacturer, b.Lot}]; lot == nil && taken != nil {
		lot = taken.servedLot
	}
	if lot == nil {
		return false
	}
	revoked, err := lot.reader.Revoked(ctx, lot.manifest, b.IMEI)
	return err == nil && revoked
}

// Device is what the directory says of a device, and the manifest of its lot.
func (l *Lots) Device(ctx context.Context, imei kme.IMEI) (*directory.Manifest, directory.Device, error) {
	lot := l.find(imei)
	if lot == nil {
		return nil, directory.Device{}, fmt.Errorf("IMEI %s is in no lot that is served", imei)
	}
	d, err := lot.reader.Device(ctx, lot.manifest, imei)
	return lot.manifest, d, err
}
