package directory

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sort"
	"time"

	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/kme"
)

// Revocations says which devices of a lot are revoked. The reasons, times and new keys are in its parts, which are not
// needed to know who is revoked. The list and its parts are the only objects that change.
//
// A lot has its list from its creation on: version 1 is empty. So a list that is missing is withheld.
type Revocations struct {
	Lot        string          `json:"lot"`
	Version    int             `json:"version"` // counts up from 1; a reader refuses to go back
	ThisUpdate time.Time       `json:"this_update"`
	NextUpdate time.Time       `json:"next_update"`     // by when a later version is published, even if nothing changes
	Whole      *LotRevocation  `json:"whole,omitempty"` // the whole lot is revoked for good; nil if it is not
	Parts      []RevocationRef `json:"parts,omitempty"` // those that there are, in order
}

// DefaultValidity is the default time from ThisUpdate to NextUpdate. It is seven runs of a daily job: a long weekend
// raises no alarm, and a withheld list raises one within a week.
const DefaultValidity = 7 * 24 * time.Hour

// CheckValidity refuses a validity that no list may have.
func CheckValidity(d time.Duration) error {
	if d < time.Second || d > 366*24*time.Hour {
		return fmt.Errorf("a list of revoked devices is good for a second to 366 days, not %s", d)
	}
	return nil
}

// Overdue says since when there should be a later version; nil if it is not time yet. No next_update is overdue.
func (r *Revocations) Overdue(now time.Time) error {
	switch {
	case r.NextUpdate.IsZero():
		return errors.New("the list has no next_update: the manufacturer has to run factory lot refresh")
	case now.After(r.NextUpdate):
		return fmt.Errorf("the list was to be replaced by %s: the manufacturer has to run factory lot refresh, or the "+
			"store withholds a later one", r.NextUpdate.Format(time.RFC3339))
	}
	return nil
}

// A LotRevocation says why and since when no device of a lot is to be trusted.
type LotRevocation struct {
	Reason string    `json:"reason"`
	Time   time.Time `json:"time"`
}

// A RevocationRef is a list's reference to a part. The store has the part in this version or a later one: a part is
// written before the list that refers to it.
type RevocationRef struct {
	Part    int           `json:"part"`
	Version int           `json:"version"`
	SHA256  strict.Base64 `json:"sha256"`  // of the part's JWS
	Revoked strict.Base64 `json:"revoked"` // a bit for each device of the part; the first is the first byte's highest
}

// A RevocationPart has the entries of the devices at revocationPart successive positions. The entries are in the order
// of their IMEIs, and those of one IMEI in the order of time: the last one counts.
type RevocationPart struct {
	Lot     string       `json:"lot"`
	Part    int          `json:"part"`
	Version int          `json:"version"` // counts up from 1
	Revoked []Revocation `json:"revoked"`
}

// A Revocation revokes the key that a device had. With Key, the device got a new one; without, the device itself is
// revoked.
type Revocation struct {
	IMEI    kme.IMEI      `json:"imei"`
	Reason  string        `json:"reason"`
	Time    time.Time     `json:"time"`
	Key     *DeviceKey    `json:"key,omitempty"`
	Package strict.Base64 `json:"package,omitempty"` // with Key: SHA-256 of its injection package
}

// revocationPart is how many devices share a part, which one more revocation rewrites. With this value, the list of a
// lot of a million devices has 350 kB if all parts have revocations.
const revocationPart = 1024

// RevocationsPath, RevocationPartPath and RevocationPartsPath are the paths of a lot's revocations in a store.
func RevocationsPath(lot string) string           { return "lots/" + lot + "/revocations" }
func RevocationPartPath(lot string, n int) string { return fmt.Sprintf("lots/%s/revoked/%06d", lot, n) }
func RevocationPartsPath(lot string) string       { return "lots/" + lot + "/revoked" }

// RevocationParts is how many parts the lot's revocations may have.
func (m *Manifest) RevocationParts() int {
	return (m.Devices() + revocationPart - 1) / revocationPart
}

// bitmap is a bitmap for the devices of a part, with no bit set.
func (m *Manifest) bitmap(n int) strict.Base64 {
	return make(strict.Base64, (min(revocationPart, m.Devices()-n*revocationPart)+7)/8)
}

