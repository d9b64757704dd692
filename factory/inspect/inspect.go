// Package inspect checks what a manufacturer has published, as a customer can: with nothing but the manufacturer's
// public key. It needs no token, and changes nothing.
package inspect

import (
	"cmp"
	"context"
	"crypto"
	"errors"
	"fmt"
	"math/big"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory/memory"
	"github.com/kmehsm/kmehsm/factory/shard"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/weakkey"
)

// maxProblems bounds how many problems a Verification lists. The others are counted.
const maxProblems = 100

// A Verification is the result of checking lots. It has no problems if everything is right.
type Verification struct {
	Lots        int          `json:"lots"`
	Devices     int          `json:"devices"`  // whose keys were verified
	Packages    int          `json:"packages"` // injection packages compared with what is published
	Revoked     int          `json:"revoked"`
	RevokedLots []RevokedLot `json:"revoked_lots"` // those that are revoked as a whole
	// each with its object; 100 at most
	Problems []string `json:"problems"`
	More     int      `json:"more"` // problems that are not listed
}

// A RevokedLot is a lot of which no device is to be trusted.
type RevokedLot struct {
	Lot string `json:"lot"`
	directory.LotRevocation
}

// OK says that nothing is wrong.
func (v *Verification) OK() bool { return len(v.Problems) == 0 }

// A verifying is one run of Lot or All.
type verifying struct {
	reader *directory.Reader
	store  directory.Store
	report func(devices int) // may be nil

	mu    sync.Mutex
	found Verification // guarded by mu
	keys  []uint64     // fingerprints of all device keys; guarded by mu

	issued map[string][]directory.DeviceKey // keys that replaced others, by lot
}

func newVerifying(store directory.Store, v *directory.Verifier, report func(int)) *verifying {
	return &verifying{
		reader: directory.NewReader(store, v, directory.ReaderOptions{}), store: store, report: report,
		found:  Verification{Problems: []string{}, RevokedLots: []RevokedLot{}},
		issued: map[string][]directory.DeviceKey{},
	}
}

func (v *verifying) problem(format string, args ...any) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.found.Problems) == maxProblems {
		v.found.More++
		return
	}
	v.found.Problems = append(v.found.Problems, fmt.Sprintf(format, args...))
}

// Lot checks a lot: every signature; the modulus; that every IMEI of the lot is there exactly once; that every public
// key is of the lot's suite and on its curve, and that no two are the same. If packages is not empty, it also checks
// that the injection packages below that folder are those of the published keys. The Verification has what is wrong; an
// error means that the check could not be made. report gets the number of devices verified so far, from one goroutine
// at a time.
func Lot(
	ctx context.Context, store directory.Store, verifier *directory.Verifier, lot, packages string,
	report func(devices int),
) (*Verification, error) {
	v := newVerifying(store, verifier, report)
	m, err := v.manifest(ctx, lot)
	if err == nil && m != nil {
		err = v.lots(ctx, []*directory.Manifest{m}, packages)
	}
	return &v.found, err
}

// All checks all lots of a manufacturer as Lot does, without injection packages. It also compares lots with one
// another: moduli that share a prime, ranges that overlap, a device key in two lots. And none of those that were made
// may be missing.
func All(
	ctx context.Context, store directory.Store, verifier *directory.Verifier, made []string, report func(devices int),
) (*Verification, error) {
	v := newVerifying(store, verifier, report)
	names, err := store.List(ctx, "lots")
	if err != nil {
		return nil, err
	}
	var all []*directory.Manifest
	var moduli []*big.Int
	var published []string
	for _, name := range names {
		if err := directory.CheckName(name); err != nil {
			v.problem("lots/ has what is no lot's, remove it: %v", err)
		}
		m, err := v.manifest(ctx, name)
		if errors.Is(err, directory.ErrNotFound) {
			continue // its folder was made, and its manifest never published
		}
		if err != nil {
			return nil, err
		}
		if published = append(published, name); m == nil {
			continue
		}
		all, moduli = append(all, m), append(moduli, m.PublicKey().N)
	}
	for _, err := range memory.Missing(made, published) {
		v.problem("%v", err)
	}
	v.overlaps(all)
	shared, err := weakkey.SharedFactors(ctx, moduli)
	if err != nil {
		return nil, err
	}
	for _, i := range shared {
		v.problem("lot %s: its modulus shares a prime with another lot's: both are broken, and must be replaced",
			all[i].Lot)
	}
	return &v.found, v.lots(ctx, all, "")
}

