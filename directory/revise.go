package directory

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sort"
	"time"

	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/kme"
)

// A revision says how a lot's revocations are to be changed.
type revision struct {
	now      time.Time
	parts    []int                // those to look at
	entries  map[int][]Revocation // to add, by part
	whole    *LotRevocation       // unless it is nil
	begin    bool                 // publish the first list, unless there is one
	refresh  bool                 // sign the list anew, also if nothing changes
	validity time.Duration        // of the list; 0: as long as the last one was good for
}

// BeginRevocations publishes a lot's first list, empty and good for validity. If the lot has a list, nothing changes.
func BeginRevocations(ctx context.Context, store Store, s *Signer, m *Manifest, now time.Time,
	validity time.Duration) error {
	return publishRevocations(ctx, store, s, m, revision{now: now, begin: true, validity: validity})
}

// RefreshRevocations signs a lot's list anew, good for validity; with 0, for as long as the last one was.
func RefreshRevocations(ctx context.Context, store Store, s *Signer, m *Manifest, now time.Time,
	validity time.Duration) error {
	return publishRevocations(ctx, store, s, m, revision{now: now, refresh: true, validity: validity})
}

// Revoke adds devices to their lot's revocations. A device that is revoked already stays as it is, so an interrupted
// run can be repeated. report gets the number of devices that are done; it may be nil.
func Revoke(ctx context.Context, store Store, s *Signer, m *Manifest, imeis []kme.IMEI, reason string, now time.Time,
	report func(done int)) error {
	entries := make([]Revocation, len(imeis))
	for i, imei := range imeis {
		entries[i] = Revocation{IMEI: imei, Reason: reason, Time: now}
	}
	return revise(ctx, store, s, m, entries, now, report)
}

// Reissue revokes the key that a device has, and issues it another one, in the injection package whose SHA-256 is pkg.
// A device that has, or had, this key stays as it is, so an interrupted run can be repeated.
func Reissue(ctx context.Context, store Store, s *Signer, m *Manifest, key DeviceKey, pkg []byte, reason string,
	now time.Time) error {
	entry := Revocation{IMEI: key.IMEI, Reason: reason, Time: now, Key: &key, Package: pkg}
	return revise(ctx, store, s, m, []Revocation{entry}, now, nil)
}

// RevokeLot revokes a whole lot, for good. A lot that is revoked stays as it is.
func RevokeLot(ctx context.Context, store Store, s *Signer, m *Manifest, reason string, now time.Time) error {
	reason, err := strict.Reason(reason)
	if err != nil {
		return err
	}
	whole := &LotRevocation{Reason: reason, Time: now.UTC().Truncate(time.Second)}
	return publishRevocations(ctx, store, s, m, revision{now: now, whole: whole})
}

// CompleteRevocations updates the list by its parts, if a run was killed between the two.
func CompleteRevocations(ctx context.Context, store Store, s *Signer, m *Manifest, parts []int, now time.Time) error {
	return publishRevocations(ctx, store, s, m, revision{now: now, parts: parts})
}

func revise(ctx context.Context, store Store, s *Signer, m *Manifest, entries []Revocation, now time.Time,
	report func(done int)) error {
	by := map[int][]Revocation{}
	for _, e := range entries {
		position, ok := m.Position(e.IMEI)
		if !ok {
			return fmt.Errorf("IMEI %s is not in lot %s", e.IMEI, m.Lot)
		}
		var err error
		if e.Reason, err = strict.Reason(e.Reason); err != nil {
			return err
		}
		e.Time = e.Time.UTC().Truncate(time.Second)
		by[position/revocationPart] = append(by[position/revocationPart], e)
	}
	done := 0
	for parts := range slices.Chunk(slices.Sorted(maps.Keys(by)), 32) { // readers use each chunk at once
		if err := publishRevocations(ctx, store, s, m, revision{now: now, parts: parts, entries: by}); err != nil {
			return err
		}
		for _, n := range parts {
			done += len(by[n])
		}
		if report != nil {
			report(done)
		}
	}
	return nil
}

// publishRevocations makes a revision. Other processes may make others at the same time.
func publishRevocations(ctx context.Context, store Store, s *Signer, m *Manifest, r revision) error {
	for tries := 1; ; tries++ {
		err := tryRevocations(ctx, store, s, m, r)
		if !errors.Is(err, ErrChanged) || tries == 30 {
			return err
		}
		// Another process changes the list, too; in each round, one of them succeeds.
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(rand.N(time.Duration(tries) * 10 * time.Millisecond)):
		}
	}
}

// tryRevocations writes the parts, and then the list that names them. A run that is killed in between leaves parts that
// are later than the list says, which readers accept. The same call again finds its entries there, and writes the list.
func tryRevocations(ctx context.Context, store Store, s *Signer, m *Manifest, r revision) error {
	v := NewVerifier(s.root)
	list, version, err := readRevocations(ctx, store, v, m)
	switch {
	case r.begin && errors.Is(err, ErrNotFound):
		list = &Revocations{Lot: m.Lot}
	case err != nil:
		return err
	case r.begin:
		return nil
	}
	if list.Whole != nil && !r.refresh {
		for _, n := range r.parts {
			if slices.ContainsFunc(r.entries[n], func(e Revocation) bool { return e.Key != nil }) {
				return list.Refusal()
			}
		}
		return nil // its devices are revoked with it
	}
	type update struct {
		path, version string
		jws           []byte
	}
	var updates []update
	changed := r.begin || r.refresh
	if r.whole != nil {
		list.Whole, changed = r.whole, true
	}
	for _, n := range r.parts {
		ref := list.ref(n)
		part, err := readPart(ctx, store, v, m, n, ref)
		if err != nil {
			return err
		}
		added := false
		for _, e := range r.entries[n] {
			added = part.add(e) || added
		}
		if added {
			part.Version++
			if err := part.check(m, n); err != nil {
				return err
			}
			jws, err := s.Sign(TypeRevocationPart, part.RevocationPart)
			if err != nil {
				return err
			}
			part.sum = sha256.Sum256(jws)
			updates = append(updates, update{path: RevocationPartPath(m.Lot, n), version: part.version, jws: jws})
		}
		if part.Version == 0 || ref != nil && ref.Version == part.Version {
			continue
		}
		changed = true
		named := RevocationRef{Part: n, Version: part.Version, SHA256: part.sum[:], Revoked: part.bitmap(m)}
		if ref != nil {
			*ref = named
			continue
		}
		at := sort.Search(len(list.Parts), func(i int) bool { return list.Parts[i].Part > n })
		list.Parts = slices.Insert(list.Parts, at, named)
	}
	if !changed {
		return nil
	}
	if r.validity == 0 {
		r.validity = list.NextUpdate.Sub(list.ThisUpdate)
	}
	if list.Version++; CheckValidity(r.validity) != nil { // the last list has no next_update
		r.validity = DefaultValidity
	}
	list.ThisUpdate = r.now.UTC().Truncate(time.Second)
	list.NextUpdate = list.ThisUpdate.Add(r.validity)
	if err := list.check(m); err != nil {
		return err
	}
	jws, err := s.Sign(TypeRevocations, list)
	if err != nil {
		return err
	}
	updates = append(updates, update{path: RevocationsPath(m.Lot), version: version, jws: jws})
	for _, u := range updates { // before the first of them is written
		if err := CheckSize(u.path, u.jws); err != nil {
			return fmt.Errorf("%w; give shorter reasons, or revoke the whole lot", err)
		}
	}
	for _, u := range updates {
		if err := store.Update(ctx, u.path, u.jws, u.version); err != nil {
			return err
		}
	}
	return nil
}
