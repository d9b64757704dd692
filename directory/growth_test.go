package directory

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// manyLots is a directory of lots of 10,000 devices, each as generated makes it.
type manyLots struct {
	Store
	lots map[string]*generated
}

func (d *manyLots) Read(ctx context.Context, path string) ([]byte, string, error) {
	return d.lots[strings.Split(path, "/")[1]].Read(ctx, path)
}

func newManyLots(t testing.TB, s *Signer, n int) (*manyLots, []*Manifest) {
	d, all := &manyLots{lots: map[string]*generated{}}, []*Manifest{}
	var keys []DeviceKey
	for i := range n {
		m := newManifest(t, s, fmt.Sprint("L", i))
		m.Ranges, m.ShardSize = []Range{{tac(t, fmt.Sprintf("35%06d", i/100)), i % 100 * 10_000, 10_000}}, 256
		if keys == nil {
			keys = keysOf(t, m, 0)
		}
		d.lots[m.Lot] = &generated{t: t, s: s, m: m, keys: keys}
		all = append(all, m)
	}
	return d, all
}

// heap is what is in use after a collection.
func heap() int64 {
	runtime.GC()
	runtime.GC() // what the first one finalised
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return int64(stats.HeapAlloc)
}

// What the readers of many manufacturers keep together is no more than what one keeps; and none is given what another
// has verified, although their lots have one name.
func TestReadersShareCache(t *testing.T) {
	const makers, shards, limit = 6, 5, int64(256 << 10) // a shard has 64 KiB of keys
	cache, common := NewCache(limit, nil), []DeviceKey(nil)
	before, one := int64(0), int64(0)
	var readers []*Reader
	for range makers {
		s := newSigner(t)
		m := newManifest(t, s, "L1")
		m.Ranges, m.ShardSize = []Range{{tac(t, "35209900"), 0, shards * 1024}}, 1024
		if common == nil {
			common = keysOf(t, m, 0)
			before = heap()
		}
		keys := slices.Clone(common)
		keys[0].Key = newKey(t).Public()
		r := NewReader(&generated{t: t, s: s, m: m, keys: keys}, NewVerifier(s.Public()),
			ReaderOptions{Cache: cache, ReadTimeout: time.Minute})
		for n := range shards {
			d, err := r.Device(t.Context(), m, m.IMEI(n*1024))
			if err != nil {
				t.Fatal(err)
			}
			if !keys[0].Key.(*ecdsa.PublicKey).Equal(d.Key) {
				t.Fatalf("shard %d has the key of another manufacturer", n)
			}
		}
		cache.shards.CleanUp()
		if readers = append(readers, r); one == 0 {
			one = heap() - before
		}
	}
	all := heap() - before
	t.Logf("one reader keeps %d KiB, %d keep %d KiB", one>>10, makers, all>>10)
	if all > 2*one+makers*(100<<10) || one < limit/2 {
		t.Errorf("one reader keeps %d bytes, %d keep %d", one, makers, all)
	}
	runtime.KeepAlive(readers)
}

// BenchmarkRandomDevices looks devices up at random in KMEHSM_LOTS lots of 10,000, as a service does that was just
// started: each shard is made, signed, read and verified. Its memory has the directory's keys, 256, in it too.
func BenchmarkRandomDevices(b *testing.B) {
	debug.SetGCPercent(200) // as keysvc serve does
	lots, err := strconv.Atoi(cmp.Or(os.Getenv("KMEHSM_LOTS"), "100"))
	if err != nil {
		b.Fatal(err)
	}
	s := newSigner(b)
	d, all := newManyLots(b, s, lots)
	r := NewReader(d, NewVerifier(s.Public()), ReaderOptions{ReadTimeout: time.Minute})
	b.ResetTimer()
	var each sync.WaitGroup
	var next atomic.Int64
	for range runtime.GOMAXPROCS(0) {
		each.Go(func() {
			for next.Add(1) <= int64(b.N) {
				m := all[rand.IntN(len(all))]
				if _, err := r.Device(b.Context(), m, m.IMEI(rand.IntN(m.Devices()))); err != nil {
					b.Error(err)
				}
			}
		})
	}
	each.Wait()
	b.StopTimer()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(u.Maxrss)/1024, "max-rss-MiB")
	b.ReportMetric(float64(heap())/(1<<20), "heap-MiB")
	runtime.KeepAlive(r)
}
