package binding_test

import (
	"bytes"
	"crypto/aes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

const notAccepted = "the payload was not accepted"

// Every known answer, through real tokens and a real database.
func TestVectors(t *testing.T) {
	r, devices := newKnown(t)
	ordered := slices.Clone(vectors(t).Vectors)
	// The bad ones first: some have the KME of a good one, and must not have used it up.
	slices.SortStableFunc(ordered, func(a, b *vector) int { return strings.Compare(b.Expect, a.Expect) })
	for _, v := range ordered {
		t.Run(v.Name, func(t *testing.T) {
			imsi := newIMSI()
			attempt := r.attempt(t, imsi)
			e, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: devices[v].imei,
				AttemptID: attempt, Payload: v.Payload, Origin: here})
			switch {
			case v.Why == "length":
				checkRefused(t, "establish", err, kme.Malformed, "")
			case v.Expect == "reject" || v.secondOfPair():
				checkRefused(t, "establish", err, kme.KMERejected, notAccepted)
			case err != nil:
				t.Error(err)
			case !bytes.Equal(e.NWSig, v.NWSig) || e.State != binding.Pending:
				t.Errorf("NW_SIG %x, %s, want %x, PENDING", e.NWSig, e.State, v.NWSig)
			}
			r.checkBound(t, imsi, err == nil)
			if err != nil {
				return
			}
			in := [hsmkeys.RANDSize]byte{1, 2, 3}
			p := must[*binding.Prepared](t)(r.service.PrepareVector(t.Context(), imsi, [][]byte{in[:]}, here))
			if want := encryptRAND(t, v.KME, in); p.RANDs[0] != want || p.AttemptID != "" {
				t.Errorf("RAND is %x, want %x by AES-256 under the KME", p.RANDs[0], want)
			}
		})
	}
	logged := strings.ToLower(r.log.String())
	for _, v := range ordered {
		for name, secret := range map[string][]byte{"KME": v.KME, "RME": v.RME, "payload": v.Payload,
			"NW_SIG": v.NWSig} {
			if len(secret) == 0 || bytes.Count(secret, secret[:1]) == len(secret) {
				continue
			}
			for _, form := range []string{hex.EncodeToString(secret), base64.StdEncoding.EncodeToString(secret),
				base64.RawURLEncoding.EncodeToString(secret)} {
				if strings.Contains(logged, strings.ToLower(form)) {
					t.Errorf("%s: the log has the %s", v.Name, name)
				}
			}
		}
	}
	for _, fault := range []string{"range", "layout", "signature", "used before"} {
		if !strings.Contains(logged, fault) {
			t.Errorf("the log names no fault %q: its reader could not tell", fault)
		}
	}
}

// encryptRAND is AES-256-ECB of one block.
func encryptRAND(t *testing.T, key []byte, in [hsmkeys.RANDSize]byte) (out [hsmkeys.RANDSize]byte) {
	t.Helper()
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	block.Encrypt(out[:], in[:])
	return out
}

// Whatever is wrong with a payload's content, the service does the same things in the same order: else the time of the
// answer would tell what the answer does not.
func TestOneWayToReject(t *testing.T) {
	r, devices := newKnown(t)
	ways := map[string]string{} // the calls made, and a payload that made them
	try := func(name string, d *device, payload []byte) {
		t.Helper()
		imsi := newIMSI()
		attempt := r.attempt(t, imsi)
		r.recorder.take()
		_, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
			AttemptID: attempt, Payload: payload, Origin: here})
		checkRefused(t, name, err, kme.KMERejected, notAccepted)
		calls := r.recorder.take()
		if n := len(slices.DeleteFunc(slices.Clone(calls), func(c string) bool { return c != "OpenPayload" })); n != 1 {
			t.Errorf("%s: %d private-key operations, not 1", name, n)
		}
		ways[strings.Join(calls, " ")] = name
	}
	for _, v := range vectors(t).Vectors {
		if v.Expect == "reject" && v.Why != "length" {
			try(v.Name, devices[v], v.Payload)
		}
	}
	for _, v := range vectors(t).Vectors {
		if v.Expect == "accept" && !v.secondOfPair() {
			imsi := newIMSI()
			must[*binding.Established](t)(r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi,
				IMEI: devices[v].imei, AttemptID: r.attempt(t, imsi), Payload: v.Payload, Origin: here}))
			try(v.Name+", again", devices[v], v.Payload)
		}
	}
	if len(ways) != 1 {
		t.Errorf("payloads were rejected in %d ways, not 1: %v", len(ways), ways)
	}
}

