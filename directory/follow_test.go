package directory

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// A hanging store takes reads while it hangs, and answers none: not even when the reader gives up.
type hanging struct {
	Store
	mu    sync.Mutex
	hung  chan struct{} // closed when it answers again; nil while it does; guarded by mu
	stuck int           // reads that it has not answered; guarded by mu
}

func (h *hanging) Read(ctx context.Context, path string) ([]byte, string, error) {
	h.mu.Lock()
	hung := h.hung
	if hung != nil {
		h.stuck++
	}
	h.mu.Unlock()
	if hung != nil {
		<-hung
		h.mu.Lock()
		h.stuck--
		h.mu.Unlock()
	}
	return h.Store.Read(ctx, path)
}

func (h *hanging) hang() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.hung = make(chan struct{})
}

func (h *hanging) answer() {
	h.mu.Lock()
	defer h.mu.Unlock()
	close(h.hung)
	h.hung = nil
}

func (h *hanging) unanswered() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.stuck
}

// tick is how often lists are read in these tests, and longer than none of them has the store answer.
const tick = 10 * time.Millisecond

// following reads a lot as a service does.
func following(t testing.TB, store Store, s *Signer, o ReaderOptions, lots ...*Manifest) *Reader {
	t.Helper()
	o.RevocationTTL = tick
	r := NewReader(store, NewVerifier(s.Public()), o)
	r.Follow(lots)
	t.Cleanup(func() { r.Follow(nil) })
	return r
}

// A dated store knows when it read a list of revoked devices last.
type dated struct {
	Store
	read atomic.Pointer[time.Time]
}

func (d *dated) Read(ctx context.Context, path string) ([]byte, string, error) {
	data, version, err := d.Store.Read(ctx, path)
	if now := time.Now(); path == RevocationsPath("L1") {
		d.read.Store(&now)
	}
	return data, version, err
}

// A list is as old as the question for it: a device may have been revoked while the answer was under way.
func TestListIsAsOldAsItsRead(t *testing.T) {
	s := newSigner(t)
	files, m := newLot(t, s, "L1")
	store := &dated{Store: files}
	r := NewReader(store, NewVerifier(s.Public()), ReaderOptions{RevocationTTL: time.Hour}) // it is read once
	r.Follow([]*Manifest{m})
	defer r.Follow(nil)
	testproc.Await(t, "the list is read", func() bool { return r.has("L1") })
	if at := r.List("L1").Read; at.After(*store.read.Load()) {
		t.Errorf("a list that was read by %v counts as one of %v", store.read.Load(), at)
	}
}

func (r *Reader) has(lot string) bool { list, _ := r.inMemory(lot); return list != nil }

// Lists are there before anybody asks for them, and are read anew; the store of one manufacturer hangs, and neither its
// own devices that are cached nor the other's wait for it.
func TestFollow(t *testing.T) {
	ctx, s, other := t.Context(), newSigner(t), newSigner(t)
	files, m := newLot(t, s, "L1")
	store := &hanging{Store: files}
	otherFiles, om := newLot(t, other, "L1")
	const timeout = time.Second
	r := following(t, store, s, ReaderOptions{ReadTimeout: timeout}, m)
	or := following(t, otherFiles, other, ReaderOptions{ReadTimeout: testproc.Patience}, om)
	testproc.Await(t, "the lists are there", func() bool { return r.has("L1") && or.has("L1") })
	cached := func() bool { d, err := r.Device(ctx, m, m.IMEI(0)); return err == nil && d.Revoked == nil }
	testproc.Await(t, "the device is read", cached)
	revoke := func(store Store, s *Signer, m *Manifest, i int) {
		t.Helper()
		if err := Revoke(ctx, store, s, m, []kme.IMEI{m.IMEI(i)}, "stolen", time.Now(), nil); err != nil {
			t.Fatal(err)
		}
	}
	revoked := func(r *Reader, m *Manifest, i int) bool {
		t.Helper()
		return must.Get[bool](t)(r.Revoked(m, m.IMEI(i)))
	}
	revoke(files, s, m, 9)
	testproc.Await(t, "the list is read again", func() bool { return revoked(r, m, 9) })
	testproc.Await(t, "the part is read", cached)

	store.hang()
	testproc.Await(t, "the list is overdue", func() bool { return len(r.Overdue()) == 1 })
	revoke(files, s, m, 8)
	revoke(otherFiles, other, om, 7)
	testproc.Await(t, "the other manufacturer's list is read again", func() bool { return revoked(or, om, 7) })
	if o := r.Overdue()[0]; o.Why != Failed || !errors.Is(o.Cause, ErrUnavailable) || len(or.Overdue()) != 0 {
		t.Errorf("%+v, the other's %+v", o, or.Overdue())
	}
	const looks = 100
	start := time.Now()
	for range looks {
		if revoked(r, m, 8) || !revoked(r, m, 9) {
			t.Fatal("it does not say what the last list says")
		}
		d, ok, err := r.Cached(m, m.IMEI(0))
		if !ok || err != nil || d.Revoked != nil {
			t.Fatalf("%+v, %v, %v", d, ok, err)
		}
	}
	if took := time.Since(start); took > looks*timeout/2 { // if each waits, twice that
		t.Errorf("%d looks at devices that are cached have taken %s", looks, took)
	}
	if n := store.unanswered(); n > 1 {
		t.Errorf("%d reads of one list wait for the store", n)
	}
	store.answer()
	testproc.Await(t, "the list is read when the store is back", func() bool {
		return revoked(r, m, 8) && len(r.Overdue()) == 0
	})

	// Nobody follows it any more.
	r.Follow(nil)
	testproc.Await(t, "it is not read any more", func() bool { // a read may be under way
		before := files.count(RevocationsPath("L1"))
		time.Sleep(10 * tick)
		return files.count(RevocationsPath("L1")) == before
	})
}

