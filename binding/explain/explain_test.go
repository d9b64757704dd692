package explain

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/refusals"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/kme"
)

// Each state and each reason is said in words, and says what to do; nobody is sent to mend what went well since.
func TestExplain(t *testing.T) {
	now, id := time.Now().UTC(), must.Get[kme.IMSI](t)(kme.ParseIMSI("262011234567890"))
	device, err := kme.ParseIMEI("35209900000001")
	if err != nil {
		t.Fatal(err)
	}
	at := func(s binding.State) *binding.Binding {
		return &binding.Binding{IMSI: id, IMEI: device, Lot: "L1", State: s, Established: now, Activated: now,
			Expires: now}
	}
	active := func() *binding.Subscription { return &binding.Subscription{Active: at(binding.Active)} }
	ended := []binding.Entry{{Event: binding.EventEstablished, IMEI: device.String(), Time: now}}
	for name, c := range map[string]struct {
		k           binding.Known
		state, says string
		next        string
	}{
		"never bound":     {binding.Known{}, "UNBOUND", "never bound", "attach"},
		"ended by itself": {binding.Known{History: ended}, "UNBOUND", "never showed that it has the KME", "attach"},
		"pending": {binding.Known{Subscription: &binding.Subscription{Pending: at(binding.Pending)}},
			"PENDING", "0 of its vectors", "attach again"},
		"active": {binding.Known{Subscription: active()},
			"ACTIVE", "only that device", "nothing"},
		"both": {binding.Known{Subscription: &binding.Subscription{Active: at(binding.Active),
			Pending: at(binding.Pending)}},
			"PENDING", "only that device", "attach again"},
		"revoked": {binding.Known{Subscription: &binding.Subscription{Revoked: at(binding.Revoked)}},
			"REVOKED", "was ended", "attach"},
		"opened": {binding.Known{Subscription: &binding.Subscription{Active: at(binding.Active),
			Attempts: []binding.Attempt{{Expires: now}}}},
			"ACTIVE", "lets it be bound to another", "attach before"},
		"damaged": {binding.Known{Damaged: errors.New("the row was changed")},
			"DAMAGED", "the row was changed", "keysvc store verify"},
		"doubted": {binding.Known{Subscription: active(), Doubts: []registry.Doubt{{Why: registry.LotRetired}}},
			"ACTIVE", "LOT_RETIRED", "binding revoke"},
		"directory away": {binding.Known{Subscription: active(), Unknown: errors.New("away")},
			"ACTIVE", "not known: away", "nothing"},
		"refused": {binding.Known{Refused: &refusals.Past{IMSI: id, Time: now, Reason: kme.OtherDevice}},
			"UNBOUND", "never bound", "keysvc binding open"},
		"a replay": {binding.Known{Refused: &refusals.Past{Time: now, Reason: kme.KMERejected,
			Cause: binding.ErrUsed.Error()}},
			"UNBOUND", "never bound", "somebody repeats its payload"},
		"a bad signature": {binding.Known{Refused: &refusals.Past{Time: now, Reason: kme.KMERejected,
			Cause: "signature"}},
			"UNBOUND", "never bound", "factory lot reissue"},
		"and mended since": {binding.Known{Subscription: active(), History: ended,
			Refused: &refusals.Past{Time: now.Add(-time.Hour), Reason: kme.NoAttempt}},
			"ACTIVE", "only that device", "nothing"},
	} {
		if c.k.IMSI = id; c.k.Subscription == nil {
			c.k.Subscription = new(binding.Subscription)
		}
		e := OfSubscription(c.k)
		if e.State != c.state || !strings.Contains(strings.Join(e.Says, "\n"), c.says) ||
			!strings.Contains(strings.Join(e.Next, "\n"), c.next) || (c.k.Refused != nil) != (e.Why != "") {
			t.Errorf("%s: %+v", name, e)
		}
	}
	// What a refusal asks for stands alone: whoever has that to do is not sent to look at origins first.
	rejected := OfSubscription(binding.Known{IMSI: id, Subscription: new(binding.Subscription),
		Refused: &refusals.Past{Time: now, Reason: kme.KMERejected, Cause: "signature"}})
	if len(rejected.Next) != 1 || strings.Contains(rejected.Next[0], "origin") {
		t.Errorf("after a rejected KME, what is to be done is %q", rejected.Next)
	}
	notBound := OfSubscription(binding.Known{IMSI: id, Subscription: new(binding.Subscription),
		Refused: &refusals.Past{Time: now, Reason: kme.NotBound}})
	if len(notBound.Next) != 1 || notBound.Next[0] != firstAttach {
		t.Errorf("of one that is not bound, what is to be done is %q", notBound.Next)
	}
	for _, reason := range []kme.Reason{kme.Malformed, kme.NoAttempt, kme.UnknownDevice, kme.RevokedDevice,
		kme.OtherDevice, kme.KMERejected, kme.NotBound, kme.CallerNotAllowed, kme.Overloaded, kme.HSMUnavailable,
		kme.DirectoryUnavailable, kme.StoreUnavailable, kme.RolledBack, kme.Damaged, "A_NEW_ONE"} {
		why, todo := meaning(&refusals.Past{Reason: reason, Message: "what the caller got"})
		if why == "" || todo == "" {
			t.Errorf("%s: %q, %q", reason, why, todo)
		}
	}
}

