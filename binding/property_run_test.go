package binding_test

import (
	"sync"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/kme"
)

// administer opens provisioning, or revokes.
func (n *network) administer(p *peer, s *sim) {
	var err error
	what := "opened"
	if n.intN(3) > 0 {
		_, err = n.service().OpenProvisioning(n.Context(), s.imsi, 10*time.Minute)
	} else {
		what = "revoked"
		_, err = n.service().RevokeBinding(n.Context(), s.imsi)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.note(p, s, what, "%v", err)
	if err != nil {
		n.refused(s, what, err, kme.NotBound)
	}
}

// next is the next step of an attach; of a hostile peer, what it likes.
func (n *network) next(p *peer, s *sim) {
	at := p.at[s]
	switch {
	case p.own != nil && (at.vector == nil || n.intN(3) == 0):
		n.air(p, s)
	case p.own != nil && n.intN(2) == 0:
		n.establish(p, s)
	case p.own != nil:
		n.report(p, s, n.intN(3) > 0)
	case at.vector != nil:
		n.aka(p, s)
	case at.attempt != "":
		n.establish(p, s)
	case at.success:
		n.report(p, s, true)
	default:
		if n.air(p, s); at.success {
			n.report(p, s, true)
		}
	}
}

// settle is the second property: with all faults gone, and the hostile peers, whoever attaches at one MME is bound,
// without an administrator, within as many vectors as a pending binding of no use takes to end, one to be
// provisioned and one to show it. Only an active binding whose KME the device does not hold is in the way: an
// administrator has to open provisioning again.
func (n *network) settle() {
	n.faultless.Store(true)
	for _, s := range n.sims {
		p := n.peers[n.intN(3)]
		p.at[s] = &visit{sent: p.at[s].sent}
		sub := n.subscription(s)
		if sub.Active != nil && n.keyOf(sub.Active) != s.in.holds[s] {
			continue
		}
		n.seen["settled"]++
		bound := func() bool {
			sub := n.subscription(s)
			return sub.Active != nil && n.keyOf(sub.Active) == s.in.holds[s] && sub.Served(p.Origin)
		}
		for range 3 + 2 {
			for n.air(p, s); p.at[s].vector != nil || p.at[s].attempt != "" || p.at[s].success; {
				n.next(p, s)
			}
		}
		if n.check(s); !bound() {
			n.fail(s, "in %s it is not bound to it: %+v", s.in.imei, n.subscription(s))
		}
	}
	n.faultless.Store(false)
}

// checkSeen insists that all of these happened.
func (n *network) checkSeen(what ...string) {
	n.Logf("%v", n.seen)
	for _, w := range what {
		if n.seen[w] == 0 && !n.Failed() {
			n.Errorf("never %s", w)
		}
	}
}

func onSQLite(t *testing.T) *network { return newNetwork(t) }

// onPostgres has two instances.
func onPostgres(t *testing.T) *network {
	url := pgtest.Start(t).Database(t)
	var stores []binding.Store
	key := kme.RandomSecret()
	for range 2 {
		s := must[*sqlstore.Store](t)(sqlstore.Open(t.Context(), url, key))
		t.Cleanup(func() { s.Close() })
		stores = append(stores, s)
	}
	return newNetwork(t, stores...)
}

func TestProperty(t *testing.T)         { oneByOne(onSQLite(t), 40) }
func TestPostgresProperty(t *testing.T) { oneByOne(onPostgres(t), 12) }

func oneByOne(n *network, rounds int) {
	n.alone = true
	for range rounds {
		for range 50 {
			p := n.peers[n.intN(3)]
			if n.intN(5) == 0 {
				p = n.peers[3+n.intN(2)]
			}
			if n.step(p); n.Failed() {
				return
			}
			for _, s := range n.sims {
				n.check(s)
			}
		}
		n.settle()
	}
	n.checkSeen("AKA", "AKA in clear", "AKA failed", "established", "not established", "reported",
		"restored", "settled")
}

func TestPropertyAtOnce(t *testing.T)         { atOnce(onSQLite(t)) }
func TestPostgresPropertyAtOnce(t *testing.T) { atOnce(onPostgres(t)) }

// atOnce has every peer work at the same time as the others.
func atOnce(n *network) {
	for range 12 {
		var all sync.WaitGroup
		for _, p := range n.peers {
			all.Go(func() {
				for range 20 {
					if n.step(p); n.Failed() {
						return
					}
				}
			})
		}
		all.Wait()
		for _, s := range n.sims {
			n.check(s)
		}
		n.settle()
	}
	n.checkSeen("AKA", "AKA in clear", "established", "reported", "settled")
}
