package proof

import (
	"context"
	"crypto/rand"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/diameter"
	"github.com/kmehsm/kmehsm/internal/milenage"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// A lossy network loses a tenth of what it carries.
type lossy struct {
	dropped, delayed, doubled atomic.Int64
	calm                      atomic.Bool // nothing is lost any more
}

// deliver sends an answer: a tenth of all are dropped, delayed beyond the patience of who waits, or doubled.
func (l *lossy) deliver(p *diameter.Peer, m *diameter.Message) {
	fate := mathrand.IntN(30)
	if l.calm.Load() {
		fate = -1
	}
	switch fate {
	case 0:
		l.dropped.Add(1)
		return
	case 1:
		l.delayed.Add(1)
		time.Sleep(time.Duration(mathrand.Int64N(int64(2 * chaosPatience))))
	case 2:
		l.doubled.Add(1)
		p.Send(m)
	}
	p.Send(m)
}

// chaosPatience is how long an MME waits for an answer.
const chaosPatience = 3 * time.Second

// A lossyHSS makes vectors and subscriptions. All SIMs have one K.
type lossyHSS struct {
	lossy
	sim *milenage.SIM
	sqn atomic.Uint64
}

func (h *lossyHSS) handle(p *diameter.Peer, m *diameter.Message) {
	avps := []diameter.AVP{diameter.Number(diameter.AuthSessionState, 1), diameter.Number(diameter.ResultCode, 2001)}
	if m.Code == diameter.AuthenticationInfo {
		var random [16]byte
		kasme := make([]byte, 32)
		rand.Read(random[:])
		rand.Read(kasme)
		autn, xres, _, _ := h.sim.Challenge(random, h.sqn.Add(32), [2]byte{0x80})
		avps = append(avps, diameter.Group(diameter.AuthInfo, diameter.Group(diameter.EUTRANVector,
			diameter.New(diameter.RAND, random[:]), diameter.New(diameter.XRES, xres[:]),
			diameter.New(diameter.AUTN, autn[:]), diameter.New(diameter.KASME, kasme))))
	} else {
		avps = append(avps, diameter.Number(diameter.ULAFlags, 1),
			diameter.Group(diameter.SubscriptionData, diameter.Number(diameter.SubscriberStatus, 0)))
	}
	h.deliver(p, p.Answer(m, avps...))
}

// A lossyMME loses answers, too: those that the extension makes never come from the HSS.
type lossyMME struct {
	*lossy
	*diameter.Peer
}

// ask gives nil for an answer that is lost, one way or another. An MME may send a request again as it was (RFC 6733,
// 5.5.4).
func (e lossyMME) ask(m *diameter.Message) (answer *diameter.Message) {
	for tries := 1 + mathrand.IntN(4)/3; tries > 0 && answer == nil; tries-- {
		ctx, cancel := context.WithTimeout(context.Background(), chaosPatience)
		answer, _ = e.Peer.Ask(ctx, m)
		cancel()
		m.Flags |= diameter.Retransmitted
		if answer != nil && !e.calm.Load() && mathrand.IntN(20) == 0 {
			e.dropped.Add(1)
			answer = nil
		}
	}
	return answer
}

// attach plays a device and its MMEs until the network serves it, and says how often the device made a payload. Nobody
// else does anything.
func (p *phone) attach(ctx context.Context, mmes []lossyMME) (payloads int, err error) {
	for ctx.Err() == nil {
		e := mmes[mathrand.IntN(len(mmes))]
		a := e.ask(e.AIR(realm, p.imsi, 1, nil, options{}.avps()...))
		if a == nil || a.Result() != 2001 {
			time.Sleep(time.Duration(mathrand.IntN(200)) * time.Millisecond)
			continue
		}
		if fault := diameter.Fault(a); fault != "" {
			return payloads, fmt.Errorf("AIA: %s", fault)
		}
		control, _ := a.Number(diameter.BindingControl)
		vectors := vecs(a, diameter.EUTRANVector, diameter.XRES, diameter.AUTN)
		switch {
		case len(vectors) != 1:
			return payloads, fmt.Errorf("%d vectors", len(vectors))
		case control == clearOnly:
			payloads++
			if err := p.provisionLossy(e, string(a.Data(diameter.BindingAttempt)), vectors[0]); err != nil {
				return payloads, err
			}
		case control != preprocessed:
			return payloads, fmt.Errorf("Binding-Control is %d", control)
		case p.kme != nil && p.accepts(vectors[0], false) == nil:
			if u := e.ask(e.ULR(realm, p.imsi, p.imei, nil, "", options{}.avps()...)); u != nil && u.Result() == 2001 {
				return payloads, nil
			}
		}
	}
	return payloads, ctx.Err()
}

// provisionLossy sends one payload, again while it is said to be safe. The device has a KME from when it has compared
// NW_SIG.
func (p *phone) provisionLossy(e lossyMME, attempt string, v vec) error {
	if err := p.accepts(v, true); err != nil {
		return err
	}
	plain, payload := p.payload()
	for range 1 + mathrand.IntN(2) { // a device may give up
		u := e.ask(e.ULR(realm, p.imsi, p.imei, payload, attempt, options{}.avps()...))
		if u == nil {
			continue
		}
		if fault := diameter.Fault(u); fault != "" {
			return fmt.Errorf("ULA: %s", fault)
		}
		status, ok := u.Number(diameter.BindingAnswer, diameter.BindingStatus)
		want, got := plain.NWSig(), u.Data(diameter.BindingAnswer, diameter.NWSig)
		switch {
		case u.Result() == 2001 && ok && status == 0 && string(got) == string(want[:]):
			p.kme = &plain.KME
			return nil
		case got != nil:
			return fmt.Errorf("result %d, status %d, and NW_SIG %x, not %x", u.Result(), status, got, want)
		case ok && status == 1:
			return fmt.Errorf("a good payload was refused")
		case ok && status == 2:
			return nil // the attempt has ended, by what was lost: another vector opens one
		}
		time.Sleep(time.Duration(mathrand.IntN(200)) * time.Millisecond)
	}
	return nil
}

// Answers are lost at every point, and keysvc is killed again and again: each device ends with its own KME, and no
// administrator has helped.
func TestS6aChaos(t *testing.T) {
	t.Parallel()
	devices, every, workers, most := 100, 3*time.Second, 32, 10*time.Minute
	if os.Getenv("KMEHSM_SOAK") != "" { // make kills
		devices, every, workers, most = 10_000, 20*time.Second, 64, 80*time.Minute
	}
	d := newNetwork(t, devices, "")
	phones := make([]*phone, devices)
	for i := range phones {
		phones[i] = d.phone()
	}
	agent := d.start("agent", []string{d.conf("kme.conf", "origin_rate = 100000", "timeout_ms = 2000")}, "hss", "mme",
		"mme2")
	hss := &lossyHSS{sim: phones[0].sim}
	agent.peer("hss", hss.handle)
	agent.connected("hss")
	var mmes []lossyMME
	for _, name := range []string{"mme", "mme2"} {
		mmes = append(mmes, lossyMME{&hss.lossy, agent.peer(name, nil).Peer})
	}

	ctx, cancel := context.WithTimeout(t.Context(), most)
	defer cancel()
	var all sync.WaitGroup
	var next, payloads atomic.Int64
	start := time.Now()
	for range workers {
		all.Go(func() {
			for i := next.Add(1) - 1; i < int64(devices); i = next.Add(1) - 1 {
				n, err := phones[i].attach(ctx, mmes)
				payloads.Add(int64(n))
				if err != nil {
					t.Errorf("IMSI %s: %v", phones[i].imsi, err)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { all.Wait(); close(done) }()
	kills, up := 0, every
	for running := true; running; {
		select {
		case <-done:
			running = false
		case <-time.After(up):
			d.keysvc.Kill()
			kills++
			began := time.Now()
			d.startKeysvc()
			up = max(every, 2*time.Since(began)) // a machine on which it starts slowly needs longer for calls, too
		}
	}
	t.Logf("%d devices in %v: %d payloads; %d answers dropped, %d delayed, %d doubled; keysvc was killed %d times",
		devices, time.Since(start).Round(time.Second), payloads.Load(), hss.dropped.Load(), hss.delayed.Load(),
		hss.doubled.Load(), kills)
	if devices >= 1000 && payloads.Load() == int64(devices) {
		t.Error("no device has had to make a second payload, so that nothing had to heal")
	}
	if kills == 0 || hss.dropped.Load() == 0 || hss.delayed.Load() == 0 || hss.doubled.Load() == 0 {
		t.Error("nothing was killed or lost, so that this test sees little")
	}

	hss.calm.Store(true)
	active := map[string][]string{}
	for line := range strings.Lines(d.run(d.operator, "keysvc", "binding", "list")) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "ACTIVE" {
			active[f[0]] = append(active[f[0]], f[1])
		}
	}
	for _, p := range phones {
		if got := active[p.imsi]; len(got) != 1 || got[0] != p.imei {
			t.Errorf("IMSI %s is ACTIVE with %v, want %s", p.imsi, got, p.imei)
			continue
		}
		var a *diameter.Message
		testproc.Await(t, "a vector", func() bool {
			a = mmes[0].ask(mmes[0].AIR(realm, p.imsi, 1, nil, options{}.avps()...))
			return a != nil && a.Result() == 2001
		})
		if err := p.accepts(vecs(a, diameter.EUTRANVector, diameter.XRES, diameter.AUTN)[0], false); err != nil {
			t.Errorf("IMSI %s: the device cannot use its vector: %v", p.imsi, err)
		}
	}
	if len(active) != devices {
		t.Errorf("%d subscriptions are ACTIVE, want %d", len(active), devices)
	}
}