// Nothing reaches the HSM before all is checked that can be checked without it.
func TestBeforeTheHSM(t *testing.T) {
	r, m, l := newServed(t)
	ctx := t.Context()
	d := l.devices[0]
	payload, _ := d.payload(t)

	imsi := newIMSI()
	attempt := r.attempt(t, imsi)
	other := newIMSI()
	others := r.attempt(t, other)

	expired := newIMSI()
	if err := r.store.OpenAttempt(ctx, binding.Attempt{ID: "expired", IMSI: expired, Expires: time.Now()}); err != nil {
		t.Fatal(err)
	}
	used := newIMSI()
	usedAttempt := r.attempt(t, used)
	earlier, _ := l.devices[1].payload(t)
	must[*binding.Established](t)(r.service.EstablishKME(ctx,
		binding.EstablishRequest{IMSI: used, IMEI: l.devices[1].imei, AttemptID: usedAttempt, Payload: earlier,
			Origin: here}))

	r.revoke(t, m, l, l.devices[2])
	unpublished := m.newLot(t, "L2", kme.SuiteECDSA, vectors(t).lot(t, "lot-2048"), 100, newDevices(t, 1)...)
	r.take(t, m, unpublished)
	if err := os.Remove(filepath.Join(m.dir, filepath.FromSlash(directory.ShardPath("L2", 0)))); err != nil {
		t.Fatal(err)
	}
	r.recorder.take()

	for _, c := range []struct {
		name    string
		imsi    kme.IMSI
		imei    kme.IMEI
		attempt string
		payload []byte
		reason  kme.Reason
	}{
		{"payload empty", imsi, d.imei, attempt, nil, kme.Malformed},
		{"payload one byte short", imsi, d.imei, attempt, payload[1:], kme.Malformed},
		{"payload one byte long", imsi, d.imei, attempt, append([]byte{0}, payload...), kme.Malformed},
		{"no attempt", imsi, d.imei, "", payload, kme.NoAttempt},
		{"unknown attempt", imsi, d.imei, attempt[1:] + "A", payload, kme.NoAttempt},
		{"another IMSI's attempt", imsi, d.imei, others, payload, kme.NoAttempt},
		{"expired attempt", expired, d.imei, "expired", payload, kme.NoAttempt},
		{"used attempt", used, d.imei, usedAttempt, payload, kme.NoAttempt},
		{"used attempt, another device", used, d.imei, usedAttempt, earlier, kme.NoAttempt},
		// Without an attempt nobody learns which devices there are.
		{"no attempt, unknown device", imsi, parseIMEI("99999999999999"), "", payload, kme.NoAttempt},
		{"no attempt, payload empty", imsi, d.imei, "", nil, kme.NoAttempt},
		{"no attempt, revoked device", imsi, l.devices[2].imei, "", payload, kme.NoAttempt},
		{"device in no lot", imsi, parseIMEI("35209900000006"), attempt, payload, kme.UnknownDevice},
		{"device of another TAC", imsi, parseIMEI("35209800000001"), attempt, payload, kme.UnknownDevice},
		{"device in no shard", imsi, unpublished.devices[0].imei, attempt, payload, kme.UnknownDevice},
		{"revoked device", imsi, l.devices[2].imei, attempt, payload, kme.RevokedDevice},
	} {
		_, err := r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: c.imsi, IMEI: c.imei, AttemptID: c.attempt,
			Payload: c.payload, Origin: here})
		checkRefused(t, c.name, err, c.reason, "")
		if calls := r.recorder.takeToken(); len(calls) > 0 {
			t.Errorf("%s: reached the HSM with %q", c.name, calls)
		}
	}
	// None of it used the attempt up, and the 15 and 16 digits of an IMEI are the same device.
	for i, imei := range []string{"352099000000014", "3520990000000199"} {
		imsi, attempt := []kme.IMSI{imsi, other}[i], []string{attempt, others}[i]
		payload, p := d.payload(t)
		e, err := r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: parseIMEI(imei),
			AttemptID: attempt, Payload: payload, Origin: here})
		if want := p.NWSig(); err != nil || !bytes.Equal(e.NWSig, want[:]) {
			t.Errorf("IMEI %s: %v, error %v", imei, e, err)
		}
	}
}

