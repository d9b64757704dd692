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
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/kme"
)

// A maker is a manufacturer in software.
type maker struct {
	*binding.Manufacturer
	signer *directory.Signer
}

func newMaker(t *testing.T, s Store) *maker {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := directory.NewSigner(key)
	if err != nil {
		t.Fatal(err)
	}
	pem, err := pemkey.Encode(signer.Public())
	if err != nil {
		t.Fatal(err)
	}
	m := &binding.Manufacturer{KeyID: signer.KeyID(), PEM: string(pem), Operator: "op",
		Directory: "file:/srv/directory", Enrolled: t0}
	if s != nil {
		if err := s.PutManufacturer(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	return &maker{m, signer}
}

// lot signs the manifest of a lot of ten devices.
func (m *maker) lot(t *testing.T, name string, first int) *binding.Lot {
	t.Helper()
	// No modulus that anybody should use, but of the right form.
	n := new(big.Int).Lsh(big.NewInt(1), 2047)
	n.Add(n, big.NewInt(int64(2*first+1)))
	manifest := &directory.Manifest{
		Lot: name, Manufacturer: m.KeyID, Suite: kme.SuiteECDSA, N: n.Bytes(), E: kme.PublicExponent, Mechanism: "none",
		Ranges: []directory.Range{{TAC: tac(t), First: first, Count: 10}}, ShardSize: 10, Created: t0,
	}
	if err := manifest.Validate(); err != nil {
		t.Fatal(err)
	}
	jws, err := m.signer.Sign(directory.TypeManifest, manifest)
	if err != nil {
		t.Fatal(err)
	}
	return &binding.Lot{Manufacturer: m.KeyID, Manifest: manifest, ManifestJWS: string(jws), Imported: t0}
}

func allowed([]*binding.Lot) error { return nil }

func checkLots(t *testing.T, s Store, want ...*binding.Lot) {
	t.Helper()
	got, err := s.Lots(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	sameLots(t, got, want)
}

// sameLots compares whatever the order.
func sameLots(t *testing.T, got, want []*binding.Lot) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%d lots, want %d", len(got), len(want))
		return
	}
	for _, w := range want {
		i := slices.IndexFunc(got, func(g *binding.Lot) bool {
			return g.Manufacturer == w.Manufacturer && g.Manifest.Lot == w.Manifest.Lot
		})
		if i < 0 {
			t.Errorf("lot %s of %s is missing", w.Manifest.Lot, w.Manufacturer)
		} else if !reflect.DeepEqual(got[i], w) {
			t.Errorf("lot %s:\n got %+v\nwant %+v", w.Manifest.Lot, got[i], w)
		}
	}
}

func checkManufacturers(t *testing.T, s Store, want ...*binding.Manufacturer) {
	t.Helper()
	got, err := s.Manufacturers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != len(want) {
		t.Errorf("%d manufacturers, want %d", len(got), len(want))
	}
	for _, w := range want {
		if !slices.ContainsFunc(got, func(g *binding.Manufacturer) bool { return reflect.DeepEqual(g, w) }) {
			t.Errorf("manufacturer %+v is missing", w)
		}
	}
}

func manufacturers(t *testing.T, s Store) {
	checkManufacturers(t, s)
	a, b := newMaker(t, s), newMaker(t, s)
	checkManufacturers(t, s, a.Manufacturer, b.Manufacturer)

	lot := a.lot(t, "L1", 0)
	if err := s.PutLot(t.Context(), lot, allowed); err != nil {
		t.Fatal(err)
	}
	// Enrolling again replaces what was there, and leaves the lots alone.
	a.Operator, a.Directory, a.Enrolled = "op-2", "", t0.Add(time.Hour)
	if err := s.PutManufacturer(t.Context(), a.Manufacturer); err != nil {
		t.Fatal(err)
	}
	checkManufacturers(t, s, a.Manufacturer, b.Manufacturer)
	checkLots(t, s, lot)
}

func lots(t *testing.T, s Store) {
	a, b := newMaker(t, s), newMaker(t, s)
	checkLots(t, s)
	// One name of two manufacturers is two lots.
	all := []*binding.Lot{a.lot(t, "L1", 0), b.lot(t, "L1", 10), a.lot(t, "L2", 20)}
	for i, lot := range all {
		err := s.PutLot(t.Context(), lot, func(before []*binding.Lot) error {
			sameLots(t, before, all[:i])
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	checkLots(t, s, all...)

	again := *all[0]
	again.Imported = t0.Add(time.Hour)
	called := false
	err := s.PutLot(t.Context(), &again, func(before []*binding.Lot) error {
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
	if err := s.PutLot(t.Context(), a.lot(t, "L1", 0), func([]*binding.Lot) error { return no }); !errors.Is(err, no) {
		t.Errorf("a lot that its check refuses: %v, want the check's error", err)
	}
	if err := s.PutLot(t.Context(), newMaker(t, nil).lot(t, "L1", 0), allowed); err == nil {
		t.Error("a lot was entered whose manufacturer is not")
	}
	checkLots(t, s)
	if err := s.PutLot(t.Context(), a.lot(t, "L1", 0), allowed); err != nil {
		t.Errorf("after refusals: %v", err)
	}
}

func raceLots(t *testing.T, s Store) {
	makers := []*maker{newMaker(t, s), newMaker(t, s)}
	lots := make([]*binding.Lot, racers)
	for i := range lots {
		lots[i] = makers[i%2].lot(t, fmt.Sprint("L", i), i/2) // each shares IMEIs with each
	}
	overlaps := errors.New("overlaps")
	errs := race(func(i int) error {
		return s.PutLot(t.Context(), lots[i], func(before []*binding.Lot) error {
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
