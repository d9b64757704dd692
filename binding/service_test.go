package binding_test

import (
	"bytes"
	"context"
	"crypto/aes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
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
			e, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: devices[v].imei, AttemptID: attempt, Payload: v.Payload, Origin: here})
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
		for name, secret := range map[string][]byte{"KME": v.KME, "RME": v.RME, "payload": v.Payload, "NW_SIG": v.NWSig} {
			if len(secret) == 0 || bytes.Count(secret, secret[:1]) == len(secret) {
				continue
			}
			for _, form := range []string{hex.EncodeToString(secret), base64.StdEncoding.EncodeToString(secret), base64.RawURLEncoding.EncodeToString(secret)} {
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
		_, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: attempt, Payload: payload, Origin: here})
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
			must[*binding.Established](t)(r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: devices[v].imei, AttemptID: r.attempt(t, imsi), Payload: v.Payload, Origin: here}))
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
	must[*binding.Established](t)(r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: used, IMEI: l.devices[1].imei, AttemptID: usedAttempt, Payload: earlier, Origin: here}))

	if err := directory.Revoke(ctx, m.store, m.Signer, l.Manifest, []kme.IMEI{l.devices[2].imei}, "stolen", time.Now(), nil); err != nil {
		t.Fatal(err)
	}
	r.refresh(t, m, l)
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
		_, err := r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: c.imsi, IMEI: c.imei, AttemptID: c.attempt, Payload: c.payload, Origin: here})
		checkRefused(t, c.name, err, c.reason, "")
		if calls := r.recorder.takeToken(); len(calls) > 0 {
			t.Errorf("%s: reached the HSM with %q", c.name, calls)
		}
	}
	// None of it used the attempt up, and the 15 and 16 digits of an IMEI are the same device.
	for i, imei := range []string{"352099000000014", "3520990000000199"} {
		imsi, attempt := []kme.IMSI{imsi, other}[i], []string{attempt, others}[i]
		payload, p := d.payload(t)
		e, err := r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: parseIMEI(imei), AttemptID: attempt, Payload: payload, Origin: here})
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

// A KME is accepted once per device for ever, however it is encrypted or signed, whoever the subscriber is, and whatever
// became of the binding.
func TestOneUse(t *testing.T) {
	r, _, l := newServed(t)
	ctx := t.Context()
	d := l.devices[0]
	payload, p := d.payload(t)
	imsi := newIMSI()
	must[*binding.Established](t)(r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: r.attempt(t, imsi), Payload: payload, Origin: here}))

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
		_, err := r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: other, IMEI: d.imei, AttemptID: attempt, Payload: again, Origin: here})
		checkRefused(t, name, err, kme.KMERejected, notAccepted)
		r.checkBound(t, other, false)
	}
	if _, err := r.service.ReportAuthentication(ctx, imsi, false, here); err != nil {
		t.Fatal(err)
	}
	attempt := r.attempt(t, imsi)
	_, err := r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: attempt, Payload: payload, Origin: here})
	checkRefused(t, "after the binding was dropped", err, kme.KMERejected, notAccepted)
	// A refusal leaves the attempt open for a better payload.
	better, _ := d.payload(t)
	must[*binding.Established](t)(r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: attempt, Payload: better, Origin: here}))
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
		return r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: imei, AttemptID: attempt, Payload: payload, Origin: here})
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
	_, err = r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, Payload: payload, Origin: here})
	checkRefused(t, "no attempt", err, kme.NoAttempt, "")
	other := newIMSI()
	_, err = r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: other, IMEI: d.imei, AttemptID: attempt, Payload: payload, Origin: here})
	checkRefused(t, "another subscriber", err, kme.NoAttempt, "")
}

