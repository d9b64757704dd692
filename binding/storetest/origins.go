package storetest

import (
	"crypto/rand"
	"errors"
	"fmt"
	"reflect"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/kme"
)

// bindFrom opens an attempt of an origin, or takes the one that is open, and makes a binding within it.
func bindFrom(t *testing.T, s Store, imsi kme.IMSI, o binding.Origin, imei kme.IMEI, tag string) *binding.Binding {
	t.Helper()
	d := decide(t, s, request(imsi, o, t0))
	if d.Attempt == nil {
		t.Fatalf("%s has no attempt for %s", imsi, o.Name)
	}
	b := newBinding(imsi, imei, d.Attempt.ID)
	b.Origin = o.Name
	must.Do(t, s.Establish(t.Context(), b, []byte("tag "+tag), true, t0))
	return b
}

// checkUnder asks for a vector, which must be processed under a binding.
func checkUnder(t *testing.T, s Store, imsi kme.IMSI, o binding.Origin, want *binding.Binding) {
	t.Helper()
	if b := decide(t, s, request(imsi, o, t0)).Binding; b == nil || b.AttemptID != want.AttemptID ||
		b.State != want.State {
		t.Errorf("a vector for %s goes under %+v, want %+v", o.Name, b, want)
	}
}

func open(t *testing.T, s Store, imsi kme.IMSI) {
	t.Helper()
	a := binding.Attempt{ID: "admin's", IMSI: imsi, Expires: t0.Add(ttl), Opened: true}
	must.Do(t, s.OpenAttempt(t.Context(), a))
}

func attemptsByOrigin(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	ids := map[binding.Origin]string{}
	for _, o := range []binding.Origin{nobody, home, away} {
		d := decide(t, s, request(imsi, o, t0))
		if ids[o] = d.Attempt.ID; d.Attempt.Origin != o.Name {
			t.Errorf("%s has attempt %+v", o.Name, d.Attempt)
		}
	}
	b := newBinding(imsi, device(t, 1), ids[home])
	b.Origin = away.Name
	refused(t, "another origin's attempt", s.Establish(t.Context(), b, []byte("tag"), true, t0), binding.ErrNoAttempt)
	b.Origin = home.Name
	must.Do(t, s.Establish(t.Context(), b, []byte("tag"), true, t0))
	checkBinding(t, s, imsi, b)
	for o, id := range ids {
		checkOpenFrom(t, s, imsi, o, id, t0, false)
	}
}

func mayNotProvision(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	for _, p := range []binding.Provisioning{binding.Forbidden, binding.Declined} {
		q := request(imsi, binding.Origin{Name: away.Name, Provisioning: p}, t0)
		if d, err := s.Prepare(t.Context(), q); !errors.Is(err, binding.ErrNotBound) || d.Attempt != nil {
			t.Errorf("an origin that may not provision: %+v, %v", d, err)
		}
		if spent, err := s.Spent(t.Context(), imsi, q.RANDs[0]); err != nil || spent {
			t.Errorf("its RAND is spent: %v, %v", spent, err)
		}
		if sub := subscriptionOf(t, s, imsi, t0); len(sub.Attempts) != 0 {
			t.Errorf("it opened %+v", sub.Attempts)
		}
	}
	b := bindFrom(t, s, imsi, home, device(t, 1), "b1")
	checkUnder(t, s, imsi, binding.Origin{Name: away.Name}, b)
	reportFrom(t, s, imsi, away, true, t0)
	open(t, s, imsi)
	b.State = binding.Active
	checkUnder(t, s, imsi, binding.Origin{Name: away.Name}, b)
}

