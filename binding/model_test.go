package binding_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// A modelled subscription is what docs/protocol.md says of the life of a binding, with nothing else in it.
type modelled struct {
	imsi                     kme.IMSI
	pending, active, revoked *modelBinding
	attempts                 []modelAttempt // that were not used or closed
	clear                    [][]byte       // RANDs that were sent in clear
	last                     map[binding.Origin]*modelVector
}

type modelBinding struct {
	device  *device
	kme     []byte
	nwSig   []byte
	attempt modelAttempt
	payload []byte
	expires time.Time
	sent    []binding.Origin // who got vectors under it while it was pending
}

type modelAttempt struct {
	id      string
	origin  binding.Origin
	expires time.Time
	opened  bool
}

// A modelVector is the last that an origin was sent.
type modelVector struct {
	rand, sent []byte
	under      *modelBinding // nil: it went in clear
}

func (m *modelled) standing() *modelBinding {
	if m.pending != nil {
		return m.pending
	}
	return m.active
}

// under is the binding for an origin's vectors: a pending one beside an active one is for who established it.
func (m *modelled) under(o binding.Origin) *modelBinding {
	if m.pending != nil && (m.active == nil || m.pending.attempt.origin == o) {
		return m.pending
	}
	return m.active
}

// opened is until when an administrator lets an origin provision.
func (m *modelled) opened(o binding.Origin) (until time.Time) {
	for _, a := range m.attempts {
		if a.opened && a.expires.After(until) && o.Provisioning == binding.Allowed {
			until = a.expires
		}
	}
	return until
}

// expire drops what has expired.
func (m *modelled) expire(now time.Time) {
	if m.pending != nil && !m.pending.expires.After(now) {
		m.pending = nil
	}
	m.attempts = slices.DeleteFunc(m.attempts, func(a modelAttempt) bool { return !a.expires.After(now) })
}

type sent struct {
	device  *device
	payload []byte
	plain   *kme.Plaintext
}

// modelOrigins are three that may provision and one that may not.
func modelOrigins(t *testing.T) (all []binding.Origin) {
	for _, name := range []string{"", "mme-1", "mme-2"} {
		all = append(all, binding.Origin{Name: must[kme.Origin](t)(kme.ParseOrigin(name)),
			Provisioning: binding.Allowed})
	}
	return append(all, binding.Origin{Name: must[kme.Origin](t)(kme.ParseOrigin("mme-3"))})
}

// A modelRun makes random calls, and compares each with what the model says.
type modelRun struct {
	*testing.T
	r        *harness
	l        *lot
	random   *rand.Rand
	now      time.Time
	origins  []binding.Origin
	world    []*modelled
	accepted []sent // payloads whose KME is used up
	ids      []string
	history  []string
}

func (r *modelRun) note(m *modelled, format string, args ...any) {
	r.history = append(r.history, m.imsi.String()+" "+fmt.Sprintf(format, args...))
}

func (r *modelRun) fail(format string, args ...any) {
	r.Helper()
	r.Fatalf("%s\n%s", fmt.Sprintf(format, args...), strings.Join(r.history[max(0, len(r.history)-15):], "\n"))
}

func (r *modelRun) origin() binding.Origin { return r.origins[r.random.IntN(len(r.origins))] }

