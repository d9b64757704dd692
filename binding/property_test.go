package binding_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// A network is all that is around the service: SIMs, devices, MMEs that are honest and some that are not, an
// administrator and a clock. It knows what the service cannot know: which SIM is in which device, and who has which
// KME. What must hold, whatever is called in whatever order:
//
//   - no IMSI is ACTIVE with a device that did not decrypt a vector under its KME;
//   - no device passes a pre-processed AKA without the KME;
//   - a device that holds the ACTIVE binding gets vectors under it, but where another device is being provisioned.
//
// One thing is assumed, since S6a does not show it: an MME that was sent a vector under a pending binding updates
// the location only after an AKA with it succeeded, there or elsewhere. The service believes its ULR. What was sent
// and got lost counts as sent.
type network struct {
	testing.TB
	services  []*binding.Service // instances with one database
	store     binding.Store
	peers     []*peer
	now       atomic.Int64 // milliseconds
	faultless atomic.Bool
	alone     bool // one call at a time

	dice   sync.Mutex
	random *rand.Rand // guarded by dice

	mu      sync.Mutex // guards all that follows, and what SIMs, phones and keys have
	sims    []*sim
	phones  []*phone
	keys    []*key // all that were made
	history []string
	seen    map[string]int
}

type sim struct {
	imsi  kme.IMSI
	in    *phone
	clear [][]byte // RANDs that went out in clear: anybody may have them
}

// A phone is a device, and what it holds for each SIM: a KME whose right NW_SIG came. The last that it asked for may
// have no answer yet.
type phone struct {
	*device
	holds, asked map[*sim]*key
}

type key struct {
	phone   *phone
	plain   *kme.Plaintext
	nwSig   []byte
	block   cipher.Block
	payload []byte
	proved  bool // the phone decrypted a vector under it for its SIM
}

// A peer is an MME, or who says that it is one. It does one thing at a time.
type peer struct {
	binding.Origin
	own *phone // of a hostile one
	at  map[*sim]*visit
}

// A visit is what a peer knows of a SIM.
type visit struct {
	vector  *sentVector // that was not used yet
	last    *sentVector // that was sent, and may have been lost
	attempt string      // in which a device may be provisioned: after AKA in clear, at an honest peer
	key     *key        // whose payload it carried last
	success bool        // it updates the location next, mostly after a pre-processed AKA
	sent    map[*key]bool
}

type sentVector struct {
	rand, sent []byte
	under      *key // nil: it went in clear
	attempt    string
	lost       bool
}

