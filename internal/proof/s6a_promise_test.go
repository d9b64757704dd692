package proof

import (
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/diameter"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// A promise is what must hold at the network's edge. Where it says so, all of a group are tested with one configuration
// of the extension.
type promise struct {
	name string
	test func(s *scene)
}

// groups: that of provision_from is the last.
var groups = []struct {
	name     string
	conf     func() []string
	promises []promise
}{
	{"as delivered", func() []string { return nil }, asDelivered},
	{"process", func() []string { return []string{"swx = process", "cx = process", "zh = process"} }, []promise{
		{"SWx, Cx and Zh are processed", multimediaProcessed},
	}},
	{"legacy", func() []string {
		return []string{"legacy_mme = " + identity("mme"), "legacy_mme = " + identity("mme3")}
	}, []promise{
		{"an MME that is listed serves without the feature", legacyMME},
	}},
	{"agents", func() []string { return []string{"agent = " + identity("mme"), "agent = *." + home} }, []promise{
		{"an agent passes on for others", agents},
	}},
	{"origin_rate", func() []string { return []string{"origin_rate = 5"} }, []promise{
		{"one origin does not use up the service", originRate},
	}},
	{"a hung keysvc", func() []string { return []string{"timeout_ms = 2000", "origin_rate = 100000"} }, []promise{
		{"a hung keysvc queues nobody", hungService},
	}},
	{"provision_from", func() []string {
		return []string{"provision_from = home", "provision_from = 26202"}
	}, []promise{
		{"a network that is listed provisions", provisionFrom},
	}},
}

// What the network promises at its edge: with the extension in the HSS and in an agent, to an MME that is
// freeDiameter's and to one that is not.
func TestS6aPromises(t *testing.T) {
	t.Parallel()
	for _, where := range []string{"in the HSS", "in an agent"} {
		t.Run(where, func(t *testing.T) {
			d := newNetwork(t, 80, "")
			for _, g := range groups {
				t.Run(g.name, func(t *testing.T) {
					outer := d.t
					defer func() { d.t = outer }()
					d.t = t
					if g.name == "provision_from" { // keysvc has a say, too
						d.keysvc.Stop(syscall.SIGTERM)
						d.startKeysvc("*." + away)
					}
					s := d.scene(where == "in an agent", g.conf()...)
					for _, stack := range []string{"freeDiameter", "own"} {
						for _, p := range g.promises {
							t.Run(p.name+" to "+stack, func(t *testing.T) {
								group := d.t
								defer func() { d.t = group }()
								p.test(s.of(t, stack))
							})
						}
					}
				})
			}
		})
	}
}

var asDelivered = []promise{
	{"refusals are answers that an MME takes", refusals},
	{"a peer of another network binds nobody", foreignPeer},
	{"a location without AKA activates nothing", withoutAKA},
	{"the old device activates nothing of the new one", oldDevice},
	{"a lost ULA heals", lostULA},
	{"vectors of all kinds are pre-processed", allKinds},
	{"SWx, Cx and Zh are refused", multimediaRefused},
	{"an MME without the feature gets nothing for who is not bound", withoutFeature},
	{"provisioning that is open is no service", openedIsNoService},
	{"resynchronisation while provisioning is open", resynchronisationOpen},
	{"a RAND that was seen in clear does not come again", repeatedRAND},
	{"the HSS decides first", hssFirst},
	{"a spoofed Origin-Host is refused", spoofed},
	{"the log says why, at the level that is seen", logged},
}

func refusals(s *scene) {
	p := s.phone()
	attempt := p.opened(s, s.mme, options{})
	_, payload := p.payload()
	payload[7] ^= 1
	s.expectULA("a payload that was changed", s.mme.ulr(p.imsi, p.imei, payload, attempt, options{}), 5420, "1")
	s.expectULA("a payload without an attempt", s.mme.ulr(p.imsi, p.imei, payload, "AAAAAAAAAAAAAAAAAAAAAA", options{}),
		5420, "2")
	bound := s.phone().bind(s, s.mme, options{})
	s.expectAIA("AUTS that nobody made", s.mme.air(bound.imsi, 1, options{resync: make([]byte, 30)}), 4181, 0)
	s.expectAIA("the HSS's own error", s.mme.air(marked("air=4181", 0), 1, options{}), 4181, 0)
}

// It has no SIM, and a device of its own lot.
func foreignPeer(s *scene) {
	p := s.phone()
	_, payload := p.payload()
	a := s.visited.air(p.imsi, 1, roaming)
	s.expectAIA("a vector for who is not bound", a, 5420, 0)
	s.expectAIA("a vector, with a Visited-PLMN-Id that is a lie", s.visited.air(p.imsi, 1, options{}), 5420, 0)
	s.expectAIA("a vector, with a realm that is a lie, too", s.visited.air(p.imsi, 1, options{realm: home}), 5420, 0)
	// An attempt that a home MME has opened is not another's, whoever asks.
	attempt := p.opened(s, s.mme, options{})
	for what, e := range map[string]edge{"of another network": s.visited, "of another MME": s.mme2} {
		if u := e.ulr(p.imsi, p.imei, payload, attempt, options{}); u.result == 2001 || u.nwSig != nil {
			s.t.Errorf("a payload %s: %+v", what, u)
		}
	}
	s.expectULA("a location of who is not bound", s.visited.ulr(p.imsi, p.imei, nil, "", roaming), 5420, "")
	s.expectState("in the end", p.imsi, "", "")
	// A subscriber who is bound roams: he is served, and his vectors are pre-processed.
	bound := s.phone().bind(s, s.mme, options{})
	bound.authenticates(s, s.visited, roaming)
	s.expectULA("his location", s.visited.ulr(bound.imsi, bound.imei, nil, "", roaming), 2001, "")
}

// A TAU with context transfer, an HSS restoration, an SGSN, a hostile peer: ULR as it comes, and no vector before.
func withoutAKA(s *scene) {
	p := s.phone()
	s.expectULA("a location of who is not bound", s.mme.ulr(p.imsi, p.imei, nil, "", options{}), 5420, "")
	p.provision(s, s.mme, options{})
	for what, e := range map[string]edge{"the MME that provisioned": s.mme, "another MME": s.mme2,
		"another network's": s.visited} {
		s.expectULA("a location by "+what, e.ulr(p.imsi, p.imei, nil, "", options{}), 5420, "")
		s.expectState("after a location by "+what, p.imsi, "PENDING", p.imei)
	}
	p.authenticates(s, s.mme, options{})
	s.expectULA("a location after AKA", s.mme.ulr(p.imsi, p.imei, nil, "", options{}), 2001, "")
	s.expectState("after AKA", p.imsi, "ACTIVE", p.imei)
}

func oldDevice(s *scene) {
	old := s.phone().bind(s, s.mme2, options{})
	s.open(old.imsi)
	next := s.phone(old.imsi)
	next.provision(s, s.mme, options{})
	for range 2 {
		s.expectULA("a location of the old device", s.mme2.ulr(old.imsi, old.imei, nil, "", options{}), 2001, "")
		s.expectState("then", old.imsi, "PENDING", next.imei)
		old.authenticates(s, s.mme2, options{})
	}
	next.authenticates(s, s.mme, options{})
	s.expectULA("a location of the new device", s.mme.ulr(next.imsi, next.imei, nil, "", options{}), 2001, "")
	s.expectState("in the end", next.imsi, "ACTIVE", next.imei)
}

func lostULA(s *scene) {
	p := s.phone()
	attempt := p.opened(s, s.mme, options{})
	_, payload := p.payload()
	s.mme.ulr(p.imsi, p.imei, payload, attempt, options{}) // its answer never reaches the device
	var a aia
	for i := 0; i < 10 && a.control != clearOnly; i++ {
		a = s.mme.air(p.imsi, 1, options{}) // the device cannot use it
	}
	s.expectAIA("after some vectors that no device could use", a, 2001, clearOnly)
	p.bind(s, s.mme, options{})
}

func allKinds(s *scene) {
	p := s.phone().bind(s, s.mme, options{})
	for what, o := range map[string]struct {
		eutran uint32
		options
	}{"with E-UTRAN": {2, options{utran: 2}}, "alone": {0, options{utran: 1}}} {
		a := s.mme.air(p.imsi, o.eutran, o.options)
		s.expectAIA("UTRAN and GERAN "+what, a, 2001, preprocessed)
		if len(a.eutran) != int(o.eutran) || len(a.utran) != int(o.utran) || len(a.gsm) != int(o.utran) {
			s.t.Fatalf("%s: %d, %d and %d vectors", what, len(a.eutran), len(a.utran), len(a.gsm))
		}
		p.allDecrypt(s, a)
		sqn := p.sequence(a.utran[0])
		auts := p.sim.Resynchronise(p.decrypt(a.utran[0].rand), sqn+1<<20)
		again := s.mme.air(p.imsi, 1, options{utran: 1, uresync: append(a.utran[0].rand, auts[:]...)})
		s.expectAIA("resynchronisation by UTRAN", again, 2001, preprocessed)
		if len(again.utran) == 1 && p.sequence(again.utran[0]) <= sqn+1<<20 {
			s.t.Errorf("after resynchronisation to %d the HSS uses %d", sqn+1<<20, p.sequence(again.utran[0]))
		}
	}
	several := s.with("split").bind(s, s.mme, options{})
	a := s.mme.air(several.imsi, 3, options{utran: 1})
	if s.expectAIA("several Authentication-Infos", a, 2001, preprocessed); len(a.eutran) != 3 || len(a.utran) != 1 {
		s.t.Fatalf("%d and %d vectors", len(a.eutran), len(a.utran))
	}
	several.allDecrypt(s, a)
}

func multimediaRefused(s *scene) {
	pending := s.phone()
	pending.provision(s, s.mme, options{})
	active, unbound := s.phone().bind(s, s.mme, options{}), s.phone()
	for _, app := range []uint32{diameter.SWx, diameter.Wx, diameter.Cx, diameter.Zh} {
		for what, user := range map[string]string{"PENDING": pending.imsi, "ACTIVE": active.imsi,
			"an EAP identity": "0" + active.imsi + "@nai." + home} {
			if r := s.mme.mar(app, user, nil, options{}); r.lost != "" || r.result != 5003 || r.authenticate != nil {
				s.t.Errorf("application %d, %s: %+v, want 5003", app, what, r)
			}
		}
		if r := s.mme.mar(app, unbound.imsi, nil, options{}); r.lost != "" || r.result != 2001 ||
			len(r.authenticate) != 2 {
			s.t.Errorf("application %d, a subscriber who is not bound: %+v", app, r)
		}
	}
	// An HSS may read the IMSI in the last two: from all digits.
	for _, name := range []string{"somebody@ims." + home, active.imsi[:8] + "@" + active.imsi[8:], "y" + active.imsi} {
		for _, app := range []uint32{diameter.SWx, diameter.Wx, diameter.Cx, diameter.Zh} {
			if r := s.mme.mar(app, name, nil, options{}); r.lost != "" || r.result != 5003 {
				s.t.Errorf("application %d, the name %s: %+v, want 5003", app, name, r)
			}
		}
	}
}

func multimediaProcessed(s *scene) {
	p, unbound := s.phone().bind(s, s.mme, options{}), s.phone()
	for _, app := range []uint32{diameter.SWx, diameter.Wx, diameter.Cx, diameter.Zh} {
		r := s.mme.mar(app, "6"+p.imsi+"@nai."+home, nil, options{})
		if r.lost != "" || r.result != 2001 || len(r.authenticate) != 2 {
			s.t.Fatalf("application %d: %+v", app, r)
		}
		var sqn uint64
		for _, item := range r.authenticate {
			var err error
			if _, sqn, err = p.sim.Authenticate(p.decrypt(item[:16]), item[16:]); err != nil {
				s.t.Errorf("application %d: %v", app, err)
			}
		}
		auts := p.sim.Resynchronise(p.decrypt(r.authenticate[1][:16]), sqn+1<<20)
		r = s.mme.mar(app, p.imsi, append(r.authenticate[1][:16:16], auts[:]...), options{})
		if r.lost != "" || r.result != 2001 || len(r.authenticate) != 2 {
			s.t.Fatalf("application %d, resynchronisation: %+v", app, r)
		}
		if _, again, err := p.sim.Authenticate(p.decrypt(r.authenticate[0][:16]), r.authenticate[0][16:]); err != nil ||
			again <= sqn+1<<20 {
			s.t.Errorf("application %d: after resynchronisation to %d the HSS uses %d: %v", app, sqn+1<<20, again, err)
		}
		r = s.mme.mar(app, unbound.imsi, nil, options{})
		if r.result != 2001 || len(r.authenticate) != 2 {
			s.t.Fatalf("application %d, a subscriber who is not bound: %+v", app, r)
		}
		if _, _, err := p.sim.Authenticate([16]byte(r.authenticate[0]), r.authenticate[0][16:]); err != nil {
			s.t.Errorf("application %d, a subscriber who is not bound: %v", app, err)
		}
	}
}

func withoutFeature(s *scene) {
	plain := options{plain: true}
	p := s.phone()
	s.expectAIA("a vector", s.mme.air(p.imsi, 1, plain), 5420, 0)
	s.expectAIA("UTRAN's", s.mme.air(p.imsi, 0, options{plain: true, utran: 1}), 5420, 0)
	s.expectULA("a location", s.mme.ulr(p.imsi, p.imei, nil, "", plain), 5420, "")
	s.expectState("in the end", p.imsi, "", "")
	p.bind(s, s.mme, options{})
	p.authenticates(s, s.mme, plain)
	s.expectULA("the location of who is bound", s.mme.ulr(p.imsi, p.imei, nil, "", plain), 2001, "")
	s.open(p.imsi) // it cannot provision, so it is closed for it
	p.authenticates(s, s.mme, plain)
	s.expectULA("the location while provisioning is open", s.mme.ulr(p.imsi, p.imei, nil, "", plain), 2001, "")
}

func legacyMME(s *scene) {
	plain := options{plain: true}
	p := s.phone()
	a := s.mme.air(p.imsi, 1, plain)
	if s.expectAIA("a vector", a, 2001, 0); len(a.eutran) != 1 || a.attempt != "" {
		s.t.Fatalf("%+v", a)
	}
	if err := p.accepts(a.eutran[0], true); err != nil {
		s.t.Error(err)
	}
	s.expectULA("a location", s.mme.ulr(p.imsi, p.imei, nil, "", plain), 2001, "")
	s.expectState("in the end", p.imsi, "", "")
	s.expectAIA("an MME that is not listed", s.mme2.air(p.imsi, 1, plain), 5420, 0)
	p.bind(s, s.mme, options{})
	p.authenticates(s, s.mme, plain)
	s.expectULA("the location of who is bound", s.mme.ulr(p.imsi, p.imei, nil, "", plain), 2001, "")
}

func openedIsNoService(s *scene) {
	p := s.phone().bind(s, s.mme, options{})
	s.open(p.imsi)
	p.opened(s, s.mme, options{})
	s.expectULA("a location", s.mme.ulr(p.imsi, p.imei, nil, "", options{}), 5420, "")
	p.opened(s, s.mme2, options{}) // each MME has an attempt of its own
	s.expectULA("a location of another", s.mme2.ulr(p.imsi, p.imei, nil, "", options{}), 5420, "")
	s.expectState("in the end", p.imsi, "ACTIVE", p.imei)
}

func resynchronisationOpen(s *scene) {
	p := s.phone()
	for _, what := range []string{"not bound", "opened"} {
		if what == "opened" {
			p.bind(s, s.mme, options{})
		}
		before := s.mme.air(p.imsi, 1, options{})
		if what == "opened" {
			s.open(p.imsi)
			// The last vector went out pre-processed; the SIM may ask with it still.
			rand, sqn := p.decrypt(before.eutran[0].rand), p.sequence(before.eutran[0])
			auts := p.sim.Resynchronise(rand, sqn+1<<20)
			s.expectAIA("AUTS of a vector from before",
				s.mme.air(p.imsi, 1, options{resync: append(before.eutran[0].rand, auts[:]...)}), 2001, clearOnly)
			before = s.mme.air(p.imsi, 1, options{})
		}
		if s.expectAIA(what, before, 2001, clearOnly); len(before.eutran) != 1 {
			s.t.Fatalf("%d vectors", len(before.eutran))
		}
		rand := [16]byte(before.eutran[0].rand)
		_, sqn, err := p.sim.Authenticate(rand, before.eutran[0].autn)
		auts := p.sim.Resynchronise(rand, sqn+1<<20)
		a := s.mme.air(p.imsi, 1, options{resync: append(rand[:], auts[:]...)})
		s.expectAIA(what+": resynchronisation", a, 2001, clearOnly)
		if len(a.eutran) != 1 || err != nil {
			s.t.Fatalf("%d vectors, %v", len(a.eutran), err)
		}
		if _, again, err := p.sim.Authenticate([16]byte(a.eutran[0].rand), a.eutran[0].autn); err != nil ||
			again <= sqn+1<<20 {
			s.t.Errorf("%s: after resynchronisation to %d the HSS uses %d: %v", what, sqn+1<<20, again, err)
		}
	}
}

func repeatedRAND(s *scene) {
	p := s.with("repeat")
	p.provision(s, s.mme, options{})
	s.expectAIA("a RAND that was sent in clear", s.mme.air(p.imsi, 1, options{}), 4181, 0)
	s.expectAIA("and for UTRAN", s.mme.air(p.imsi, 0, options{utran: 1}), 4181, 0)
}

func hssFirst(s *scene) {
	for _, mark := range []string{"ulr=5001", "ulr=5012"} {
		p := s.with(mark)
		attempt := p.opened(s, s.mme, options{})
		_, payload := p.payload()
		s.expectULA(mark, s.mme.ulr(p.imsi, p.imei, payload, attempt, options{}),
			number(strings.TrimPrefix(mark, "ulr=")), "")
		if state, _ := s.binding(p.imsi); state == "PENDING" || state == "ACTIVE" {
			s.t.Errorf("%s: the binding is %s", mark, state)
		}
		p.opened(s, s.mme, options{})
	}
}

func spoofed(s *scene) {
	p := s.phone()
	for _, host := range []string{identity("mme2"), identity("visited"), "x"} {
		s.expectAIA("a vector for "+host, s.mme.air(p.imsi, 1, options{host: host}), 5012, 0)
		s.expectULA("a location for "+host, s.mme.ulr(p.imsi, p.imei, nil, "", options{host: host}), 5012, "")
	}
	p.opened(s, s.mme, options{host: strings.ToUpper(s.name)}) // a name's case says nothing (RFC 6733, 4.3.1)
}

func agents(s *scene) {
	p := s.phone()
	other := options{host: "other." + home}
	p.provision(s, s.mme, other)
	s.expectULA("a location by the agent itself", s.mme.ulr(p.imsi, p.imei, nil, "", options{}), 5420, "")
	p.authenticates(s, s.mme, other)
	s.expectULA("a location by who had the vector", s.mme.ulr(p.imsi, p.imei, nil, "", other), 2001, "")
	s.expectAIA("a peer that is no agent", s.visited.air(p.imsi, 1, options{host: "other." + home}), 5012, 0)
}

func provisionFrom(s *scene) {
	s.phone().bind(s, s.visited, roaming)
	s.phone().bind(s, s.mme, options{})
	p := s.phone()
	s.expectAIA("in a network that is none of its own", s.visited.air(p.imsi, 1, options{}), 5420, 0)
	s.expectAIA("a network whose realm it is not", s.mme.air(p.imsi, 1, roaming), 5420, 0)
	s.expectAIA("a third network", s.mme.air(p.imsi, 1, options{plmn: "310410"}), 5420, 0)
}

func originRate(s *scene) {
	p := s.phone()
	var all sync.WaitGroup
	var mu sync.Mutex
	results := map[uint32]int{}
	for range 200 {
		all.Go(func() {
			a := s.mme2.air(p.imsi, 1, options{})
			mu.Lock()
			results[a.result]++
			mu.Unlock()
		})
	}
	p.opened(s, s.mme, options{})
	all.Wait()
	if results[3004] == 0 || results[3004]+results[2001] != 200 {
		s.t.Errorf("200 requests at once: %v, want 3004, and 2001 for some", results)
	}
	testproc.Await(s.t, "the origin is served again", func() bool {
		return s.mme2.air(p.imsi, 1, options{}).result == 2001
	})
}

// many asks for vectors of so many subscribers at once, and says how long all took.
func (s *scene) many(n int) (results map[uint32]int, took time.Duration) {
	results = map[uint32]int{}
	var all sync.WaitGroup
	var mu sync.Mutex
	start := time.Now()
	for i := range n {
		all.Go(func() {
			a := s.own.air(fmt.Sprintf("00101%010d", i%s.made), 1, options{})
			mu.Lock()
			results[a.result]++
			mu.Unlock()
		})
	}
	all.Wait()
	return results, time.Since(start)
}

func hungService(s *scene) {
	const timeout = 2 * time.Second
	up := map[int]time.Duration{}
	for _, n := range []int{40, 1000} {
		_, up[n] = s.many(n)
	}
	s.suspend()
	hung := map[int]time.Duration{}
	for _, n := range []int{40, 1000} {
		var results map[uint32]int
		if results, hung[n] = s.many(n); results[4181]+results[3004] != n {
			s.t.Errorf("%d AIRs: %v, want 4181 or 3004", n, results)
		}
	}
	s.keysvc.Cmd.Process.Signal(syscall.SIGCONT)
	p := s.phone()
	testproc.Await(s.t, "keysvc is asked again", func() bool { return s.mme.air(p.imsi, 1, options{}).result == 2001 })
	for n, took := range hung {
		if took > 2*timeout+10*up[n] { // other work may have begun since that was measured
			_, now := s.many(n)
			up[n] = max(up[n], now)
		}
		if most := 2*timeout + 10*up[n]; took > most {
			s.t.Errorf("%d AIRs took %v, with a service that answers %v: more than %v", n, took, up[n], most)
		}
	}
	var a aia
	testproc.Await(s.t, "a vector in the end", func() bool { // what was just measured may have opened the breaker
		a = s.mme.air(p.imsi, 1, options{})
		return a.result == 2001
	})
	s.expectAIA("a vector in the end", a, 2001, clearOnly)
}

// Open5GS shows errors only, and so does the test HSS.
func logged(s *scene) {
	if s.front.name != "hss" {
		return
	}
	if first, _, _ := strings.Cut(s.hss.Log.String(), "\n"); !strings.Contains(first, "kme: ") ||
		!strings.Contains(first, s.path("s")) {
		s.t.Errorf("the first line is not that of the extension's start: %s", first)
	}
	p := s.phone()
	testproc.Await(s.t, "a line with IMSI, origin and reason",
		func() bool { // one of many refusals in a second may not be there
			attempt := p.opened(s, s.mme, options{})
			_, payload := p.payload()
			payload[7] ^= 1
			s.mme.ulr(p.imsi, p.imei, payload, attempt, options{})
			for line := range strings.Lines(s.hss.Log.String()) {
				if strings.Contains(line, p.imsi) && strings.Contains(line, s.name) &&
					strings.Contains(line, "KME_REJECTED") {
					return true
				}
			}
			return false
		})
}
