package binding_test

import (
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// The life of a binding, as an HSS sees it.
func TestLife(t *testing.T) {
	r, m, l := newServed(t)
	ctx := t.Context()
	d := l.devices[0]
	imsi := newIMSI()
	checkUnbound := func(when string) {
		t.Helper()
		vector := hsmkeys.RAND(newRANDs(1)[0])
		_, err := r.service.GetBinding(ctx, imsi)
		checkRefused(t, when+", get", err, kme.NotBound, "")
		_, err = r.service.RestoreRAND(ctx, imsi, vector[:], here)
		checkRefused(t, when+", restore", err, kme.NotBound, "")
		for _, ok := range []bool{true, false} {
			_, err = r.service.ReportAuthentication(ctx, imsi, ok, here)
			checkRefused(t, when+", report", err, kme.NotBound, "")
		}
		p := must[*binding.Prepared](t)(r.service.PrepareVector(ctx, imsi, [][]byte{vector[:]}, here))
		if p.RANDs[0] != vector || p.AttemptID == "" {
			t.Errorf("%s: prepared %+v, want RAND as it was and an attempt", when, p)
		}
		if back := must[hsmkeys.RAND](t)(r.service.RestoreRAND(ctx, imsi, vector[:], here)); back != vector {
			t.Errorf("%s: a RAND that was sent in clear is restored to %x, want %x", when, back, vector)
		}
	}
	checkBound := func(when string, p *kme.Plaintext, state binding.State) {
		t.Helper()
		b := must[*binding.Binding](t)(r.service.GetBinding(ctx, imsi))
		if b.State != state || b.IMEI != d.imei || b.Lot != "L1" || b.Manufacturer != m.KeyID() ||
			b.Activated.IsZero() != (state == binding.Pending) {
			t.Errorf("%s: binding %+v", when, b)
		}
		vector := hsmkeys.RAND(newRANDs(1)[0])
		prepared := must[*binding.Prepared](t)(r.service.PrepareVector(ctx, imsi, [][]byte{vector[:]}, here))
		if want := encryptRAND(t, p.KME.Bytes(), vector); prepared.RANDs[0] != want || prepared.AttemptID != "" {
			t.Errorf("%s: prepared %+v, want RAND %x and no attempt", when, prepared, want)
		}
		if back := must[[hsmkeys.RANDSize]byte](t)(r.service.RestoreRAND(ctx, imsi,
			prepared.RANDs[0][:], here)); back != vector {
			t.Errorf("%s: RAND restored to %x, want %x", when, back, vector)
		}
	}

	checkUnbound("at first")
	attempt := r.attempt(t, imsi)
	r.attempt(t, imsi) // it does not end the one before
	payload, p := d.payload(t)
	must[*binding.Established](t)(r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
		AttemptID: attempt, Payload: payload, Origin: here}))
	checkBound("established", p, binding.Pending)

	if got, err := r.service.ReportAuthentication(ctx, imsi, false, here); err != nil ||
		got.Binding != nil || got.Served {
		t.Errorf("a failed authentication leaves %+v, error %v", got, err)
	}
	checkUnbound("dropped")
	_, err := r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: attempt,
		Payload: payload, Origin: here})
	checkRefused(t, "the dropped binding's attempt", err, kme.NoAttempt, "")

	payload, p = d.payload(t)
	must[*binding.Established](t)(r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
		AttemptID: r.attempt(t, imsi), Payload: payload, Origin: here}))
	r.activate(t, imsi)
	for _, ok := range []bool{true, true, false} { // an active binding outlives a failed authentication
		if got := must[*binding.Reported](t)(r.service.ReportAuthentication(ctx, imsi, ok, here)); !got.Served ||
			got.Binding.State != binding.Active {
			t.Errorf("report %v gives %+v", ok, got)
		}
		checkBound("active", p, binding.Active)
	}
}

// An attempt ends by itself.
func TestAttemptExpires(t *testing.T) {
	r, _, l := newServed(t)
	d := l.devices[0]
	const short = 20 * time.Millisecond
	service := r.newService(binding.Options{Times: binding.Times{Attempt: short, Pending: ttl, PendingVectors: 3,
		Now: time.Now}})
	imsi := newIMSI()
	p := must[*binding.Prepared](t)(service.PrepareVector(t.Context(), imsi, newRANDs(1), here))
	time.Sleep(short + 2*time.Millisecond) // stores keep milliseconds
	payload, _ := d.payload(t)
	_, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
		AttemptID: p.AttemptID, Payload: payload, Origin: here})
	checkRefused(t, "after its time", err, kme.NoAttempt, "")
	again := must[*binding.Prepared](t)(service.PrepareVector(t.Context(), imsi, newRANDs(1), here))
	if again.AttemptID == "" || again.AttemptID == p.AttemptID {
		t.Errorf("attempt %q after %q", again.AttemptID, p.AttemptID)
	}
}
