package sqlstore

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"strconv"
	"testing"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/ledger"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/kme"
)

// fillLots enters a manufacturer with n lots of 10,000 devices.
func fillLots(t testing.TB, s *Store, n int) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := directory.NewSigner(key)
	if err != nil {
		t.Fatal(err)
	}
	pem, err := pemkey.Encode(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	maker := &registry.Manufacturer{KeyID: signer.KeyID(), PEM: string(pem), Operator: "op", Enrolled: t0}
	if err := s.PutManufacturer(t.Context(), maker); err != nil {
		t.Fatal(err)
	}
	err = s.change(t.Context(), "fill", "registry", func(ctx context.Context, tx *txn) error {
		for i := range n {
			tac, err := kme.ParseTAC(fmt.Sprintf("35%06d", i/100))
			if err != nil {
				return err
			}
			modulus := make([]byte, 384)
			rand.Read(modulus)
			modulus[0] |= 0x80
			modulus[383] |= 1
			m := &directory.Manifest{
				Lot: fmt.Sprintf("L%d", i), Manufacturer: signer.KeyID(), Suite: kme.SuiteECDSA, N: modulus,
				E: kme.PublicExponent, Mechanism: "CKM_RSA_PKCS_KEY_PAIR_GEN", ShardSize: 256, Created: t0,
				Ranges: []directory.Range{{TAC: tac, First: i % 100 * 10_000, Count: 10_000}},
			}
			jws, err := signer.Sign(directory.TypeManifest, m)
			if err != nil {
				return err
			}
			l := &registry.Lot{Manufacturer: maker.KeyID, Manifest: m, ManifestJWS: string(jws), Imported: t0}
			seq, err := s.chains.Enter(ctx, &tx.Tx, ledger.Entry{Event: binding.EventImported,
				Subject: binding.LotSubject(l.Manufacturer, m.Lot)})
			if err != nil {
				return err
			}
			if err := s.macs.Add(ctx, tx.Conn, tables.Lots, lotValues(l, seq)...); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// All lots are read in time and memory that grow as they do; and whoever reads them again, as /readyz does, verifies no
// manifest again.
func TestLotsGrowth(t *testing.T) {
	allocs := func(n int) (first, again float64) {
		s := filled(t, t.TempDir(), 0)
		fillLots(t, s, n)
		read := func() {
			if all, err := s.Lots(t.Context()); err != nil || len(all) != n {
				t.Fatalf("%d lots, %v", len(all), err)
			}
		}
		first = testing.AllocsPerRun(1, func() { s.manifests.Clear(); read() })
		return first, testing.AllocsPerRun(5, read)
	}
	few, fewAgain := allocs(100)
	many, manyAgain := allocs(400)
	t.Logf("allocations for 100 lots: %.0f, again %.0f; for 400: %.0f, again %.0f", few, fewAgain, many, manyAgain)
	if many > 5*few || manyAgain > 5*fewAgain {
		t.Error("they grow faster than the lots")
	}
	if manyAgain > many/2 {
		t.Error("manifests are verified again")
	}
}

func BenchmarkLots(b *testing.B) {
	for _, n := range []int{250, 1000, 4000} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			s := filled(b, b.TempDir(), 0)
			fillLots(b, s, n)
			if _, err := s.Lots(b.Context()); err != nil {
				b.Fatal(err)
			}
			for again, unit := range map[bool]string{false: "us/lot", true: "again-us/lot"} {
				before := cpu()
				for range b.N {
					if !again {
						s.manifests.Clear()
					}
					if all, err := s.Lots(b.Context()); err != nil || len(all) != n {
						b.Fatal(len(all), err)
					}
				}
				b.ReportMetric((cpu()-before)/float64(b.N*n), unit)
			}
		})
	}
}
