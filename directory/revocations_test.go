package directory

import (
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"math/big"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/kme"
)

// newMillion is a lot of a million devices, of which nothing is published.
func newMillion(t testing.TB, s *Signer) *Manifest {
	t.Helper()
	m := newManifest(t, s, "L1")
	m.Ranges, m.ShardSize = []Range{{tac(t, "35209900"), 0, 1_000_000}}, 256
	return m
}

// every gives every n-th device of a lot.
func every(m *Manifest, n int) (imeis []kme.IMEI) {
	for i := 0; i < m.Devices(); i += n {
		imeis = append(imeis, m.IMEI(i))
	}
	return imeis
}

// begin publishes the first list of a lot of which nothing else is published.
func begin(t testing.TB, store Store, s *Signer, m *Manifest) {
	t.Helper()
	if err := BeginRevocations(t.Context(), store, s, m, time.Now(), time.Hour); err != nil {
		t.Fatal(err)
	}
	if w, ok := store.(*writing); ok {
		w.take()
	}
}

// listed says what the list, read now, has of a device.
func listed(t testing.TB, r *Reader, m *Manifest, imei kme.IMEI) bool {
	t.Helper()
	r.Refresh(t.Context(), m)
	return must.Get[bool](t)(r.Revoked(m, imei))
}

func readerOf(store Store, s *Signer) *Reader {
	return NewReader(store, NewVerifier(s.Public()),
		ReaderOptions{RevocationTTL: time.Nanosecond, NegativeTTL: time.Nanosecond})
}

// Ten thousand devices of a million, each in a place of its own: no object is larger than a store takes, one device
// more is two objects and no megabytes, and a reader that looks at one device reads what that one needs.
func TestRevocationsOfAMillion(t *testing.T) {
	ctx, s, files := t.Context(), newSigner(t), newWriting(t)
	m := newMillion(t, s)
	begin(t, files, s, m)
	imeis := every(m, 100)
	var told []int
	if err := Revoke(ctx, files, s, m, imeis, "stolen from a warehouse", time.Now(), func(done int) {
		told = append(told, done)
	}); err != nil {
		t.Fatal(err)
	}
	if len(told) < 2 || told[len(told)-1] != len(imeis) || !slices.IsSorted(told) {
		t.Errorf("progress: %v", told)
	}
	if paths, _ := files.take(); len(paths) != m.RevocationParts()+1 {
		t.Errorf("%d objects were written, for %d parts", len(paths), m.RevocationParts())
	}
	if err := Revoke(ctx, files, s, m, []kme.IMEI{m.IMEI(100_001)}, "stolen", time.Now(), nil); err != nil {
		t.Fatal(err)
	}
	if paths, bytes := files.take(); len(paths) != 2 || bytes > MaxObject/2 {
		t.Errorf("for one more device %d bytes were written: %v", bytes, paths)
	}
	store := &counting{Store: files, reads: map[string]int{}}
	r := NewReader(store, NewVerifier(s.Public()), ReaderOptions{ReadTimeout: time.Minute})
	if err := r.Refresh(ctx, m); err != nil {
		t.Fatal(err)
	}
	n := 0
	for i := range m.Devices() {
		revoked, err := r.Revoked(m, m.IMEI(i))
		if err != nil {
			t.Fatal(err)
		}
		if revoked {
			n++
		}
		if revoked != (i%100 == 0 || i == 100_001) {
			t.Errorf("device %d is revoked: %v", i, revoked)
		}
	}
	if n != len(imeis)+1 || len(store.reads) != 1 {
		t.Errorf("%d are revoked; read was %v", n, store.reads)
	}
	history, err := r.History(ctx, m, m.IMEI(100_001))
	if err != nil || len(history) != 1 || history[0].Reason != "stolen" {
		t.Errorf("%+v, %v", history, err)
	}
}