// Success counts from an origin that was sent a vector under the binding, and failure from that and from whoever
// established it.
func activatedBySent(t *testing.T, s Store) {
	for i, c := range []struct {
		sent, reports binding.Origin
		ok, changes   bool
	}{
		{home, home, true, true},
		{away, away, true, true}, // the device has moved on
		{home, away, true, false},
		{away, home, true, false},
		{home, nobody, true, false},
		{home, home, false, true},
		{away, away, false, true},
		{away, home, false, true},
		{home, away, false, false},
	} {
		imsi := subscription(t, i)
		b := bindFrom(t, s, imsi, home, device(t, i), fmt.Sprint("b", i))
		if got := reportFrom(t, s, imsi, c.reports, true, t0); got.State != binding.Pending {
			t.Errorf("%+v: active before a vector went out", c)
		}
		checkUnder(t, s, imsi, c.sent, b)
		got := reportFrom(t, s, imsi, c.reports, c.ok, t0)
		switch {
		case !c.changes && (got == nil || got.State != binding.Pending):
			t.Errorf("%+v: the report changes it to %+v", c, got)
		case c.changes && c.ok && (got == nil || got.State != binding.Active):
			t.Errorf("%+v: the report leaves %+v", c, got)
		case c.changes && !c.ok && got != nil:
			t.Errorf("%+v: the report leaves %+v", c, got)
		}
	}
}

// Whoever was only told of a pending binding was sent nothing, and it lasts.
func notReady(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	b := bindFrom(t, s, imsi, home, device(t, 1), "b1")
	for range 2 * pendingVectors {
		for _, ready := range []string{"", "another"} {
			q := request(imsi, away, t0)
			q.Ready = ready
			if d, err := s.Prepare(t.Context(), q); err != nil || !reflect.DeepEqual(d.Binding, b) {
				t.Fatalf("%+v, %v", d.Binding, err)
			}
		}
	}
	if got := reportFrom(t, s, imsi, away, true, t0); !reflect.DeepEqual(got, b) {
		t.Errorf("without a vector that left it is %+v", got)
	}
}

// What was sent under a pending binding counts nothing for one that takes its place.
func pendingReplaced(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	before := bindFrom(t, s, imsi, home, device(t, 1), "b1")
	checkUnder(t, s, imsi, away, before)
	open(t, s, imsi)
	b := bindFrom(t, s, imsi, home, device(t, 2), "b2")
	for _, ok := range []bool{true, false} {
		if got := reportFrom(t, s, imsi, away, ok, t0); !reflect.DeepEqual(got, b) {
			t.Errorf("a report of %v about the binding before gives %+v", ok, got)
		}
	}
	q := request(imsi, away, t0)
	q.Ready = before.AttemptID // it was replaced meanwhile
	if d, err := s.Prepare(t.Context(), q); err != nil || !reflect.DeepEqual(d.Binding, b) {
		t.Errorf("with vectors under the binding before: %+v, %v", d.Binding, err)
	}
	checkBinding(t, s, imsi, b)
}

// What the old device does, elsewhere, neither promotes nor removes anything of the new one.
func besideActive(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	old := bindFrom(t, s, imsi, home, device(t, 1), "b1")
	checkUnder(t, s, imsi, home, old)
	old = active(old, t0)
	reportFrom(t, s, imsi, home, true, t0)
	open(t, s, imsi)
	pending := bindFrom(t, s, imsi, away, device(t, 2), "b2")
	for range 2 * pendingVectors {
		checkUnder(t, s, imsi, home, old)
		reportFrom(t, s, imsi, home, true, t0)
		reportFrom(t, s, imsi, home, false, t0)
		checkBinding(t, s, imsi, pending)
	}
	if sub := subscriptionOf(t, s, imsi, t0); sub.Sent(home.Name).State != binding.Active ||
		sub.Sent(away.Name).State != binding.Active {
		t.Error("a vector from before is restored under the pending binding")
	}
	checkUnder(t, s, imsi, away, pending)
	if sub := subscriptionOf(t, s, imsi, t0); sub.Sent(home.Name).State != binding.Active ||
		sub.Sent(away.Name).State != binding.Pending {
		t.Error("each origin's vectors are restored under what they were sent with")
	}
	reportFrom(t, s, imsi, away, true, t0)
	checkBinding(t, s, imsi, active(pending, t0))
	checkUnder(t, s, imsi, home, pending)
}