// An MME that sends again before the first answer must not hear that the attempt is used up: the call has overtaken itself,
// and the answer to both is one.
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
				return r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: attempt, Payload: payload, Origin: here})
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
				e, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: attempt, Payload: payload, Origin: here})
				if err != nil {
					t.Error(err)
				} else if !bytes.Equal(e.NWSig, want[:]) {
					t.Errorf("NW_SIG %x, want %x", e.NWSig, want)
				}
			})
		}
		all.Wait()
		// The ledger holds its one entry; a second would have failed as used.
		opened := must[*hsmkeys.Opened](t)(r.token.OpenPayload(t.Context(), hsmkeys.Payload{Suite: l.Suite, Lot: r.lotKey(l), N: l.PublicKey(), Device: d.signer.Public(), Bytes: payload}))
		other := newIMSI()
		err := r.store.Establish(t.Context(), &binding.Binding{IMSI: other, IMEI: d.imei, AttemptID: r.attempt(t, other)}, opened.Tag, true, time.Now())
		if !errors.Is(err, binding.ErrUsed) {
			t.Errorf("the ledger does not have the KME: %v", err)
		}
		b := must[*binding.Binding](t)(r.service.GetBinding(t.Context(), imsi))
		if b.AttemptID != attempt || b.IMEI != d.imei {
			t.Errorf("binding %+v", b)
		}
	}
}

func (r *rig) lotKey(l *lot) hsmkeys.Key {
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
			_, errs[i] = r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: attempt, Payload: payload, Origin: here})
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
		if b.State != state || b.IMEI != d.imei || b.Lot != "L1" || b.Manufacturer != m.KeyID() || b.Activated.IsZero() != (state == binding.Pending) {
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
	if again := r.attempt(t, imsi); again != attempt {
		t.Errorf("two vectors asked for at once have attempts %q and %q", attempt, again)
	}
	payload, p := d.payload(t)
	must[*binding.Established](t)(r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: attempt, Payload: payload, Origin: here}))
	checkBound("established", p, binding.Pending)

	if got, err := r.service.ReportAuthentication(ctx, imsi, false, here); err != nil || got.Binding != nil || got.Served {
		t.Errorf("a failed authentication leaves %+v, error %v", got, err)
	}
	checkUnbound("dropped")
	_, err := r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: attempt, Payload: payload, Origin: here})
	checkRefused(t, "the dropped binding's attempt", err, kme.NoAttempt, "")

	payload, p = d.payload(t)
	must[*binding.Established](t)(r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: r.attempt(t, imsi), Payload: payload, Origin: here}))
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
	service := r.newService(binding.Options{Times: binding.Times{Attempt: short, Pending: ttl, PendingVectors: 3, Now: time.Now}})
	imsi := newIMSI()
	p := must[*binding.Prepared](t)(service.PrepareVector(t.Context(), imsi, newRANDs(1), here))
	time.Sleep(short + 2*time.Millisecond) // stores keep milliseconds
	payload, _ := d.payload(t)
	_, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: p.AttemptID, Payload: payload, Origin: here})
	checkRefused(t, "after its time", err, kme.NoAttempt, "")
	again := must[*binding.Prepared](t)(service.PrepareVector(t.Context(), imsi, newRANDs(1), here))
	if again.AttemptID == "" || again.AttemptID == p.AttemptID {
		t.Errorf("attempt %q after %q", again.AttemptID, p.AttemptID)
	}
}