// newNetwork has three honest peers, a hostile one that may provision, and one that may not.
func newNetwork(t testing.TB, stores ...binding.Store) *network {
	t.Helper()
	r, _, l := newServed(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	n := &network{TB: t, random: rand.New(rand.NewPCG(seed, 0)), seen: map[string]int{}}
	if len(stores) == 0 {
		stores = []binding.Store{r.store, r.store}
	}
	n.store = stores[0]
	n.now.Store(time.Now().UnixMilli())
	times := times()
	times.Now = n.time
	lots := must[*registry.Lots](t)(registry.NewLots(must[[]*registry.Lot](t)(r.store.Lots(t.Context())), r.readers))
	for _, s := range stores {
		token := &recorder{Ledger: s, token: r.pool, store: s, before: func(call string) error {
			if call == "EncryptRANDs" && n.fault() {
				return errors.New("the HSM is away")
			}
			return nil
		}}
		n.services = append(n.services,
			binding.NewService(binding.Options{Token: token, Store: s, Lots: lots, Times: times,
				Log: slog.New(slog.DiscardHandler)}))
	}
	for _, d := range l.devices[:5] {
		n.phones = append(n.phones, &phone{d, map[*sim]*key{}, map[*sim]*key{}})
	}
	for i := range 3 {
		n.sims = append(n.sims, &sim{imsi: newIMSI(), in: n.phones[i]})
	}
	for i, name := range []string{"mme-1", "mme-2", "mme-3", "hostile-1", "hostile-2"} {
		p := &peer{Origin: binding.Origin{Name: must[kme.Origin](t)(kme.ParseOrigin(name))}, at: map[*sim]*visit{}}
		if i < 4 {
			p.Provisioning = binding.Allowed
		}
		if i > 2 {
			p.own = n.phones[i]
		}
		for _, s := range n.sims {
			p.at[s] = &visit{sent: map[*key]bool{}}
		}
		n.peers = append(n.peers, p)
	}
	return n
}

func (n *network) time() time.Time { return time.UnixMilli(n.now.Load()).UTC() }

func (n *network) intN(of int) int {
	n.dice.Lock()
	defer n.dice.Unlock()
	return n.random.IntN(of)
}

func (n *network) service() *binding.Service { return n.services[n.intN(len(n.services))] }

// fault says whether something fails or is lost now.
func (n *network) fault() bool { return !n.faultless.Load() && n.intN(10) == 0 }

// note needs mu.
func (n *network) note(p *peer, s *sim, what, format string, args ...any) {
	n.seen[what]++
	n.history = append(n.history, fmt.Sprintf("%s %s: %s %s", s.imsi, p.Name, what, fmt.Sprintf(format, args...)))
}

// fail needs mu.
func (n *network) fail(s *sim, format string, args ...any) {
	n.Helper()
	if n.Failed() {
		return
	}
	last := slices.DeleteFunc(slices.Clone(n.history), func(line string) bool {
		return !strings.HasPrefix(line, s.imsi.String())
	})
	n.Errorf("%s: %s\n%s", s.imsi, fmt.Sprintf(format, args...), strings.Join(last[max(0, len(last)-30):], "\n"))
}

// refused insists that an error is a refusal, for one of these reasons. It needs mu.
func (n *network) refused(s *sim, what string, err error, reasons ...kme.Reason) {
	n.Helper()
	var r *binding.Refusal
	if !errors.As(err, &r) || !slices.Contains(reasons, r.Reason) {
		n.fail(s, "%s: %v, want one of %q", what, err, reasons)
	}
}

func (n *network) subscription(s *sim) *binding.Subscription {
	sub, err := n.store.Subscription(n.Context(), s.imsi, n.time())
	if err != nil {
		n.Error(err)
		return new(binding.Subscription)
	}
	return sub
}

// keyOf needs mu.
func (n *network) keyOf(b *binding.Binding) *key {
	if b == nil {
		return nil
	}
	i := slices.IndexFunc(n.keys, func(k *key) bool { return bytes.Equal(k.nwSig, b.NWSig) && k.phone.imei == b.IMEI })
	if i < 0 {
		n.Errorf("a binding of no payload: %+v", b)
		return nil
	}
	return n.keys[i]
}

// check is the property.
func (n *network) check(s *sim) {
	sub := n.subscription(s)
	n.mu.Lock()
	defer n.mu.Unlock()
	if k := n.keyOf(sub.Active); k != nil && !k.proved {
		n.fail(s, "ACTIVE with %s, which did not decrypt a vector under its KME", sub.Active.IMEI)
	}
}

// air has a peer ask for vectors, and use the first. An HSS repeats a RAND now and then.
func (n *network) air(p *peer, s *sim) {
	before := n.subscription(s)
	rands := newRANDs(1 + n.intN(2))
	n.mu.Lock()
	if len(s.clear) > 0 && !n.faultless.Load() && n.intN(8) == 0 {
		rands[0] = s.clear[n.intN(len(s.clear))]
	}
	n.mu.Unlock()
	got, err := n.service().PrepareVector(n.Context(), s.imsi, rands, p.Origin)
	n.mu.Lock()
	defer n.mu.Unlock()
	at := p.at[s]
	if err != nil {
		n.note(p, s, "no vector", "%v", err)
		at.success = n.intN(2) == 0 // it updates the location all the same
		n.refused(s, "PrepareVector", err, kme.CallerNotAllowed, kme.Malformed, kme.HSMUnavailable)
		return
	}
	v := &sentVector{rand: rands[0], sent: got.RANDs[0][:], attempt: got.AttemptID, lost: n.fault()}
	if v.attempt != "" {
		s.clear = append(s.clear, rands...)
	} else if v.under = n.under(v); v.under == nil {
		n.fail(s, "a vector under no KME")
	} else {
		at.sent[v.under] = true
	}
	if _, opened := before.Opened(p.Origin); n.alone && before.Active != nil && !opened &&
		(before.Pending == nil || before.Pending.Origin != p.Name) && v.under != n.keyOf(before.Active) {
		n.fail(s, "a vector for %s is not under the ACTIVE binding", p.Name)
	}
	n.note(p, s, "sent a vector", "in clear: %v, lost: %v", v.under == nil, v.lost)
	if at.last = v; !v.lost {
		at.vector = v
	}
}

// under finds the KME that a vector was processed with. It needs mu.
func (n *network) under(v *sentVector) *key {
	out := make([]byte, hsmkeys.RANDSize)
	i := slices.IndexFunc(n.keys, func(k *key) bool {
		k.block.Encrypt(out, v.rand)
		return bytes.Equal(out, v.sent)
	})
	if i < 0 {
		return nil
	}
	return n.keys[i]
}

// aka has the SIM answer a vector, in whatever device it is. It answers only what it gets as the HSS made it: a
// device without the KME tries all RANDs that it has seen in clear.
func (n *network) aka(p *peer, s *sim) {
	n.mu.Lock()
	at := p.at[s]
	v := at.vector
	at.vector = nil
	failed := false
	switch {
	case v.under == nil:
		n.note(p, s, "AKA in clear", "by %s", s.in.imei)
		at.attempt = v.attempt
	case s.in.holds[s] == v.under:
		n.note(p, s, "AKA", "by %s", s.in.imei)
		v.under.proved, at.success = true, true
	case slices.ContainsFunc(s.clear, func(c []byte) bool { return bytes.Equal(c, v.rand) }):
		n.fail(s, "%s passes a pre-processed AKA without the KME, with a RAND that was seen in clear", s.in.imei)
	default:
		n.note(p, s, "AKA failed", "by %s", s.in.imei)
		failed = true
	}
	n.mu.Unlock()
	if failed && n.intN(4) == 0 { // S6a does not report it
		n.report(p, s, false)
	}
}

// newKey is what a phone makes for a SIM.
func (n *network) newKey(d *phone, s *sim) *key {
	k := &key{phone: d}
	k.payload, k.plain = d.payload(n)
	sig := k.plain.NWSig()
	k.nwSig = sig[:]
	k.block = must[cipher.Block](n)(aes.NewCipher(k.plain.KME.Bytes()))
	n.mu.Lock()
	defer n.mu.Unlock()
	n.keys = append(n.keys, k)
	d.asked[s] = k
	return k
}

// establish has a peer carry a payload: an honest one that of the device that the SIM is in, for the first time or
// again; a hostile one that of its own device, or one that it recorded.
func (n *network) establish(p *peer, s *sim) {
	at := p.at[s]
	n.mu.Lock()
	d, k, attempt := s.in, at.key, at.attempt
	if p.own != nil {
		d = p.own
		if at.vector != nil {
			attempt = at.vector.attempt
		}
		if k = nil; len(n.keys) > 0 && n.intN(2) == 0 {
			k = n.keys[n.intN(len(n.keys))]
		}
	} else if k != nil && k.phone != d {
		k = nil
	}
	n.mu.Unlock()
	if k == nil || p.own == nil && n.intN(3) > 0 {
		k = n.newKey(d, s)
	}
	at.key = k
	e, err := n.service().EstablishKME(n.Context(), binding.EstablishRequest{IMSI: s.imsi, IMEI: k.phone.imei,
		AttemptID: attempt, Payload: k.payload, Origin: p.Origin})
	n.mu.Lock()
	defer n.mu.Unlock()
	if err != nil {
		n.note(p, s, "not established", "%s: %v", k.phone.imei, err)
		n.refused(s, "EstablishKME", err, kme.CallerNotAllowed, kme.NoAttempt, kme.OtherDevice, kme.KMERejected)
		at.attempt = ""
		return
	}
	if p.Provisioning != binding.Allowed || !bytes.Equal(e.NWSig, k.nwSig) {
		n.fail(s, "%s established, with NW_SIG %x", p.Name, e.NWSig)
	}
	lost := n.fault()
	n.note(p, s, "established", "%s, lost: %v", k.phone.imei, lost)
	if !lost && p.own == nil && k.phone.asked[s] == k {
		k.phone.holds[s], at.attempt = k, ""
	}
}

// report is a ULR without a payload, with or without an AKA before it, or a failed AKA.
func (n *network) report(p *peer, s *sim, ok bool) {
	sub := n.subscription(s)
	n.mu.Lock()
	at := p.at[s]
	if ok {
		at.success = false
		if k := n.keyOf(sub.Pending); k != nil && at.sent[k] && !k.proved {
			n.mu.Unlock()
			return // what is assumed of it
		}
	}
	n.mu.Unlock()
	got, err := n.service().ReportAuthentication(n.Context(), s.imsi, ok, p.Origin)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.note(p, s, "reported", "%v: %+v, %v", ok, got, err)
	if err != nil {
		n.refused(s, "ReportAuthentication", err, kme.NotBound)
	} else if got.Binding != nil && got.Binding.State == binding.Active && !n.keyOf(got.Binding).proved {
		n.fail(s, "the report of %s activates what was not proved", p.Name)
	} else if n.alone && sub.Active != nil && sub.Pending != nil && sub.Pending.Origin != p.Name &&
		!reflects(sub, got) {
		n.fail(s, "the report of %s changes a pending binding of another origin: %+v", p.Name, got.Binding)
	}
}

// reflects says whether a report left the pending binding as it was.
func reflects(sub *binding.Subscription, got *binding.Reported) bool {
	return got.Binding != nil && got.Binding.State == binding.Pending &&
		bytes.Equal(got.Binding.NWSig, sub.Pending.NWSig)
}

// resync insists on the RAND that the HSS made, of the last vector that a peer was sent, as long as there is its KME.
func (n *network) resync(p *peer, s *sim) {
	v := p.at[s].last
	if v == nil || v.lost {
		return
	}
	before := n.subscription(s)
	got, err := n.service().RestoreRAND(n.Context(), s.imsi, v.sent, p.Origin)
	after := n.subscription(s)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.note(p, s, "restored", "%x, %v", got, err)
	stands := func(sub *binding.Subscription) bool {
		return v.under == nil || v.under == n.keyOf(sub.Pending) || v.under == n.keyOf(sub.Active)
	}
	if stands(before) && stands(after) && (err != nil || !bytes.Equal(got[:], v.rand)) {
		n.fail(s, "restored %x, %v, want %x", got, err, v.rand)
	}
}

// step has a peer do something about a SIM: mostly what comes next.
func (n *network) step(p *peer) {
	s := n.sims[n.intN(len(n.sims))]
	switch n.intN(40) {
	case 0, 1, 2:
		n.report(p, s, true) // a TAU with context transfer, a restoration, an SGSN
	case 3, 4:
		n.resync(p, s)
	case 5:
		n.air(p, s)
	case 6:
		if p.own != nil || p.at[s].key != nil {
			n.establish(p, s)
		}
	case 7, 8:
		n.mu.Lock()
		s.in = n.phones[n.intN(3)]
		n.note(p, s, "moved", "to %s", s.in.imei)
		n.mu.Unlock()
	case 9, 10, 11:
		n.administer(p, s)
	case 12:
		n.now.Add(int64(n.intN(181)-60) * time.Minute.Milliseconds())
	default:
		n.now.Add(int64(n.intN(1000)))
		n.next(p, s)
	}
}
