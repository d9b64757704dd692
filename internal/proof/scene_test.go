package proof

import (
	"testing"
)

// A scene is a network as an MME sees it: the one that is looked at, two more of the home network, and one of another
// network.
type scene struct {
	*network
	hss, front *node
	mme        edge   // of either stack
	name       string // its Origin-Host
	mme2       peerEdge
	visited    peerEdge
	line       lineEdge // freeDiameter's, whatever mme is
	own        peerEdge
}

// roaming is what an MME of the other network says.
var roaming = options{plmn: "26202"}

// scene starts the nodes, the extension in the HSS or in an agent before it.
func (d *network) scene(agent bool, conf ...string) *scene {
	d.t.Helper()
	s := &scene{network: d}
	peers := []string{"mme", "mme2", "mme3", "visited"}
	hssd, kme := "hssd:"+d.path("subscribers"), d.conf("kme.conf", conf...)
	if agent {
		s.hss = d.start("hss", []string{hssd}, "agent")
		s.front = d.start("agent", []string{kme}, append(peers, "hss")...)
		s.front.connected("hss")
	} else {
		s.hss = d.start("hss", []string{hssd, kme}, peers...)
		s.front = s.hss
	}
	d.start("mme", []string{"mme:" + d.path("m")}, s.front.name).connected(s.front.name)
	s.line = lineEdge{d.mme("m")}
	s.own, s.mme2, s.visited = s.front.peer("mme3", nil), s.front.peer("mme2", nil), s.front.peer("visited", nil)
	return s
}

// of is the scene with the MME of one stack.
func (s *scene) of(t *testing.T, stack string) *scene {
	c := *s
	c.t, c.line.t = t, t
	if c.mme, c.name = c.line, identity("mme"); stack == "own" {
		c.mme, c.name = c.own, identity("mme3")
	}
	return &c
}

func (s *scene) open(imsi string) { s.run(s.operator, "keysvc", "binding", "open", imsi) }

// expectAIA checks a result and Binding-Control.
func (s *scene) expectAIA(what string, a aia, result, control uint32) {
	s.t.Helper()
	if a.lost != "" || a.result != result || a.control != control ||
		result != 2001 && len(a.eutran)+len(a.utran)+len(a.gsm) > 0 {
		s.t.Errorf("%s: result %d, Binding-Control %d, %d vectors, lost: %q; want result %d, Binding-Control %d",
			what, a.result, a.control, len(a.eutran)+len(a.utran)+len(a.gsm), a.lost, result, control)
	}
}

// expectULA checks a result, and the status of a payload; data is there with a success that has none.
func (s *scene) expectULA(what string, u ula, result uint32, status string) {
	s.t.Helper()
	if u.lost != "" || u.result != result || u.status != status || (u.nwSig != nil) != (status == "0") ||
		u.data != (result == 2001 && status == "") {
		s.t.Errorf("%s: result %d, status %q, NW-Sig of %d bytes, Subscription-Data %v, lost: %q; want result %d, "+
			"status %q",
			what, u.result, u.status, len(u.nwSig), u.data, u.lost, result, status)
	}
}

func (s *scene) expectState(what, imsi, state, imei string) {
	s.t.Helper()
	if got, by := s.binding(imsi); got != state || imei != "" && by != imei {
		s.t.Errorf("%s: the binding is %q of %q, want %q of %q", what, got, by, state, imei)
	}
}

// open makes sure of a first vector: in clear, with an attempt.
func (p *phone) opened(s *scene, e edge, o options) (attempt string) {
	s.t.Helper()
	a := e.air(p.imsi, 1, o)
	s.expectAIA("a first vector", a, 2001, clearOnly)
	if len(a.eutran) != 1 || a.attempt == "" {
		s.t.Fatalf("%d vectors, attempt %q", len(a.eutran), a.attempt)
	}
	if err := p.accepts(a.eutran[0], true); err != nil {
		s.t.Error(err)
	}
	return a.attempt
}

// provision has the phone make a KME and compare NW_SIG.
func (p *phone) provision(s *scene, e edge, o options) {
	s.t.Helper()
	attempt := p.opened(s, e, o)
	plain, payload := p.payload()
	u := e.ulr(p.imsi, p.imei, payload, attempt, o)
	s.expectULA("a payload", u, 2001, "0")
	if want := plain.NWSig(); string(u.nwSig) != string(want[:]) {
		s.t.Fatalf("NW_SIG is %x, want %x", u.nwSig, want)
	}
	p.kme = &plain.KME
}

// authenticates makes AKA with a pre-processed vector.
func (p *phone) authenticates(s *scene, e edge, o options) {
	s.t.Helper()
	a := e.air(p.imsi, 1, o)
	if s.expectAIA("a vector of a bound subscriber", a, 2001, preprocessed); len(a.eutran) != 1 {
		s.t.Fatalf("%d vectors", len(a.eutran))
	}
	if err := p.accepts(a.eutran[0], false); err != nil {
		s.t.Error(err)
	}
}

// bind is the whole flow.
func (p *phone) bind(s *scene, e edge, o options) *phone {
	s.t.Helper()
	p.provision(s, e, o)
	p.authenticates(s, e, o)
	s.expectULA("the location after AKA", e.ulr(p.imsi, p.imei, nil, "", o), 2001, "")
	s.expectState("after AKA", p.imsi, "ACTIVE", p.imei)
	return p
}

// with is one of the subscribers with a mark, another for each set-up and stack.
func (s *scene) with(mark string) *phone {
	return s.phone(marked(mark, btoi(s.name == identity("mme"))+2*btoi(s.front.name == "agent")))
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// allDecrypt: every vector is of use with the KME.
func (p *phone) allDecrypt(s *scene, a aia) {
	s.t.Helper()
	for i, v := range append(a.eutran, a.utran...) {
		if err := p.accepts(v, false); err != nil {
			s.t.Errorf("vector %d: %v", i, err)
		}
	}
	for i, v := range a.gsm {
		if sres, kc := p.sim.GSM(p.decrypt(v.rand)); string(sres[:]) != string(v.xres) ||
			string(kc[:]) != string(v.autn) {
			s.t.Errorf("GERAN vector %d is not pre-processed", i)
		}
	}
}

// sequence is the sequence number of a pre-processed vector.
func (p *phone) sequence(v vec) uint64 {
	_, sqn, _ := p.sim.Authenticate(p.decrypt(v.rand), v.autn)
	return sqn
}