// A lost answer heals: a pending binding answers so many requests without success, and then it has ended.
func pendingEnds(t *testing.T, s Store) {
	for n, bound := range []bool{false, true} {
		imsi := subscription(t, n)
		var before *binding.Binding
		if bound {
			before = bindFrom(t, s, imsi, home, device(t, 10), fmt.Sprint("b", n))
			checkUnder(t, s, imsi, home, before)
			before = active(before, t0)
			reportFrom(t, s, imsi, home, true, t0)
			open(t, s, imsi)
		}
		pending := bindFrom(t, s, imsi, home, device(t, n), fmt.Sprint("c", n))
		for range pendingVectors {
			checkUnder(t, s, imsi, home, pending)
		}
		d := decide(t, s, request(imsi, home, t0))
		if d.Ended == nil || d.Ended.AttemptID != pending.AttemptID {
			t.Errorf("ended is %+v", d.Ended)
		}
		if bound != (d.Binding != nil) || bound && !reflect.DeepEqual(d.Binding, before) {
			t.Errorf("bound before: %v; then it is %+v", bound, d.Binding)
		}
		checkBinding(t, s, imsi, before)
		if d := decide(t, s, request(imsi, home, t0)); d.Ended != nil {
			t.Errorf("it ends again: %+v", d.Ended)
		}
		checkUsed(t, s, pending.IMEI, []byte("tag "+fmt.Sprint("c", n)), true)
	}
	// It ends for whoever may not provision too.
	imsi := subscription(t, 3)
	pending := bindFrom(t, s, imsi, home, device(t, 3), "d")
	for range pendingVectors {
		checkUnder(t, s, imsi, binding.Origin{Name: away.Name}, pending)
	}
	for range 2 {
		_, err := s.Prepare(t.Context(), request(imsi, binding.Origin{Name: away.Name}, t0))
		refused(t, "after it has ended", err, binding.ErrNotBound)
		checkBinding(t, s, imsi, nil)
	}
}

func pendingExpires(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	pending := bindFrom(t, s, imsi, home, device(t, 1), "b1")
	checkUnder(t, s, imsi, home, pending)
	end := t0.Add(pendingTTL)
	if sub := subscriptionOf(t, s, imsi, end.Add(-time.Millisecond)); sub.Pending == nil {
		t.Error("it has expired too soon")
	}
	if sub := subscriptionOf(t, s, imsi, end); sub.Latest() != nil {
		t.Errorf("expired, it is %+v", sub)
	}
	if all, err := s.Bindings(t.Context(), binding.BindingQuery{Limit: 10, Now: end}); err != nil || len(all) != 0 {
		t.Errorf("expired, it is listed: %v, %v", all, err)
	}
	_, err := s.Report(t.Context(), imsi, home.Name, true, end)
	refused(t, "a success that comes too late", err, binding.ErrNotBound)
	if d := decide(t, s, request(imsi, home, end)); d.Attempt == nil || d.Ended == nil {
		t.Errorf("after it expired: %+v", d)
	}
	// A clock that is set back does not bring it back.
	if sub := subscriptionOf(t, s, imsi, t0); sub.Latest() != nil {
		t.Errorf("it is back: %+v", sub)
	}
}

func spent(t *testing.T, s Store) {
	one, other := subscription(t, 1), subscription(t, 2)
	q := request(one, home, t0)
	for range 31 {
		var r hsmkeys.RAND
		rand.Read(r[:])
		q.RANDs = append(q.RANDs, r)
	}
	var id string
	for range 2 { // in clear again it does no harm
		d := decide(t, s, q)
		if d.Attempt == nil {
			t.Fatal("bound already")
		}
		id = d.Attempt.ID
	}
	check := func(imsi kme.IMSI, r hsmkeys.RAND, want bool) {
		t.Helper()
		if got, err := s.Spent(t.Context(), imsi, r); err != nil || got != want {
			t.Errorf("RAND %x of %s is spent: %v, %v, want %v", r, imsi, got, err, want)
		}
	}
	for _, r := range q.RANDs {
		check(one, r, true)
		check(other, r, false)
	}
	b := newBinding(one, device(t, 1), id)
	b.Origin = home.Name
	must.Do(t, s.Establish(t.Context(), b, []byte("tag"), true, t0))
	again := request(one, home, t0)
	again.RANDs = append(again.RANDs, q.RANDs[17])
	for _, state := range []binding.State{binding.Pending, binding.Active} {
		_, err := s.Prepare(t.Context(), again)
		refused(t, string(state)+": a spent RAND", err, binding.ErrSpent)
		check(one, again.RANDs[0], false)
		if state == binding.Pending && len(subscriptionOf(t, s, one, t0).Pending.Sent) != 0 {
			t.Error("a refused vector counts as sent")
		}
		checkUnder(t, s, one, home, &binding.Binding{AttemptID: id, State: state})
		reportFrom(t, s, one, home, true, t0)
	}
	must.Get[*binding.Binding](t)(s.Revoke(t.Context(), one, t0))
	check(one, q.RANDs[0], true)
}

