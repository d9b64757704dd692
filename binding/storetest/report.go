package storetest

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/kme"
)

func report(t *testing.T, s Store, imsi kme.IMSI, ok bool, now time.Time) *binding.Binding {
	t.Helper()
	return reportFrom(t, s, imsi, nobody, ok, now)
}

func reportFrom(t *testing.T, s Store, imsi kme.IMSI, o binding.Origin, ok bool, now time.Time) *binding.Binding {
	t.Helper()
	sub := must.Get[*binding.Subscription](t)(s.Report(t.Context(), imsi, o.Name, ok, now))
	if stored := subscriptionOf(t, s, imsi, now); !reflect.DeepEqual(sub, stored) {
		t.Errorf("Report gives %+v, and stored is %+v", sub, stored)
	}
	return sub.Standing()
}

// activate sends nobody a vector under the pending binding, and reports nobody's success.
func activate(t *testing.T, s Store, imsi kme.IMSI, now time.Time) *binding.Binding {
	t.Helper()
	if b, _ := prepare(t, s, imsi, t0); b == nil || b.State != binding.Pending {
		t.Fatalf("IMSI %s has no pending binding: %v", imsi, b)
	}
	b := report(t, s, imsi, true, now)
	if b == nil || b.State != binding.Active {
		t.Fatalf("IMSI %s has no active binding: %v", imsi, b)
	}
	return b
}

// active is what a binding becomes.
func active(b *binding.Binding, now time.Time) *binding.Binding {
	b.State, b.Activated, b.Expires, b.Sent = binding.Active, now, time.Time{}, nil
	return b
}

func reportOK(t *testing.T, s Store) {
	one, other := subscription(t, 1), subscription(t, 2)
	b := bind(t, s, one, device(t, 1), []byte("tag"))
	untouched := bind(t, s, other, device(t, 2), []byte("tag"))
	prepare(t, s, one, t0)
	b = active(b, t0.Add(time.Minute))
	for i, ok := range []bool{true, true, false} {
		// Whatever is reported of an active binding changes nothing, its time neither.
		if got := report(t, s, one, ok, t0.Add(time.Duration(i+1)*time.Minute)); !reflect.DeepEqual(got, b) {
			t.Errorf("report %d gives %+v, want %+v", i, got, b)
		}
		checkBinding(t, s, one, b)
	}
	if got, _ := prepare(t, s, one, t0); !reflect.DeepEqual(got, b) {
		t.Errorf("Prepare gives %+v, want the active binding", got)
	}
	checkBinding(t, s, other, untouched)
}

func reportNotOK(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	bind(t, s, imsi, device(t, 1), []byte("tag"))
	if b := report(t, s, imsi, false, t0); b != nil {
		t.Errorf("the report gives %+v, want nothing", b)
	}
	checkBinding(t, s, imsi, nil)
	// The device gets another chance.
	bind(t, s, imsi, device(t, 1), []byte("tag 2"))
}