// ref is the list's reference to a part; nil if it has none.
func (r *Revocations) ref(n int) *RevocationRef {
	i, ok := slices.BinarySearchFunc(r.Parts, n, func(ref RevocationRef, n int) int { return ref.Part - n })
	if !ok {
		return nil
	}
	return &r.Parts[i]
}

// Revokes says whether the device at a position is not to be trusted.
func (r *Revocations) Revokes(position int) bool {
	if r.Whole != nil {
		return true
	}
	ref, at := r.ref(position/revocationPart), position%revocationPart
	return ref != nil && ref.Revoked[at/8]&(0x80>>(at%8)) != 0
}

// compare says whether the list has what a part has, as CompareRevocationPart does. It is an error if they contradict
// each other in the same version.
func (r *Revocations) compare(m *Manifest, p *RevocationPart) (complete bool, err error) {
	ref := r.ref(p.Part)
	if p.Version == 0 || ref == nil || ref.Version < p.Version {
		return p.Version == 0, nil
	}
	if !bytes.Equal(ref.Revoked, p.bitmap(m)) {
		return true, refused(RevocationsPath(m.Lot), "it revokes other devices of part %d than the part itself", p.Part)
	}
	return true, nil
}

// check refuses a list that is another lot's, or contradicts itself.
func (r *Revocations) check(m *Manifest) error {
	if r.Lot != m.Lot || r.Version < 1 {
		return fmt.Errorf("it is version %d of lot %q", r.Version, r.Lot)
	}
	if r.Whole != nil && (r.Whole.Reason == "" || r.Whole.Time.IsZero()) {
		return errors.New("why or when the lot was revoked is missing")
	}
	if !r.NextUpdate.IsZero() && !r.NextUpdate.After(r.ThisUpdate) {
		return errors.New("its next_update is not after its this_update")
	}
	last := -1
	for _, ref := range r.Parts {
		if ref.Part <= last || ref.Part >= m.RevocationParts() {
			return fmt.Errorf("part %d is not one of the lot, or not in order", ref.Part)
		}
		last = ref.Part
		if ref.Version < 1 || len(ref.SHA256) != sha256.Size || len(ref.Revoked) != len(m.bitmap(ref.Part)) {
			return fmt.Errorf("its entry for part %d is not valid", ref.Part)
		}
	}
	return nil
}

// Of gives a device's entries.
func (p *RevocationPart) Of(imei kme.IMEI) []Revocation {
	name := imei.String()
	first := sort.Search(len(p.Revoked), func(i int) bool { return p.Revoked[i].IMEI.String() >= name })
	end := first
	for end < len(p.Revoked) && p.Revoked[end].IMEI == imei {
		end++
	}
	return p.Revoked[first:end]
}

// check refuses a part that is another lot's, is not in order, or has an entry that changes nothing.
func (p *RevocationPart) check(m *Manifest, n int) error {
	if p.Lot != m.Lot || p.Part != n || p.Version < 1 {
		return fmt.Errorf("it is version %d of part %d of lot %q", p.Version, p.Part, p.Lot)
	}
	for i, e := range p.Revoked {
		var before *Revocation
		if i > 0 {
			before = &p.Revoked[i-1]
		}
		switch position, ok := m.Position(e.IMEI); {
		case !ok || position/revocationPart != n || before != nil && before.IMEI.String() > e.IMEI.String():
			return fmt.Errorf("IMEI %s is not in this part of the lot, or not in order", e.IMEI)
		case before != nil && before.IMEI == e.IMEI && before.Key == nil && e.Key == nil:
			return fmt.Errorf("IMEI %s is revoked twice", e.IMEI)
		case e.Key != nil && e.Key.IMEI != e.IMEI:
			return fmt.Errorf("the key issued to IMEI %s is that of %s", e.IMEI, e.Key.IMEI)
		case e.Key == nil && e.Package != nil:
			return fmt.Errorf("IMEI %s was issued an injection package without a key", e.IMEI)
		}
		if e.Key != nil {
			err := m.Suite.CheckDevice(e.Key.Key)
			if err == nil {
				err = checkPackage(e.Package)
			}
			if err != nil {
				return fmt.Errorf("the key issued to IMEI %s: %w", e.IMEI, err)
			}
		}
	}
	return nil
}