// A RAND that left in clear is not processed under the active binding either that stands when a pending one has ended.
func spentWhenPendingEnds(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	clear := request(imsi, home, t0)
	b := newBinding(imsi, device(t, 1), decide(t, s, clear).Attempt.ID)
	b.Origin = home.Name
	must.Do(t, s.Establish(t.Context(), b, []byte("tag 1"), true, t0))
	checkUnder(t, s, imsi, home, b)
	reportFrom(t, s, imsi, home, true, t0)
	open(t, s, imsi)
	pending := bindFrom(t, s, imsi, home, device(t, 2), "2")
	for range pendingVectors {
		checkUnder(t, s, imsi, home, pending)
	}
	_, err := s.Prepare(t.Context(), clear)
	refused(t, "a spent RAND", err, binding.ErrSpent)
}

// A pending binding that has expired is over when the next one is established.
func expiredIsReplaced(t *testing.T, s Store) {
	imsi, later := subscription(t, 1), t0.Add(2*pendingTTL)
	bindFrom(t, s, imsi, home, device(t, 1), "1")
	must.Do(t, s.OpenAttempt(t.Context(),
		binding.Attempt{ID: "admin's", IMSI: imsi, Expires: later.Add(ttl), Opened: true}))
	b := newBinding(imsi, device(t, 2), decide(t, s, request(imsi, home, t0)).Attempt.ID)
	b.Origin, b.Expires = home.Name, later.Add(pendingTTL)
	must.Do(t, s.Establish(t.Context(), b, []byte("tag 2"), true, later))
	if d := decide(t, s, request(imsi, home, later)); d.Ended != nil || d.Binding.AttemptID != b.AttemptID {
		t.Errorf("after a new binding: %+v", d)
	}
}

// In an administrator's opening each origin that may provision has an attempt of its own, as long as the opening lasts.
func openedByOrigin(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	before := bindFrom(t, s, imsi, home, device(t, 1), "b1")
	checkUnder(t, s, imsi, home, before)
	before = active(before, t0)
	reportFrom(t, s, imsi, home, true, t0)
	open(t, s, imsi)
	late := t0.Add(ttl - time.Millisecond)
	ids := map[binding.Origin]string{}
	for _, o := range []binding.Origin{home, away} {
		for _, now := range []time.Time{t0, late} {
			d := decide(t, s, request(imsi, o, now))
			if now.Equal(t0) {
				ids[o] = d.Attempt.ID
			}
			if a := d.Attempt; a == nil || a.ID != ids[o] || a.Origin != o.Name || !a.Opened ||
				!a.Expires.Equal(t0.Add(ttl)) {
				t.Errorf("%s has %+v", o.Name, d)
			}
		}
	}
	checkUnder(t, s, imsi, binding.Origin{Name: away.Name, Provisioning: binding.Declined}, before)
	sub := subscriptionOf(t, s, imsi, t0)
	for o, want := range map[binding.Origin]bool{
		home:               false,
		{Name: home.Name}:  false, // it was sent a vector in clear, whatever it says now
		third:              false,
		{Name: third.Name}: true,
	} {
		if sub.Served(o) != want {
			t.Errorf("while it is open %+v is served: %v", o, !want)
		}
	}
	if d := decide(t, s, request(imsi, home, t0.Add(ttl))); d.Binding == nil {
		t.Errorf("after its end: %+v", d)
	}
	b := newBinding(imsi, device(t, 2), ids[away])
	b.Origin = away.Name
	must.Do(t, s.Establish(t.Context(), b, []byte("new"), true, t0))
	checkUnder(t, s, imsi, home, before) // it is closed, for all
}
