package binding_test

import (
	"slices"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/kme"
)

// A bound device that the manufacturer revokes is not served on; one that got another key is.
func TestRevokedWhileBound(t *testing.T) {
	r, m, l := newServed(t)
	d := l.devices[0]
	imsi := r.prove(t, d)
	if err := r.vector(t, imsi); err != nil {
		t.Fatal(err)
	}
	r.revoke(t, m, l, d)
	checkRefused(t, "a vector for a device that was revoked", r.vector(t, imsi), kme.RevokedDevice, "")
}

// Whether the device of a binding was revoked is known of lots that were imported, also if they were retired. An
// instance that does not know the lot refuses: another one may have imported it.
func TestRevokedInALotThatIsNotKnown(t *testing.T) {
	r, m, l := newServed(t)
	d := l.devices[0]
	imsi := r.prove(t, d)
	must[registry.Verdict](t)(r.store.Decide(t.Context(), m.KeyID(), l.Lot, registry.Verdict{Withdrawn: true, By: "ops",
		Reason: "sold", Time: time.Now()}, func([]*registry.Lot) error { return nil }))
	r.serve(t)
	if err := r.vector(t, imsi); err != nil {
		t.Errorf("a device of a retired lot that was not revoked: %v", err)
	}
	r.revoke(t, m, l, d)
	checkRefused(t, "a revoked device of a retired lot", r.vector(t, imsi), kme.RevokedDevice, "")
	r.service = r.service.WithLots(new(registry.Lots))
	checkRefused(t, "a device of a lot that is not known", r.vector(t, imsi), kme.DirectoryUnavailable, "")
}

// A lot that the manufacturer revokes: none of its devices is bound any more, and none that is bound is served on.
func TestRevokedLot(t *testing.T) {
	r, m, l := newServed(t)
	d := l.devices[0]
	imsi := r.prove(t, d)
	if err := directory.RevokeLot(t.Context(), m.store, m.Signer, l.Manifest, "its key has leaked",
		time.Now()); err != nil {
		t.Fatal(err)
	}
	r.refresh(t, m, l)
	checkRefused(t, "a vector for a device of a revoked lot", r.vector(t, imsi), kme.RevokedDevice, "")
	other := newIMSI()
	payload, _ := l.devices[1].payload(t)
	_, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: other, IMEI: l.devices[1].imei,
		AttemptID: r.attempt(t, other), Payload: payload, Origin: here})
	checkRefused(t, "a payload of a device of a revoked lot", err, kme.RevokedDevice, "")
}

// Only who asks for it gets the KME, and also with an answer that is given again.
func TestExport(t *testing.T) {
	r, _, l := newServed(t)
	imsi, d := newIMSI(), l.devices[0]
	payload, plain := d.payload(t)
	attempt := r.attempt(t, imsi)
	for i, export := range []bool{true, false, true} {
		e := must[*binding.Established](t)(r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi,
			IMEI: d.imei, AttemptID: attempt, Payload: payload, Origin: here, Export: export}))
		if export != e.KME.Equal(plain.KME) || !export && e.KME.Bytes() != nil {
			t.Errorf("call %d: exported %v", i, e.KME.Bytes() != nil)
		}
	}
	bad := slices.Clone(payload)
	bad[len(bad)-1] ^= 1
	other := newIMSI()
	if _, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: other, IMEI: d.imei,
		AttemptID: r.attempt(t, other), Payload: bad, Origin: here, Export: true}); err == nil {
		t.Error("a bad payload's plaintext was exported")
	}
	if calls := r.recorder.take(); slices.Index(calls, "ExportKME") < slices.Index(calls, "Establish") {
		t.Errorf("exported before it was durable: %q", calls)
	}
}
