package directory

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// A list that cannot be read, or is not believed, does not make the one before it younger, and each try is told.
func TestOverdue(t *testing.T) {
	s := newSigner(t)
	store, m := newLot(t, s, "L1")
	ctx, now := t.Context(), time.Now()
	var told []Overdue
	const ttl = 20 * time.Millisecond
	o := ReaderOptions{RevocationTTL: ttl, Overdue: func(d Overdue) { told = append(told, d) }}
	r := NewReader(store, NewVerifier(s.Public()), o)
	look := func() error {
		t.Helper()
		time.Sleep(2 * ttl)
		_, _, err := r.RevocationsOf(ctx, m, m.IMEI(3))
		return err
	}
	// Without a list there is no answer.
	store.down.Store(true)
	if err := look(); !errors.Is(err, errDown) || len(told) != 1 ||
		told[0] != (Overdue{"L1", Failed, time.Time{}, errDown}) {
		t.Fatalf("%v, %+v", err, told)
	}
	store.down.Store(false)
	if err := errors.Join(look(), Revoke(ctx, store, s, m, []kme.IMEI{m.IMEI(3)}, "stolen", now, nil),
		look()); err != nil {
		t.Fatal(err)
	}
	if got := r.Overdue(); len(got) != 0 || len(told) != 1 {
		t.Errorf("%+v", got)
	}
	read := time.Now()
	good, _, err := store.Read(ctx, RevocationsPath("L1"))
	if err != nil {
		t.Fatal(err)
	}
	put := func(jws []byte) { put(t, store, RevocationsPath("L1"), jws) }
	older, err := s.Sign(TypeRevocations, &Revocations{Lot: "L1", Version: 1})
	if err != nil {
		t.Fatal(err)
	}
	anothers, err := newSigner(t).Sign(TypeRevocations, &Revocations{Lot: "L1", Version: 9})
	if err != nil {
		t.Fatal(err)
	}
	same := must.Get[[]byte](t)(s.Sign(TypeRevocations, &Revocations{Lot: "L1", Version: 2}))
	for name, c := range map[string]struct {
		harm func()
		why  Why
	}{
		"away":                    {func() { store.down.Store(true) }, Failed},
		"an older one":            {func() { put(older) }, Rollback},
		"another of this version": {func() { put(same) }, Rollback},
		"another's":               {func() { put(anothers) }, Refused},
		"noise":                   {func() { put([]byte("noise")) }, Refused},
		"a panic on read":         {func() { store.panics.Store(true) }, Failed},
		"gone":                    {func() { remove(t, store, RevocationsPath("L1")) }, Withheld},
	} {
		told = nil
		c.harm()
		for range 2 {
			if err := look(); err != nil {
				t.Errorf("%s: the last list does not stand: %v", name, err)
			}
		}
		got := r.Overdue()
		if len(told) != 2 || len(got) != 1 || got[0].Lot != "L1" || got[0].Why != c.why || told[1].Why != c.why {
			t.Errorf("%s: told %+v, overdue %+v", name, told, got)
		} else if !got[0].Since.Before(read) {
			t.Errorf("%s: the list that stands is said to be of %s", name, got[0].Since)
		}
		store.down.Store(false)
		store.panics.Store(false)
		put(good)
		if err := look(); err != nil || len(r.Overdue()) != 0 {
			t.Errorf("after %s: %v, %+v", name, err, r.Overdue())
		}
		read = time.Now()
	}
}

// A list of the same version with another content is not believed either: of each version, the line publishes one.
func TestRevocationsSameVersion(t *testing.T) {
	ctx, s := t.Context(), newSigner(t)
	store, m := newLot(t, s, "L1")
	if err := Revoke(ctx, store, s, m, []kme.IMEI{m.IMEI(3)}, "stolen", time.Now(), nil); err != nil {
		t.Fatal(err)
	}
	r := readerOf(store, s)
	look := func() {
		t.Helper()
		if !listed(t, r, m, m.IMEI(3)) {
			t.Error("it is not revoked")
		}
	}
	look()
	put(t, store, RevocationsPath("L1"),
		must.Get[[]byte](t)(s.Sign(TypeRevocations, &Revocations{Lot: "L1", Version: 2})))
	look()
	if len(r.Overdue()) != 1 {
		t.Error("it was believed")
	}
}

// A panic of who is told of overdue lists ends neither the process nor the reading.
func TestOverduePanics(t *testing.T) {
	testproc.Logged(t)
	s := newSigner(t)
	store, m := newLot(t, s, "L1")
	store.down.Store(true)
	var told atomic.Int64
	before := panics.Count()
	following(t, store, s, ReaderOptions{Overdue: func(Overdue) { told.Add(1); panic("who is told") }}, m)
	testproc.Await(t, "it goes on", func() bool { return told.Load() > 1 && panics.Count() > before+1 })
}

// A panicking Memory is a Memory of a store that panics.
type panicking struct{ Memory }

func (panicking) Last(context.Context, string) (ListMark, bool, error) { panic("a memory's") }

// Where nothing can be read, and the Memory panics, that is why there is no list: also on Follow's goroutines, where a
// panic would end the process.
func TestMemoryPanics(t *testing.T) {
	s := newSigner(t)
	store, m := newLot(t, s, "L1")
	store.down.Store(true)
	r := following(t, store, s, ReaderOptions{Memory: panicking{}}, m)
	testproc.Await(t, "the list is overdue by a panic", func() bool {
		all := r.Overdue()
		return len(all) == 1 && all[0].Why == Failed && panics.Of(all[0].Cause) != nil
	})
}