// So many wait for a store as may, each for a time; one more is told at once. A store that hangs has no more reads open
// than that.
func TestWaiting(t *testing.T) {
	ctx, s := t.Context(), newSigner(t)
	files, m := newLot(t, s, "L1")
	m.ShardSize = 1 // so that each device is a read
	store := &hanging{Store: files}
	const waiting, timeout = 3, 2 * time.Second
	r := following(t, store, s, ReaderOptions{ReadTimeout: timeout, Waiting: waiting}, m)
	testproc.Await(t, "the list is there", func() bool { return r.has("L1") })
	store.hang()
	results, begun := make(chan error), time.Now()
	for i := range waiting {
		go func() { _, err := r.Fetch(ctx, m, m.IMEI(i)); results <- err }()
	}
	testproc.Await(t, "they wait, and whatever reads the list", func() bool { return store.unanswered() == waiting+1 })
	_, err := r.Device(ctx, m, m.IMEI(9))
	if late := time.Since(begun) >= timeout; !errors.Is(err, ErrUnavailable) || // late, the others wait no more
		!late && !strings.Contains(err.Error(), "wait for it already") {
		t.Errorf("one more: %v", err)
	}
	for range waiting {
		if err := <-results; !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	}
	if _, err := r.Device(ctx, m, m.IMEI(9)); !errors.Is(err, ErrUnavailable) ||
		!strings.Contains(err.Error(), "has not answered 3 reads") {
		t.Errorf("while they hang: %v", err)
	}
	store.answer()
	testproc.Await(t, "the store is read again", func() bool {
		_, err := r.Device(ctx, m, m.IMEI(9))
		return !errors.Is(err, ErrUnavailable)
	})
}

