package binding_test

import (
	"bytes"
	"crypto/aes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
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

// A modelled subscription is what docs/protocol.md says of the life of a binding, with nothing else in it.
type modelled struct {
	imsi                     string
	pending, active, revoked *modelBinding
	attempts                 []string // that are open
	opened                   string   // the one of them that an administrator has opened
	spent                    []string // attempts that are not open any more
}

type modelBinding struct {
	device  *device
	kme     []byte
	nwSig   []byte
	attempt string
	payload []byte
}

func (m *modelled) standing() *modelBinding {
	if m.pending != nil {
		return m.pending
	}
	return m.active
}

func (m *modelled) close() {
	m.spent = append(m.spent, m.attempts...)
	m.attempts, m.opened = nil, ""
}

type sent struct {
	device  *device
	payload []byte
	plain   *kme.Plaintext
}

// Random calls, each compared with what the model says.
func TestModel(t *testing.T) {
	r, _, l := newServed(t)
	var world []*modelled
	for range 4 {
		world = append(world, &modelled{imsi: newIMSI()})
	}
	var accepted []sent // payloads whose KME is used up
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	vector := func() []byte {
		b := make([]byte, hsmkeys.RANDSize)
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		return b
	}
	var history []string
	for step := range 3000 {
		m := world[random.IntN(len(world))]
		fail := func(format string, args ...any) {
			t.Helper()
			t.Fatalf("step %d, IMSI %s: %s\n%s", step, m.imsi, fmt.Sprintf(format, args...), strings.Join(history[max(0, len(history)-12):], "\n"))
		}
		note := func(format string, args ...any) {
			history = append(history, m.imsi+" "+fmt.Sprintf(format, args...))
		}
		switch op := random.IntN(20); {
		case op < 6: // a vector
			rand := vector()
			p, err := r.service.PrepareVector(t.Context(), m.imsi, rand)
			if err != nil {
				fail("prepare: %v", err)
			}
			note("prepared %q", p.AttemptID)
			switch b := m.standing(); {
			case m.opened != "":
				if p.AttemptID != m.opened || !bytes.Equal(p.RAND[:], rand) {
					fail("prepared with attempt %q, want the opened %q", p.AttemptID, m.opened)
				}
			case b != nil:
				block, _ := aes.NewCipher(b.kme)
				want := make([]byte, hsmkeys.RANDSize)
				block.Encrypt(want, rand)
				if p.AttemptID != "" || !bytes.Equal(p.RAND[:], want) {
					fail("RAND is not encrypted under the standing binding's KME; attempt %q", p.AttemptID)
				}
				back, err := r.service.RestoreRAND(t.Context(), m.imsi, p.RAND[:])
				if err != nil || !bytes.Equal(back[:], rand) {
					fail("restored %x, %v", back, err)
				}
			case p.AttemptID == "" || !bytes.Equal(p.RAND[:], rand) || len(m.attempts) > 0 && !slices.Contains(m.attempts, p.AttemptID):
				fail("prepared with attempt %q, open are %q", p.AttemptID, m.attempts)
			case len(m.attempts) == 0:
				m.attempts = []string{p.AttemptID}
			}
		case op < 13: // a payload
			d := l.devices[random.IntN(3)]
			s := sent{device: d}
			s.payload, s.plain = d.payload(t)
			replayed := false
			if len(accepted) > 0 && random.IntN(4) == 0 {
				s, replayed = accepted[random.IntN(len(accepted))], true
				if random.IntN(2) == 0 { // the old KME with its signature, and a new RME
					p := &kme.Plaintext{KME: s.plain.KME, Sig: s.plain.Sig, RME: kme.RandomSecret()}
					s.payload = s.device.encrypt(t, p)
				}
			}
			attempt := "none"
			switch pool := slices.Concat(m.attempts, m.attempts, m.spent, world[random.IntN(len(world))].attempts); {
			case len(pool) > 0:
				attempt = pool[random.IntN(len(pool))]
			}
			open := slices.Contains(m.attempts, attempt)
			want := kme.Reason("")
			standing := m.standing()
			again := standing != nil && standing.attempt == attempt && standing.device == s.device && bytes.Equal(standing.payload, s.payload)
			switch {
			case again:
			case !open && m.pending == nil && m.active != nil && m.active.device != s.device:
				want = kme.OtherDevice
			case !open:
				want = kme.NoAttempt
			case replayed:
				want = kme.KMERejected
			}
			e, err := r.service.EstablishKME(t.Context(), m.imsi, s.device.imei.String(), attempt, s.payload, false)
			note("established %s with attempt %q: %v, want %q", s.device.imei, attempt, err, want)
			var refusal *binding.Refusal
			if want != "" {
				if !errors.As(err, &refusal) || refusal.Reason != want {
					fail("establish: %v, want %s", err, want)
				}
				continue
			}
			nwSig := s.plain.NWSig()
			if err != nil || !again && !bytes.Equal(e.NWSig, nwSig[:]) || again && !bytes.Equal(e.NWSig, standing.nwSig) {
				fail("establish: %v, %v", e, err)
			}
			if !again {
				m.close()
				m.pending = &modelBinding{s.device, s.plain.KME.Bytes(), nwSig[:], attempt, s.payload}
				accepted = append(accepted, s)
			}
		case op < 16: // the end of an authentication
			ok := random.IntN(3) > 0
			b, err := r.service.ReportAuthentication(t.Context(), m.imsi, ok)
			note("reported %v: %v", ok, err)
			if m.standing() == nil {
				checkRefused(t, "a report about nothing", err, kme.NotBound, "")
				continue
			}
			if m.pending != nil {
				if ok {
					m.active, m.revoked = m.pending, nil
				}
				m.pending = nil
			}
			if err != nil || (b == nil) != (m.active == nil) || b != nil && (b.State != binding.Active || b.IMEI != m.active.device.imei) {
				fail("the report gives %+v, %v", b, err)
			}
		case op == 16: // an administrator opens
			a, err := r.service.OpenProvisioning(t.Context(), m.imsi, time.Minute)
			if err != nil {
				fail("open: %v", err)
			}
			note("opened %q", a.ID)
			m.close()
			m.attempts, m.opened = []string{a.ID}, a.ID
		case op == 17 && random.IntN(2) == 0: // or revokes
			b, err := r.service.RevokeBinding(t.Context(), m.imsi)
			note("revoked: %v", err)
			if m.standing() == nil && m.revoked == nil {
				checkRefused(t, "nothing was revoked", err, kme.NotBound, "")
				continue
			}
			if s := m.standing(); s != nil {
				m.revoked, m.pending, m.active = s, nil, nil
				m.close()
			}
			if err != nil || b.State != binding.Revoked || b.IMEI != m.revoked.device.imei || len(b.Sealed) != 0 {
				fail("revoked %+v, %v", b, err)
			}
		default:
			b, err := r.service.GetBinding(t.Context(), m.imsi)
			state, of := binding.Pending, m.pending
			if of == nil {
				state, of = binding.Active, m.active
			}
			if of == nil {
				state, of = binding.Revoked, m.revoked
			}
			if of == nil {
				checkRefused(t, "an IMSI that was never bound", err, kme.NotBound, "")
				continue
			}
			if err != nil || b.State != state || b.IMEI != of.device.imei {
				fail("the binding is %+v, %v, want %s to %s", b, err, state, of.device.imei)
			}
		}
	}
	if len(accepted) < 50 {
		t.Errorf("only %d payloads were accepted", len(accepted))
	}
}

// Calls of all kinds at once: no KME is accepted twice, and in the end each IMSI has at most one binding of each state, of a
// payload that was accepted for it.
func TestModelAtOnce(t *testing.T) {
	r, _, l := newServed(t)
	r.service = binding.NewService(r.token, r.store, must[*binding.Lots](t)(binding.NewLots(must[[]*binding.Lot](t)(r.store.Lots(t.Context())), r.readers)), ttl, slog.New(slog.DiscardHandler))
	var imsis []string
	for range 3 {
		imsis = append(imsis, newIMSI())
	}
	var payloads []sent
	for i := range 24 {
		s := sent{device: l.devices[i%3]}
		s.payload, s.plain = s.device.payload(t)
		payloads = append(payloads, s)
	}
	var mu sync.Mutex
	accepted := map[int]map[string]bool{} // the attempts that a payload was accepted in
	var all sync.WaitGroup
	for w := range 8 {
		all.Go(func() {
			random := rand.New(rand.NewPCG(uint64(w), uint64(time.Now().UnixNano())))
			for range 200 {
				imsi := imsis[random.IntN(len(imsis))]
				switch random.IntN(8) {
				case 0:
					r.service.ReportAuthentication(t.Context(), imsi, random.IntN(2) == 0)
				case 1:
					if random.IntN(4) == 0 {
						r.service.RevokeBinding(t.Context(), imsi)
					}
				case 2:
					r.service.OpenProvisioning(t.Context(), imsi, time.Minute)
				default:
					p, err := r.service.PrepareVector(t.Context(), imsi, make([]byte, hsmkeys.RANDSize))
					if err != nil {
						t.Error(err)
						return
					}
					if p.AttemptID == "" {
						continue
					}
					n := random.IntN(len(payloads))
					s := payloads[n]
					e, err := r.service.EstablishKME(t.Context(), imsi, s.device.imei.String(), p.AttemptID, s.payload, false)
					var refusal *binding.Refusal
					if err != nil && (!errors.As(err, &refusal) || !slices.Contains([]kme.Reason{kme.KMERejected, kme.NoAttempt, kme.OtherDevice}, refusal.Reason)) {
						t.Error(err)
						return
					}
					if err != nil {
						continue
					}
					if want := s.plain.NWSig(); !bytes.Equal(e.NWSig, want[:]) {
						t.Error("another payload's NW_SIG was answered")
					}
					mu.Lock()
					if accepted[n] == nil {
						accepted[n] = map[string]bool{}
					}
					accepted[n][p.AttemptID] = true
					mu.Unlock()
				}
			}
		})
	}
	all.Wait()
	if len(accepted) == 0 {
		t.Error("nothing was accepted")
	}
	for n, attempts := range accepted {
		if len(attempts) != 1 {
			t.Errorf("payload %d was accepted in %d attempts", n, len(attempts))
		}
	}
	listed := must[[]*binding.Binding](t)(r.service.ListBindings(t.Context(), "", "", 1000))
	for i, b := range listed {
		if i > 0 && listed[i-1].IMSI.String() >= b.IMSI.String() {
			t.Error("the list is not in order")
		}
		if !slices.ContainsFunc(payloads, func(s sent) bool {
			nwSig := s.plain.NWSig()
			return bytes.Equal(nwSig[:], b.NWSig) && s.device.imei == b.IMEI
		}) {
			t.Errorf("a binding of no payload: %+v", b)
		}
	}
}

// A bound device that the manufacturer revokes is not served on; one that got another key is.
func TestRevokedWhileBound(t *testing.T) {
	r, m, l := newServed(t)
	imsi, d := newIMSI(), l.devices[0]
	payload, _ := d.payload(t)
	must[*binding.Established](t)(r.service.EstablishKME(t.Context(), imsi, d.imei.String(), r.attempt(t, imsi), payload, false))
	must[*binding.Binding](t)(r.service.ReportAuthentication(t.Context(), imsi, true))
	prepare := func() error {
		_, err := r.service.PrepareVector(t.Context(), imsi, make([]byte, hsmkeys.RANDSize))
		return err
	}
	if err := prepare(); err != nil {
		t.Fatal(err)
	}
	if err := directory.Revoke(t.Context(), m.store, m.Signer, l.Manifest, d.imei, "stolen", time.Now()); err != nil {
		t.Fatal(err)
	}
	r.readers[m.KeyID()] = m.reader(t) // one that has not cached the list
	r.serve(t)
	checkRefused(t, "a vector for a device that was revoked", prepare(), kme.RevokedDevice, "")
	// Its lot is not served any more: what is bound stays bound.
	r.service.SetLots(new(binding.Lots))
	if err := prepare(); err != nil {
		t.Error(err)
	}
}

// Only who asks for it gets the KME, and also with an answer that is given again.
func TestExport(t *testing.T) {
	r, _, l := newServed(t)
	imsi, d := newIMSI(), l.devices[0]
	payload, plain := d.payload(t)
	attempt := r.attempt(t, imsi)
	for i, export := range []bool{true, false, true} {
		e := must[*binding.Established](t)(r.service.EstablishKME(t.Context(), imsi, d.imei.String(), attempt, payload, export))
		if export != e.KME.Equal(plain.KME) || !export && e.KME.Bytes() != nil {
			t.Errorf("call %d: exported %v", i, e.KME.Bytes() != nil)
		}
	}
	bad := slices.Clone(payload)
	bad[len(bad)-1] ^= 1
	other := newIMSI()
	if _, err := r.service.EstablishKME(t.Context(), other, d.imei.String(), r.attempt(t, other), bad, true); err == nil {
		t.Error("a bad payload's plaintext was exported")
	}
	if calls := r.recorder.take(); slices.Index(calls, "ExportKME") < slices.Index(calls, "Establish") {
		t.Errorf("exported before it was durable: %q", calls)
	}
}
