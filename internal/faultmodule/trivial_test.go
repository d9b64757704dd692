package faultmodule_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"testing"
	"time"

	"github.com/tink-crypto/tink-go/v2/kwp/subtle"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/imports"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/directory/filestore"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/internal/testkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// A service with a lot of 2048 bits, L1, of one device, through the module around the token.
func served(t *testing.T) (service *binding.Service, lot *rsa.PublicKey, imei kme.IMEI) {
	t.Helper()
	ctx := t.Context()
	token, _, _ := newOperator(t)
	rowKey := must[kme.Secret](t)(token.Derive(ctx, sqlstore.RowKey))
	store := must[*sqlstore.Store](t)(sqlstore.Open(ctx, sqlstore.InFolder(t.TempDir()), rowKey))
	t.Cleanup(func() { store.Close() })
	maker := must[*directory.Signer](t)(
		directory.NewSigner(must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))))
	files := must[*filestore.Store](t)(filestore.Open(t.TempDir()))

	kek := make([]byte, 32)
	rand.Read(kek)
	id := hsmkeys.Key{Role: hsmkeys.RoleKEK, Manufacturer: maker.KeyID(), Name: "op"}.HexID()
	transport := must[*rsa.PublicKey](t)(token.NewTransportKey(ctx))
	pem := must[[]byte](t)(pemkey.Encode(maker.Public()))
	must[*registry.Manufacturer](t)(imports.Enroll(ctx, token, store,
		imports.Enrolment{JWS: must[[]byte](t)(maker.Sign(handover.TypeEnrolment, &handover.Enrolment{
			Manufacturer: maker.KeyID(), Operator: "op", TransportKey: pemkey.Thumbprint(transport), KEK: id,
			Algorithm: handover.RSAOAEP,
			Wrapped:   must[[]byte](t)(rsa.EncryptOAEP(sha1.New(), rand.Reader, transport, kek, nil)),
		})), PEM: pem, Thumbprint: maker.KeyID(), Directory: "file:/"}))

	key := must[*rsa.PrivateKey](t)(testkeys.RSA(2048))
	tac := must[kme.TAC](t)(kme.ParseTAC("35209900"))
	m := &directory.Manifest{
		Lot: "L1", Manufacturer: maker.KeyID(), Suite: kme.SuiteECDSA, N: key.N.Bytes(), E: key.E,
		Mechanism: "software", Ranges: []directory.Range{{TAC: tac, First: 1, Count: 1}}, ShardSize: 1,
		Created: time.Now().UTC(),
	}
	imei = must[kme.IMEI](t)(kme.NewIMEI(tac, 1))
	device := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	shard := must[*directory.Shard](t)(directory.NewShard(m, 0,
		[]directory.DeviceKey{{IMEI: imei, Key: &device.PublicKey}}, make([]byte, sha256.Size)))
	publish := func(path string, typ directory.Type, payload any) {
		if err := directory.Publish(ctx, files, path, maker, typ, payload); err != nil {
			t.Fatal(err)
		}
	}
	publish(directory.ManifestPath("L1"), directory.TypeManifest, m)
	publish(directory.ShardPath("L1", 0), directory.TypeShard, shard)
	if err := directory.BeginRevocations(ctx, files, maker, m, time.Now(), time.Hour); err != nil {
		t.Fatal(err)
	}
	wrapped := must[[]byte](t)(must[*subtle.KWP](t)(subtle.NewKWP(kek)).
		Wrap(must[[]byte](t)(x509.MarshalPKCS8PrivateKey(key))))
	must[*registry.Lot](t)(imports.ImportLot(ctx, token, store,
		must[[]byte](t)(maker.Sign(handover.TypeGrant, &handover.Grant{
			Operator: "op", KEK: id, Lot: "L1", Algorithm: handover.A256KWP, Wrapped: wrapped,
			Manifest: string(must[[]byte](t)(maker.Sign(directory.TypeManifest, m))),
		})), nil))
	reader := directory.NewReader(files, directory.NewVerifier(maker.Public()), directory.ReaderOptions{})
	readers := func(*registry.Manufacturer) (*directory.Reader, error) { return reader, nil }
	lots := must[*registry.Lots](t)(registry.OpenLots(ctx, store, readers))
	return binding.NewService(binding.Options{Token: token, Store: store, Lots: lots, Times: binding.DefaultTimes(),
		Log: slog.New(slog.NewTextHandler(io.Discard, nil))}), &key.PublicKey, imei
}

// Whether a token decrypts 0, 1 and N-1, which are their own roots, or refuses them, as NIST SP 800-56B Rev. 2 section
// 7.1.2.1 has it: nobody learns it, nor by which calls of the token they were answered.
func TestTrivialPayloads(t *testing.T) {
	service, lot, imei := served(t)
	here := binding.Origin{Provisioning: binding.Allowed}
	imsi := must[kme.IMSI](t)(kme.ParseIMSI("001010000000001"))
	attempt := must[*binding.Prepared](t)(service.PrepareVector(t.Context(), imsi, [][]byte{make([]byte, 16)},
		here)).AttemptID
	send := func(payload []byte) (kme.Reason, map[string]uint64) {
		var calls map[string]uint64
		var err error
		for looked := true; looked; looked = calls["C_FindObjectsInit"] > 0 { // hsmkeys.LookAgain: once in five seconds
			calls, _, err = faulty.Of(func() error {
				_, err := service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: imei,
					AttemptID: attempt, Payload: payload, Origin: here})
				return err
			})
		}
		var r *binding.Refusal
		if !errors.As(err, &r) {
			t.Fatalf("%v", err)
		}
		// What was left in sessions is destroyed when it is time.
		for _, f := range dropping {
			delete(calls, f)
		}
		return r.Reason, calls
	}
	ordinary := make([]byte, 256)
	rand.Read(ordinary[1:])
	_, want := send(ordinary)
	for _, rv := range []string{"0x20", "0x40"} { // CKR_DATA_INVALID, CKR_ENCRYPTED_DATA_INVALID
		faulty.Tell(t, "trivial "+rv)
		defer faulty.Tell(t)
		for name, n := range map[string]*big.Int{
			"0": big.NewInt(0), "1": big.NewInt(1), "N-1": new(big.Int).Sub(lot.N, big.NewInt(1)),
			"N": lot.N, "N+1": new(big.Int).Add(lot.N, big.NewInt(1)),
		} {
			reason, calls := send(n.FillBytes(make([]byte, 256)))
			if reason != kme.KMERejected || !maps.Equal(calls, want) {
				t.Errorf("%s, with a token that answers %s: %s, by %v, want %v", name, rv, reason, calls, want)
			}
		}
	}
}