// A list is good until its next_update, and is signed anew before.
func TestNextUpdate(t *testing.T) {
	ctx, s := t.Context(), newSigner(t)
	store, m := newLot(t, s, "L1")
	var mu sync.Mutex
	told := map[Why]int{}
	r := following(t, store, s, ReaderOptions{Overdue: func(o Overdue) { mu.Lock(); told[o.Why]++; mu.Unlock() }}, m)
	testproc.Await(t, "the list is there", func() bool { return r.has("L1") })
	sign := func(now time.Time, validity time.Duration) *Revocations {
		t.Helper()
		if err := RefreshRevocations(ctx, store, s, m, now, validity); err != nil {
			t.Fatal(err)
		}
		return must.Get[*Revocations](t)(r.ReadRevocations(ctx, m))
	}
	list := sign(time.Now().Add(-time.Hour), 30*time.Minute)
	if list.Version != 2 || list.NextUpdate.Sub(list.ThisUpdate) != 30*time.Minute {
		t.Errorf("%+v", list)
	}
	testproc.Await(t, "it is told to be late", func() bool { mu.Lock(); defer mu.Unlock(); return told[Late] > 1 })
	if o := r.Overdue(); len(o) != 1 || o[0].Why != Late || o[0].Since.IsZero() ||
		!strings.Contains(o[0].Cause.Error(), "factory lot refresh") {
		t.Errorf("%+v", o)
	}
	// It stands all the same.
	if d, err := r.Device(ctx, m, m.IMEI(0)); err != nil {
		t.Error(d, err)
	}
	// For as long as before, and what else the list says stays.
	if err := RevokeLot(ctx, store, s, m, "leaked", time.Now().Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	if list = sign(time.Now(), 0); list.Version != 4 || list.NextUpdate.Sub(list.ThisUpdate) != 30*time.Minute ||
		list.Whole == nil {
		t.Errorf("%+v", list)
	}
	testproc.Await(t, "it is not late any more", func() bool { return len(r.Overdue()) == 0 })

	// One of before there was next_update is late, and becomes one that has it.
	put(t, store, RevocationsPath("L1"),
		must.Get[[]byte](t)(s.Sign(TypeRevocations, &Revocations{Lot: "L1", Version: 9, Whole: list.Whole})))
	testproc.Await(t, "it is late", func() bool { o := r.Overdue(); return len(o) == 1 && o[0].Why == Late })
	if list = sign(time.Now(), 0); list.Version != 10 || list.NextUpdate.Sub(list.ThisUpdate) != DefaultValidity {
		t.Errorf("%+v", list)
	}
	for _, d := range []time.Duration{-time.Hour, 0, time.Millisecond, 400 * 24 * time.Hour} {
		if CheckValidity(d) == nil {
			t.Errorf("a list is good for %s", d)
		}
	}
	now := time.Now()
	if err := (&Revocations{Lot: "L1", Version: 1, ThisUpdate: now, NextUpdate: now}).check(m); err == nil {
		t.Error("a list that was never good")
	}
}

// Every lot has a list: where there is none, the line does not begin one by the way.
func TestBeginRevocations(t *testing.T) {
	ctx, s, now := t.Context(), newSigner(t), time.Now()
	store := newMemory()
	m := newManifest(t, s, "L1")
	for name, err := range map[string]error{
		"revoke":   Revoke(ctx, store, s, m, []kme.IMEI{m.IMEI(1)}, "x", now, nil),
		"lot":      RevokeLot(ctx, store, s, m, "x", now),
		"refresh":  RefreshRevocations(ctx, store, s, m, now, time.Hour),
		"complete": CompleteRevocations(ctx, store, s, m, []int{0}, now),
	} {
		if !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "lot create") {
			t.Errorf("%s: %v", name, err)
		}
	}
	var all sync.WaitGroup
	for range 5 {
		all.Go(func() {
			if err := BeginRevocations(ctx, store, s, m, now, time.Hour); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	first, _, err := store.Read(ctx, RevocationsPath("L1"))
	if err != nil {
		t.Fatal(err)
	}
	list := must.Get[*Revocations](t)(parseRevocations(NewVerifier(s.Public()), m, first))
	if list.Version != 1 || list.Whole != nil || len(list.Parts) != 0 ||
		!list.ThisUpdate.Equal(now.Truncate(time.Second)) ||
		list.NextUpdate.Sub(list.ThisUpdate) != time.Hour {
		t.Errorf("%+v", list)
	}
	begin(t, store, s, m)
	if again, _, _ := store.Read(ctx, RevocationsPath("L1")); !bytes.Equal(again, first) {
		t.Error("it was begun twice")
	}
}

// notes is a Memory.
type notes struct {
	mu    sync.Mutex
	marks map[string][]ListMark // guarded by mu
	asked int                   // guarded by mu
	err   error                 // guarded by mu
	kept  []byte                // guarded by mu
}

func (n *notes) Keep(_ string, jws []byte) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.kept = jws
	return nil
}

func (n *notes) Kept(string) ([]byte, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.kept, nil
}

func (n *notes) Last(_ context.Context, lot string) (mark ListMark, found bool, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked++
	if all := n.marks[lot]; len(all) > 0 {
		mark, found = all[len(all)-1], true
	}
	return mark, found, n.err
}

func (n *notes) Note(_ context.Context, lot string, mark ListMark) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.err == nil {
		n.marks[lot] = append(n.marks[lot], mark)
	}
	return n.err
}

func (n *notes) fail(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.err = err
}

func (n *notes) count() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.marks["L1"])
}

