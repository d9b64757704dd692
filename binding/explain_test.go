package binding_test

import (
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/imports"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/kme"
)

// A subscription is explained at each point of its life: how it stands, why the last call was refused, what to do.
func TestExplain(t *testing.T) {
	r, m, l := newServed(t)
	ctx, imsi, d, other := t.Context(), newIMSI(), l.devices[0], l.devices[1]
	check := func(when string, facts, do []string) {
		t.Helper()
		e := must[*binding.Explanation](t)(r.service.ExplainIMSI(ctx, imsi))
		checkText(t, when+", the facts", e.Facts, facts)
		checkText(t, when+", what to do", e.Do, do)
	}
	establish := func(d *device, attempt string, payload []byte) error {
		_, err := r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: attempt,
			Payload: payload, Origin: here})
		return err
	}
	const quiet = "No call about it was refused"
	check("never seen", []string{"bound to no device", quiet}, nil)
	r.service.GetBinding(ctx, imsi) // who only looks is told so, and changes nothing
	check("looked at", []string{"bound to no device", quiet}, nil)

	payload, _ := d.payload(t)
	bad := make([]byte, len(payload))
	checkRefused(t, "garbage", establish(d, r.attempt(t, imsi), bad), kme.KMERejected, "")
	check("a rejected payload", []string{"bound to no device", `refused was "establish"`, "KME_REJECTED",
		"content of the device's payload was not good"}, []string{"log has the cause"})

	if err := establish(d, r.attempt(t, imsi), payload); err != nil {
		t.Fatal(err)
	}
	check("pending", []string{"A KME of IMEI " + d.imei.String() + " of lot L1 was accepted", "is pending until",
		"under that KME never", "That is settled"}, []string{"attach once more"})
	r.activate(t, imsi)
	check("active", []string{"is bound to IMEI " + d.imei.String() + " of lot L1 since", "this device only",
		"That is settled"}, nil)

	stolen, _ := other.payload(t)
	checkRefused(t, "another device", establish(other, "x", stolen), kme.OtherDevice, "")
	check("another device", []string{"is bound to IMEI " + d.imei.String(), "OTHER_DEVICE: the SIM is in another device"},
		[]string{"keysvc binding open " + imsi.String()})
	must[*binding.Attempt](t)(r.service.OpenProvisioning(ctx, imsi, time.Hour))
	check("opened", []string{"is bound to", "opened provisioning until"}, []string{"keysvc binding open"})

	if err := directory.Revoke(ctx, m.store, m.Signer, l.Manifest, []kme.IMEI{d.imei}, "stolen", time.Now(),
		nil); err != nil {
		t.Fatal(err)
	}
	r.refresh(t, m, l)
	check("the device is revoked", []string{"is bound to", "The manufacturer has revoked the device"},
		[]string{"needs another device"})
	must[binding.Verdict](t)(imports.Distrust(ctx, r.store, m.KeyID(), verdict(t, true, "its key is lost")))
	r.serve(t)
	check("the manufacturer is distrusted", []string{"is bound to", "Its manufacturer is distrusted",
		"its key is lost"}, []string{"keysvc binding revoke " + imsi.String()})
	must[*binding.Binding](t)(r.service.RevokeBinding(ctx, imsi))
	check("revoked", []string{"an administrator has revoked that at", "bound to no device"}, nil)
	if text := r.log.String(); strings.Count(text, `"subscription explained"`) < 8 {
		t.Error("the log does not say that a subscription was explained")
	}
}

// A device is explained by its lot and the list of revoked devices, with the bindings that the asker may see.
func TestExplainDevice(t *testing.T) {
	r, m, l := newServed(t)
	ctx, d := t.Context(), l.devices[0]
	imsi := r.bind(t, d)
	check := func(when string, q binding.BindingQuery, bound int, facts, do []string) {
		t.Helper()
		e, all, err := r.service.ExplainIMEI(ctx, d.imei, q)
		if err != nil || len(all) != bound {
			t.Fatalf("%s: %v, %v", when, all, err)
		}
		checkText(t, when+", the facts", e.Facts, facts)
		checkText(t, when+", what to do", e.Do, do)
	}
	check("good", binding.BindingQuery{}, 1, []string{"in lot L1 of manufacturer " + m.KeyID() + ", which is served"}, nil)
	check("of others", binding.BindingQuery{Within: []string{"26201"}}, 0, []string{"in lot L1"}, nil)
	check("of ours", binding.BindingQuery{Within: []string{imsi.String()[:5]}}, 1, []string{"in lot L1"}, nil)
	if err := directory.Revoke(ctx, m.store, m.Signer, l.Manifest, []kme.IMEI{d.imei}, "stolen", time.Now(),
		nil); err != nil {
		t.Fatal(err)
	}
	r.refresh(t, m, l)
	check("revoked", binding.BindingQuery{}, 1, []string{"which is served", "has revoked the device"},
		[]string{"needs another device"})
	r.service = r.service.WithLots(new(binding.Lots))
	check("no lots", binding.BindingQuery{}, 1, []string{"in no lot"}, []string{"keysvc lot import"})
}

// Every reason is explained.
func TestMeanings(t *testing.T) {
	for _, reason := range kme.Reasons() {
		e := new(binding.Lots).Explain(newIMSI(), new(binding.Subscription), &binding.LastRefusal{Reason: reason,
			Call: "establish", Message: "no", Time: time.Now()})
		if text := strings.Join(e.Facts, " "); !strings.Contains(text, string(reason)+": ") || strings.Contains(text,
			string(reason)+":  ") || len(e.Do) != 1 || len(e.Do[0]) < 10 {
			t.Errorf("%s: %q", reason, e)
		}
	}
}

// checkText insists that the texts are in this order in what was said; without, that nothing was.
func checkText(t *testing.T, what string, said, want []string) {
	t.Helper()
	text := strings.Join(said, "\n")
	rest, ok := text, len(want) > 0 || text == ""
	for _, w := range want {
		var found bool
		if _, rest, found = strings.Cut(rest, w); !found {
			ok = false
		}
	}
	if !ok {
		t.Errorf("%s:\n%s\nwant %q", what, text, want)
	}
}