// No object is written of a change of which one would be too large.
func TestRevocationsTooLarge(t *testing.T) {
	s, files := newSigner(t), newWriting(t)
	m := newMillion(t, s)
	begin(t, files, s, m)
	imeis := every(m, 1)[:2*revocationPart]
	reason := strings.Repeat("<", 200) // six bytes each, in JSON
	err := Revoke(t.Context(), files, s, m, imeis, reason, time.Now(), nil)
	if err == nil || !strings.Contains(err.Error(), "shorter reasons") {
		t.Error(err)
	}
	if paths, _ := files.take(); len(paths) != 0 {
		t.Errorf("%v was written", paths)
	}
	if err := Revoke(t.Context(), files, s, m, imeis, strings.Repeat("x", 200), time.Now(), nil); err != nil {
		t.Error(err)
	}
}

// The largest shard that a manifest allows fits, and the largest list.
func TestLargestObjects(t *testing.T) {
	s := newSigner(t)
	for suite, key := range map[kme.Suite]func() any{
		kme.SuiteECDSA: func() any { return newKey(t).Public() },
		kme.SuiteRSA: func() any {
			n := make([]byte, 256)
			rand.Read(n)
			n[0], n[255] = n[0]|0x80, n[255]|1
			return &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: kme.PublicExponent}
		},
	} {
		m := newMillion(t, s)
		m.Suite, m.ShardSize = suite, maxShard
		var keys []DeviceKey
		for i := range maxShard {
			keys = append(keys, DeviceKey{m.IMEI(i), key()})
		}
		shard := must.Get[*Shard](t)(NewShard(m, 0, keys, someHash))
		jws := must.Get[[]byte](t)(s.Sign(TypeShard, shard))
		t.Logf("a shard of %d keys of %s has %d bytes", maxShard, suite, len(jws))
		if err := CheckSize("x", jws); err != nil {
			t.Errorf("%s: %v", suite, err)
		}
	}
	m := newMillion(t, s)
	list := &Revocations{Lot: m.Lot, Version: 1_000_000}
	for n := range m.RevocationParts() {
		list.Parts = append(list.Parts, RevocationRef{n, 1_000_000, make(strict.Base64, 32), m.bitmap(n)})
	}
	if err := list.check(m); err != nil {
		t.Error(err)
	}
	jws := must.Get[[]byte](t)(s.Sign(TypeRevocations, list))
	t.Logf("a list of a million devices has %d bytes", len(jws))
	if err := CheckSize("x", jws); err != nil {
		t.Error(err)
	}
}