func TestMalformed(t *testing.T) {
	r, _, _ := newServed(t)
	ctx := t.Context()
	imsi, vector := newIMSI(), make([]byte, hsmkeys.RANDSize)
	for _, c := range []struct {
		name   string
		vector []byte
	}{
		{"RAND empty", nil},
		{"RAND short", vector[1:]},
		{"RAND long", append([]byte{0}, vector...)},
	} {
		_, err := r.service.PrepareVector(ctx, imsi, [][]byte{c.vector}, here)
		checkRefused(t, c.name+", prepare", err, kme.Malformed, "")
		_, err = r.service.RestoreRAND(ctx, imsi, c.vector, here)
		checkRefused(t, c.name+", restore", err, kme.Malformed, "")
	}
	if calls := r.recorder.take(); len(calls) > 0 {
		t.Errorf("malformed requests made calls %q", calls)
	}
}

// A KME is accepted once per device for ever, however it is encrypted or signed, whoever the subscriber is, and
// whatever became of the binding.
func TestOneUse(t *testing.T) {
	r, _, l := newServed(t)
	ctx := t.Context()
	d := l.devices[0]
	payload, p := d.payload(t)
	imsi := newIMSI()
	must[*binding.Established](t)(r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
		AttemptID: r.attempt(t, imsi), Payload: payload, Origin: here}))

	freshNonce := *p
	freshNonce.RME = kme.RandomSecret()
	freshSig := *p
	freshSig.Sig = must[[]byte](t)(kme.SuiteECDSA.Sign(d.signer, p.KME.Bytes()))
	for name, again := range map[string][]byte{
		"the same payload":     payload,
		"with another nonce":   d.encrypt(t, &freshNonce),
		"with a new signature": d.encrypt(t, &freshSig),
	} {
		other := newIMSI()
		attempt := r.attempt(t, other)
		_, err := r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: other, IMEI: d.imei, AttemptID: attempt,
			Payload: again, Origin: here})
		checkRefused(t, name, err, kme.KMERejected, notAccepted)
		r.checkBound(t, other, false)
	}
	if _, err := r.service.ReportAuthentication(ctx, imsi, false, here); err != nil {
		t.Fatal(err)
	}
	attempt := r.attempt(t, imsi)
	_, err := r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: attempt,
		Payload: payload, Origin: here})
	checkRefused(t, "after the binding was dropped", err, kme.KMERejected, notAccepted)
	// A refusal leaves the attempt open for a better payload.
	better, _ := d.payload(t)
	must[*binding.Established](t)(r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
		AttemptID: attempt, Payload: better, Origin: here}))
}

// The same call again gives the stored NW_SIG, without the HSM, for as long as the binding stands.
func TestRetransmission(t *testing.T) {
	r, _, l := newServed(t)
	ctx := t.Context()
	d := l.devices[0]
	payload, p := d.payload(t)
	want := p.NWSig()
	imsi := newIMSI()
	attempt := r.attempt(t, imsi)
	call := func(imei kme.IMEI, payload []byte) (*binding.Established, error) {
		return r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: imei, AttemptID: attempt,
			Payload: payload, Origin: here})
	}
	for i, state := range []binding.State{binding.Pending, binding.Pending, binding.Active, binding.Active} {
		if i == 2 {
			r.activate(t, imsi)
		}
		r.recorder.take()
		e, err := call(d.imei, payload)
		if err != nil || !bytes.Equal(e.NWSig, want[:]) || e.State != state {
			t.Fatalf("call %d: %v, error %v, want %x, %s", i, e, err, want, state)
		}
		if calls := r.recorder.takeToken(); len(calls) > 0 != (i == 0) {
			t.Errorf("call %d reached the HSM with %q", i, calls)
		}
	}
	// What differs in anything is no retransmission.
	changed := slices.Clone(payload)
	changed[len(changed)-1] ^= 1
	_, err := call(d.imei, changed)
	checkRefused(t, "another payload", err, kme.NoAttempt, "")
	_, err = call(l.devices[1].imei, payload)
	checkRefused(t, "another device", err, kme.OtherDevice, "")
	_, err = r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, Payload: payload,
		Origin: here})
	checkRefused(t, "no attempt", err, kme.NoAttempt, "")
	other := newIMSI()
	_, err = r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: other, IMEI: d.imei, AttemptID: attempt,
		Payload: payload, Origin: here})
	checkRefused(t, "another subscriber", err, kme.NoAttempt, "")
	// A failover may take the binding away after it was read; here, a revocation does.
	r.recorder.onFirst("Settle", func() error {
		_, err := r.store.Revoke(ctx, imsi, time.Now())
		return err
	})
	_, err = call(d.imei, payload)
	checkRefused(t, "a binding that is gone before it is told again", err, kme.NoAttempt, "")
}