func TestUnavailable(t *testing.T) {
	type call func(ctx context.Context, r *rig, imsi kme.IMSI) error
	prepare := func(ctx context.Context, r *rig, imsi kme.IMSI) error {
		_, err := r.service.PrepareVector(ctx, imsi, newRANDs(1), here)
		return err
	}
	restore := func(ctx context.Context, r *rig, imsi kme.IMSI) error {
		_, err := r.service.RestoreRAND(ctx, imsi, make([]byte, hsmkeys.RANDSize), here)
		return err
	}
	report := func(ctx context.Context, r *rig, imsi kme.IMSI) error {
		_, err := r.service.ReportAuthentication(ctx, imsi, true, here)
		return err
	}
	get := func(ctx context.Context, r *rig, imsi kme.IMSI) error {
		_, err := r.service.GetBinding(ctx, imsi)
		return err
	}
	r, m, l := newServed(t)
	ctx := t.Context()
	d := l.devices[0]
	establish := func(ctx context.Context, r *rig, imsi kme.IMSI) error {
		payload, _ := d.payload(t)
		_, err := r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: r.attemptPastRecorder(t, imsi), Payload: payload, Origin: here})
		return err
	}
	bound := newIMSI()
	if err := establish(ctx, r, bound); err != nil {
		t.Fatal(err)
	}

	secret := errors.New("secret of the driver")
	for _, c := range []struct {
		name   string
		fails  string
		call   call
		imsi   kme.IMSI
		reason kme.Reason
	}{
		{"prepare", "Prepare", prepare, newIMSI(), kme.StoreUnavailable},
		{"prepare", "EncryptRANDs", prepare, bound, kme.HSMUnavailable},
		{"restore", "Spent", restore, bound, kme.StoreUnavailable},
		{"restore", "Subscription", restore, bound, kme.StoreUnavailable},
		{"restore", "DecryptRAND", restore, bound, kme.HSMUnavailable},
		{"report", "Report", report, bound, kme.StoreUnavailable},
		{"get", "Subscription", get, bound, kme.StoreUnavailable},
		{"establish", "Subscription", establish, newIMSI(), kme.StoreUnavailable},
		{"establish", "OpenPayload", establish, newIMSI(), kme.HSMUnavailable},
		{"establish", "Establish", establish, newIMSI(), kme.StoreUnavailable},
		{"prepare", "Prepare", prepare, bound, kme.RolledBack},
		{"establish", "Establish", establish, newIMSI(), kme.RolledBack},
		{"get", "Subscription", get, bound, kme.Damaged},
		{"report", "Report", report, bound, kme.Damaged},
	} {
		name := c.name + ", when " + c.fails + " fails"
		fault := secret
		switch c.reason {
		case kme.RolledBack:
			fault = fmt.Errorf("%w (%w)", binding.ErrRolledBack, secret)
		case kme.Damaged:
			fault = fmt.Errorf("%w: %w", &binding.DamagedRow{Table: "bindings"}, secret)
		}
		r.recorder.onFirst(c.fails, func() error { return fault })
		err := c.call(ctx, r, c.imsi)
		checkRefused(t, name, err, c.reason, "")
		var refusal *binding.Refusal
		if errors.As(err, &refusal) && (strings.Contains(refusal.Message, secret.Error()) || !errors.Is(err, secret)) {
			t.Errorf("%s: message %q, cause %v: the cause is for the log alone", name, refusal.Message, refusal.Cause)
		}
		r.checkBound(t, c.imsi, c.imsi == bound)
		// The fault was passing, and so was the refusal.
		if err := c.call(ctx, r, c.imsi); err != nil {
			t.Errorf("%s, then again: %v", name, err)
		}
	}

	shard := filepath.Join(m.dir, filepath.FromSlash(directory.ShardPath("L1", 0)))
	genuine := must[[]byte](t)(os.ReadFile(shard))
	for name, damage := range map[string]func(){
		"a shard that cannot be read": func() { os.Mkdir(shard, 0o700) },
		"a shard that was changed":    func() { os.WriteFile(shard, bytes.Replace(genuine, []byte("."), []byte(".e"), 1), 0o600) },
		"a shard that another signed": func() {
			os.WriteFile(shard, newMaker(t).sign(t, directory.TypeShard, must[*directory.Shard](t)(m.reader(t).ReadShard(ctx, l.Manifest, 0))), 0o600)
		},
	} {
		if name == "a shard that cannot be read" {
			os.Remove(shard)
		}
		damage()
		r.readers[m.KeyID()] = m.reader(t) // one that has not cached it
		r.serve(t)
		r.recorder.take()
		imsi := newIMSI()
		checkRefused(t, name, establish(ctx, r, imsi), kme.DirectoryUnavailable, "")
		if calls := r.recorder.takeToken(); len(calls) > 0 {
			t.Errorf("%s: reached the HSM with %q", name, calls)
		}
		if err := os.RemoveAll(shard); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(shard, genuine, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := establish(ctx, r, imsi); err != nil {
			t.Errorf("%s, then mended: %v", name, err)
		}
	}

	if err := r.token.RemoveLotKey(ctx, m.lotKey("L1")); err != nil {
		t.Fatal(err)
	}
	checkRefused(t, "a lot key that is gone", establish(ctx, r, newIMSI()), kme.HSMUnavailable, "")

	last := newIMSI()
	r.attempt(t, last)
	if err := r.store.Close(); err != nil {
		t.Fatal(err)
	}
	payload, _ := d.payload(t)
	for name, c := range map[string]call{"prepare": prepare, "restore": restore, "report": report, "get": get, "establish": func(ctx context.Context, r *rig, imsi kme.IMSI) error {
		_, err := r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: "attempt", Payload: payload, Origin: here})
		return err
	}} {
		checkRefused(t, name+" on a closed database", c(ctx, r, last), kme.StoreUnavailable, "")
	}
}

