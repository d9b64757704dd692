package binding_test

import (
	"testing"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/kme"
)

// A device is greylisted until it has proven itself, and whitelisted then, for one read of the store and nothing of the
// token.
func TestCheckEquipment(t *testing.T) {
	r, _, l := newServed(t)
	d := l.devices[0]
	check := func(imei kme.IMEI, imsi kme.IMSI) binding.Equipment {
		t.Helper()
		r.recorder.take()
		e := must[binding.Equipment](t)(r.service.CheckEquipment(t.Context(), imei, imsi))
		if calls := r.recorder.take(); len(calls) > 1 || len(calls) == 1 && calls[0] != "Equipment" {
			t.Errorf("it called %q", calls)
		}
		return e
	}
	for _, asked := range []kme.IMSI{newIMSI(), {}} {
		if got := check(d.imei, asked); got != (binding.Equipment{Status: binding.Greylisted, Reason: binding.NotProven}) {
			t.Errorf("before: %+v", got)
		}
	}
	imsi := r.bind(t, d)
	r.activate(t, imsi)
	for _, asked := range []kme.IMSI{imsi, {}} {
		if got := check(d.imei, asked); got != (binding.Equipment{Status: binding.Whitelisted, Reason: binding.Proven}) {
			t.Errorf("after: %+v", got)
		}
	}
	if got := check(l.devices[1].imei, imsi); got != (binding.Equipment{Status: binding.Blacklisted, Reason: binding.OtherDevice}) {
		t.Errorf("another device: %+v", got)
	}
}