// A reader that is started anew takes no list of before the last one that was believed.
func TestMemory(t *testing.T) {
	ctx, s := t.Context(), newSigner(t)
	store, m := newLot(t, s, "L1")
	memory := &notes{marks: map[string][]ListMark{}}
	start := func() *Reader {
		return NewReader(store, NewVerifier(s.Public()), ReaderOptions{RevocationTTL: time.Nanosecond, Memory: memory})
	}
	read := func() []byte {
		t.Helper()
		jws, _, err := store.Read(ctx, RevocationsPath("L1"))
		if err != nil {
			t.Fatal(err)
		}
		return jws
	}
	revoke := func(i int) {
		t.Helper()
		if err := Revoke(ctx, store, s, m, []kme.IMEI{m.IMEI(i)}, "stolen", time.Now(), nil); err != nil {
			t.Fatal(err)
		}
	}
	first, r := read(), start()
	for range 5 {
		if err := r.Refresh(ctx, m); err != nil {
			t.Fatal(err)
		}
	}
	if n := memory.count(); n != 1 || memory.asked != 7 { // at each read, and twice as it was noted
		t.Errorf("one list was noted %d times, and asked for %d times", n, memory.asked)
	}
	revoke(1)
	second := read()
	if err := errors.Join(r.Refresh(ctx, m), start().Refresh(ctx, m)); err != nil || memory.count() != 2 {
		t.Errorf("%v, %d notes", err, memory.count())
	}
	wrong := func(name string, r *Reader, why Why) {
		t.Helper()
		err := r.Refresh(ctx, m)
		if o := r.Overdue(); err == nil || len(o) != 1 || o[0].Why != why {
			t.Errorf("%s: %v, %+v", name, err, o)
		}
		if _, err := r.Device(ctx, m, m.IMEI(1)); err == nil {
			t.Errorf("%s: a device is known", name)
		}
	}
	// The copy of the last list stands meanwhile, if there is one that is the last.
	stands := func(name string) {
		t.Helper()
		r := start()
		r.Refresh(ctx, m)
		if revoked, err := r.Revoked(m, m.IMEI(1)); err != nil || !revoked {
			t.Errorf("%s, with a copy: revoked %v, error %v", name, revoked, err)
		}
		r = start()
		r.followed = map[string]bool{m.Lot: true} // as Follow has it before its first read has ended
		if d, err := r.Device(ctx, m, m.IMEI(1)); err != nil || d.Revoked == nil {
			t.Errorf("%s, with a copy, and followed: %+v, error %v", name, d.Revoked, err)
		}
	}
	kept := memory.kept
	lost := func(copy []byte) {
		memory.mu.Lock()
		defer memory.mu.Unlock()
		memory.kept = copy
	}
	put(t, store, RevocationsPath("L1"), first)
	stands("the first list again")
	remove(t, store, RevocationsPath("L1"))
	stands("none")
	lost(first)
	put(t, store, RevocationsPath("L1"), first)
	wrong("the first list again", start(), Rollback)
	put(t, store, RevocationsPath("L1"),
		must.Get[[]byte](t)(s.Sign(TypeRevocations, &Revocations{Lot: "L1", Version: 2})))
	wrong("another of this version", start(), Rollback)
	remove(t, store, RevocationsPath("L1"))
	lost(nil)
	wrong("none", start(), Withheld)
	lost(kept)
	put(t, store, RevocationsPath("L1"), second)
	if err := start().Refresh(ctx, m); err != nil {
		t.Error(err)
	}
	if n := memory.count(); n != 2 {
		t.Errorf("%d notes of two lists", n)
	}

	// Another process has seen a later list than this one's store has.
	r = start()
	if err := r.Refresh(ctx, m); err != nil {
		t.Fatal(err)
	}
	if err := memory.Note(ctx, "L1", ListMark{9, make(strict.Base64, 32)}); err != nil {
		t.Fatal(err)
	}
	was := r.List("L1").Read
	if err := r.Refresh(ctx, m); overdueFor("", time.Time{}, err).Why != Rollback || r.List("L1").Read != was {
		t.Errorf("the same list, after another process saw a later one: %v, read %v, then %v", err, was,
			r.List("L1").Read)
	}
	revoke(2)
	if err := r.Refresh(ctx, m); overdueFor("", time.Time{}, err).Why != Rollback {
		t.Errorf("a list of before another process's: %v", err)
	}
	put(t, store, RevocationsPath("L1"), second)
	memory.mu.Lock()
	memory.marks["L1"] = memory.marks["L1"][:2]
	memory.mu.Unlock()

	// While the memory is away, a first list is not believed; a later one is, and noted when the memory is back.
	r = start()
	if err := r.Refresh(ctx, m); err != nil {
		t.Fatal(err)
	}
	memory.fail(errDown)
	wrong("a first list", start(), Failed)
	revoke(3)
	if err := r.Refresh(ctx, m); !errors.Is(err, errDown) || !must.Get[bool](t)(r.Revoked(m, m.IMEI(3))) ||
		len(r.Overdue()) != 1 {
		t.Errorf("a later list: %v, %+v", err, r.Overdue())
	}
	memory.fail(nil)
	if err := r.Refresh(ctx, m); err != nil || len(r.Overdue()) != 0 || memory.count() != 3 {
		t.Errorf("%v, %+v, %d notes", err, r.Overdue(), memory.count())
	}
}
