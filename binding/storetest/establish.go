package storetest

import (
	"context"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/kme"
)

func attempts(t *testing.T, s Store) {
	one, other := subscription(t, 1), subscription(t, 2)
	a1, a2 := openAttempt(t, s, one, t0), openAttempt(t, s, one, t0.Add(time.Second))
	b1 := openAttempt(t, s, other, t0)
	flipped := []byte(a1)
	flipped[len(a1)/2] ^= 1
	// A second attempt does not close the first: the device may have its answer under way.
	end := t0.Add(ttl)
	for _, c := range []struct {
		imsi kme.IMSI
		id   string
		now  time.Time
		want bool
	}{
		{one, a1, t0, true},
		{one, a1, end.Add(-time.Millisecond), true},
		{one, a1, end, false},
		{one, a1, end.Add(time.Hour), false},
		{one, a2, end, true},
		{one, b1, t0, false},
		{other, b1, t0, true},
		{other, a1, t0, false},
		{one, "", t0, false},
		{one, "A", t0, false},
		{one, a1[:11], t0, false},
		{one, a1[:len(a1)-1], t0, false},
		{one, a1 + "A", t0, false},
		{one, a1 + "=", t0, false},
		{one, "\n" + a1, t0, false},
		{one, strings.ToLower(a1), t0, false},
		{one, string(flipped), t0, false},
		{subscription(t, 3), a1, t0, false},
	} {
		checkOpen(t, s, c.imsi, c.id, c.now, c.want)
	}
	checkOpenFrom(t, s, one, home, a1, t0, false)
}

// What an administrator has opened leaves no row behind.
func dropExpired(t *testing.T, s Store) {
	one, other := subscription(t, 1), subscription(t, 2)
	for i, imsi := range []kme.IMSI{one, other} {
		must.Do(t, s.OpenAttempt(t.Context(), binding.Attempt{ID: "o", IMSI: imsi, Opened: true,
			Expires: t0.Add(ttl + time.Duration(i)*time.Millisecond)}))
	}
	for _, c := range []struct {
		now          time.Time
		first, other bool
	}{
		{t0.Add(ttl - time.Millisecond), true, true},
		{t0.Add(ttl), false, true},
		{t0.Add(ttl + time.Millisecond), false, false},
	} {
		must.Do(t, s.DropExpired(t.Context(), c.now))
		// Asked for a time at which they were open: what is gone stays gone.
		checkOpen(t, s, one, "o", t0, c.first)
		checkOpen(t, s, other, "o", t0, c.other)
	}
}

func establish(t *testing.T, s Store) {
	imsi, imei := subscription(t, 1), device(t, 1)
	checkBinding(t, s, imsi, nil)
	b := bind(t, s, imsi, imei, []byte("tag"))
	checkBinding(t, s, imsi, b)
	checkBinding(t, s, subscription(t, 2), nil)
	b.Sent = []kme.Origin{nobody.Name}
	if got, _ := prepare(t, s, imsi, t0); !reflect.DeepEqual(got, b) {
		t.Errorf("Prepare gives %+v, want the pending binding", got)
	}
}

func establishNoAttempt(t *testing.T, s Store) {
	one, other, imei := subscription(t, 1), subscription(t, 2), device(t, 1)
	a1, b1 := openAttempt(t, s, one, t0), openAttempt(t, s, other, t0)
	for _, c := range []struct {
		name, attempt string
		now           time.Time
	}{
		{"none such", "a0", t0},
		{"empty", "", t0},
		{"another IMSI's", b1, t0},
		{"expired", a1, t0.Add(ttl)},
	} {
		b := newBinding(one, imei, a1)
		b.AttemptID = c.attempt
		refused(t, c.name, s.Establish(t.Context(), b, []byte("tag"), true, c.now), binding.ErrNoAttempt)
	}
	checkBinding(t, s, one, nil)
	checkUsed(t, s, imei, []byte("tag"), false)
	checkOpen(t, s, one, a1, t0, true)
	checkOpen(t, s, other, b1, t0, true)

	first := newBinding(one, imei, a1)
	must.Do(t, s.Establish(t.Context(), first, []byte("tag"), true, t0.Add(ttl-time.Millisecond)))
	again := newBinding(one, device(t, 2), a1)
	err := s.Establish(t.Context(), again, []byte("tag 2"), true, t0)
	refused(t, "an attempt used twice", err, binding.ErrNoAttempt)
	checkBinding(t, s, one, first)
	checkUsed(t, s, again.IMEI, []byte("tag 2"), false)
}

