package directory

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/internal/testkeys"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

func TestReader(t *testing.T) {
	s := newSigner(t)
	store, m := newLot(t, s, "L1")
	r := NewReader(store, NewVerifier(s.Public()), ReaderOptions{})
	ctx := t.Context()
	if all, err := r.Manifests(ctx); err != nil || len(all) != 1 || all[0].Lot != "L1" {
		t.Error(all, err)
	}
	for i := range m.Devices() {
		d, err := r.Device(ctx, m, m.IMEI(i))
		if err != nil {
			t.Fatal(err)
		}
		shard, err := r.ReadShard(ctx, m, i/4)
		if err != nil {
			t.Fatal(err)
		}
		if d.Shard != i/4 || d.Revoked != nil || !shard.Keys[i%4].Key.(*ecdsa.PublicKey).Equal(d.Key) {
			t.Errorf("device %d: %+v", i, d)
		}
	}
	if n := store.count(ShardPath("L1", 0)); n != 5 {
		t.Errorf("shard 0 was read %d times, of which 4 were this test's", n)
	}
	stranger, _ := kme.ParseIMEI("35209902000000")
	if _, err := r.Device(ctx, m, stranger); !errors.Is(err, ErrUnknownDevice) {
		t.Error(err)
	}
	store.down.Store(true)
	if _, err := r.Device(ctx, m, m.IMEI(9)); err != nil {
		t.Errorf("the store is away, and a cached device with it: %v", err)
	}
}

func TestReaderRSA(t *testing.T) {
	s := newSigner(t)
	store := newMemory()
	m := newManifest(t, s, "L1")
	n := make([]byte, 384)
	rand.Read(n)
	n[0] |= 0x80
	n[383] |= 1
	m.N, m.Suite, m.Ranges = n, kme.SuiteRSA, m.Ranges[1:]
	var keys []DeviceKey
	for i := range m.Devices() {
		k, err := testkeys.RSA(2048)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, DeviceKey{m.IMEI(i), k.Public()})
	}
	shard, err := NewShard(m, 0, keys, someHash)
	if err == nil {
		err = errors.Join(Publish(t.Context(), store, ShardPath("L1", 0), s, TypeShard, shard),
			BeginRevocations(t.Context(), store, s, m, time.Now(), time.Hour))
	}
	if err != nil {
		t.Fatal(err)
	}
	d, err := NewReader(store, NewVerifier(s.Public()), ReaderOptions{}).Device(t.Context(), m, m.IMEI(2))
	if err != nil || !keys[2].Key.(*rsa.PublicKey).Equal(d.Key) {
		t.Error(d, err)
	}
}

// However many ask for devices of one shard that nobody has asked for yet, the store is asked once; and a caller who
// gives up does not fail the others.
func TestReaderOneFlight(t *testing.T) {
	s := newSigner(t)
	store, m := newLot(t, s, "L1")
	store.hold = make(chan struct{})
	r := NewReader(store, NewVerifier(s.Public()), ReaderOptions{ReadTimeout: testproc.Patience})
	gone, cancel := context.WithCancel(t.Context())
	first := make(chan error, 1)
	go func() { _, err := r.Device(gone, m, m.IMEI(0)); first <- err }()
	for store.count(ShardPath("L1", 0)) == 0 {
		time.Sleep(time.Millisecond)
	}
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			if _, err := r.Device(t.Context(), m, m.IMEI(i%4)); err != nil {
				t.Error(err)
			}
		})
	}
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	time.Sleep(20 * time.Millisecond) // the hundred come up
	close(store.hold)
	all.Wait()
	for _, path := range []string{ShardPath("L1", 0), RevocationsPath("L1")} {
		if n := store.count(path); n != 1 {
			t.Errorf("%s was read %d times", path, n)
		}
	}
}

// A store that makes a shard when it is read, of the same keys each, so that a lot of any size is there at once.
type generated struct {
	Store
	t    testing.TB
	s    *Signer
	m    *Manifest
	keys []DeviceKey
}

func (g *generated) Read(_ context.Context, path string) ([]byte, string, error) {
	var n int
	if path == RevocationsPath(g.m.Lot) {
		jws, err := g.s.Sign(TypeRevocations, &Revocations{Lot: g.m.Lot, Version: 1})
		return jws, "1", err
	}
	if _, err := fmt.Sscanf(path, "lots/"+g.m.Lot+"/shards/%06d", &n); err != nil {
		return nil, "", ErrNotFound
	}
	first, count := g.m.ShardRange(n)
	keys := slices.Clone(g.keys[:count])
	for i := range keys {
		keys[i].IMEI = g.m.IMEI(first + i)
	}
	shard, err := NewShard(g.m, n, keys, someHash)
	if err != nil {
		g.t.Fatal(err)
	}
	jws, err := g.s.Sign(TypeShard, shard)
	return jws, "1", err
}

