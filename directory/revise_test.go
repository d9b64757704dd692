package directory

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testkeys"
	"github.com/kmehsm/kmehsm/kme"
)

func TestRevocations(t *testing.T) {
	s := newSigner(t)
	store, m := newLot(t, s, "L1")
	ctx, now := t.Context(), time.Now()
	const ttl = 50 * time.Millisecond
	r := NewReader(store, NewVerifier(s.Public()), ReaderOptions{RevocationTTL: ttl})
	revoked := func(i int) bool {
		t.Helper()
		time.Sleep(2 * ttl)
		d, err := r.Device(ctx, m, m.IMEI(i))
		if err != nil {
			t.Fatal(err)
		}
		return d.Revoked != nil
	}
	if revoked(3) {
		t.Error("revoked before it was")
	}
	for range 2 {
		if err := Revoke(ctx, store, s, m, []kme.IMEI{m.IMEI(3)}, "stolen", now, nil); err != nil {
			t.Fatal(err)
		}
	}
	if !revoked(3) || revoked(2) {
		t.Error("the list does not reach a cached shard, or reaches the wrong device")
	}
	old, _, err := store.Read(ctx, RevocationsPath("L1"))
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for _, i := range []int{1, 5, 0, 9} {
		all.Go(func() {
			if err := Revoke(ctx, store, s, m, []kme.IMEI{m.IMEI(i)}, "lost", now, nil); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	list, err := r.ReadRevocations(ctx, m)
	if err != nil || len(list.Parts) != 1 || list.Parts[0].Version != 5 ||
		fmt.Sprintf("%x", []byte(list.Parts[0].Revoked)) != "d440" {
		t.Fatalf("%+v, %v", list, err)
	}
	if !revoked(9) {
		t.Error("9 is not revoked")
	}
	// The store goes back to the first list, and then away: what was seen last stands.
	_, version, _ := store.Read(ctx, RevocationsPath("L1"))
	if err := store.Update(ctx, RevocationsPath("L1"), old, version); err != nil {
		t.Fatal(err)
	}
	if !revoked(9) {
		t.Error("an older list was believed")
	}
	store.down.Store(true)
	if !revoked(9) || revoked(2) {
		t.Error("the list went with the store")
	}
	stranger, _ := kme.ParseIMEI("35209902000000")
	store.down.Store(false)
	for name, err := range map[string]error{
		"another lot's device": Revoke(ctx, store, s, m, []kme.IMEI{stranger}, "x", now, nil),
		"no reason":            Revoke(ctx, store, s, m, []kme.IMEI{m.IMEI(2)}, " ", now, nil),
		"a long reason":        Revoke(ctx, store, s, m, []kme.IMEI{m.IMEI(2)}, strings.Repeat("x", 201), now, nil),
		"another's list":       Revoke(ctx, store, newSigner(t), m, []kme.IMEI{m.IMEI(2)}, "x", now, nil),
	} {
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// A device that came back has the key that it was issued last; a revocation after that is of that key too.
func TestReissue(t *testing.T) {
	ctx, s := t.Context(), newSigner(t)
	store, m := newLot(t, s, "L1")
	imei, now := m.IMEI(3), time.Now()
	device := func() Device {
		t.Helper()
		d, err := NewReader(store, NewVerifier(s.Public()), ReaderOptions{}).Device(ctx, m, imei)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	same := func(a, b crypto.PublicKey) bool { return a.(*ecdsa.PublicKey).Equal(b) }
	first, second, third := device().Key, DeviceKey{imei, newKey(t).Public()}, DeviceKey{imei, newKey(t).Public()}
	step := func(err error, key crypto.PublicKey, revoked bool, history int) {
		t.Helper()
		if d := device(); err != nil || !same(d.Key, key) || (d.Revoked != nil) != revoked ||
			len(d.History) != history {
			t.Errorf("%+v, %v", d, err)
		}
		if got := listed(t, readerOf(store, s), m, imei); got != revoked {
			t.Errorf("the list alone: %v", got)
		}
	}
	if err := Revoke(ctx, store, s, m, []kme.IMEI{m.IMEI(5)}, "stolen", now, nil); err != nil {
		t.Fatal(err)
	}
	step(nil, first, false, 0)
	if d := device(); !bytes.Equal(d.Package, someHash) {
		t.Errorf("the package of the first key is %x", d.Package)
	}
	anotherHash := bytes.Repeat([]byte{1}, sha256.Size)
	step(Reissue(ctx, store, s, m, second, someHash, "return 1", now), second.Key, false, 1)
	step(Reissue(ctx, store, s, m, second, someHash, "return 1", now), second.Key, false, 1)
	step(Revoke(ctx, store, s, m, []kme.IMEI{imei}, "stolen", now, nil), second.Key, true, 2)
	step(Revoke(ctx, store, s, m, []kme.IMEI{imei}, "stolen", now, nil), second.Key, true, 2)
	step(Reissue(ctx, store, s, m, third, anotherHash, "return 2", now), third.Key, false, 3)
	if d := device(); !bytes.Equal(d.Package, anotherHash) {
		t.Errorf("the package of the key issued last is %x", d.Package)
	}
	if d, err := NewReader(store, NewVerifier(s.Public()), ReaderOptions{}).Device(ctx, m, m.IMEI(5)); err != nil ||
		d.Revoked == nil {
		t.Errorf("the other device: %+v, %v", d, err)
	}
	stranger, _ := kme.ParseIMEI("35209902000000")
	rsaKey, err := testkeys.RSA(2048)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]DeviceKey{"another lot's device": {stranger, newKey(t).Public()},
		"a key of another suite": {imei, &rsaKey.PublicKey}} {
		if err := Reissue(ctx, store, s, m, key, someHash, "x", now); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	err = Reissue(ctx, store, s, m, DeviceKey{imei, newKey(t).Public()}, nil, "x", now)
	if err == nil || !strings.Contains(err.Error(), "package has 0 bytes") {
		t.Errorf("a key of no package: %v", err)
	}
	// Parts that the line would never sign.
	entry := func(n int, key *DeviceKey) Revocation {
		r := Revocation{m.IMEI(n), "x", now.UTC(), key, nil}
		if key != nil {
			r.Package = someHash
		}
		return r
	}
	short, alone := entry(3, &DeviceKey{imei, newKey(t).Public()}), entry(3, nil)
	short.Package, alone.Package = someHash[1:], someHash
	for name, part := range map[string]*RevocationPart{
		"another device's key": {"L1", 0, 99, []Revocation{entry(3, &DeviceKey{m.IMEI(4), newKey(t).Public()})}},
		"revoked twice":        {"L1", 0, 99, []Revocation{entry(3, nil), entry(3, nil)}},
		"not in order":         {"L1", 0, 99, []Revocation{entry(4, nil), entry(3, nil)}},
		"a key of no suite":    {"L1", 0, 99, []Revocation{entry(3, &DeviceKey{imei, &rsaKey.PublicKey})}},
		"a hash cut short":     {"L1", 0, 99, []Revocation{short}},
		"a hash without a key": {"L1", 0, 99, []Revocation{alone}},
		"another lot's":        {"L2", 0, 99, nil},
		"another part":         {"L1", 1, 99, nil},
	} {
		put(t, store, RevocationPartPath("L1", 0), must.Get[[]byte](t)(s.Sign(TypeRevocationPart, part)))
		if _, err := NewReader(store, NewVerifier(s.Public()), ReaderOptions{}).Device(ctx, m, imei); !errors.As(err,
			new(*RefusedError)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// writing notes what is written where, and fails the update that fail names.
type writing struct {
	Store
	mu      sync.Mutex
	written map[string]int // bytes by path
	fail    string
}

var errKilled = errors.New("killed")

func (w *writing) Update(ctx context.Context, path string, data []byte, version string) error {
	if path == w.fail {
		return errKilled
	}
	err := w.Store.Update(ctx, path, data, version)
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil {
		w.written[path] += len(data)
	}
	return err
}

func (w *writing) take() (paths []string, bytes int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for path, n := range w.written {
		paths, bytes = append(paths, path), bytes+n
	}
	clear(w.written)
	slices.Sort(paths)
	return paths, bytes
}

func newWriting(t testing.TB) *writing {
	t.Helper()
	return &writing{Store: newMemory(), written: map[string]int{}}
}

// A run that is killed between a part and the list leaves what readers take; the same command finishes it, and so does
// CompleteRevocations.
func TestRevokeKilled(t *testing.T) {
	for name, finish := range map[string]func(store Store, s *Signer, m *Manifest) error{
		"the same again": func(store Store, s *Signer, m *Manifest) error {
			return Revoke(t.Context(), store, s, m, []kme.IMEI{m.IMEI(4)}, "stolen", time.Now(), nil)
		},
		"another device of the part": func(store Store, s *Signer, m *Manifest) error {
			return Revoke(t.Context(), store, s, m, []kme.IMEI{m.IMEI(5)}, "stolen", time.Now(), nil)
		},
		"complete": func(store Store, s *Signer, m *Manifest) error {
			return CompleteRevocations(t.Context(), store, s, m, []int{0}, time.Now())
		},
	} {
		for _, earlier := range []bool{false, true} {
			s := newSigner(t)
			store, m := newLot(t, s, "L1")
			files := &writing{Store: store, written: map[string]int{}}
			if earlier {
				if err := Revoke(t.Context(), files, s, m, []kme.IMEI{m.IMEI(1)}, "stolen", time.Now(),
					nil); err != nil {
					t.Fatal(err)
				}
			}
			files.fail = RevocationsPath("L1")
			if err := Revoke(t.Context(), files, s, m, []kme.IMEI{m.IMEI(4)}, "stolen", time.Now(),
				nil); !errors.Is(err, errKilled) {
				t.Fatal(err)
			}
			files.fail = ""
			r := readerOf(store, s)
			look := func(list bool) {
				t.Helper()
				if revoked := listed(t, r, m, m.IMEI(4)); revoked != list {
					t.Errorf("%s: %v", name, revoked)
				}
				if d, err := r.Device(t.Context(), m, m.IMEI(4)); (d.Revoked != nil) != (list || earlier) ||
					err != nil {
					t.Errorf("%s: %+v, %v", name, d, err)
				}
				whole := must.Get[*Revocations](t)(r.ReadRevocations(t.Context(), m))
				parts, strays, err := r.RevocationParts(t.Context(), m, whole)
				if err != nil || !slices.Equal(parts, []int{0}) || len(strays) != 0 {
					t.Errorf("%s: %v %v %v", name, parts, strays, err)
				}
				if _, complete, err := r.CompareRevocationPart(t.Context(), m, whole, 0); complete != list ||
					err != nil {
					t.Errorf("%s: complete %v, %v", name, complete, err)
				}
			}
			look(false)
			if err := finish(files, s, m); err != nil {
				t.Fatal(err)
			}
			look(true)
		}
	}
}

// Many revoke at once, in the same parts: nothing is lost, and the list and its parts agree.
func TestRevokeAtOnce(t *testing.T) {
	ctx, s, files := t.Context(), newSigner(t), newWriting(t)
	m := newMillion(t, s)
	begin(t, files, s, m)
	var all sync.WaitGroup
	for i := range 6 {
		all.Go(func() {
			imeis := []kme.IMEI{m.IMEI(i), m.IMEI(1023 - i), m.IMEI(1024 + i), m.IMEI(999_999 - i)}
			if i%2 == 0 {
				slices.Reverse(imeis)
			}
			if err := Revoke(ctx, files, s, m, imeis, "stolen", time.Now(), nil); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	r := readerOf(files, s)
	list := must.Get[*Revocations](t)(r.ReadRevocations(ctx, m))
	n := 0
	for i := range m.Devices() {
		if list.Revokes(i) {
			n++
		}
	}
	if n != 24 || len(list.Parts) != 3 {
		t.Errorf("%d are revoked, in %d parts", n, len(list.Parts))
	}
	for _, ref := range list.Parts {
		if _, complete, err := r.CompareRevocationPart(ctx, m, list, ref.Part); !complete || err != nil {
			t.Errorf("part %d: %v, %v", ref.Part, complete, err)
		}
	}
}

// A whole lot is revoked for good.
func TestRevokeLot(t *testing.T) {
	ctx, s := t.Context(), newSigner(t)
	store, m := newLot(t, s, "L1")
	second := DeviceKey{m.IMEI(3), newKey(t).Public()}
	r := readerOf(store, s)
	if err := errors.Join(
		Reissue(ctx, store, s, m, second, someHash, "return 1", time.Now()),
		Revoke(ctx, store, s, m, []kme.IMEI{m.IMEI(5)}, "stolen", time.Now(), nil)); err != nil {
		t.Fatal(err)
	}
	before, _, err := store.Read(ctx, RevocationsPath("L1"))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := RevokeLot(ctx, store, s, m, " P and Q have leaked ", time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	list := must.Get[*Revocations](t)(r.ReadRevocations(ctx, m))
	if list.Version != 4 || list.Whole == nil || list.Whole.Reason != "P and Q have leaked" || list.Refusal() == nil {
		t.Errorf("%+v", list)
	}
	all := func() {
		t.Helper()
		for i := range m.Devices() {
			revoked := listed(t, r, m, m.IMEI(i))
			d, err := r.Device(ctx, m, m.IMEI(i))
			if !revoked || d.Revoked == nil || d.Revoked.Reason != "P and Q have leaked" || d.Lot == nil || err != nil {
				t.Errorf("device %d: %v, %+v, %v", i, revoked, d, err)
			}
		}
	}
	all()
	// A device of the lot is revoked already, and gets no new key.
	if err := Revoke(ctx, store, s, m, []kme.IMEI{m.IMEI(1)}, "stolen", time.Now(), nil); err != nil {
		t.Error(err)
	}
	if err := Reissue(ctx, store, s, m, second, someHash, "return 2", time.Now()); err == nil ||
		!strings.Contains(err.Error(), "lot L1 is revoked since") {
		t.Error(err)
	}
	if again := must.Get[*Revocations](t)(r.ReadRevocations(ctx, m)); again.Version != list.Version {
		t.Errorf("version %d", again.Version)
	}
	// Neither an older list, nor a later one that does not know it, takes it back.
	put(t, store, RevocationsPath("L1"), before)
	all()
	put(t, store, RevocationsPath("L1"),
		must.Get[[]byte](t)(s.Sign(TypeRevocations, &Revocations{Lot: "L1", Version: 9})))
	all()
	if got := r.Overdue(); len(got) != 1 || !strings.Contains(got[0].Cause.Error(), "for good") {
		t.Errorf("%+v", got)
	}
	for _, reason := range []string{"", " ", strings.Repeat("x", 201), "two\nlines", "\xff"} {
		if err := RevokeLot(ctx, store, s, m, reason, time.Now()); err == nil {
			t.Errorf("the reason %q", reason)
		}
	}
}
