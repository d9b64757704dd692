package storetest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"math/big"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/kme"
)

// A maker is a manufacturer in software.
type maker struct {
	*registry.Manufacturer
	signer *directory.Signer
}

func newMaker(t *testing.T, s Store) *maker {
	t.Helper()
	key := must.Get[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	signer := must.Get[*directory.Signer](t)(directory.NewSigner(key))
	pem := must.Get[[]byte](t)(pemkey.Encode(signer.Public()))
	m := &registry.Manufacturer{KeyID: signer.KeyID(), PEM: string(pem), Operator: "op",
		Directory: "file:/srv/directory", Enrolled: t0}
	if s != nil {
		must.Do(t, s.PutManufacturer(t.Context(), m))
	}
	return &maker{Manufacturer: m, signer: signer}
}

// lot signs the manifest of a lot of ten devices.
func (m *maker) lot(t *testing.T, name string, first int) *registry.Lot {
	t.Helper()
	// No modulus that anybody should use, but of the right form.
	n := new(big.Int).Lsh(big.NewInt(1), 2047)
	n.Add(n, big.NewInt(int64(2*first+1)))
	manifest := &directory.Manifest{
		Lot: name, Manufacturer: m.KeyID, Suite: kme.SuiteECDSA, N: n.Bytes(), E: kme.PublicExponent, Mechanism: "none",
		Ranges: []directory.Range{{TAC: tac(t), First: first, Count: 10}}, ShardSize: 10, Created: t0,
	}
	must.Do(t, manifest.Validate())
	jws := must.Get[[]byte](t)(m.signer.Sign(directory.TypeManifest, manifest))
	return &registry.Lot{Manufacturer: m.KeyID, Manifest: manifest, ManifestJWS: string(jws), Imported: t0}
}

func allowed([]*registry.Lot) error { return nil }

func checkLots(t *testing.T, s Store, want ...*registry.Lot) {
	t.Helper()
	got := must.Get[[]*registry.Lot](t)(s.Lots(t.Context()))
	sameLots(t, got, want)
}

// sameLots compares whatever the order.
func sameLots(t *testing.T, got, want []*registry.Lot) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%d lots, want %d", len(got), len(want))
		return
	}
	for _, w := range want {
		i := slices.IndexFunc(got, func(g *registry.Lot) bool {
			return g.Manufacturer == w.Manufacturer && g.Manifest.Lot == w.Manifest.Lot
		})
		if i < 0 {
			t.Errorf("lot %s of %s is missing", w.Manifest.Lot, w.Manufacturer)
		} else if !reflect.DeepEqual(got[i], w) {
			t.Errorf("lot %s:\n got %+v\nwant %+v", w.Manifest.Lot, got[i], w)
		}
	}
}

func checkManufacturers(t *testing.T, s Store, want ...*registry.Manufacturer) {
	t.Helper()
	got := must.Get[[]*registry.Manufacturer](t)(s.Manufacturers(t.Context()))
	if len(got) != len(want) {
		t.Errorf("%d manufacturers, want %d", len(got), len(want))
	}
	for _, w := range want {
		if !slices.ContainsFunc(got, func(g *registry.Manufacturer) bool { return reflect.DeepEqual(g, w) }) {
			t.Errorf("manufacturer %+v is missing", w)
		}
	}
}

func manufacturers(t *testing.T, s Store) {
	checkManufacturers(t, s)
	a, b := newMaker(t, s), newMaker(t, s)
	checkManufacturers(t, s, a.Manufacturer, b.Manufacturer)

	lot := a.lot(t, "L1", 0)
	must.Do(t, s.PutLot(t.Context(), lot, allowed))
	// Enrolling again replaces what was there, and leaves the lots alone.
	a.Operator, a.Directory, a.Enrolled = "op-2", "", t0.Add(time.Hour)
	must.Do(t, s.PutManufacturer(t.Context(), a.Manufacturer))
	checkManufacturers(t, s, a.Manufacturer, b.Manufacturer)
	checkLots(t, s, lot)
}