// bitmap says which devices are revoked, as a RevocationRef has it.
func (p *RevocationPart) bitmap(m *Manifest) strict.Base64 {
	bits := m.bitmap(p.Part)
	for _, e := range p.Revoked { // of the entries of one device, the last one counts
		position, _ := m.Position(e.IMEI)
		at := position % revocationPart
		bits[at/8] &^= 0x80 >> (at % 8)
		if e.Key == nil {
			bits[at/8] |= 0x80 >> (at % 8)
		}
	}
	return bits
}

// add inserts an entry in order, unless the device has had its key, or is revoked already.
func (p *RevocationPart) add(entry Revocation) (added bool) {
	had := p.Of(entry.IMEI)
	if entry.Key == nil && len(had) > 0 && had[len(had)-1].Key == nil || entry.Key != nil &&
		slices.ContainsFunc(had, func(e Revocation) bool { return e.Key != nil && entry.Key.equal(*e.Key) }) {
		return false
	}
	name := entry.IMEI.String()
	at := sort.Search(len(p.Revoked), func(i int) bool { return p.Revoked[i].IMEI.String() > name })
	p.Revoked = slices.Insert(p.Revoked, at, entry)
	return true
}

// readRevocations reads a lot's list. It also gives its version in the store.
func readRevocations(ctx context.Context, store Store, v *Verifier, m *Manifest) (*Revocations, string, error) {
	jws, version, err := store.Read(ctx, RevocationsPath(m.Lot))
	if errors.Is(err, ErrNotFound) {
		return nil, "", fmt.Errorf("%w: every lot has a list of revoked devices: if lot create was interrupted, run "+
			"it again; if the lot was made before that was so, run factory lot refresh --begin; else %s", err, askWhy)
	}
	if err != nil {
		return nil, "", err
	}
	list, err := parseRevocations(v, m, jws)
	return list, version, err
}

func parseRevocations(v *Verifier, m *Manifest, jws []byte) (*Revocations, error) {
	return checked(v, TypeRevocations, RevocationsPath(m.Lot), jws, func(l *Revocations) error { return l.check(m) })
}

const askWhy = "ask whoever runs the store why"

// A storedPart is a part as it was read.
type storedPart struct {
	RevocationPart
	sum     [sha256.Size]byte // of its JWS
	size    int               // of its JWS
	version string            // the store's
}

// satisfies says whether the part is the version that the list refers to, or a later one.
func (p *storedPart) satisfies(ref *RevocationRef) bool {
	return p.Version > ref.Version || p.Version == ref.Version && bytes.Equal(p.sum[:], ref.SHA256)
}

// readPart reads part n of a lot's revocations. It refuses an earlier version than ref, and a different one of the same
// version. ref is nil if the list has no such part; if the store does not have it either, the part is empty, with
// version 0.
func readPart(ctx context.Context, store Store, v *Verifier, m *Manifest, n int,
	ref *RevocationRef) (*storedPart, error) {
	path := RevocationPartPath(m.Lot, n)
	jws, version, err := store.Read(ctx, path)
	switch {
	case errors.Is(err, ErrNotFound) && ref != nil:
		return nil, refused(path, "it is not there, and the list of revocations has version %d of it: "+askWhy,
			ref.Version)
	case errors.Is(err, ErrNotFound):
		return &storedPart{RevocationPart: RevocationPart{Lot: m.Lot, Part: n}}, nil
	case err != nil:
		return nil, err
	}
	part, err := checked(v, TypeRevocationPart, path, jws, func(p *RevocationPart) error { return p.check(m, n) })
	if err != nil {
		return nil, err
	}
	p := &storedPart{RevocationPart: *part, sum: sha256.Sum256(jws), size: len(jws), version: version}
	if ref != nil && !p.satisfies(ref) {
		return nil, refused(path, "it has version %d, and is not what the list of revocations has as version %d: "+
			askWhy, p.Version, ref.Version)
	}
	return p, nil
}

// Refusal says that a lot is revoked; nil if it is not.
func (r *Revocations) Refusal() error {
	if r.Whole == nil {
		return nil
	}
	return fmt.Errorf("lot %s is revoked since %s, all of it and for good: %s",
		r.Lot, r.Whole.Time.Format(time.RFC3339), r.Whole.Reason)
}