// What whoever runs the store may put in the place of a part. The reader refuses it, and what the list says stands.
func TestRevocationPartReplaced(t *testing.T) {
	ctx, s := t.Context(), newSigner(t)
	store, m := newLot(t, s, "L1")
	path, now := RevocationPartPath("L1", 0), time.Now()
	revoke := func(i int) (part []byte) {
		t.Helper()
		if err := Revoke(ctx, store, s, m, []kme.IMEI{m.IMEI(i)}, "stolen", now, nil); err != nil {
			t.Fatal(err)
		}
		part, _, err := store.Read(ctx, path)
		if err != nil {
			t.Fatal(err)
		}
		return part
	}
	sign := func(by *Signer, p *RevocationPart) []byte { return must.Get[[]byte](t)(by.Sign(TypeRevocationPart, p)) }
	entry := Revocation{IMEI: m.IMEI(5), Reason: "stolen", Time: now.UTC().Truncate(time.Second)}
	first := revoke(3)
	good := revoke(5)
	list, _, err := store.Read(ctx, RevocationsPath("L1"))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		jws  []byte
		want string
	}{
		"good":           {good, ""},
		"the one before": {first, "version 1, and is not what the list of revocations has as version 2"},
		"another of this version": {sign(s, &RevocationPart{"L1", 0, 2, []Revocation{entry}}),
			"version 2, and is not what"},
		"a later one": {sign(s,
			&RevocationPart{"L1", 0, 3, []Revocation{{IMEI: m.IMEI(3), Reason: "x", Time: entry.Time}, entry}}), ""},
		"another manufacturer's": {sign(newSigner(t), &RevocationPart{"L1", 0, 3, nil}), "pinned"},
		"the list": {must.Get[[]byte](t)(s.Sign(TypeRevocations, &Revocations{Lot: "L1", Version: 3})),
			"type"},
		"one without a version": {sign(s, &RevocationPart{"L1", 0, 0, nil}), "version 0"},
		"a device of another's part": {sign(s,
			&RevocationPart{"L1", 0, 3, []Revocation{{IMEI: must.Get[kme.IMEI](t)(kme.ParseIMEI("35209902000000"))}}}),
			"not in this part"},
		"noise": {[]byte("noise"), "compact JWS"},
	} {
		t.Run(name, func(t *testing.T) {
			put(t, store, RevocationsPath("L1"), list)
			put(t, store, path, c.jws)
			r := readerOf(store, s)
			d, err := r.Device(ctx, m, m.IMEI(3))
			if c.want == "" && (err != nil || d.Revoked == nil) || c.want != "" &&
				(err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%+v, %v", d, err)
			}
			if c.want != "" && !errors.As(err, new(*RefusedError)) {
				t.Errorf("%T", err)
			}
			if !listed(t, r, m, m.IMEI(3)) {
				t.Error("the list says otherwise")
			}
			// And the line does not build on it.
			if err := Revoke(ctx, store, s, m, []kme.IMEI{m.IMEI(3)}, "x", now, nil); (c.want == "") != (err == nil) {
				t.Errorf("the line: %v", err)
			}
		})
	}
	// The part that is cached serves on, and when the list names a later one, it does not.
	put(t, store, path, good)
	put(t, store, RevocationsPath("L1"),
		must.Get[[]byte](t)(s.Sign(TypeRevocations,
			&Revocations{Lot: "L1", Version: 50, Parts: []RevocationRef{refOf(t, s, m, good)}})))
	r := readerOf(store, s)
	if d, err := r.Device(ctx, m, m.IMEI(5)); err != nil || d.Revoked == nil {
		t.Fatal(d, err)
	}
	put(t, store, path, first)
	if d, err := r.Device(ctx, m, m.IMEI(5)); err != nil || d.Revoked == nil {
		t.Errorf("the cached part: %+v, %v", d, err)
	}
	put(t, store, path, good)
	newest := revoke(6)
	put(t, store, path, good)
	if _, err := r.Device(ctx, m, m.IMEI(6)); !errors.As(err, new(*RefusedError)) {
		t.Errorf("a list that names a later part, and the part that is cached: %v", err)
	}
	put(t, store, path, newest)
	if d, err := r.Device(ctx, m, m.IMEI(6)); err != nil || d.Revoked == nil {
		t.Errorf("%+v, %v", d, err)
	}
}

func refOf(t *testing.T, s *Signer, m *Manifest, jws []byte) RevocationRef {
	t.Helper()
	store := newMemory()
	put(t, store, RevocationPartPath(m.Lot, 0), jws)
	p := must.Get[*storedPart](t)(readPart(t.Context(), store, NewVerifier(s.Public()), m, 0, nil))
	return RevocationRef{0, p.Version, p.sum[:], p.bitmap(m)}
}