// Who was sent no vector because the HSM was away, or the device revoked, does not activate a binding.
func TestNotSent(t *testing.T) {
	r, m, l := newServed(t)
	d, imsi := l.devices[0], newIMSI()
	payload, _ := d.payload(t)
	must[*binding.Established](t)(r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: r.attempt(t, imsi), Payload: payload, Origin: here}))
	check := func(reason kme.Reason) {
		t.Helper()
		for range 2 * binding.DefaultTimes().PendingVectors {
			_, err := r.service.PrepareVector(t.Context(), imsi, newRANDs(1), here)
			checkRefused(t, "a vector", err, reason, "")
			got := must[*binding.Reported](t)(r.service.ReportAuthentication(t.Context(), imsi, true, here))
			if got.Binding == nil || got.Binding.State != binding.Pending {
				t.Fatalf("after no vector it is %+v", got.Binding)
			}
		}
	}
	r.recorder.mu.Lock()
	r.recorder.before = func(call string) error {
		if call == "EncryptRANDs" {
			return errors.New("away")
		}
		return nil
	}
	r.recorder.mu.Unlock()
	check(kme.HSMUnavailable)
	r.recorder.mu.Lock()
	r.recorder.before = nil
	r.recorder.mu.Unlock()
	if err := directory.Revoke(t.Context(), m.store, m.Signer, l.Manifest, []kme.IMEI{d.imei}, "stolen", time.Now(), nil); err != nil {
		t.Fatal(err)
	}
	r.refresh(t, m, l)
	check(kme.RevokedDevice)
}