func lots(t *testing.T, s Store) {
	a, b := newMaker(t, s), newMaker(t, s)
	checkLots(t, s)
	// One name of two manufacturers is two lots.
	all := []*registry.Lot{a.lot(t, "L1", 0), b.lot(t, "L1", 10), a.lot(t, "L2", 20)}
	for i, lot := range all {
		must.Do(t, s.PutLot(t.Context(), lot, func(before []*registry.Lot) error {
			sameLots(t, before, all[:i])
			return nil
		}))
	}
	checkLots(t, s, all...)

	again := *all[0]
	again.Imported = t0.Add(time.Hour)
	called := false
	err := s.PutLot(t.Context(), &again, func(before []*registry.Lot) error {
		called = true
		sameLots(t, before, all)
		return nil
	})
	if err != nil || !called {
		t.Errorf("the same lot again: error %v, checked %v", err, called)
	}
	checkLots(t, s, all...)
}

func lotRefused(t *testing.T, s Store) {
	a := newMaker(t, s)
	no := errors.New("no")
	refused(t, "a lot that its check refuses", s.PutLot(t.Context(), a.lot(t, "L1", 0), func([]*registry.Lot) error {
		return no
	}), no)
	if err := s.PutLot(t.Context(), newMaker(t, nil).lot(t, "L1", 0), allowed); err == nil {
		t.Error("a lot was entered whose manufacturer is not")
	}
	checkLots(t, s)
	must.Do(t, s.PutLot(t.Context(), a.lot(t, "L1", 0), allowed))
}

func verdicts(t *testing.T, s Store) {
	a, b := newMaker(t, s), newMaker(t, s)
	lots := []*registry.Lot{a.lot(t, "L1", 0), b.lot(t, "L1", 10), a.lot(t, "L2", 20)}
	for _, l := range lots {
		must.Do(t, s.PutLot(t.Context(), l, allowed))
	}
	enter := func(manufacturer, lot string, v, want registry.Verdict) {
		t.Helper()
		checked := false
		stands, err := s.Decide(t.Context(), manufacturer, lot, v, func(before []*registry.Lot) error {
			checked = true
			sameLots(t, before, lots)
			return nil
		})
		if err != nil || stands != want || checked != (v == want) {
			t.Errorf("decided %+v, error %v, checked %v; want %+v", stands, err, checked, want)
		}
	}
	verdict := func(withdrawn bool, by string, after time.Duration) registry.Verdict {
		return registry.Verdict{Withdrawn: withdrawn, By: by, Reason: "why " + by, Time: t0.Add(after)}
	}
	enter(a.KeyID, "", verdict(false, "x@h", 0), registry.Verdict{}) // it is served already

	// A lot of that name of that manufacturer, and no other.
	retired := verdict(true, "a@h", time.Second)
	enter(a.KeyID, "L1", retired, retired)
	lots[0].Retired = retired
	checkLots(t, s, lots...)
	enter(a.KeyID, "L1", verdict(true, "b@h", time.Hour), retired) // the first one stands

	// All lots of that manufacturer, what is decided about them besides stays.
	distrusted := verdict(true, "c@h", time.Minute)
	enter(a.KeyID, "", distrusted, distrusted)
	lots[0].Distrusted, lots[2].Distrusted, a.Verdict = distrusted, distrusted, distrusted
	checkLots(t, s, lots...)
	checkManufacturers(t, s, a.Manufacturer, b.Manufacturer)

	// Enrolling and importing again do not undo it.
	must.Do(t, s.PutManufacturer(t.Context(), &registry.Manufacturer{KeyID: a.KeyID, PEM: a.PEM, Operator: "op",
		Directory: a.Directory, Enrolled: t0}))
	must.Do(t, s.PutLot(t.Context(), a.lot(t, "L1", 0), allowed))
	checkManufacturers(t, s, a.Manufacturer, b.Manufacturer)
	checkLots(t, s, lots...)

	trusted := verdict(false, "d@h", 2*time.Minute)
	enter(a.KeyID, "", trusted, trusted)
	lots[0].Distrusted, lots[2].Distrusted, a.Verdict = trusted, trusted, trusted
	checkLots(t, s, lots...)
	checkManufacturers(t, s, a.Manufacturer, b.Manufacturer)
}

