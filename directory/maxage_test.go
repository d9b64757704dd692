package directory

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// With MaxAge, nothing is said by a list that is older, or was to be replaced longer ago; without, the last one stands.
// A Strict reader says nothing by a list that is not the last one.
func TestMaxAge(t *testing.T) {
	ctx, s := t.Context(), newSigner(t)
	const age = 100 * time.Millisecond
	type answer struct{ device, revoked error }
	ask := func(r *Reader, m *Manifest) answer {
		_, derr := r.Device(ctx, m, m.IMEI(0))
		_, rerr := r.Revoked(m, m.IMEI(0))
		return answer{derr, rerr}
	}
	for name, harm := range map[string]func(store *counting, m *Manifest){
		"the store is away": func(store *counting, _ *Manifest) { store.down.Store(true) },
		"it is withheld":    func(store *counting, m *Manifest) { remove(t, store, RevocationsPath(m.Lot)) },
		"it is late": func(store *counting, m *Manifest) {
			if err := RefreshRevocations(ctx, store, s, m, time.Now().Add(-time.Hour), time.Minute); err != nil {
				t.Fatal(err)
			}
		},
		"it is of before there was next_update": func(store *counting, m *Manifest) {
			put(t, store, RevocationsPath(m.Lot),
				must.Get[[]byte](t)(s.Sign(TypeRevocations, &Revocations{Lot: m.Lot, Version: 9})))
		},
	} {
		t.Run(name, func(t *testing.T) {
			store, m := newLot(t, s, "L1")
			strict := following(t, store, s, ReaderOptions{MaxAge: time.Hour}, m)
			lax := following(t, store, s, ReaderOptions{}, m)
			last := following(t, store, s, ReaderOptions{Strict: true}, m)
			for _, r := range []*Reader{strict, lax, last} {
				testproc.Await(t, "all is well", func() bool { return r.has("L1") && ask(r, m) == answer{} })
			}
			strict.o.MaxAge = age // nobody reads it meanwhile but this goroutine
			harm(store, m)
			testproc.Await(t, "nothing is said any more", func() bool {
				a := ask(strict, m)
				return a.device != nil && a.revoked != nil &&
					strings.Contains(a.revoked.Error(), "max_revocation_age") &&
					strings.Contains(a.device.Error(), "max_revocation_age")
			})
			testproc.Await(t, "the list is overdue", func() bool { return len(lax.Overdue()) == 1 })
			if a := ask(lax, m); a != (answer{}) {
				t.Errorf("without MaxAge: %+v", a)
			}
			testproc.Await(t, "it is overdue for the Strict one", func() bool { return len(last.Overdue()) == 1 })
			a, late := ask(last, m), last.Overdue()[0].Why == Late
			if late && a != (answer{}) || !late && !(errors.Is(a.device, ErrNotCurrent) &&
				errors.Is(a.revoked, ErrNotCurrent)) {
				t.Errorf("Strict: %+v", a)
			}
		})
	}
	// No list was ever read.
	store, m := newLot(t, s, "L1")
	store.down.Store(true)
	for maxAge, want := range map[time.Duration]bool{0: false, time.Hour: true} {
		r := following(t, store, s, ReaderOptions{MaxAge: maxAge}, m)
		if a := ask(r, m); a.device == nil || (a.revoked != nil) != want {
			t.Errorf("without a list, and a MaxAge of %s: %+v", maxAge, a)
		}
	}
}
