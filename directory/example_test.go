package directory_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/directory/filestore"
	"github.com/kmehsm/kmehsm/kme"
)

// A manufacturer publishes a lot of one device, and revokes the device. An operator, who has pinned the manufacturer's
// key, looks the device up.
func Example() {
	folder, err := os.MkdirTemp("", "directory-")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(folder)
	ctx, now := context.Background(), time.Now()

	// The manufacturer. Its signing key and the lot's key are in a token, elsewhere.
	store, err := filestore.Open(folder)
	if err != nil {
		panic(err)
	}
	signing, deviceKey := newKey(), newKey()
	signer, err := directory.NewSigner(signing)
	if err != nil {
		panic(err)
	}
	lotKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	tac, err := kme.ParseTAC("35209900")
	if err != nil {
		panic(err)
	}
	m := &directory.Manifest{
		Lot: "L1", Manufacturer: signer.KeyID(), Suite: kme.SuiteECDSA, N: lotKey.N.Bytes(), E: lotKey.E,
		Mechanism: "CKM_RSA_PKCS_KEY_PAIR_GEN", Ranges: []directory.Range{{TAC: tac, First: 1, Count: 1}},
		ShardSize: 256, Created: now,
	}
	if err := m.Validate(); err != nil {
		panic(err)
	}
	imei, pkg := m.IMEI(0), sha256.Sum256([]byte("the injection package"))
	shard, err := directory.NewShard(m, 0, []directory.DeviceKey{{IMEI: imei, Key: deviceKey.Public()}}, pkg[:])
	if err != nil {
		panic(err)
	}
	err = errors.Join(
		directory.Publish(ctx, store, directory.ManifestPath(m.Lot), signer, directory.TypeManifest, m),
		directory.BeginRevocations(ctx, store, signer, m, now, directory.DefaultValidity),
		directory.Publish(ctx, store, directory.ShardPath(m.Lot, 0), signer, directory.TypeShard, shard),
	)
	if err != nil {
		panic(err)
	}

	// The operator.
	reader := directory.NewReader(store, directory.NewVerifier(&signing.PublicKey), directory.ReaderOptions{})
	lot, err := reader.Manifest(ctx, "L1")
	if err != nil {
		panic(err)
	}
	device, err := reader.Device(ctx, lot, imei)
	fmt.Println(imei, "has the key that was published:", deviceKey.PublicKey.Equal(device.Key), err)

	// The manufacturer again.
	if err := directory.Revoke(ctx, store, signer, m, []kme.IMEI{imei}, "stolen", now, nil); err != nil {
		panic(err)
	}
	if err := reader.Refresh(ctx, lot); err != nil { // a service has Follow do it
		panic(err)
	}
	device, err = reader.Device(ctx, lot, imei)
	if err != nil {
		panic(err)
	}
	fmt.Println("revoked:", device.Revoked.Reason)
	// Output:
	// 35209900000001 has the key that was published: true <nil>
	// revoked: stolen
}

func newKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}
