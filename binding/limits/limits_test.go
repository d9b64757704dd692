package limits

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/kme"
)

// Places are shared among the clients that have calls under way. "+a" is a call of a's that gets one, "!a" one that
// gets none, and "-a" the end of one.
func TestGatePlaces(t *testing.T) {
	for name, c := range map[string]struct {
		calls int
		steps []string
	}{
		"no limit":                {0, []string{"+a", "+a", "+a", "+a", "+a"}},
		"alone":                   {2, []string{"+a", "+a", "!a", "-a", "+a", "!a"}},
		"a share beside others":   {4, []string{"+a", "+a", "+a", "+a", "+b", "+b", "!b", "!a"}},
		"at least one":            {1, []string{"+a", "+b", "+c", "!a", "!b", "!c"}},
		"who has gone has none":   {4, []string{"+a", "+a", "+a", "+a", "+b", "-b", "+c", "+c", "!c"}},
		"more than its share":     {4, []string{"+a", "+a", "+a", "+b", "!a", "+b", "-a", "-a", "+a"}},
		"one that ends, of three": {3, []string{"+a", "+a", "+a", "+b", "+c", "!c", "-a", "!a", "!b"}},
	} {
		g := NewGate(Limits{Calls: c.calls})
		for i, s := range c.steps {
			client := s[1:]
			if s[0] == '-' {
				g.Leave(client)
			} else if got := g.Take(client); got != (s[0] == '+') {
				t.Errorf("%s: after %q, Take(%s) is %v", name, c.steps[:i], client, got)
			}
		}
	}
}

// Payloads are charged to their IMSI, and to an IMEI when they are accepted.
func TestGateRates(t *testing.T) {
	imsis := []kme.IMSI{must.Get[kme.IMSI](t)(kme.ParseIMSI("001010000000001")),
		must.Get[kme.IMSI](t)(kme.ParseIMSI("001010000000002"))}
	imeis := []kme.IMEI{must.Get[kme.IMEI](t)(kme.ParseIMEI("35209900000001")),
		must.Get[kme.IMEI](t)(kme.ParseIMEI("35209900000002"))}
	for name, c := range map[string]struct {
		Limits
		accepted int // payloads of the first IMSI for the first IMEI
		sent     int // of another IMSI for another IMEI
		// which of (IMSI, IMEI) may send another then
		may [2][2]bool
	}{
		"no limit":            {Limits{}, 9, 9, [2][2]bool{{true, true}, {true, true}}},
		"accepted":            {Limits{IMEIRate: 1e-6, IMEIBurst: 2}, 2, 0, [2][2]bool{{false, false}, {false, true}}},
		"one less":            {Limits{IMEIRate: 1e-6, IMEIBurst: 3}, 2, 0, [2][2]bool{{true, true}, {true, true}}},
		"not accepted":        {Limits{IMEIRate: 1e-6, IMEIBurst: 2}, 0, 2, [2][2]bool{{true, true}, {false, false}}},
		"a burst of no size":  {Limits{IMEIRate: 1e-6}, 1, 0, [2][2]bool{{false, false}, {false, true}}},
		"more than one burst": {Limits{IMEIRate: 1e-6, IMEIBurst: 1}, 3, 0, [2][2]bool{{false, false}, {false, true}}},
	} {
		sent := func() *Gate {
			g := NewGate(c.Limits)
			for range c.accepted {
				g.Allow(imsis[0], imeis[0])
				g.Established(imeis[0])
			}
			for range c.sent {
				g.Allow(imsis[1], imeis[1])
			}
			return g
		}
		for i, imsi := range imsis {
			for j, imei := range imeis {
				if got := sent().Allow(imsi, imei); got != c.may[i][j] {
					t.Errorf("%s: IMSI %d for IMEI %d is allowed: %v", name, i, j, got)
				}
			}
		}
	}
}

// Of many strangers, lines are left out. Then one line has their number, and the next has its turn later.
func TestStrangers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, left := NewStrangers(), []int(nil)
		tell := func(why string) bool { return s.Tell(why, func(n int) { left = append(left, n) }) }
		for n := range strangersBurst {
			if !tell("certificate") {
				t.Fatalf("line %d of a burst is left out", n)
			}
		}
		for range 3 {
			if tell("certificate") {
				t.Error("a line behind the burst is not left out")
			}
		}
		if !tell("token") {
			t.Error("one why takes the lines of another")
		}
		time.Sleep(strangersEvery + time.Millisecond)
		synctest.Wait()
		if !slices.Equal(left, []int{3}) {
			t.Errorf("%v were told of, want 3, once", left)
		}
		if tell("certificate") {
			t.Error("the line that told of the others counts as none")
		}
		time.Sleep(2 * strangersEvery)
		synctest.Wait()
		if !slices.Equal(left, []int{3, 1}) || !tell("certificate") {
			t.Errorf("%v were told of, want 3 and 1, and then a line", left)
		}
	})
}