// Lists that the line would never sign.
func TestRevocationsCheck(t *testing.T) {
	m := newMillion(t, newSigner(t))
	ref := func(n int) RevocationRef { return RevocationRef{n, 1, make(strict.Base64, 32), m.bitmap(n)} }
	for name, c := range map[string]struct {
		change func(*Revocations)
		good   bool
	}{
		"good":                {func(*Revocations) {}, true},
		"the last part":       {func(r *Revocations) { r.Parts = []RevocationRef{ref(976)} }, true},
		"another lot":         {func(r *Revocations) { r.Lot = "L2" }, false},
		"no version":          {func(r *Revocations) { r.Version = 0 }, false},
		"a part twice":        {func(r *Revocations) { r.Parts = append(r.Parts, ref(1)) }, false},
		"not in order":        {func(r *Revocations) { r.Parts = append(r.Parts, ref(0)) }, false},
		"a part of no device": {func(r *Revocations) { r.Parts[1].Part = 977 }, false},
		"a negative part":     {func(r *Revocations) { r.Parts[0].Part = -1 }, false},
		"a part's version":    {func(r *Revocations) { r.Parts[0].Version = 0 }, false},
		"a short digest":      {func(r *Revocations) { r.Parts[0].SHA256 = r.Parts[0].SHA256[1:] }, false},
		"too few devices":     {func(r *Revocations) { r.Parts[0].Revoked = r.Parts[0].Revoked[1:] }, false},
		"no reason":           {func(r *Revocations) { r.Whole = &LotRevocation{Time: time.Now()} }, false},
		"no time":             {func(r *Revocations) { r.Whole = &LotRevocation{Reason: "x"} }, false},
	} {
		list := &Revocations{Lot: "L1", Version: 1, Parts: []RevocationRef{ref(0), ref(1)}}
		c.change(list)
		if err := list.check(m); (err == nil) != c.good {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// However many revoked devices are looked up, what a reader keeps of why is bounded.
func TestRevocationsCacheBound(t *testing.T) {
	const limit, parts = int64(16 << 20), 100
	s, files := newSigner(t), newWriting(t)
	m := newMillion(t, s)
	begin(t, files, s, m)
	if err := Revoke(t.Context(), files, s, m, every(m, 1)[:parts*revocationPart], strings.Repeat("stolen ", 20),
		time.Now(), nil); err != nil {
		t.Fatal(err)
	}
	_, published := files.take()
	r := NewReader(files, NewVerifier(s.Public()), ReaderOptions{Cache: NewCache(limit, nil), ReadTimeout: time.Minute})
	list := must.Get[*Revocations](t)(r.Revocations(t.Context(), m))
	heap := func() int64 {
		runtime.GC()
		runtime.GC()
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		return int64(stats.HeapAlloc)
	}
	before := heap()
	for i := range list.Parts {
		if _, err := r.part(t.Context(), m, &list.Parts[i]); err != nil {
			t.Fatal(err)
		}
	}
	r.cache.parts.CleanUp()
	grown := heap() - before
	t.Logf("%d parts of %d bytes were read with a cache of %d MiB: the heap has grown by %.1f MiB", parts,
		published/parts, limit>>20, float64(grown)/(1<<20))
	if grown > limit/8*3/2+1<<20 {
		t.Errorf("the heap has grown by %d bytes with a cache of %d", grown, limit)
	}
	runtime.KeepAlive(r)
}

// What a vector for a bound device costs here: a look at the list, in a lot of a million with 10,000 revoked.
func BenchmarkRevoked(b *testing.B) {
	s, files := newSigner(b), newWriting(b)
	m := newMillion(b, s)
	begin(b, files, s, m)
	if err := Revoke(b.Context(), files, s, m, every(m, 100), "stolen", time.Now(), nil); err != nil {
		b.Fatal(err)
	}
	files.take()
	if err := Revoke(b.Context(), files, s, m, []kme.IMEI{m.IMEI(1)}, "stolen", time.Now(), nil); err != nil {
		b.Fatal(err)
	}
	_, update := files.take()
	jws, _, err := files.Read(b.Context(), RevocationsPath("L1"))
	if err != nil {
		b.Fatal(err)
	}
	r := NewReader(files, NewVerifier(s.Public()), ReaderOptions{RevocationTTL: time.Hour})
	heap := func() float64 {
		runtime.GC()
		runtime.GC()
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		return float64(stats.HeapAlloc)
	}
	before, start := heap(), time.Now()
	if err := r.Refresh(b.Context(), m); err != nil {
		b.Fatal(err)
	}
	took, grown := time.Since(start), heap()-before
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if _, err := r.Revoked(m, m.IMEI(i*7919%1_000_000)); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(took.Microseconds()), "us/list")
	b.ReportMetric(grown/1024, "KiB/lot")
	b.ReportMetric(float64(len(jws)), "bytes/list")
	b.ReportMetric(float64(update), "bytes/revocation")
}
