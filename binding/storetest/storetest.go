// Package storetest holds every implementation of binding.Store and binding.Registry to what they promise.
package storetest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/tokenkeys"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// A Store is what Run tests: both interfaces in one.
type Store = interface {
	binding.Store
	binding.Registry
	tokenkeys.SealedStore
}

// Run tests an implementation. open gives a store that holds nothing, and closes it at the end of its test.
func Run(t *testing.T, open func(t *testing.T) Store) {
	for _, c := range []struct {
		name string
		test func(t *testing.T, s Store)
	}{
		{"Attempts", attempts},
		{"DropExpired", dropExpired},
		{"Establish", establish},
		{"EstablishNoAttempt", establishNoAttempt},
		{"EstablishUsed", establishUsed},
		{"EstablishClosesAttempts", establishClosesAttempts},
		{"EstablishCanceled", establishCanceled},
		{"Ledger", ledger},
		{"ReportOK", reportOK},
		{"ReportNotOK", reportNotOK},
		{"ReportNotBound", reportNotBound},
		{"OpenedBesideActive", openedBesideActive},
		{"AttemptsByOrigin", attemptsByOrigin},
		{"MayNotProvision", mayNotProvision},
		{"ActivatedBySent", activatedBySent},
		{"NotReady", notReady},
		{"PendingReplaced", pendingReplaced},
		{"BesideActive", besideActive},
		{"PendingEnds", pendingEnds},
		{"PendingExpires", pendingExpires},
		{"Spent", spent},
		{"OpenedByOrigin", openedByOrigin},
		{"BoundNotOpened", boundNotOpened},
		{"Revoke", revoke},
		{"Bindings", bindings},
		{"Manufacturers", manufacturers},
		{"Lots", lots},
		{"LotRefused", lotRefused},
		{"Verdicts", verdicts},
		{"VerdictsRefused", verdictsRefused},
		{"Bound", boundTo},
		{"Reseal", reseal},
		{"Noted", noted},
		{"LastNote", lastNote},
		{"RolledBack", rolledBack},
		{"RacePrepare", racePrepare},
		{"RaceAttempt", raceAttempt},
		{"RaceLedger", raceLedger},
		{"RaceReport", raceReport},
		{"RaceLots", raceLots},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, open(t)) })
	}
}

// Stores keep milliseconds, and times come back as UTC.
var t0 = time.UnixMilli(1_800_000_000_123).UTC()

const (
	ttl            = 5 * time.Minute
	pendingTTL     = time.Hour
	pendingVectors = 3
	racers         = 16
)

// subscription and device are one of many.
func subscription(t *testing.T, n int) kme.IMSI {
	t.Helper()
	imsi, err := kme.ParseIMSI(fmt.Sprintf("0010100000%05d", n)) // the zeros in front must survive
	if err != nil {
		t.Fatal(err)
	}
	return imsi
}

func device(t *testing.T, n int) kme.IMEI {
	t.Helper()
	imei, err := kme.NewIMEI(tac(t), n)
	if err != nil {
		t.Fatal(err)
	}
	return imei
}