// An MME that sends again before the first answer must not hear that the attempt is used up: the call has overtaken
// itself, and the answer to both is one.
func TestOvertaken(t *testing.T) {
	r, _, l := newServed(t)
	d := l.devices[0]
	for _, at := range []string{"Binding", "Attempt", "OpenPayload", "Used", "Establish"} {
		t.Run("before "+at, func(t *testing.T) {
			ctx := t.Context()
			payload, p := d.payload(t)
			want := p.NWSig()
			imsi := newIMSI()
			attempt := r.attempt(t, imsi)
			establish := func() (*binding.Established, error) {
				return r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
					AttemptID: attempt, Payload: payload, Origin: here})
			}
			r.recorder.onFirst(at, func() error {
				e, err := establish()
				if err == nil && !bytes.Equal(e.NWSig, want[:]) {
					err = fmt.Errorf("NW_SIG %x, want %x", e.NWSig, want)
				}
				return err
			})
			e, err := establish()
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(e.NWSig, want[:]) {
				t.Errorf("NW_SIG %x, want %x", e.NWSig, want)
			}
		})
	}
}

func TestSameCallAtOnce(t *testing.T) {
	r, _, l := newServed(t)
	d := l.devices[0]
	for range 5 {
		payload, p := d.payload(t)
		want := p.NWSig()
		imsi := newIMSI()
		attempt := r.attempt(t, imsi)
		r.recorder.take()
		var all sync.WaitGroup
		for range 16 {
			all.Go(func() {
				e, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
					AttemptID: attempt, Payload: payload, Origin: here})
				if err != nil {
					t.Error(err)
				} else if !bytes.Equal(e.NWSig, want[:]) {
					t.Errorf("NW_SIG %x, want %x", e.NWSig, want)
				}
			})
		}
		all.Wait()
		// The ledger holds its one entry; a second would have failed as used.
		opened := must[*hsmkeys.Opened](t)(r.token.OpenPayload(t.Context(),
			hsmkeys.Payload{Suite: l.Suite, Lot: r.lotKey(l), N: l.PublicKey(), Device: d.signer.Public(),
				Bytes: payload}))
		other := newIMSI()
		err := r.store.Establish(t.Context(),
			&binding.Binding{IMSI: other, IMEI: d.imei, AttemptID: r.attempt(t, other)}, opened.Tag, true, time.Now())
		if !errors.Is(err, binding.ErrUsed) {
			t.Errorf("the ledger does not have the KME: %v", err)
		}
		b := must[*binding.Binding](t)(r.service.GetBinding(t.Context(), imsi))
		if b.AttemptID != attempt || b.IMEI != d.imei {
			t.Errorf("binding %+v", b)
		}
	}
}

func (r *harness) lotKey(l *lot) hsmkeys.Key {
	return hsmkeys.Key{Role: hsmkeys.RoleLot, Manufacturer: l.Manufacturer, Name: l.Lot}
}

// Two subscribers who send one KME at once: it binds one of them.
func TestOneKMEAtOnce(t *testing.T) {
	r, _, l := newServed(t)
	d := l.devices[0]
	payload, _ := d.payload(t)
	errs := make([]error, 16)
	var all sync.WaitGroup
	for i := range errs {
		imsi := newIMSI()
		attempt := r.attempt(t, imsi)
		all.Go(func() {
			_, errs[i] = r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
				AttemptID: attempt, Payload: payload, Origin: here})
		})
	}
	all.Wait()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
		} else {
			checkRefused(t, "a KME in use", err, kme.KMERejected, notAccepted)
		}
	}
	if won != 1 {
		t.Errorf("one KME bound %d subscribers", won)
	}
}