func TestModel(t *testing.T) {
	h, _, l := newServed(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := &modelRun{T: t, r: h, l: l, random: rand.New(rand.NewPCG(seed, 0)), now: time.Now(), origins: modelOrigins(t)}
	times := times()
	times.Now = func() time.Time { return r.now }
	h.service = h.unrecorded(t, binding.Options{Times: times})
	for range 4 {
		r.world = append(r.world, &modelled{imsi: newIMSI(), last: map[binding.Origin]*modelVector{}})
	}
	for range 3000 {
		// Milliseconds, as stores keep them; now and then the clock steps far.
		r.now = r.now.Add(time.Duration(r.random.IntN(2000)) * time.Millisecond).Truncate(time.Millisecond)
		if r.random.IntN(100) == 0 {
			r.now = r.now.Add(time.Duration(r.random.IntN(90)) * time.Minute)
		}
		for _, m := range r.world {
			m.expire(r.now)
		}
		m := r.world[r.random.IntN(len(r.world))]
		switch op := r.random.IntN(24); {
		case op < 8:
			r.prepare(m, r.origin())
		case op < 9:
			r.restore(m, r.origin())
		case op < 15:
			r.establish(m, r.origin())
		case op < 20:
			r.report(m, r.origin(), r.random.IntN(4) > 0)
		case op == 20:
			r.open(m)
		case op == 21 && r.random.IntN(3) == 0:
			r.revoke(m)
		default:
			r.get(m)
		}
	}
	if len(r.accepted) < 50 {
		t.Errorf("only %d payloads were accepted", len(r.accepted))
	}
}

func (r *modelRun) prepare(m *modelled, o binding.Origin) {
	rands := newRANDs(1 + r.random.IntN(3))
	if len(m.clear) > 0 && r.random.IntN(8) == 0 {
		rands[0] = m.clear[r.random.IntN(len(m.clear))]
	}
	p, err := r.r.service.PrepareVector(r.Context(), m.imsi, rands, o)
	r.note(m, "prepared for %q: %+v, %v", o.Name, p, err)
	until, b := m.opened(o), m.under(o)
	if (b != m.active || b == nil || !until.IsZero()) && m.pending != nil && len(m.pending.sent) >= 3 {
		m.pending = nil // it ends
		b = m.under(o)
	}
	var refusal *binding.Refusal
	spent := slices.ContainsFunc(m.clear, func(c []byte) bool { return bytes.Equal(c, rands[0]) })
	switch {
	case !until.IsZero() || b == nil && o.Provisioning == binding.Allowed:
		if err != nil || p.AttemptID == "" {
			r.fail("no attempt: %v", err)
		}
		r.attempted(m, o, p.AttemptID, until)
		for i := range rands {
			if !bytes.Equal(p.RANDs[i][:], rands[i]) {
				r.fail("a RAND changed that leaves in clear")
			}
		}
		m.clear = append(m.clear, rands...)
		m.last[o] = &modelVector{rand: rands[0], sent: rands[0]}
	case b == nil:
		if !errors.As(err, &refusal) || refusal.Reason != kme.CallerNotAllowed {
			r.fail("an origin that may not provision: %v", err)
		}
	case spent:
		if !errors.As(err, &refusal) || refusal.Reason != kme.Malformed {
			r.fail("a RAND that was sent in clear: %v", err)
		}
	default:
		if err != nil || p.AttemptID != "" {
			r.fail("not pre-processed: %v", err)
		}
		block := must[cipher.Block](r)(aes.NewCipher(b.kme))
		want := make([]byte, hsmkeys.RANDSize)
		for i := range rands {
			if block.Encrypt(want, rands[i]); !bytes.Equal(p.RANDs[i][:], want) {
				r.fail("RAND %d is not encrypted under the KME of the binding for %q", i, o.Name)
			}
		}
		if b == m.pending {
			b.sent = append(b.sent, o)
		}
		m.last[o] = &modelVector{rands[0], p.RANDs[0][:], b}
	}
}

// attempted compares the attempt that an origin was given with that which it should have.
func (r *modelRun) attempted(m *modelled, o binding.Origin, id string, until time.Time) {
	opened := !until.IsZero()
	if !opened {
		until = r.now.Add(ttl)
	}
	same := slices.IndexFunc(m.attempts, func(a modelAttempt) bool {
		return a.origin == o && a.opened == opened && !a.expires.Before(until)
	})
	if same < 0 && !slices.Contains(r.ids, id) {
		r.ids = append(r.ids, id)
		m.attempts = append(m.attempts, modelAttempt{id, o, until, opened})
	} else if same < 0 || m.attempts[same].id != id {
		r.fail("attempt %q for %q at %s, of %+v", id, o.Name, r.now, m.attempts)
	}
}

func (r *modelRun) restore(m *modelled, o binding.Origin) {
	v := m.last[o]
	if v == nil {
		return
	}
	got, err := r.r.service.RestoreRAND(r.Context(), m.imsi, v.sent, o)
	r.note(m, "restored for %q: %x, %v", o.Name, got, err)
	if v.under != nil && v.under != m.pending && v.under != m.active {
		return // its KME is gone
	}
	if v.under != nil && v.under == m.active && m.pending != nil && slices.Contains(m.pending.sent, o) {
		return // an older one than the origin was sent last
	}
	if err != nil || !bytes.Equal(got[:], v.rand) {
		r.fail("restored %x, %v, want %x", got, err, v.rand)
	}
}

func (r *modelRun) establish(m *modelled, o binding.Origin) {
	s := sent{device: r.l.devices[r.random.IntN(2)]}
	s.payload, s.plain = s.device.payload(r)
	replayed := false
	if len(r.accepted) > 0 && r.random.IntN(4) == 0 {
		s, replayed = r.accepted[r.random.IntN(len(r.accepted))], true
		if r.random.IntN(2) == 0 { // the old KME with its signature, and a new RME
			p := &kme.Plaintext{KME: s.plain.KME, Sig: s.plain.Sig, RME: kme.RandomSecret()}
			s.payload = s.device.encrypt(r, p)
		}
	}
	id := "none"
	if other := r.world[r.random.IntN(len(r.world))]; len(other.attempts) > 0 && r.random.IntN(4) == 0 {
		id = other.attempts[0].id
	} else if len(r.ids) > 0 && r.random.IntN(8) == 0 {
		id = r.ids[r.random.IntN(len(r.ids))]
	} else if len(m.attempts) > 0 {
		a := m.attempts[r.random.IntN(len(m.attempts))]
		if id = a.id; r.random.IntN(4) > 0 {
			o = a.origin
		}
	}
	// The last answer was lost, and the device sends again.
	if b := m.standing(); b != nil && r.random.IntN(4) == 0 {
		s, id, o = sent{device: b.device, payload: b.payload}, b.attempt.id, b.attempt.origin
	}
	i := slices.IndexFunc(m.attempts, func(a modelAttempt) bool { return a.id == id && a.origin == o })
	standing := m.standing()
	again := standing != nil && standing.attempt.id == id && standing.attempt.origin == o &&
		standing.device == s.device &&
		bytes.Equal(standing.payload, s.payload)
	want := kme.Reason("")
	switch {
	case o.Provisioning != binding.Allowed:
		want = kme.CallerNotAllowed
	case again:
	case i < 0 && m.pending == nil && m.active != nil && m.active.device != s.device:
		want = kme.OtherDevice
	case i < 0:
		want = kme.NoAttempt
	case replayed:
		want = kme.KMERejected
	}
	e, err := r.r.service.EstablishKME(r.Context(), binding.EstablishRequest{IMSI: m.imsi, IMEI: s.device.imei,
		AttemptID: id, Payload: s.payload, Origin: o})
	r.note(m, "established %s from %q with attempt %q: %v, want %q", s.device.imei, o.Name, id, err, want)
	var refusal *binding.Refusal
	if want != "" {
		if !errors.As(err, &refusal) || refusal.Reason != want {
			r.fail("establish: %v, want %s", err, want)
		}
		return
	}
	if again {
		if err != nil || !bytes.Equal(e.NWSig, standing.nwSig) {
			r.fail("established again: %v, %v", e, err)
		}
		return
	}
	nwSig := s.plain.NWSig()
	if err != nil || !bytes.Equal(e.NWSig, nwSig[:]) {
		r.fail("establish: %v, %v", e, err)
	}
	m.pending = &modelBinding{device: s.device, kme: s.plain.KME.Bytes(), nwSig: nwSig[:], attempt: m.attempts[i],
		payload: s.payload, expires: r.now.Add(time.Hour)}
	m.attempts = nil
	r.accepted = append(r.accepted, s)
}

func (r *modelRun) report(m *modelled, o binding.Origin, ok bool) {
	got, err := r.r.service.ReportAuthentication(r.Context(), m.imsi, ok, o)
	r.note(m, "reported %v from %q: %+v, %v", ok, o.Name, got, err)
	if m.standing() == nil {
		checkRefused(r, "a report about nothing", err, kme.NotBound, "")
		return
	}
	if p := m.pending; p != nil && (slices.Contains(p.sent, o) || !ok && p.attempt.origin == o) {
		if m.pending = nil; ok {
			m.active, m.revoked = p, nil
		}
	}
	if err != nil || (got.Binding == nil) != (m.standing() == nil) ||
		got.Served != (m.active != nil && m.opened(o).IsZero()) {
		r.fail("the report gives %+v, %v", got, err)
	}
	if b := got.Binding; b != nil && (b.IMEI != m.standing().device.imei ||
		(b.State == binding.Pending) != (m.pending != nil)) {
		r.fail("the report gives %+v", b)
	}
}

func (r *modelRun) open(m *modelled) {
	a, err := r.r.service.OpenProvisioning(r.Context(), m.imsi, 10*time.Minute)
	if err != nil {
		r.fail("open: %v", err)
	}
	r.note(m, "opened %q", a.ID)
	r.ids = append(r.ids, a.ID)
	m.attempts = []modelAttempt{{a.ID, here, a.Expires, true}}
}

func (r *modelRun) revoke(m *modelled) {
	b, err := r.r.service.RevokeBinding(r.Context(), m.imsi)
	r.note(m, "revoked: %v", err)
	m.attempts = nil
	if m.standing() == nil && m.revoked == nil {
		checkRefused(r, "nothing was revoked", err, kme.NotBound, "")
		return
	}
	if s := m.standing(); s != nil {
		m.revoked, m.pending, m.active = s, nil, nil
	}
	if err != nil || b.State != binding.Revoked || b.IMEI != m.revoked.device.imei || len(b.Sealed) != 0 {
		r.fail("revoked %+v, %v", b, err)
	}
}

func (r *modelRun) get(m *modelled) {
	b, err := r.r.service.GetBinding(r.Context(), m.imsi)
	state, of := binding.Pending, m.pending
	if of == nil {
		state, of = binding.Active, m.active
	}
	if of == nil {
		state, of = binding.Revoked, m.revoked
	}
	if of == nil {
		checkRefused(r, "an IMSI that was never bound", err, kme.NotBound, "")
		return
	}
	if err != nil || b.State != state || b.IMEI != of.device.imei {
		r.fail("the binding is %+v, %v, want %s to %s", b, err, state, of.device.imei)
	}
}
