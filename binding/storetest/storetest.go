// Package storetest holds every implementation of binding.Store and registry.Store to what they promise.
package storetest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"reflect"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/sightings"
	"github.com/kmehsm/kmehsm/binding/tokenkeys"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/kme"
)

// A Store is what Run tests: all interfaces in one.
type Store = interface {
	binding.Store
	registry.Store
	tokenkeys.SealedStore
	binding.Listings
	sightings.Store
	Count(ctx context.Context, now time.Time) (map[binding.State]int64, error)
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
		{"EstablishAfterOpened", establishAfterOpened},
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
		{"SpentWhenPendingEnds", spentWhenPendingEnds},
		{"ExpiredIsReplaced", expiredIsReplaced},
		{"OpenedByOrigin", openedByOrigin},
		{"Revoke", revoke},
		{"Bindings", bindings},
		{"Manufacturers", manufacturers},
		{"Lots", lots},
		{"LotRefused", lotRefused},
		{"Verdicts", verdicts},
		{"VerdictsRefused", verdictsRefused},
		{"Bound", boundTo},
		{"Count", count},
		{"Reseal", reseal},
		{"Noted", noted},
		{"LastNote", lastNote},
		{"RolledBack", rolledBack},
		{"Equipment", equipment},
		{"Listed", listed},
		{"Sightings", seenDevices},
		{"SightingsBounded", sightingsBounded},
		{"SightingsTogether", sightingsTogether},
		{"RacePrepare", racePrepare},
		{"RaceAttempt", raceAttempt},
		{"RaceLedger", raceLedger},
		{"RaceReport", raceReport},
		{"RaceLots", raceLots},
		{"RaceListed", raceListed},
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
	return must.Get[kme.IMSI](t)(kme.ParseIMSI(fmt.Sprintf("0010100000%05d", n))) // the zeros in front must survive
}

func device(t *testing.T, n int) kme.IMEI {
	t.Helper()
	return must.Get[kme.IMEI](t)(kme.NewIMEI(tac(t), n))
}

func tac(t *testing.T) kme.TAC {
	t.Helper()
	return must.Get[kme.TAC](t)(kme.ParseTAC("01234567"))
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
func request(imsi kme.IMSI, o binding.Origin, now time.Time) binding.VectorRequest {
	var r hsmkeys.RAND
	rand.Read(r[:])
	return binding.VectorRequest{
		IMSI: imsi, Origin: o, RANDs: []hsmkeys.RAND{r}, Now: now, AttemptTTL: ttl, PendingVectors: pendingVectors,
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
	must.Do(t, err)
	if (d.Binding == nil) == (d.Attempt == nil) {
		t.Fatalf("Prepare gave binding %v and attempt %v, not one of them", d.Binding, d.Attempt)
	}
	return d
}

func prepare(t *testing.T, s Store, imsi kme.IMSI, now time.Time) (*binding.Binding, *binding.Attempt) {
	t.Helper()
	d := decide(t, s, request(imsi, nobody, now))
	return d.Binding, d.Attempt
}

// openAttempt opens one, and gives its id.
func openAttempt(t *testing.T, s Store, imsi kme.IMSI, now time.Time) string {
	t.Helper()
	_, a := prepare(t, s, imsi, now)
	if a == nil || a.IMSI != imsi || a.Opened || !a.Expires.Equal(now.Add(ttl)) {
		t.Fatalf("Prepare gave attempt %v at %s", a, now)
	}
	return a.ID
}

func checkOpen(t *testing.T, s Store, imsi kme.IMSI, id string, now time.Time, want bool) {
	t.Helper()
	checkOpenFrom(t, s, imsi, nobody, id, now, want)
}

func checkOpenFrom(t *testing.T, s Store, imsi kme.IMSI, o binding.Origin, id string, now time.Time, want bool) {
	t.Helper()
	a, err := s.Attempt(t.Context(), imsi, o.Name, id, now)
	if errors.Is(err, binding.ErrNoAttempt) == want || err != nil && !errors.Is(err, binding.ErrNoAttempt) ||
		a != nil && (a.ID != id || a.IMSI != imsi || a.Origin != o.Name) {
		t.Errorf("attempt %s of %s at %s: %v, %v, want it open: %v", id, imsi, now, a, err, want)
	}
}

func subscriptionOf(t *testing.T, s Store, imsi kme.IMSI, now time.Time) *binding.Subscription {
	t.Helper()
	return must.Get[*binding.Subscription](t)(s.Subscription(t.Context(), imsi, now))
}

func newBinding(imsi kme.IMSI, imei kme.IMEI, attempt string) *binding.Binding {
	fill := func(n int) []byte { return bytes.Repeat([]byte(attempt[len(attempt)-1:]), n) }
	return &binding.Binding{
		IMSI: imsi, IMEI: imei, Manufacturer: "maker", Lot: "L1", State: binding.Pending, DeviceKey: 2,
		Sealed: fill(40), Established: t0.Add(time.Second), Expires: t0.Add(pendingTTL), AttemptID: attempt,
		PayloadSHA256: append([]byte{0, 0xff}, fill(30)...), NWSig: fill(32),
	}
}

// bind opens an attempt and makes a binding within it.
func bind(t *testing.T, s Store, imsi kme.IMSI, imei kme.IMEI, tag []byte) *binding.Binding {
	t.Helper()
	b := newBinding(imsi, imei, openAttempt(t, s, imsi, t0))
	must.Do(t, s.Establish(t.Context(), b, tag, true, t0))
	return b
}

func checkBinding(t *testing.T, s Store, imsi kme.IMSI, want *binding.Binding) {
	t.Helper()
	if got := subscriptionOf(t, s, imsi, t0).Latest(); !reflect.DeepEqual(got, want) {
		t.Errorf("binding of %s:\n got %+v\nwant %+v", imsi, got, want)
	}
}

// refused insists that a call has failed as it should.
func refused(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

// askers are subscriptions that nothing else is done with.
var askers atomic.Int64

// checkUsed asks, as somebody does who has a KME that is not good, whether the ledger has it: in an attempt of another
// subscription.
func checkUsed(t *testing.T, s Store, imei kme.IMEI, tag []byte, want bool) {
	t.Helper()
	imsi := subscription(t, 50_000+int(askers.Add(1)))
	b := newBinding(imsi, imei, openAttempt(t, s, imsi, t0))
	if err := s.Establish(t.Context(), b, tag, false, t0); errors.Is(err, binding.ErrUsed) != want ||
		errors.Is(err, binding.ErrNotGood) == want {
		t.Errorf("tag %x of %s: %v, want it used: %v", tag, imei, err, want)
	}
	checkBinding(t, s, b.IMSI, nil)
	checkOpen(t, s, b.IMSI, b.AttemptID, t0, true)
}