// However many devices are looked up, the process does not grow by more than the bound, and a half for the garbage
// collector and the structure of the cache.
func TestReaderCacheBound(t *testing.T) {
	limit, devices := int64(16<<20), 1_000_000
	if raceEnabled { // five times slower; with 64 bytes a key, this too is more than the bound
		limit, devices = 2<<20, 50_000
	}
	s := newSigner(t)
	m := newManifest(t, s, "L1")
	m.Ranges, m.ShardSize = []Range{{tac(t, "35209900"), 0, devices}}, 1024
	r := NewReader(&generated{t: t, s: s, m: m, keys: keysOf(t, m, 0)}, NewVerifier(s.Public()),
		ReaderOptions{Cache: NewCache(limit, nil), ReadTimeout: time.Minute})
	heap := func() int64 {
		runtime.GC()
		runtime.GC() // what the first one finalised
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		return int64(stats.HeapAlloc)
	}
	before := heap()
	for i := range devices {
		if _, err := r.Device(t.Context(), m, m.IMEI(i)); err != nil {
			t.Fatal(err)
		}
	}
	r.cache.shards.CleanUp()
	grown := heap() - before
	t.Logf("%d devices looked up with a cache of %d MiB: the heap has grown by %.1f MiB", devices, limit>>20,
		float64(grown)/(1<<20))
	if grown > limit*3/2+1<<20 || grown < limit/2 {
		t.Errorf("the heap has grown by %d bytes with a cache of %d", grown, limit)
	}
	runtime.KeepAlive(r)
}

func TestReaderMissingShard(t *testing.T) {
	s := newSigner(t)
	files := newMemory()
	store, m := &counting{Store: files, reads: map[string]int{}}, newManifest(t, s, "L1")
	const ttl = 300 * time.Millisecond
	r := NewReader(store, NewVerifier(s.Public()), ReaderOptions{NegativeTTL: ttl})
	path := ShardPath("L1", 0)
	start := time.Now()
	for range 1000 {
		if _, err := r.Device(t.Context(), m, m.IMEI(0)); !errors.Is(err, ErrUnknownDevice) {
			t.Fatal(err)
		}
	}
	if n, took := store.count(path), time.Since(start); n > 1+int(took/ttl) {
		t.Errorf("a missing shard was asked for %d times in %s", n, took)
	}
	publish(t, files, s, m)
	testproc.Await(t, "a shard published since is found", func() bool {
		_, err := r.Device(t.Context(), m, m.IMEI(0))
		return err == nil
	})
	// What may pass is not remembered.
	store.down.Store(true)
	if _, err := r.Device(t.Context(), m, m.IMEI(4)); !errors.Is(err, errDown) {
		t.Error(err)
	}
	store.down.Store(false)
	if _, err := r.Device(t.Context(), m, m.IMEI(4)); err != nil {
		t.Error(err)
	}
}

// A panic over what the store has is the error of those who wait for it, and no end of the process.
func TestReaderPanics(t *testing.T) {
	s := newSigner(t)
	store, m := newLot(t, s, "L1")
	r := NewReader(store, NewVerifier(s.Public()), ReaderOptions{})
	store.panics.Store(true)
	if _, err := r.Device(t.Context(), m, m.IMEI(0)); panics.Of(err) == nil {
		t.Errorf("%v", err)
	}
	store.panics.Store(false)
	if _, err := r.Device(t.Context(), m, m.IMEI(0)); err != nil {
		t.Errorf("after it: %v", err)
	}
}

// A panic of a read that nobody waits for any more is not lost.
func TestReaderPanicsLate(t *testing.T) {
	log, s := testproc.Logged(t), newSigner(t)
	store, m := newLot(t, s, "L1")
	store.hold = make(chan struct{})
	store.panics.Store(true)
	ctx, leave := context.WithCancel(t.Context())
	time.AfterFunc(tick, leave)
	r, before := NewReader(store, NewVerifier(s.Public()), ReaderOptions{}), panics.Count()
	if _, err := r.Device(ctx, m, m.IMEI(0)); !errors.Is(err, context.Canceled) || panics.Count() != before {
		t.Error(err)
	}
	close(store.hold)
	testproc.Await(t, "it is counted", func() bool { return panics.Count() > before })
	testproc.Await(t, "it is logged", func() bool { return strings.Contains(log.String(), `"cause":"a store's"`) })
}

func BenchmarkCachedDevice(b *testing.B) {
	s := newSigner(b)
	store, m := newLot(b, s, "L1")
	r := NewReader(store, NewVerifier(s.Public()), ReaderOptions{})
	imei := m.IMEI(3)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Device(b.Context(), m, imei); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkShard256(b *testing.B) {
	s := newSigner(b)
	m := newManifest(b, s, "L1")
	m.Ranges, m.ShardSize = []Range{{tac(b, "35209900"), 0, 256}}, 256
	store := newMemory()
	publish(b, store, s, m)
	r := NewReader(store, NewVerifier(s.Public()), ReaderOptions{})
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.ReadShard(b.Context(), m, 0); err != nil {
			b.Fatal(err)
		}
	}
}

// A device that is cached costs its key, and what the caller asks with: the garbage of a million lookups a
// second is a matter of this number.
func TestCachedDeviceAllocations(t *testing.T) {
	s := newSigner(t)
	store, m := newLot(t, s, "L1")
	r := NewReader(store, NewVerifier(s.Public()), ReaderOptions{})
	imei := m.IMEI(3)
	n := testing.AllocsPerRun(100, func() {
		if _, err := r.Device(t.Context(), m, imei); err != nil {
			t.Fatal(err)
		}
	})
	if n > 12 {
		t.Errorf("%v allocations, not at most 12", n)
	}
}