// With an administrator's attempt an active binding gets a pending one beside it; it stands until that one has shown
// itself.
func openedBesideActive(t *testing.T, s Store) {
	for n, ok := range []bool{true, false} {
		imsi := subscription(t, n)
		bind(t, s, imsi, device(t, 2*n), []byte{byte(n), 1})
		before := activate(t, s, imsi, t0)
		opened := binding.Attempt{ID: fmt.Sprint("o", n), IMSI: imsi, Expires: t0.Add(ttl), Opened: true}
		for range 2 { // it replaces the one before
			must.Do(t, s.OpenAttempt(t.Context(), opened))
		}
		checkBinding(t, s, imsi, before)
		if b, a := prepare(t, s, imsi, t0); b != nil || a == nil || *a != opened {
			t.Fatalf("prepared %+v, %+v, want the attempt that was opened", b, a)
		}
		// It is there to its end, however little is left of it; then the binding counts again.
		if b, a := prepare(t, s, imsi, t0.Add(ttl-time.Millisecond)); b != nil || a == nil || *a != opened {
			t.Fatalf("at its end prepared %+v, %+v", b, a)
		}
		if b, a := prepare(t, s, imsi, t0.Add(ttl)); b == nil || a != nil {
			t.Fatalf("after its end prepared %+v, %+v", b, a)
		}
		pending := newBinding(imsi, device(t, 2*n+1), opened.ID)
		must.Do(t, s.Establish(t.Context(), pending, []byte{byte(n), 2}, true, t0))
		checkBinding(t, s, imsi, pending)
		if b, a := prepare(t, s, imsi, t0); b == nil || b.State != binding.Pending || a != nil {
			t.Fatalf("prepared %+v, %+v, want the pending binding", b, a)
		}
		want := before // it stands
		if ok {
			want = active(pending, t0.Add(time.Minute))
		}
		if b := report(t, s, imsi, ok, t0.Add(time.Minute)); !reflect.DeepEqual(b, want) {
			t.Errorf("the report gives %+v, want %+v", b, want)
		}
		checkBinding(t, s, imsi, want)
	}
}

func revoke(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	_, err := s.Revoke(t.Context(), imsi, t0)
	refused(t, "revoked nothing", err, binding.ErrNotBound)
	bind(t, s, imsi, device(t, 1), []byte("tag"))
	want := activate(t, s, imsi, t0)
	want.State, want.Revoked, want.Sealed = binding.Revoked, t0.Add(time.Hour), []byte{}
	for i := range 2 { // the second time changes nothing
		b, err := s.Revoke(t.Context(), imsi, t0.Add(time.Duration(1+i)*time.Hour))
		if err != nil || b.State != binding.Revoked || !b.Revoked.Equal(want.Revoked) || len(b.Sealed) != 0 {
			t.Fatalf("%+v, %v", b, err)
		}
	}
	checkBinding(t, s, imsi, want)
	_, err = s.Report(t.Context(), imsi, nobody.Name, true, t0)
	refused(t, "reported about a revoked binding", err, binding.ErrNotBound)
	// It ends what was opened since, also of one that was never bound.
	for _, imsi := range []kme.IMSI{imsi, subscription(t, 2)} {
		open(t, s, imsi)
		if _, err := s.Revoke(t.Context(), imsi, t0); err != nil && !errors.Is(err, binding.ErrNotBound) {
			t.Fatal(err)
		}
		checkOpen(t, s, imsi, "admin's", t0, false)
	}
	checkBinding(t, s, imsi, want)
	// The subscription is as one that was never bound; the KME of before stays used.
	a2 := openAttempt(t, s, imsi, t0)
	checkUsed(t, s, device(t, 1), []byte("tag"), true)
	next := newBinding(imsi, device(t, 1), a2)
	must.Do(t, s.Establish(t.Context(), next, []byte("tag 2"), true, t0))
	checkBinding(t, s, imsi, next)
	if b := report(t, s, imsi, false, t0); b != nil {
		t.Errorf("a revoked binding came back: %+v", b)
	}
	checkBinding(t, s, imsi, want)
	a3 := openAttempt(t, s, imsi, t0)
	must.Do(t, s.Establish(t.Context(), newBinding(imsi, device(t, 2), a3), []byte("tag 3"), true, t0))
	// Revoked when it has expired: a clock that is set back does not bring it back.
	must.Get[*binding.Binding](t)(s.Revoke(t.Context(), imsi, t0.Add(pendingTTL)))
	checkBinding(t, s, imsi, want)
	// Revoked while it is pending.
	bind(t, s, imsi, device(t, 2), []byte("tag 4"))
	if b, err := s.Revoke(t.Context(), imsi, t0); err != nil || b.IMEI != device(t, 2) || !b.Activated.IsZero() {
		t.Errorf("%+v, %v", b, err)
	}
}

