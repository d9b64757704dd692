package registry

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rsa"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// Lots finds the lot of an IMEI: by the manifests' ranges, never by what a caller says. It is immutable.
type Lots struct {
	ranges     []lotRange // by first IMEI; they do not overlap
	imported   map[lotName]*ImportedLot
	trusted    []*Lot             // those of imported whose manufacturer is not distrusted
	distrusted map[string]Verdict // manufacturers, by KeyID
}

type lotName struct{ manufacturer, lot string }

// An ImportedLot is one that was imported, whether it is served or not.
type ImportedLot struct {
	*TrustedLot // nil if its manufacturer is distrusted, whose directory is not asked any more
	Retired     Verdict
}

type lotRange struct {
	first, last string // IMEIs as 14 digits, which sort as numbers do
	lot         *TrustedLot
}

// A TrustedLot is one whose manufacturer is trusted, and Reader reads the manufacturer's directory.
type TrustedLot struct {
	Manifest *directory.Manifest
	Public   *rsa.PublicKey
	key      hsmkeys.Key
	Reader   *directory.Reader
}

// Payload is a payload of one of the lot's devices, whose public key is device.
func (l *TrustedLot) Payload(imsi kme.IMSI, imei kme.IMEI, device crypto.PublicKey, bytes []byte) hsmkeys.Payload {
	return hsmkeys.Payload{
		Suite: l.Manifest.Suite, Lot: l.key, N: l.Public, Device: device,
		For: kme.Context{Lot: l.Manifest.Lot, IMEI: imei, IMSI: imsi}, Bytes: bytes,
	}
}

// OpenLots indexes all lots of a registry. open gives the reader of a manufacturer's directory.
func OpenLots(
	ctx context.Context, store Store, open func(*Manufacturer) (*directory.Reader, error),
) (*Lots, error) {
	manufacturers, err := store.Manufacturers(ctx)
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
	lots, err := store.Lots(ctx)
	if err != nil {
		return nil, err
	}
	return NewLots(lots, readers)
}

// NewLots indexes lots. readers has the reader of each manufacturer's directory, by KeyID; of one that is distrusted,
// none is needed.
func NewLots(lots []*Lot, readers map[string]*directory.Reader) (*Lots, error) {
	index := &Lots{imported: map[lotName]*ImportedLot{}, distrusted: map[string]Verdict{}}
	for _, l := range lots {
		lot := &ImportedLot{Retired: l.Retired}
		index.imported[lotName{manufacturer: l.Manufacturer, lot: l.Manifest.Lot}] = lot
		if l.Distrusted.Withdrawn {
			index.distrusted[l.Manufacturer] = l.Distrusted
			continue
		}
		reader := readers[l.Manufacturer]
		if reader == nil {
			return nil, fmt.Errorf("lot %s is of manufacturer %s, who is not enrolled", l.Manifest.Lot, l.Manufacturer)
		}
		served := &TrustedLot{Manifest: l.Manifest, Public: l.Manifest.PublicKey(), key: l.Key(), Reader: reader}
		index.trusted = append(index.trusted, l)
		if lot.TrustedLot = served; !l.Served() {
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
			index.ranges = append(index.ranges, lotRange{first: first.String(), last: last.String(), lot: served})
		}
	}
	slices.SortFunc(index.ranges, func(a, b lotRange) int { return cmp.Compare(a.first, b.first) })
	return index, nil
}

// Find gives the lot that is served and has a device; nil if there is none.
func (l *Lots) Find(imei kme.IMEI) *TrustedLot {
	digits := imei.String()
	i, found := slices.BinarySearchFunc(l.ranges, digits, func(r lotRange, d string) int {
		return cmp.Compare(r.first, d)
	})
	if !found {
		i--
	}
	if i < 0 || digits > l.ranges[i].last {
		return nil
	}
	return l.ranges[i].lot
}

// Of is [LotOf] among the lots whose manufacturer is trusted.
func (l *Lots) Of(imei kme.IMEI) *ImportedLot {
	lot := LotOf(l.trusted, imei)
	if lot == nil {
		return nil
	}
	return l.imported[lotName{manufacturer: lot.Manufacturer, lot: lot.Manifest.Lot}]
}

// LogWithdrawn logs what is not served, and by whose decision.
func (l *Lots) LogWithdrawn(log *slog.Logger) {
	for _, m := range slices.Sorted(maps.Keys(l.distrusted)) {
		v := l.distrusted[m]
		log.Warn("a manufacturer is distrusted: its lots are not served",
			"manufacturer", m, "by", v.By, "reason", v.Reason, "decided", v.Time)
	}
	for name, lot := range l.imported {
		if v := lot.Retired; v.Withdrawn {
			log.Warn("a lot is retired: it is not served", "manufacturer", name.manufacturer, "lot", name.lot,
				"by", v.By, "reason", v.Reason, "decided", v.Time)
		}
	}
}

// Len is how many ranges of IMEIs are served.
func (l *Lots) Len() int { return len(l.ranges) }