func verdictsRefused(t *testing.T, s Store) {
	a := newMaker(t, s)
	lot := a.lot(t, "L1", 0)
	must.Do(t, s.PutLot(t.Context(), lot, allowed))
	v := registry.Verdict{Withdrawn: true, By: "a@h", Reason: "r", Time: t0}
	for _, c := range [][2]string{{"nobody", ""}, {a.KeyID, "L2"}, {"nobody", "L1"}, {"", ""}} {
		_, err := s.Decide(t.Context(), c[0], c[1], v, allowed)
		refused(t, fmt.Sprintf("manufacturer %q, lot %q", c[0], c[1]), err, registry.ErrNotImported)
	}
	no := errors.New("no")
	for _, name := range []string{"", "L1"} {
		_, err := s.Decide(t.Context(), a.KeyID, name, v, func([]*registry.Lot) error { return no })
		refused(t, "a verdict that its check refuses", err, no)
	}
	checkManufacturers(t, s, a.Manufacturer)
	checkLots(t, s, lot)
}

func boundTo(t *testing.T, s Store) {
	check := func(when time.Time, want ...int) {
		t.Helper()
		for i, c := range [][2]string{{"maker", ""}, {"maker", "L1"}, {"maker", "L2"}, {"other", ""}} {
			if n, err := s.Bound(t.Context(), c[0], c[1], when); err != nil || n != want[i] {
				t.Errorf("%d bindings stand with lot %q of %q, error %v; want %d", n, c[1], c[0], err, want[i])
			}
		}
	}
	check(t0, 0, 0, 0, 0)
	for i := range 3 {
		bind(t, s, subscription(t, i), device(t, i), []byte{byte(i)})
	}
	b := newBinding(subscription(t, 3), device(t, 3), openAttempt(t, s, subscription(t, 3), t0))
	b.Lot = "L2"
	must.Do(t, s.Establish(t.Context(), b, []byte{3}, true, t0))
	check(t0, 4, 3, 1, 0)
	activate(t, s, subscription(t, 0), t0)
	must.Get[*binding.Binding](t)(s.Revoke(t.Context(), subscription(t, 1), t0))
	check(t0, 3, 2, 1, 0)
	check(t0.Add(pendingTTL), 1, 1, 0, 0) // pending ones have ended by themselves
}

func count(t *testing.T, s Store) {
	check := func(when time.Time, pending, active, revoked int64) {
		t.Helper()
		want := map[binding.State]int64{binding.Pending: pending, binding.Active: active, binding.Revoked: revoked}
		if got, err := s.Count(t.Context(), when); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%v, error %v; want %v", got, err, want)
		}
	}
	check(t0, 0, 0, 0)
	for i := range 4 {
		bind(t, s, subscription(t, i), device(t, i), []byte{byte(i)})
	}
	check(t0, 4, 0, 0)
	activate(t, s, subscription(t, 0), t0)
	must.Get[*binding.Binding](t)(s.Revoke(t.Context(), subscription(t, 1), t0))
	check(t0, 2, 1, 1)
	check(t0.Add(pendingTTL), 0, 1, 1) // pending ones have ended by themselves
}

func raceLots(t *testing.T, s Store) {
	makers := []*maker{newMaker(t, s), newMaker(t, s)}
	lots := make([]*registry.Lot, racers)
	for i := range lots {
		lots[i] = makers[i%2].lot(t, fmt.Sprint("L", i), i/2) // each shares IMEIs with each
	}
	overlaps := errors.New("overlaps")
	errs := race(func(i int) error {
		return s.PutLot(t.Context(), lots[i], func(before []*registry.Lot) error {
			for _, b := range before {
				if b.Manifest.Overlap(lots[i].Manifest) != nil {
					return overlaps
				}
			}
			return nil
		})
	})
	checkLots(t, s, lots[checkOneWon(t, errs, overlaps)])
}