// A meanwhile does something when it has read.
type meanwhile struct {
	Store
	do atomic.Pointer[func(context.Context)]
}

func (m *meanwhile) Read(ctx context.Context, path string) ([]byte, string, error) {
	data, version, err := m.Store.Read(ctx, path)
	if do := m.do.Load(); do != nil {
		(*do)(ctx)
	}
	return data, version, errors.Join(err, ctx.Err())
}

// A list that is replaced, and noted by another process, while it is read is not put back: nobody is told that it is.
func TestNotedMeanwhile(t *testing.T) {
	ctx, s := t.Context(), newSigner(t)
	files, m := newLot(t, s, "L1")
	memory := &notes{marks: map[string][]ListMark{}}
	reader := func(store Store, o ReaderOptions) *Reader {
		o.RevocationTTL, o.Memory = time.Nanosecond, memory
		return NewReader(store, NewVerifier(s.Public()), o)
	}
	store := &meanwhile{Store: files}
	one := reader(store, ReaderOptions{Overdue: func(o Overdue) { t.Errorf("told: %+v", o) }})
	another := reader(files, ReaderOptions{})
	for i := range 3 { // of the first, nothing is noted yet
		revoke := func(ctx context.Context) {
			store.do.Store(nil)
			if err := errors.Join(Revoke(ctx, files, s, m, []kme.IMEI{m.IMEI(i)}, "stolen", time.Now(), nil),
				another.Refresh(ctx, m)); err != nil {
				t.Error(err)
			}
		}
		store.do.Store(&revoke)
		for range 2 {
			if err := one.Refresh(ctx, m); err != nil {
				t.Error(err)
			}
		}
		if !must.Get[bool](t)(one.Revoked(m, m.IMEI(i))) || one.List("L1") != (ListState{Lot: "L1", Version: i + 2,
			Read: one.List("L1").Read, NextUpdate: one.List("L1").NextUpdate}) {
			t.Errorf("revocation %d: %+v", i, one.List("L1"))
		}
	}
	if n := memory.count(); n != 3 {
		t.Errorf("%d notes of three lists: %v", n, memory.marks)
	}
}

// A list that the Memory cannot be asked about does not count as read: another process may have noted a later one.
func TestMemoryAway(t *testing.T) {
	ctx, s := t.Context(), newSigner(t)
	store, m := newLot(t, s, "L1")
	memory := &notes{marks: map[string][]ListMark{}}
	r := NewReader(store, NewVerifier(s.Public()), ReaderOptions{RevocationTTL: time.Nanosecond, Memory: memory})
	if err := r.Refresh(ctx, m); err != nil {
		t.Fatal(err)
	}
	read := r.List("L1").Read
	memory.fail(errDown)
	if err := r.Refresh(ctx, m); !errors.Is(err, errDown) || r.List("L1").Read != read || len(r.Overdue()) != 1 {
		t.Errorf("%v, %+v, read %v before", err, r.List("L1"), read)
	}
	memory.fail(nil)
	if err := r.Refresh(ctx, m); err != nil || !r.List("L1").Read.After(read) || len(r.Overdue()) != 0 {
		t.Errorf("%v, %+v, read %v before", err, r.List("L1"), read)
	}
}

// After a restart, the copies of all lots are in use at once, however many lots a silent store is asked for.
func TestCopiesComeFirst(t *testing.T) {
	s := newSigner(t)
	files, m := newLot(t, s, "L1")
	memory := &notes{marks: map[string][]ListMark{}}
	o := ReaderOptions{ReadTimeout: time.Hour, Memory: memory}
	if err := NewReader(files, NewVerifier(s.Public()), o).Refresh(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	hang := func(ctx context.Context) { <-ctx.Done() }
	store := &meanwhile{Store: files}
	store.do.Store(&hang)
	lots := make([]*Manifest, 50) // whose lists were never read, and then one that was
	for i := range lots {
		lots[i] = newManifest(t, s, fmt.Sprint("N", i))
	}
	r := NewReader(store, NewVerifier(s.Public()), o)
	r.Follow(append(lots, m))
	defer r.Follow(nil)
	testproc.Await(t, "the copy is in use", func() bool { return r.List("L1").Version == 1 })
}

// A lookup that waits for a store in vain says that the store is not available, and the list is overdue, which is told
// once for all who wait.
func TestListIsSilent(t *testing.T) {
	s := newSigner(t)
	files, m := newLot(t, s, "L1")
	store := &meanwhile{Store: files}
	var told atomic.Int64
	r := NewReader(store, NewVerifier(s.Public()), ReaderOptions{RevocationTTL: 300 * time.Millisecond, Strict: true,
		ReadTimeout: 200 * time.Millisecond, Overdue: func(Overdue) { told.Add(1) }})
	testproc.Await(t, "the shard is in memory", func() bool {
		_, err := r.Device(t.Context(), m, m.IMEI(0))
		return err == nil
	})
	time.Sleep(r.o.RevocationTTL)
	told.Store(0)
	var reads atomic.Int64
	hang := func(ctx context.Context) { reads.Add(1); <-ctx.Done() }
	store.do.Store(&hang)
	errs := make(chan error)
	for range 3 {
		go func() { _, err := r.Device(t.Context(), m, m.IMEI(0)); errs <- err }()
	}
	for range 3 {
		if err := <-errs; !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrNotCurrent) {
			t.Error(err)
		}
	}
	if n := told.Load(); len(r.Overdue()) != 1 || n < 1 || n > reads.Load() {
		t.Errorf("%d reads in vain were told %d times; overdue %+v", reads.Load(), n, r.Overdue())
	}
}