func establishUsed(t *testing.T, s Store) {
	one, other, imei := subscription(t, 1), subscription(t, 2), device(t, 1)
	b := bind(t, s, one, imei, []byte("tag"))
	b1 := openAttempt(t, s, other, t0)
	refused(t, "a KME used twice", s.Establish(t.Context(), newBinding(other, imei, b1), []byte("tag"), true, t0),
		binding.ErrUsed)
	// The refusal changed nothing: the device may still establish another KME within the same attempt.
	checkBinding(t, s, other, nil)
	checkBinding(t, s, one, b)
	checkOpen(t, s, other, b1, t0, true)
	must.Do(t, s.Establish(t.Context(), newBinding(other, imei, b1), []byte("tag 2"), true, t0))
}

func establishClosesAttempts(t *testing.T, s Store) {
	one, other := subscription(t, 1), subscription(t, 2)
	later := t0.Add(ttl/2 + time.Second)
	a1, a2, b1 := openAttempt(t, s, one, t0), openAttempt(t, s, one, later), openAttempt(t, s, other, t0)
	must.Do(t, s.Establish(t.Context(), newBinding(one, device(t, 1), a1), []byte("tag"), true, later))
	checkOpen(t, s, one, a1, later, false)
	checkOpen(t, s, one, a2, later, false)
	checkOpen(t, s, other, b1, later, true)
}

// What an administrator has opened and has expired is closed too: a clock that is set back does not find it.
func establishAfterOpened(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	open(t, s, imsi)
	must.Do(t, s.Establish(t.Context(), newBinding(imsi, device(t, 1), openAttempt(t, s, imsi, t0.Add(ttl))),
		[]byte("tag"), true, t0.Add(ttl)))
	checkOpen(t, s, imsi, "admin's", t0, false)
}

func establishCanceled(t *testing.T, s Store) {
	imsi, imei := subscription(t, 1), device(t, 1)
	a1 := openAttempt(t, s, imsi, t0)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	refused(t, "a call that was canceled", s.Establish(ctx, newBinding(imsi, imei, a1), []byte("tag"), true, t0),
		context.Canceled)
	checkBinding(t, s, imsi, nil)
	checkUsed(t, s, imei, []byte("tag"), false)
	checkOpen(t, s, imsi, a1, t0, true)
}

func ledger(t *testing.T, s Store) {
	first, second := device(t, 1), device(t, 2)
	tag, zero := []byte("tag"), []byte{0, 't', 'a', 'g'}
	checkUsed(t, s, first, tag, false)
	bind(t, s, subscription(t, 1), first, tag)
	checkUsed(t, s, first, tag, true)
	checkUsed(t, s, second, tag, false)
	checkUsed(t, s, first, zero, false)
	checkUsed(t, s, first, tag[:2], false)
	// The ledger is per device.
	bind(t, s, subscription(t, 2), second, tag)
	checkUsed(t, s, second, tag, true)
	// It is for ever: a binding that was dropped, and attempts that expired, leave it as it is.
	must.Get[*binding.Subscription](t)(s.Report(t.Context(), subscription(t, 1), nobody.Name, false, t0))
	must.Do(t, s.DropExpired(t.Context(), t0.Add(100*365*24*time.Hour)))
	checkUsed(t, s, first, tag, true)
	a2 := openAttempt(t, s, subscription(t, 1), t0)
	refused(t, "the KME of a dropped binding", s.Establish(t.Context(), newBinding(subscription(t, 1), first, a2), tag,
		true, t0), binding.ErrUsed)
}
