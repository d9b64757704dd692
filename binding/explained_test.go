package binding_test

import (
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/explain"
	"github.com/kmehsm/kmehsm/binding/imports"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/kme"
)

// What is explained to who is no administrator: how a subscription stands and why its last call was refused, but not
// what was wrong with a payload, which the log has.
func TestExplained(t *testing.T) {
	r, m, l := newServed(t)
	ctx, imsi, d := t.Context(), newIMSI(), l.devices[0]
	check := func(when, state string, want ...string) {
		t.Helper()
		e := explain.OfSubscription(must[binding.Known](t)(r.service.Known(ctx, imsi)))
		text := strings.Join(e.Says, "\n") + "\n" + e.Why + "\n" + strings.Join(e.Next, "\n")
		for _, w := range want {
			if !strings.Contains(text, w) {
				t.Errorf("%s: no %q in %s", when, w, text)
			}
		}
		if e.State != state || strings.Contains(text, "used") || e.Refused != nil && e.Refused.Cause != "" {
			t.Errorf("%s: %+v", when, e)
		}
	}
	check("never seen", "UNBOUND", "It was never bound.")
	payload, _ := d.payload(t)
	ask := binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: r.attempt(t, imsi), Payload: payload,
		Origin: here}
	must[*binding.Established](t)(r.service.EstablishKME(ctx, ask))
	r.activate(t, imsi)
	check("bound", "ACTIVE", "It is bound to device "+d.imei.String())
	ask.IMSI, imsi = newIMSI(), ask.IMSI
	ask.AttemptID = r.attempt(t, ask.IMSI)
	_, err := r.service.EstablishKME(ctx, ask) // the same payload again, for another subscription
	checkRefused(t, "a replay", err, kme.KMERejected, "")
	if text := r.log.String(); !strings.Contains(text, "the KME was used before") && !strings.Contains(text, "used") {
		t.Errorf("the log has no cause: %s", text)
	}
	bound := imsi
	imsi = ask.IMSI
	check("a replay", "UNBOUND", "the payload of device "+d.imei.String()+" was not accepted\n")
	imsi = bound
	r.revoke(t, m, l, d)
	check("the device is revoked", "ACTIVE", "DEVICE_REVOKED", "keysvc binding revoke "+imsi.String())
	if !strings.Contains(r.log.String(), `"subscription explained"`) {
		t.Error("the log does not say that a subscription was explained")
	}
}

// A device is explained by its lot and the list of revoked devices, with the bindings that the asker may see.
func TestExplainedDevice(t *testing.T) {
	r, m, l := newServed(t)
	ctx, d := t.Context(), l.devices[0]
	imsi := r.bind(t, d)
	check := func(when string, q binding.BindingQuery, bound int, says, next string) {
		t.Helper()
		e := explain.OfDevice(must[binding.KnownDevice](t)(r.service.KnownDevice(ctx, d.imei, q)))
		text, do := strings.Join(e.Says, "\n"), strings.Join(e.Next, "\n")
		if len(e.Bindings) != bound || !strings.Contains(text, says) || !strings.Contains(do, next) ||
			(next == "") != (do == "") {
			t.Errorf("%s: %d bindings, %s\n%s", when, len(e.Bindings), text, do)
		}
	}
	check("good", binding.BindingQuery{}, 1, "in lot L1 of manufacturer "+m.KeyID()+", which is served", "")
	check("for whoever sees others", binding.BindingQuery{Within: []string{"26201"}}, 0, "in lot L1", "")
	check("for whoever sees it", binding.BindingQuery{Within: []string{imsi.String()[:5]}}, 1, "in lot L1", "")
	r.revoke(t, m, l, d)
	check("revoked", binding.BindingQuery{}, 1, "The manufacturer has revoked it", "needs another device")
	must[registry.Verdict](t)(imports.Distrust(ctx, r.store, m.KeyID(), verdict(t, true, "its key is lost")))
	r.serve(t)
	check("of nobody that is trusted", binding.BindingQuery{}, 1, "in no lot", "keysvc lot import")
}
