package binding_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/limits"
	"github.com/kmehsm/kmehsm/internal/panics"
)

// A panic of the token or the store leaves nothing taken: no place among the calls, and no ticket of the store. One
// that ended on another goroutine is no refusal: nothing is away.
func TestPanics(t *testing.T) {
	r, _, l := newServed(t)
	r.service = r.newService(binding.Options{Lots: r.lots(t), Limits: limits.Limits{Calls: 1}})
	bound := newIMSI()
	payload, _ := l.devices[0].payload(t)
	imei, attempt := l.devices[0].imei, r.attempt(t, bound)
	if _, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: bound, IMEI: imei,
		AttemptID: attempt, Payload: payload, Origin: here}); err != nil {
		t.Fatal(err)
	}
	r.activate(t, bound)
	restore := func() error {
		_, err := r.service.RestoreRAND(t.Context(), bound, newRANDs(1)[0], here)
		return err
	}
	establish := func(export bool) func() error {
		imsi := newIMSI()
		attempt := r.attempt(t, imsi)
		payload, _ := l.devices[1].payload(t)
		return func() error {
			_, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: l.devices[1].imei,
				AttemptID: attempt, Payload: payload, Origin: here, Export: export})
			return err
		}
	}
	for _, c := range []struct {
		seam string
		call func() error
	}{
		{"Prepare", func() error { return r.vector(t, newIMSI()) }},
		{"EncryptRANDs", func() error { return r.vector(t, bound) }},
		{"DecryptRAND", restore},
		{"Spent", restore},
		{"Subscription", restore},
		{"OpenPayload", establish(false)},
		{"Establish", establish(false)},
		{"ExportKME", establish(true)},
		{"Report", func() error {
			_, err := r.service.ReportAuthentication(t.Context(), bound, true, here)
			return err
		}},
	} {
		t.Run(c.seam, func(t *testing.T) {
			call := func() (err error) {
				defer panics.Recover(&err)
				return c.call()
			}
			r.recorder.onFirst(c.seam, func() error { panic("here") })
			if p := panics.Of(call()); p == nil || p.Value != "here" {
				t.Errorf("the call ended with %v", p)
			}
			r.recorder.onFirst(c.seam, func() error { return &panics.Error{Value: "elsewhere"} })
			err := call()
			if p := panics.Of(err); p == nil || p.Value != "elsewhere" || errors.As(err, new(*binding.Refusal)) {
				t.Errorf("the call ended with %v", err)
			}
			if n := r.recorder.tickets.Load(); n != 0 {
				t.Errorf("%d tickets are still out", n)
			}
			if err := call(); err != nil {
				t.Errorf("the same call again: %v", err)
			}
		})
	}
}

// What a refusal would have said cannot be known while the store is away, and the log has why a call was not answered.
func TestStoreErrors(t *testing.T) {
	r, _, l := newServed(t)
	imsi := newIMSI()
	away := errors.New("the disk is gone")
	for _, c := range []struct {
		name, seam string
		call       func() error
	}{
		{"no attempt, or another device?", "Subscription", func() error {
			// The first look finds no attempt; the one that fails asks for whom.
			r.recorder.onFirst("Subscription", func() error {
				r.recorder.onFirst("Subscription", func() error { return away })
				return nil
			})
			_, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: l.devices[0].imei,
				AttemptID: "none", Payload: make([]byte, 256), Origin: here})
			return err
		}},
		{"get", "Subscription", func() error { _, err := r.service.GetBinding(t.Context(), imsi); return err }},
		{"list", "Bindings", func() error {
			_, err := r.service.ListBindings(t.Context(), binding.BindingQuery{Limit: 10})
			return err
		}},
	} {
		before := len(r.log.String())
		r.recorder.onFirst(c.seam, func() error { return away })
		checkRefused(t, c.name, c.call(), "STORE_UNAVAILABLE", "")
		if line := r.log.String()[before:]; !strings.Contains(line, away.Error()) {
			t.Errorf("%s: the log has %q, and not the cause", c.name, line)
		}
	}
}