// The number of a device that somebody took for an IMSI is recognised.
func TestOrDevice(t *testing.T) {
	tac := must.Get[kme.TAC](t)(kme.ParseTAC("35209900"))
	lots := []*registry.Lot{
		{Manifest: &directory.Manifest{Lot: "L1", Ranges: []directory.Range{{TAC: tac, First: 0, Count: 10}}}},
		{Manifest: &directory.Manifest{Lot: "L2", Ranges: []directory.Range{{TAC: tac, First: 10, Count: 10}}}},
	}
	for number, lot := range map[string]string{"35209900000012": "L2", "35209900000003": "L1", "35209900000020": "",
		"262011234567890": ""} {
		e := &Subscription{IMSI: must.Get[kme.IMSI](t)(kme.ParseIMSI(number))}
		e.OrDevice(lots)
		says, next := strings.Join(e.Says, "\n"), strings.Join(e.Next, "\n")
		if lot == "" && says+next != "" || lot != "" && (!strings.Contains(says, "of lot "+lot+",") ||
			!strings.Contains(next, "keysvc device "+number[:14]+" shows it")) {
			t.Errorf("%s: %q, %q", number, says, next)
		}
	}
}

// What is bound, or damaged, is lost when it is revoked; nothing else is.
func TestRevocationLoss(t *testing.T) {
	imsi := must.Get[kme.IMSI](t)(kme.ParseIMSI("262011234567890"))
	bound := func(s binding.State) *binding.Binding { return &binding.Binding{State: s, Lot: "L1"} }
	away := errors.New("the store is away")
	for name, c := range map[string]struct {
		s    binding.Subscription
		err  error
		says string
		fail error
	}{
		"never bound": {},
		"revoked":     {s: binding.Subscription{Revoked: bound(binding.Revoked)}},
		"pending":     {s: binding.Subscription{Pending: bound(binding.Pending)}, says: "it is bound to IMEI"},
		"active":      {s: binding.Subscription{Active: bound(binding.Active)}, says: "of lot L1"},
		"damaged":     {err: fmt.Errorf("read: %w", &binding.DamagedRow{}), says: "what it is bound to is damaged"},
		"away":        {err: away, fail: away},
	} {
		says, err := RevocationLoss(imsi, &c.s, c.err)
		if !errors.Is(err, c.fail) || (says == "") != (c.says == "") || !strings.Contains(says, c.says) {
			t.Errorf("%s: %q, %v", name, says, err)
		}
	}
}
