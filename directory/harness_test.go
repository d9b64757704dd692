package directory

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/kme"
)

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newSigner(t testing.TB) *Signer {
	t.Helper()
	s, err := NewSigner(newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func tac(t testing.TB, s string) kme.TAC {
	t.Helper()
	v, err := kme.ParseTAC(s)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// newManifest is a lot of 10 devices in two ranges, 4 a shard.
func newManifest(t testing.TB, s *Signer, lot string) *Manifest {
	t.Helper()
	n := make([]byte, 256)
	rand.Read(n)
	n[0] |= 0x80
	n[255] |= 1
	return &Manifest{
		Lot: lot, Manufacturer: s.KeyID(), Suite: kme.SuiteECDSA, N: n, E: 65537,
		Mechanism: "CKM_RSA_PKCS_KEY_PAIR_GEN", Ranges: []Range{{tac(t, "35209900"), 999_993, 7},
			{tac(t, "35209901"), 0, 3}}, ShardSize: 4, Created: time.Now().UTC().Truncate(time.Second),
	}
}

// someHash stands for the SHA-256 of an injection package.
var someHash = bytes.Repeat([]byte{0xfb}, sha256.Size)

func keysOf(t testing.TB, m *Manifest, n int) []DeviceKey {
	t.Helper()
	first, count := m.ShardRange(n)
	var keys []DeviceKey
	for i := range count {
		keys = append(keys, DeviceKey{m.IMEI(first + i), newKey(t).Public()})
	}
	return keys
}

// counting counts the reads of each path, and fails those of paths in down.
type counting struct {
	Store
	mu    sync.Mutex
	reads map[string]int
	down  atomic.Bool
	hold  chan struct{} // where not nil, reads wait for it

	panics atomic.Bool
}

var errDown = errors.New("the store is away")

func (c *counting) Read(ctx context.Context, path string) ([]byte, string, error) {
	c.mu.Lock()
	c.reads[path]++
	c.mu.Unlock()
	if c.hold != nil {
		<-c.hold
	}
	if c.down.Load() {
		return nil, "", errDown
	}
	if c.panics.Load() {
		panic("a store's")
	}
	return c.Store.Read(ctx, path)
}

func (c *counting) count(path string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reads[path]
}

// newLot publishes a whole lot.
func newLot(t testing.TB, s *Signer, lot string) (*counting, *Manifest) {
	t.Helper()
	files := newMemory()
	m := newManifest(t, s, lot)
	publish(t, files, s, m)
	return &counting{Store: files, reads: map[string]int{}}, m
}

func publish(t testing.TB, store Store, s *Signer, m *Manifest) {
	t.Helper()
	if err := errors.Join(Publish(t.Context(), store, ManifestPath(m.Lot), s, TypeManifest, m),
		BeginRevocations(t.Context(), store, s, m, time.Now(), time.Hour)); err != nil {
		t.Fatal(err)
	}
	for n := range m.Shards() {
		shard, err := NewShard(m, n, keysOf(t, m, n), someHash)
		if err != nil {
			t.Fatal(err)
		}
		if err := Publish(t.Context(), store, ShardPath(m.Lot, n), s, TypeShard, shard); err != nil {
			t.Fatal(err)
		}
	}
}

// put replaces what a store has, as whoever runs it may.
func put(t testing.TB, store Store, path string, jws []byte) {
	t.Helper()
	_, version, err := store.Read(t.Context(), path)
	if err == nil || errors.Is(err, ErrNotFound) {
		err = store.Update(t.Context(), path, jws, version)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// remove takes an object away, as whoever runs the store may.
func remove(t testing.TB, store *counting, path string) {
	t.Helper()
	store.Store.(*memory).remove(path)
}