// overlaps notes each range that begins within one of another lot.
func (v *verifying) overlaps(lots []*directory.Manifest) {
	type part struct {
		directory.Range
		lot string
	}
	var all []part
	for _, m := range lots {
		for _, r := range m.Ranges {
			all = append(all, part{Range: r, lot: m.Lot})
		}
	}
	slices.SortFunc(all, func(a, b part) int {
		return cmp.Or(strings.Compare(a.TAC.String(), b.TAC.String()), a.First-b.First, strings.Compare(a.lot, b.lot))
	})
	var furthest part // of those that were seen
	for _, p := range all {
		if p.TAC == furthest.TAC && p.First < furthest.First+furthest.Count {
			v.problem("lots %s and %s: both have IMEIs from %s%06d on", furthest.lot, p.lot, p.TAC, p.First)
		}
		if p.TAC != furthest.TAC || p.First+p.Count > furthest.First+furthest.Count {
			furthest = p
		}
	}
}

// manifest reads a lot's manifest. If it is refused, it notes the problem and gives nil.
func (v *verifying) manifest(ctx context.Context, lot string) (*directory.Manifest, error) {
	m, err := v.reader.Manifest(ctx, lot)
	if errors.As(err, new(*directory.RefusedError)) {
		v.problem("%v", err)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := weakkey.Check(ctx, m.PublicKey(), m.PublicKey().N.BitLen()); err != nil {
		v.problem("lot %s: %v", lot, err)
	}
	return m, nil
}

func (v *verifying) lots(ctx context.Context, lots []*directory.Manifest, packages string) error {
	v.found.Lots = len(lots)
	for _, m := range lots {
		if err := v.objects(ctx, m, packages); err != nil {
			return err
		}
		if err := v.shards(ctx, m, func(n int, s *directory.Shard) {
			prints := make([]uint64, len(s.Keys))
			for i, k := range s.Keys {
				prints[i] = k.Fingerprint()
			}
			if packages != "" {
				v.compare(m, n, s, filepath.Join(packages, m.Lot))
			}
			v.mu.Lock()
			defer v.mu.Unlock()
			v.keys = append(v.keys, prints...)
			v.found.Devices += len(s.Keys)
			if packages != "" {
				v.found.Packages++
			}
			if v.report != nil {
				v.report(v.found.Devices)
			}
		}, true); err != nil {
			return err
		}
	}
	return v.duplicates(ctx, lots)
}

// refused notes an error about an object that is refused or missing. It returns any other error.
func (v *verifying) refused(err error) error {
	if errors.As(err, new(*directory.RefusedError)) || errors.Is(err, directory.ErrNotFound) {
		v.problem("%v", err)
		return nil
	}
	return err
}

// revocations checks a lot's list of revoked devices and its parts.
func (v *verifying) revocations(ctx context.Context, m *directory.Manifest, packages string) error {
	list, err := v.reader.ReadRevocations(ctx, m)
	if err != nil {
		return v.refused(err)
	}
	if late := list.Overdue(time.Now()); late != nil {
		v.problem("%s: %v", directory.RevocationsPath(m.Lot), late)
	}
	if list.Whole != nil {
		v.found.RevokedLots = append(v.found.RevokedLots, RevokedLot{Lot: m.Lot, LotRevocation: *list.Whole})
	}
	parts, strays, err := v.reader.RevocationParts(ctx, m, list)
	if err != nil {
		return err
	}
	for _, path := range strays {
		v.problem("%s: the lot's revocations have no such part", path)
	}
	for _, n := range parts {
		part, complete, err := v.reader.CompareRevocationPart(ctx, m, list, n)
		if err != nil {
			if err := v.refused(err); err != nil {
				return err
			}
			continue
		}
		if !complete {
			v.problem("%s: the list of revocations does not name it yet: a run is at work, or was killed; factory "+
				"reconcile --repair finishes it", directory.RevocationPartPath(m.Lot, n))
		}
		v.part(m, part, packages)
	}
	return nil
}

// part checks the keys that replaced others.
func (v *verifying) part(m *directory.Manifest, part *directory.RevocationPart, packages string) {
	v.found.Revoked += len(part.Revoked)
	for path, e := range handover.Reissues(part.Revoked, filepath.Join(packages, m.Lot)) {
		v.keys = append(v.keys, e.Key.Fingerprint())
		v.issued[m.Lot] = append(v.issued[m.Lot], *e.Key)
		if packages == "" {
			continue
		}
		if err := handover.CheckReissue(m.Lot, path, e); err != nil {
			v.problem("%v: %s", err, handover.BringBack(e.Package))
		}
		v.found.Packages++
	}
}

// objects checks a lot's objects that are neither manifest nor shard.
func (v *verifying) objects(ctx context.Context, m *directory.Manifest, packages string) error {
	if err := v.revocations(ctx, m, packages); err != nil {
		return err
	}
	if packages != "" {
		wrong, err := shard.CheckManifest(ctx, v.store, m.Lot, filepath.Join(packages, m.Lot))
		if err != nil {
			return err
		}
		if wrong != "" {
			v.problem("%s: inject from no package beside it, and run factory reconcile --repair", wrong)
		}
	}
	names, err := v.store.List(ctx, directory.ShardsPath(m.Lot))
	for _, name := range names {
		if n, aerr := strconv.Atoi(name); aerr != nil || n >= m.Shards() ||
			directory.ShardPath(m.Lot, n) != directory.ShardsPath(m.Lot)+"/"+name {
			v.problem("%s/%s: the lot has no such shard", directory.ShardsPath(m.Lot), name)
		}
	}
	return err
}

// shards calls f for all shards of a lot, several at a time. A shard has its devices' IMEIs, no other, in order
// (Reader.ReadShard refuses it otherwise), and a manifest's ranges do not overlap: if all shards are there, each IMEI
// is there once. A missing or refused shard is a problem, which the first of two passes notes.
func (v *verifying) shards(ctx context.Context, m *directory.Manifest, f func(int, *directory.Shard), note bool) error {
	return shard.Each(ctx, m, func(ctx context.Context, n int) error {
		s, err := v.reader.ReadShard(ctx, m, n)
		refused := errors.As(err, new(*directory.RefusedError))
		switch {
		case err == nil:
			f(n, s)
		case errors.Is(err, directory.ErrNotFound) && note:
			v.problem("%s: it is not published", directory.ShardPath(m.Lot, n))
		case refused && note:
			v.problem("%v", err)
		case !errors.Is(err, directory.ErrNotFound) && !refused:
			return err
		}
		return nil
	})
}

// compare checks the injection package of a published shard.
func (v *verifying) compare(m *directory.Manifest, n int, s *directory.Shard, dir string) {
	look := shard.Look(m, n, dir, s, shard.Entry{}) // without the journal, which is the line's own
	switch look.Standing() {
	case shard.PackageMissing, shard.PackageDamaged, shard.PackageOther:
		what, remedy := look.Describe()
		v.problem("%s: %s: %s", directory.ShardPath(m.Lot, n), what, remedy)
	}
}

// duplicates names the devices that have the same key. If fingerprints are the same, it compares the keys themselves,
// in a second pass. It needs eight bytes of memory for each device.
func (v *verifying) duplicates(ctx context.Context, lots []*directory.Manifest) error {
	slices.Sort(v.keys)
	twice := map[uint64]bool{}
	for i := 1; i < len(v.keys); i++ {
		if v.keys[i] == v.keys[i-1] {
			twice[v.keys[i]] = true
		}
	}
	if len(twice) == 0 {
		return nil
	}
	type holder struct {
		name string
		key  crypto.PublicKey
	}
	holders := map[uint64][]holder{}
	for _, m := range lots {
		hold := func(keys []directory.DeviceKey) {
			for _, k := range keys {
				if print := k.Fingerprint(); twice[print] {
					v.mu.Lock()
					holders[print] = append(holders[print],
						holder{name: k.IMEI.String() + " of lot " + m.Lot, key: k.Key})
					v.mu.Unlock()
				}
			}
		}
		if err := v.shards(ctx, m, func(_ int, s *directory.Shard) { hold(s.Keys) }, false); err != nil {
			return err
		}
		hold(v.issued[m.Lot])
	}
	for _, all := range holders {
		slices.SortFunc(all, func(a, b holder) int { return strings.Compare(a.name, b.name) })
		for i, a := range all {
			for _, b := range all[i+1:] {
				if a.key.(interface{ Equal(crypto.PublicKey) bool }).Equal(b.key) {
					v.problem("%s and %s have one key: revoke both, and find out why", a.name, b.name)
				}
			}
		}
	}
	return nil
}
