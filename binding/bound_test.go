package binding_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"slices"
	"testing"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/kme"
)

// In the bound suite a payload is good for one subscription, device and lot, and for nothing else.
func TestBoundSuite(t *testing.T) {
	r, m := newHarness(t), newMaker(t)
	r.enroll(t, m)
	l := m.newLot(t, "LB", kme.SuiteBound, vectors(t).lot(t, "lot-2048"), 1, newDevices(t, 3)...)
	r.take(t, m, l)
	d := l.devices[0]
	make := func(c kme.Context) ([]byte, *kme.Plaintext) {
		p := &kme.Plaintext{KME: kme.RandomSecret(), RME: kme.RandomSecret()}
		p.Sig = must[[]byte](t)(kme.SuiteBound.Sign(d.signer, kme.SuiteBound.Signed(c, p)))
		return must[[]byte](t)(kme.SuiteBound.Encrypt(&l.key.PublicKey, p)), p
	}
	imsi := newIMSI()
	attempt := r.attempt(t, imsi)
	right := kme.Context{Lot: "LB", IMEI: d.imei, IMSI: imsi}
	good, plain := make(right)
	reject := func(name string, payload []byte) {
		t.Helper()
		_, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
			AttemptID: attempt, Payload: payload, Origin: here})
		checkRefused(t, name, err, kme.KMERejected, notAccepted)
	}
	other := newIMSI()
	for name, c := range map[string]kme.Context{
		"for another subscription": {Lot: "LB", IMEI: d.imei, IMSI: other},
		"for another device":       {Lot: "LB", IMEI: l.devices[1].imei, IMSI: imsi},
		"for another lot":          {Lot: "LA", IMEI: d.imei, IMSI: imsi},
	} {
		payload, _ := make(c)
		reject(name, payload)
	}
	// The signature of the text's suite, over KME alone.
	p := &kme.Plaintext{KME: kme.RandomSecret(), RME: kme.RandomSecret()}
	p.Sig = must[[]byte](t)(kme.SuiteECDSA.Sign(d.signer, p.KME.Bytes()))
	reject("signed as in the text", must[[]byte](t)(kme.SuiteBound.Encrypt(&l.key.PublicKey, p)))
	// With another RME, as anybody could make it if RME were not signed.
	reject("with another RME",
		must[[]byte](t)(kme.SuiteBound.Encrypt(&l.key.PublicKey, &kme.Plaintext{KME: plain.KME, RME: kme.RandomSecret(),
			Sig: plain.Sig})))
	reject("encrypted as in a textbook", must[[]byte](t)(kme.SuiteECDSA.Encrypt(&l.key.PublicKey, plain)))
	sha1 := must[[]byte](t)(rsa.EncryptOAEP(sha1.New(), rand.Reader, &l.key.PublicKey,
		slices.Concat(plain.KME.Bytes(), plain.Sig, plain.RME.Bytes()), nil))
	reject("with another hash", sha1)
	noise := bytes.Clone(good)
	rand.Read(noise[1:])
	reject("noise", noise)
	reject("above N", bytes.Repeat([]byte{0xff}, len(good)))

	e := must[*binding.Established](t)(r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi,
		IMEI: d.imei, AttemptID: attempt, Payload: good, Origin: here, Export: true}))
	want := plain.NWSig()
	if !bytes.Equal(e.NWSig, want[:]) || !e.KME.Equal(plain.KME) {
		t.Errorf("NW_SIG %x, want %x", e.NWSig, want)
	}
	_, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: other, IMEI: d.imei,
		AttemptID: r.attempt(t, other), Payload: good, Origin: here})
	checkRefused(t, "by another subscription", err, kme.KMERejected, notAccepted)
	if h := r.token.Health(); h.Reinitialised != 0 || h.Cause != nil {
		t.Errorf("payloads have closed the token: %+v", h)
	}
}