func tac(t *testing.T) kme.TAC {
	t.Helper()
	v, err := kme.ParseTAC("01234567")
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// home and away are two origins; nobody is that of callers that have one peer.
var nobody, home, away, third = origin(""), origin("mme-1.home"), origin("mme-2.away"), origin("mme-3.home")

func origin(name string) binding.Origin {
	o, err := kme.ParseOrigin(name)
	if err != nil {
		panic(err)
	}
	return binding.Origin{Name: o, Provisioning: binding.Allowed}
}

// request is a VectorRequest as the service makes it, for one RAND that no other has.
func request(imsi kme.IMSI, o binding.Origin, id string, now time.Time) binding.VectorRequest {
	var r hsmkeys.RAND
	rand.Read(r[:])
	return binding.VectorRequest{
		IMSI: imsi, Origin: o, RANDs: []hsmkeys.RAND{r}, Now: now, AttemptID: id, AttemptTTL: ttl,
		PendingVectors: pendingVectors,
	}
}

// decide calls Prepare, which must succeed, and again when vectors are ready under a pending binding.
func decide(t *testing.T, s Store, q binding.VectorRequest) binding.Decision {
	t.Helper()
	d, err := s.Prepare(t.Context(), q)
	if err == nil && d.Binding != nil && d.Binding.State == binding.Pending {
		q.Ready = d.Binding.AttemptID
		d, err = s.Prepare(t.Context(), q)
	}
	if err != nil {
		t.Fatal(err)
	}
	if (d.Binding == nil) == (d.Attempt == nil) {
		t.Fatalf("Prepare gave binding %v and attempt %v, not one of them", d.Binding, d.Attempt)
	}
	return d
}

func prepare(t *testing.T, s Store, imsi kme.IMSI, id string, now time.Time) (*binding.Binding, *binding.Attempt) {
	t.Helper()
	d := decide(t, s, request(imsi, nobody, id, now))
	return d.Binding, d.Attempt
}

// openAttempt opens one and insists that it is new.
func openAttempt(t *testing.T, s Store, imsi kme.IMSI, id string, now time.Time) {
	t.Helper()
	if _, a := prepare(t, s, imsi, id, now); a == nil || a.ID != id {
		t.Fatalf("Prepare gave attempt %v, want a new one, %s", a, id)
	}
}

func checkOpen(t *testing.T, s Store, imsi kme.IMSI, id string, now time.Time, want bool) {
	t.Helper()
	a := subscriptionOf(t, s, imsi, now).Attempt(id, nobody.Name)
	if want != (a != nil) || a != nil && (a.ID != id || a.IMSI != imsi) {
		t.Errorf("attempt %s of %s at %s: %v, want it open: %v", id, imsi, now, a, want)
	}
}

func subscriptionOf(t *testing.T, s Store, imsi kme.IMSI, now time.Time) *binding.Subscription {
	t.Helper()
	sub, err := s.Subscription(t.Context(), imsi, now)
	if err != nil {
		t.Fatal(err)
	}
	return sub
}

func newBinding(imsi kme.IMSI, imei kme.IMEI, attempt string) *binding.Binding {
	fill := func(n int) []byte { return bytes.Repeat([]byte(attempt[:1]), n) }
	return &binding.Binding{
		IMSI: imsi, IMEI: imei, Manufacturer: "maker", Lot: "L1", State: binding.Pending, DeviceKey: 2, Sealed: fill(40), Established: t0.Add(time.Second),
		Expires: t0.Add(pendingTTL), AttemptID: attempt, PayloadSHA256: append([]byte{0, 0xff}, fill(30)...), NWSig: fill(32),
	}
}

// bind opens an attempt and makes a binding within it.
func bind(t *testing.T, s Store, imsi kme.IMSI, imei kme.IMEI, attempt string, tag []byte) *binding.Binding {
	t.Helper()
	openAttempt(t, s, imsi, attempt, t0)
	b := newBinding(imsi, imei, attempt)
	if err := s.Establish(t.Context(), b, tag, true, t0); err != nil {
		t.Fatal(err)
	}
	return b
}

func checkBinding(t *testing.T, s Store, imsi kme.IMSI, want *binding.Binding) {
	t.Helper()
	if got := subscriptionOf(t, s, imsi, t0).Latest(); !reflect.DeepEqual(got, want) {
		t.Errorf("binding of %s:\n got %+v\nwant %+v", imsi, got, want)
	}
}

// askers are subscriptions that nothing else is done with.
var askers atomic.Int64

// checkUsed asks, as one does who has a KME that is not good, whether the ledger has it: in an attempt of another subscription.
func checkUsed(t *testing.T, s Store, imei kme.IMEI, tag []byte, want bool) {
	t.Helper()
	b := newBinding(subscription(t, 50_000+int(askers.Add(1))), imei, "asks")
	if err := s.OpenAttempt(t.Context(), binding.Attempt{ID: b.AttemptID, IMSI: b.IMSI, Expires: t0.Add(ttl)}); err != nil {
		t.Fatal(err)
	}
	if err := s.Establish(t.Context(), b, tag, false, t0); errors.Is(err, binding.ErrUsed) != want || errors.Is(err, binding.ErrNotGood) == want {
		t.Errorf("tag %x of %s: %v, want it used: %v", tag, imei, err, want)
	}
	checkBinding(t, s, b.IMSI, nil)
	checkOpen(t, s, b.IMSI, b.AttemptID, t0, true)
}

func attempts(t *testing.T, s Store) {
	one, other := subscription(t, 1), subscription(t, 2)
	openAttempt(t, s, one, "a1", t0)
	for _, c := range []struct {
		name  string
		after time.Duration
		want  string
	}{
		{"at once", 0, "a1"},
		{"while it lives for long enough", ttl/2 - time.Millisecond, "a1"},
		{"while it lives for just long enough", ttl / 2, "a1"},
		{"when it does not", ttl/2 + time.Millisecond, "a2"},
		{"of two, the one that lives longer", ttl/2 + time.Second, "a2"},
	} {
		if _, a := prepare(t, s, one, "a2", t0.Add(c.after)); a == nil || a.ID != c.want || a.IMSI != one {
			t.Errorf("%s: attempt %v, want %s", c.name, a, c.want)
		}
	}
	openAttempt(t, s, other, "b1", t0)

	// A second attempt does not close the first: the device may have its answer under way.
	end := t0.Add(ttl)
	for _, c := range []struct {
		imsi kme.IMSI
		id   string
		now  time.Time
		want bool
	}{
		{one, "a1", t0, true},
		{one, "a1", end.Add(-time.Millisecond), true},
		{one, "a1", end, false},
		{one, "a1", end.Add(time.Hour), false},
		{one, "a2", end, true},
		{one, "b1", t0, false},
		{other, "b1", t0, true},
		{other, "a1", t0, false},
		{one, "", t0, false},
		{one, "A1", t0, false},
		{one, "a_", t0, false},
		{subscription(t, 3), "a1", t0, false},
	} {
		checkOpen(t, s, c.imsi, c.id, c.now, c.want)
	}
	if a := subscriptionOf(t, s, one, t0).Attempt("a1", nobody.Name); a == nil || !a.Expires.Equal(end) {
		t.Errorf("attempt a1 is %v; want it to expire at %s", a, end)
	}
}

func dropExpired(t *testing.T, s Store) {
	one, other := subscription(t, 1), subscription(t, 2)
	openAttempt(t, s, one, "a1", t0)
	openAttempt(t, s, other, "b1", t0.Add(time.Millisecond))
	for _, c := range []struct {
		now          time.Time
		first, other bool
	}{
		{t0.Add(ttl - time.Millisecond), true, true},
		{t0.Add(ttl), false, true},
		{t0.Add(ttl + time.Millisecond), false, false},
	} {
		if err := s.DropExpired(t.Context(), c.now); err != nil {
			t.Fatal(err)
		}
		// Asked for a time at which they were open: what is gone stays gone.
		checkOpen(t, s, one, "a1", t0, c.first)
		checkOpen(t, s, other, "b1", t0, c.other)
	}
}

func establish(t *testing.T, s Store) {
	imsi, imei := subscription(t, 1), device(t, 1)
	checkBinding(t, s, imsi, nil)
	b := bind(t, s, imsi, imei, "a1", []byte("tag"))
	checkBinding(t, s, imsi, b)
	checkBinding(t, s, subscription(t, 2), nil)
	b.Sent = []kme.Origin{nobody.Name}
	if got, _ := prepare(t, s, imsi, "a2", t0); !reflect.DeepEqual(got, b) {
		t.Errorf("Prepare gives %+v, want the pending binding", got)
	}
	checkOpen(t, s, imsi, "a2", t0, false)
}

func establishNoAttempt(t *testing.T, s Store) {
	one, other, imei := subscription(t, 1), subscription(t, 2), device(t, 1)
	openAttempt(t, s, one, "a1", t0)
	openAttempt(t, s, other, "b1", t0)
	for _, c := range []struct {
		name, attempt string
		now           time.Time
	}{
		{"none such", "a0", t0},
		{"empty", "", t0},
		{"another IMSI's", "b1", t0},
		{"expired", "a1", t0.Add(ttl)},
	} {
		b := newBinding(one, imei, "a1")
		b.AttemptID = c.attempt
		if err := s.Establish(t.Context(), b, []byte("tag"), true, c.now); !errors.Is(err, binding.ErrNoAttempt) {
			t.Errorf("%s: %v, want ErrNoAttempt", c.name, err)
		}
	}
	checkBinding(t, s, one, nil)
	checkUsed(t, s, imei, []byte("tag"), false)
	checkOpen(t, s, one, "a1", t0, true)
	checkOpen(t, s, other, "b1", t0, true)

	first := newBinding(one, imei, "a1")
	if err := s.Establish(t.Context(), first, []byte("tag"), true, t0.Add(ttl-time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	again := newBinding(one, device(t, 2), "a1")
	if err := s.Establish(t.Context(), again, []byte("tag 2"), true, t0); !errors.Is(err, binding.ErrNoAttempt) {
		t.Errorf("an attempt used twice: %v, want ErrNoAttempt", err)
	}
	checkBinding(t, s, one, first)
	checkUsed(t, s, again.IMEI, []byte("tag 2"), false)
}

func establishUsed(t *testing.T, s Store) {
	one, other, imei := subscription(t, 1), subscription(t, 2), device(t, 1)
	b := bind(t, s, one, imei, "a1", []byte("tag"))
	openAttempt(t, s, other, "b1", t0)
	if err := s.Establish(t.Context(), newBinding(other, imei, "b1"), []byte("tag"), true, t0); !errors.Is(err, binding.ErrUsed) {
		t.Errorf("a KME used twice: %v, want ErrUsed", err)
	}
	// The refusal changed nothing: the device may still establish another KME within the same attempt.
	checkBinding(t, s, other, nil)
	checkBinding(t, s, one, b)
	checkOpen(t, s, other, "b1", t0, true)
	if err := s.Establish(t.Context(), newBinding(other, imei, "b1"), []byte("tag 2"), true, t0); err != nil {
		t.Errorf("another KME after the refusal: %v", err)
	}
}

func establishClosesAttempts(t *testing.T, s Store) {
	one, other := subscription(t, 1), subscription(t, 2)
	later := t0.Add(ttl/2 + time.Second)
	openAttempt(t, s, one, "a1", t0)
	openAttempt(t, s, one, "a2", later)
	openAttempt(t, s, other, "b1", t0)
	if err := s.Establish(t.Context(), newBinding(one, device(t, 1), "a1"), []byte("tag"), true, later); err != nil {
		t.Fatal(err)
	}
	checkOpen(t, s, one, "a1", later, false)
	checkOpen(t, s, one, "a2", later, false)
	checkOpen(t, s, other, "b1", later, true)
}

func establishCanceled(t *testing.T, s Store) {
	imsi, imei := subscription(t, 1), device(t, 1)
	openAttempt(t, s, imsi, "a1", t0)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Establish(ctx, newBinding(imsi, imei, "a1"), []byte("tag"), true, t0); !errors.Is(err, context.Canceled) {
		t.Errorf("a call that was canceled: %v, want context.Canceled", err)
	}
	checkBinding(t, s, imsi, nil)
	checkUsed(t, s, imei, []byte("tag"), false)
	checkOpen(t, s, imsi, "a1", t0, true)
}

func ledger(t *testing.T, s Store) {
	first, second := device(t, 1), device(t, 2)
	tag, zero := []byte("tag"), []byte{0, 't', 'a', 'g'}
	checkUsed(t, s, first, tag, false)
	bind(t, s, subscription(t, 1), first, "a1", tag)
	checkUsed(t, s, first, tag, true)
	checkUsed(t, s, second, tag, false)
	checkUsed(t, s, first, zero, false)
	checkUsed(t, s, first, tag[:2], false)
	// The ledger is per device.
	bind(t, s, subscription(t, 2), second, "b1", tag)
	checkUsed(t, s, second, tag, true)
	// It is for ever: a binding that was dropped, and attempts that expired, leave it as it is.
	if _, err := s.Report(t.Context(), subscription(t, 1), nobody.Name, false, t0); err != nil {
		t.Fatal(err)
	}
	if err := s.DropExpired(t.Context(), t0.Add(100*365*24*time.Hour)); err != nil {
		t.Fatal(err)
	}
	checkUsed(t, s, first, tag, true)
	openAttempt(t, s, subscription(t, 1), "a2", t0)
	if err := s.Establish(t.Context(), newBinding(subscription(t, 1), first, "a2"), tag, true, t0); !errors.Is(err, binding.ErrUsed) {
		t.Errorf("the KME of a dropped binding: %v, want ErrUsed", err)
	}
}

func report(t *testing.T, s Store, imsi kme.IMSI, ok bool, now time.Time) *binding.Binding {
	t.Helper()
	return reportFrom(t, s, imsi, nobody, ok, now)
}

func reportFrom(t *testing.T, s Store, imsi kme.IMSI, o binding.Origin, ok bool, now time.Time) *binding.Binding {
	t.Helper()
	sub, err := s.Report(t.Context(), imsi, o.Name, ok, now)
	if err != nil {
		t.Fatal(err)
	}
	if stored := subscriptionOf(t, s, imsi, now); !reflect.DeepEqual(sub, stored) {
		t.Errorf("Report gives %+v, and stored is %+v", sub, stored)
	}
	return sub.Standing()
}

// activate has the vector under a pending binding go to nobody, who reports success.
func activate(t *testing.T, s Store, imsi kme.IMSI, now time.Time) *binding.Binding {
	t.Helper()
	if b, _ := prepare(t, s, imsi, "none", t0); b == nil || b.State != binding.Pending {
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
	b := bind(t, s, one, device(t, 1), "a1", []byte("tag"))
	untouched := bind(t, s, other, device(t, 2), "b1", []byte("tag"))
	prepare(t, s, one, "none", t0)
	b = active(b, t0.Add(time.Minute))
	for i, ok := range []bool{true, true, false} {
		// Whatever is reported of an active binding changes nothing, its time neither.
		if got := report(t, s, one, ok, t0.Add(time.Duration(i+1)*time.Minute)); !reflect.DeepEqual(got, b) {
			t.Errorf("report %d gives %+v, want %+v", i, got, b)
		}
		checkBinding(t, s, one, b)
	}
	if got, _ := prepare(t, s, one, "a2", t0); !reflect.DeepEqual(got, b) {
		t.Errorf("Prepare gives %+v, want the active binding", got)
	}
	checkBinding(t, s, other, untouched)
}

func reportNotOK(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	bind(t, s, imsi, device(t, 1), "a1", []byte("tag"))
	if b := report(t, s, imsi, false, t0); b != nil {
		t.Errorf("the report gives %+v, want nothing", b)
	}
	checkBinding(t, s, imsi, nil)
	// The device gets another chance.
	bind(t, s, imsi, device(t, 1), "a2", []byte("tag 2"))
}

// With an administrator's attempt an active binding gets a pending one beside it; it stands until that one has shown itself.
func openedBesideActive(t *testing.T, s Store) {
	for n, ok := range []bool{true, false} {
		imsi := subscription(t, n)
		bind(t, s, imsi, device(t, 2*n), fmt.Sprint("a", n), []byte{byte(n), 1})
		before := activate(t, s, imsi, t0)
		opened := binding.Attempt{ID: fmt.Sprint("o", n), IMSI: imsi, Expires: t0.Add(ttl), Opened: true}
		for range 2 { // it replaces the one before
			if err := s.OpenAttempt(t.Context(), opened); err != nil {
				t.Fatal(err)
			}
		}
		checkBinding(t, s, imsi, before)
		if b, a := prepare(t, s, imsi, "fresh", t0); b != nil || a == nil || *a != opened {
			t.Fatalf("prepared %+v, %+v, want the attempt that was opened", b, a)
		}
		// It is there to its end, however little is left of it; then the binding counts again.
		if b, a := prepare(t, s, imsi, "fresh", t0.Add(ttl-time.Millisecond)); b != nil || a == nil || *a != opened {
			t.Fatalf("at its end prepared %+v, %+v", b, a)
		}
		if b, a := prepare(t, s, imsi, "fresh", t0.Add(ttl)); b == nil || a != nil {
			t.Fatalf("after its end prepared %+v, %+v", b, a)
		}
		pending := newBinding(imsi, device(t, 2*n+1), opened.ID)
		if err := s.Establish(t.Context(), pending, []byte{byte(n), 2}, true, t0); err != nil {
			t.Fatal(err)
		}
		checkBinding(t, s, imsi, pending)
		if b, a := prepare(t, s, imsi, "fresh", t0); b == nil || b.State != binding.Pending || a != nil {
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

// An attempt from before a binding became active does not outlive it, whatever let both be.
func boundNotOpened(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	bind(t, s, imsi, device(t, 1), "a1", []byte("tag"))
	before := activate(t, s, imsi, t0)
	if err := s.OpenAttempt(t.Context(), binding.Attempt{ID: "late", IMSI: imsi, Expires: t0.Add(ttl)}); err != nil {
		t.Fatal(err)
	}
	if err := s.Establish(t.Context(), newBinding(imsi, device(t, 2), "late"), []byte("tag 2"), true, t0); !errors.Is(err, binding.ErrBound) {
		t.Errorf("established beside an active binding: %v", err)
	}
	checkUsed(t, s, device(t, 2), []byte("tag 2"), false)
	checkBinding(t, s, imsi, before)
}

func revoke(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	if _, err := s.Revoke(t.Context(), imsi, t0); !errors.Is(err, binding.ErrNotBound) {
		t.Errorf("revoked nothing: %v", err)
	}
	bind(t, s, imsi, device(t, 1), "a1", []byte("tag"))
	want := activate(t, s, imsi, t0)
	want.State, want.Revoked, want.Sealed = binding.Revoked, t0.Add(time.Hour), []byte{}
	for i := range 2 { // the second time changes nothing
		b, err := s.Revoke(t.Context(), imsi, t0.Add(time.Duration(1+i)*time.Hour))
		if err != nil || b.State != binding.Revoked || !b.Revoked.Equal(want.Revoked) || len(b.Sealed) != 0 {
			t.Fatalf("%+v, %v", b, err)
		}
	}
	checkBinding(t, s, imsi, want)
	if _, err := s.Report(t.Context(), imsi, nobody.Name, true, t0); !errors.Is(err, binding.ErrNotBound) {
		t.Errorf("reported about a revoked binding: %v", err)
	}
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
	if b, a := prepare(t, s, imsi, "a2", t0); b != nil || a == nil {
		t.Fatalf("prepared %+v, %+v", b, a)
	}
	checkUsed(t, s, device(t, 1), []byte("tag"), true)
	next := newBinding(imsi, device(t, 1), "a2")
	if err := s.Establish(t.Context(), next, []byte("tag 2"), true, t0); err != nil {
		t.Fatal(err)
	}
	checkBinding(t, s, imsi, next)
	if b := report(t, s, imsi, false, t0); b != nil {
		t.Errorf("a revoked binding came back: %+v", b)
	}
	checkBinding(t, s, imsi, want)
	openAttempt(t, s, imsi, "a3", t0)
	if err := s.Establish(t.Context(), newBinding(imsi, device(t, 2), "a3"), []byte("tag 3"), true, t0); err != nil {
		t.Fatal(err)
	}
	// Revoked when it has expired: a clock that is set back does not bring it back.
	if _, err := s.Revoke(t.Context(), imsi, t0.Add(pendingTTL)); err != nil {
		t.Fatal(err)
	}
	checkBinding(t, s, imsi, want)
	// Revoked while it is pending.
	bind(t, s, imsi, device(t, 2), "a4", []byte("tag 4"))
	if b, err := s.Revoke(t.Context(), imsi, t0); err != nil || b.IMEI != device(t, 2) || !b.Activated.IsZero() {
		t.Errorf("%+v, %v", b, err)
	}
}

func bindings(t *testing.T, s Store) {
	query := func(q binding.BindingQuery) (names []string) {
		t.Helper()
		q.Now = t0
		all, err := s.Bindings(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
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
		bind(t, s, subscription(t, n), device(t, n/2), fmt.Sprint("a", n), []byte{byte(n)})
	}
	activate(t, s, subscription(t, 1), t0)
	activate(t, s, subscription(t, 2), t0)
	if _, err := s.Revoke(t.Context(), subscription(t, 2), t0); err != nil {
		t.Fatal(err)
	}
	if err := s.OpenAttempt(t.Context(), binding.Attempt{ID: "o", IMSI: subscription(t, 1), Expires: t0.Add(ttl), Opened: true}); err != nil {
		t.Fatal(err)
	}
	if err := s.Establish(t.Context(), newBinding(subscription(t, 1), device(t, 7), "o"), []byte("o"), true, t0); err != nil {
		t.Fatal(err)
	}
	all := []string{"00000 000 PENDING", "00001 007 PENDING", "00002 001 REVOKED", "00003 001 PENDING", "00004 002 PENDING"}
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
	bind(t, s, subscription(t, 1), device(t, 1), "a1", []byte("tag"))
	openAttempt(t, s, subscription(t, 2), "b1", t0)
	for _, ok := range []bool{true, false} {
		if b, err := s.Report(t.Context(), subscription(t, 2), nobody.Name, ok, t0); !errors.Is(err, binding.ErrNotBound) ||
			b != nil {
			t.Errorf("ok %v: %v, error %v, want ErrNotBound", ok, b, err)
		}
	}
}

// race runs f in many goroutines that begin together, and gives what each returned.
func race(f func(i int) error) []error {
	errs := make([]error, racers)
	var begin, done sync.WaitGroup
	begin.Add(1)
	for i := range racers {
		done.Go(func() {
			begin.Wait()
			errs[i] = f(i)
		})
	}
	begin.Done()
	done.Wait()
	return errs
}

// checkOneWon insists that one call succeeded and the others failed as they should, and gives its number.
func checkOneWon(t *testing.T, errs []error, lost error) (winner int) {
	t.Helper()
	winner = -1
	for i, err := range errs {
		switch {
		case err == nil && winner >= 0:
			t.Errorf("calls %d and %d both succeeded", winner, i)
		case err == nil:
			winner = i
		case !errors.Is(err, lost):
			t.Errorf("call %d failed with %v, want %v", i, err, lost)
		}
	}
	if winner < 0 {
		t.Fatal("no call succeeded")
	}
	return winner
}

func racePrepare(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	ids := make([]string, racers)
	for _, err := range race(func(i int) error {
		d, err := s.Prepare(t.Context(), request(imsi, nobody, fmt.Sprint("a", i), t0))
		if d.Attempt != nil {
			ids[i] = d.Attempt.ID
		}
		return err
	}) {
		if err != nil {
			t.Error(err)
		}
	}
	if slices.ContainsFunc(ids, func(id string) bool { return id == "" || id != ids[0] }) {
		t.Errorf("vectors prepared at once got the attempts %q, not one", ids)
	}
}

func raceAttempt(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	openAttempt(t, s, imsi, "a1", t0)
	bindings := make([]*binding.Binding, racers)
	for i := range bindings {
		bindings[i] = newBinding(imsi, device(t, i), "a1")
	}
	errs := race(func(i int) error { return s.Establish(t.Context(), bindings[i], []byte{byte(i)}, true, t0) })
	winner := checkOneWon(t, errs, binding.ErrNoAttempt)
	checkBinding(t, s, imsi, bindings[winner])
	for i, b := range bindings {
		checkUsed(t, s, b.IMEI, []byte{byte(i)}, i == winner)
	}
}

func raceLedger(t *testing.T, s Store) {
	imei := device(t, 1)
	bindings := make([]*binding.Binding, racers)
	for i := range bindings {
		bindings[i] = newBinding(subscription(t, i), imei, fmt.Sprint("a", i))
		openAttempt(t, s, bindings[i].IMSI, bindings[i].AttemptID, t0)
	}
	errs := race(func(i int) error { return s.Establish(t.Context(), bindings[i], []byte("tag"), true, t0) })
	winner := checkOneWon(t, errs, binding.ErrUsed)
	for i, b := range bindings {
		checkOpen(t, s, b.IMSI, b.AttemptID, t0, i != winner)
		if i != winner {
			b = nil
		}
		checkBinding(t, s, bindings[i].IMSI, b)
	}
}

func raceReport(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	want := bind(t, s, imsi, device(t, 1), "a1", []byte("tag"))
	prepare(t, s, imsi, "none", t0)
	got := make([]*binding.Subscription, racers)
	errs := race(func(i int) (err error) {
		got[i], err = s.Report(t.Context(), imsi, nobody.Name, true, t0.Add(time.Minute))
		return err
	})
	want = active(want, t0.Add(time.Minute))
	for i := range got {
		if errs[i] != nil || !reflect.DeepEqual(got[i], &binding.Subscription{Active: want}) {
			t.Errorf("report %d: %+v, error %v", i, got[i], errs[i])
		}
	}
	checkBinding(t, s, imsi, want)
}