// Keys are those of the lots that are served.
func (l *Lots) Keys() (keys []hsmkeys.Key) {
	for _, lot := range l.imported {
		if lot.TrustedLot != nil && !lot.Retired.Withdrawn {
			keys = append(keys, lot.key)
		}
	}
	return keys
}

// CheckDirectories reads one manifest of each manufacturer, of all at once, until ctx ends, and gives the errors by
// manufacturer.
func (l *Lots) CheckDirectories(ctx context.Context) map[string]error {
	checked, failed := map[*directory.Reader]bool{}, map[string]error{}
	var mu sync.Mutex // guards failed
	var all sync.WaitGroup
	for _, r := range l.ranges {
		if checked[r.lot.Reader] {
			continue
		}
		checked[r.lot.Reader] = true
		all.Go(func() {
			m := r.lot.Manifest
			if err := r.lot.Reader.Check(ctx, m.Lot); err != nil {
				mu.Lock()
				defer mu.Unlock()
				failed[m.Manufacturer] = err
			}
		})
	}
	all.Wait()
	return failed
}

// byReader gives the lots whose lists are read: served ones, and retired ones, whose devices may still be bound.
func (l *Lots) byReader() map[*directory.Reader][]*directory.Manifest {
	all := map[*directory.Reader][]*directory.Manifest{}
	for _, lot := range l.imported {
		if lot.TrustedLot != nil {
			all[lot.Reader] = append(all[lot.Reader], lot.Manifest)
		}
	}
	return all
}

// Follow reads the lists of revoked devices of these lots in the background, instead of those of before.
func (l *Lots) Follow(before *Lots) {
	now := l.byReader()
	for reader := range before.byReader() {
		if now[reader] == nil {
			reader.Follow(nil)
		}
	}
	for reader, lots := range now {
		reader.Follow(lots)
	}
}

// Overdue gives the lists of revoked devices that could not be read again when it was time, or are late, by
// manufacturer.
func (l *Lots) Overdue() map[string][]directory.Overdue {
	all := map[string][]directory.Overdue{}
	for reader, lots := range l.byReader() { // a manufacturer's lots have one reader
		if lists := reader.Overdue(); len(lists) > 0 {
			all[lots[0].Manufacturer] = lists
		}
	}
	return all
}

// Lists gives the states of the lists of revoked devices that are read, by manufacturer, in the order of lots.
func (l *Lots) Lists() map[string][]directory.ListState {
	all := map[string][]directory.ListState{}
	for reader, lots := range l.byReader() {
		for _, m := range lots {
			all[m.Manufacturer] = append(all[m.Manufacturer], reader.List(m.Lot))
		}
	}
	for _, lists := range all {
		slices.SortFunc(lists, func(a, b directory.ListState) int { return cmp.Compare(a.Lot, b.Lot) })
	}
	return all
}

// Revoked says whether a binding's device is revoked, by the lists in memory, without waiting. Such a binding is not
// served any more. It looks at the lot that has the device now and at the binding's lot, even if that is retired, but
// not at lots of a distrusted manufacturer. It fails if a list is older than the reader's MaxAge, or if this process
// does not know the binding's lot yet.
func (l *Lots) Revoked(b Basis) (bool, error) {
	now := l.Find(b.IMEI)
	if now != nil {
		if revoked, err := now.Reader.Revoked(now.Manifest, b.IMEI); revoked || err != nil {
			return revoked, err
		}
	}
	of := l.imported[b.lotName()]
	switch {
	case of == nil:
		return false, fmt.Errorf("lot %s of manufacturer %s is not known here: reload the lots (SIGHUP)", b.Lot,
			b.Manufacturer)
	case of.TrustedLot == nil || of.TrustedLot == now:
		return false, nil
	}
	return of.Reader.Revoked(of.Manifest, b.IMEI)
}

// Trusts says whether a binding rests on a key of a manufacturer who is not distrusted.
func (l *Lots) Trusts(b Basis) bool {
	lot := l.imported[b.lotName()]
	return lot != nil && lot.TrustedLot != nil
}

// Reissued says whether the device of a trusted binding was issued another key since.
func (l *Lots) Reissued(ctx context.Context, b Basis) (bool, error) {
	lot := l.imported[b.lotName()]
	history, _, err := lot.Reader.RevocationsOf(ctx, lot.Manifest, b.IMEI)
	if err != nil {
		return false, err
	}
	return directory.Device{History: history}.Issued() > b.DeviceKey, nil
}

// Device gives the manifest of a device's lot, and what the directory says about the device.
func (l *Lots) Device(ctx context.Context, imei kme.IMEI) (*directory.Manifest, directory.Device, error) {
	lot := l.Find(imei)
	if lot == nil {
		return nil, directory.Device{}, fmt.Errorf("IMEI %s is in no lot that is served", imei)
	}
	d, err := lot.Reader.Device(ctx, lot.Manifest, imei)
	return lot.Manifest, d, err
}