func bindings(t *testing.T, s Store) {
	query := func(q binding.BindingQuery) (names []string) {
		t.Helper()
		q.Now = t0
		all := must.Get[[]*binding.Binding](t)(s.Bindings(t.Context(), q))
		for _, b := range all {
			names = append(names, fmt.Sprint(b.IMSI.String()[10:], " ", b.IMEI.String()[11:], " ", b.State))
		}
		return names
	}
	list := func(after string, imei kme.IMEI, limit int) []string {
		t.Helper()
		return query(binding.BindingQuery{After: after, IMEI: imei, Limit: limit})
	}
	if got := list("", kme.IMEI{}, 10); len(got) != 0 {
		t.Errorf("an empty store lists %v", got)
	}
	for n := range 5 {
		bind(t, s, subscription(t, n), device(t, n/2), []byte{byte(n)})
	}
	activate(t, s, subscription(t, 1), t0)
	activate(t, s, subscription(t, 2), t0)
	must.Get[*binding.Binding](t)(s.Revoke(t.Context(), subscription(t, 2), t0))
	open(t, s, subscription(t, 1))
	must.Do(t, s.Establish(t.Context(), newBinding(subscription(t, 1), device(t, 7), "admin's"), []byte("o"), true, t0))
	all := []string{"00000 000 PENDING", "00001 007 PENDING", "00002 001 REVOKED", "00003 001 PENDING",
		"00004 002 PENDING"}
	if got := list("", kme.IMEI{}, 10); !slices.Equal(got, all) {
		t.Errorf("all: %v", got)
	}
	if got := list("", kme.IMEI{}, 2); !slices.Equal(got, all[:2]) {
		t.Errorf("the first page: %v", got)
	}
	if got := list(subscription(t, 1).String(), kme.IMEI{}, 2); !slices.Equal(got, all[2:4]) {
		t.Errorf("the second page: %v", got)
	}
	if got := list("", device(t, 1), 10); !slices.Equal(got, all[2:4]) {
		t.Errorf("those of a device: %v", got)
	}
	plmn := subscription(t, 0).String()[:5]
	ends := func(n int) string { return subscription(t, n).String() }
	for _, c := range []struct {
		within, without []string
		want            []string
	}{
		{[]string{plmn}, nil, all},
		{[]string{"99999", plmn}, nil, all},
		{[]string{"99999"}, nil, nil},
		{[]string{}, nil, nil},
		{nil, []string{"99999"}, all},
		{nil, []string{plmn}, nil},
		{[]string{ends(1), ends(3), ends(4)}, []string{ends(3)}, []string{all[1], all[4]}},
	} {
		got := query(binding.BindingQuery{Within: c.within, Without: c.without, Limit: 10})
		if !slices.Equal(got, c.want) {
			t.Errorf("within %q, without %q: %v, want %v", c.within, c.without, got, c.want)
		}
	}
	// The limit counts what is asked for alone, and a device's are filtered too.
	q := binding.BindingQuery{Within: []string{ends(0), ends(2), ends(4)}, Limit: 2}
	if got := query(q); !slices.Equal(got, []string{all[0], all[2]}) {
		t.Errorf("a page of some: %v", got)
	}
	q = binding.BindingQuery{IMEI: device(t, 1), Without: []string{ends(2)}, Limit: 2}
	if got := query(q); !slices.Equal(got, all[3:4]) {
		t.Errorf("some of a device: %v", got)
	}
}

func reportNotBound(t *testing.T, s Store) {
	bind(t, s, subscription(t, 1), device(t, 1), []byte("tag"))
	openAttempt(t, s, subscription(t, 2), t0)
	for _, ok := range []bool{true, false} {
		b, err := s.Report(t.Context(), subscription(t, 2), nobody.Name, ok, t0)
		if !errors.Is(err, binding.ErrNotBound) || b != nil {
			t.Errorf("ok %v: %v, error %v, want ErrNotBound", ok, b, err)
		}
	}
}