// A caller who has gone is no fault of the HSM, the directory or the database, and changes nothing.
func TestCanceled(t *testing.T) {
	r, _, l := newServed(t)
	d := l.devices[0]
	bound := newIMSI()
	payload, _ := d.payload(t)
	must[*binding.Established](t)(r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: bound, IMEI: d.imei, AttemptID: r.attempt(t, bound), Payload: payload, Origin: here}))
	vector := newRANDs(1)[0]

	open := newIMSI()
	attempt := r.attempt(t, open)
	fresh, p := d.payload(t)
	establish := func(ctx context.Context) error {
		_, err := r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: open, IMEI: d.imei, AttemptID: attempt, Payload: fresh, Origin: here})
		return err
	}
	for _, c := range []struct {
		name   string
		during []string // canceled just before
		call   func(ctx context.Context) error
	}{
		{"prepare", []string{"Prepare", "EncryptRANDs"}, func(ctx context.Context) error {
			_, err := r.service.PrepareVector(ctx, bound, [][]byte{vector}, here)
			return err
		}},
		{"restore", []string{"Spent", "Subscription", "DecryptRAND"}, func(ctx context.Context) error {
			_, err := r.service.RestoreRAND(ctx, bound, vector, here)
			return err
		}},
		{"report", []string{"Report"}, func(ctx context.Context) error {
			_, err := r.service.ReportAuthentication(ctx, bound, false, here)
			return err
		}},
		{"get", []string{"Subscription"}, func(ctx context.Context) error {
			_, err := r.service.GetBinding(ctx, bound)
			return err
		}},
		{"establish", []string{"OpenPayload", "Establish"}, establish},
	} {
		for _, at := range c.during {
			t.Run(c.name+" during "+at, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				r.recorder.onFirst(at, func() error {
					cancel()
					return nil
				})
				if err := c.call(ctx); !errors.Is(err, context.Canceled) || errors.As(err, new(*binding.Refusal)) {
					t.Errorf("canceled: %v, want context.Canceled", err)
				}
			})
		}
		t.Run(c.name+" too late", func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 0)
			defer cancel()
			if err := c.call(ctx); !errors.Is(err, context.DeadlineExceeded) || errors.As(err, new(*binding.Refusal)) {
				t.Errorf("past its deadline: %v, want context.DeadlineExceeded", err)
			}
		})
	}
	r.checkBound(t, bound, true)
	r.checkBound(t, open, false)
	want := p.NWSig()
	e, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: open, IMEI: d.imei, AttemptID: attempt, Payload: fresh, Origin: here})
	if err != nil || !bytes.Equal(e.NWSig, want[:]) {
		t.Errorf("after all that: %v, error %v", e, err)
	}
}

// Two manufacturers may call their lots the same.
func TestTwoManufacturers(t *testing.T) {
	r, _, first := newServed(t)
	m := newMaker(t)
	r.enroll(t, m)
	second := m.newLot(t, "L1", kme.SuiteRSA, vectors(t).lot(t, "lot-3072"), 6, vectors(t).lot(t, "lot-2048"))
	r.take(t, m, second)
	for _, l := range []*lot{first, second} {
		d := l.devices[0]
		payload, p := d.payload(t)
		imsi := newIMSI()
		e, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: r.attempt(t, imsi), Payload: payload, Origin: here})
		if want := p.NWSig(); err != nil || !bytes.Equal(e.NWSig, want[:]) {
			t.Fatalf("manufacturer %s: %v, error %v", l.Manufacturer, e, err)
		}
		b := must[*binding.Binding](t)(r.service.GetBinding(t.Context(), imsi))
		if b.Manufacturer != l.Manufacturer || b.Lot != "L1" {
			t.Errorf("bound to lot %s of %s, want that of %s", b.Lot, b.Manufacturer, l.Manufacturer)
		}
	}
	lots := must[[]*binding.Lot](t)(r.store.Lots(t.Context()))
	if len(lots) != 2 {
		t.Errorf("%d lots, want 2", len(lots))
	}

	// The devices of one are not those of the other, whatever they have signed.
	payload, _ := first.devices[0].payload(t)
	imsi := newIMSI()
	_, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: first.devices[1].imei, AttemptID: r.attempt(t, imsi), Payload: payload, Origin: here})
	checkRefused(t, "another device's payload", err, kme.KMERejected, notAccepted)

	manifest, dev, err := must[*binding.Lots](t)(binding.NewLots(lots, r.readers)).Device(t.Context(), second.devices[0].imei)
	if err != nil || manifest.Manufacturer != m.KeyID() || !reflect.DeepEqual(dev.Key, second.devices[0].signer.Public()) {
		t.Errorf("the directory says %+v, %+v, error %v", manifest, dev, err)
	}
	if _, err := binding.NewLots(lots, nil); err == nil || !strings.Contains(err.Error(), "not enrolled") {
		t.Errorf("lots without a directory: %v", err)
	}
}
