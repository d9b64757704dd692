package inspect

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/kme"
)

// All finds overlaps as a look at all pairs does, and in time that hardly grows faster than the lots.
func TestOverlaps(t *testing.T) {
	tacs := [2]kme.TAC{must.Get[kme.TAC](t)(kme.ParseTAC("35209900")), must.Get[kme.TAC](t)(kme.ParseTAC("35209901"))}
	for range 200 {
		var lots []*directory.Manifest
		pairs := map[string]bool{}
		for i := range 6 {
			m := &directory.Manifest{Lot: fmt.Sprint("L", i), Ranges: []directory.Range{
				{TAC: tacs[rand.IntN(2)], First: rand.IntN(60), Count: 1 + rand.IntN(9)}}}
			for _, other := range lots {
				if m.Overlap(other) != nil {
					pairs["lots "+other.Lot+" and "+m.Lot], pairs["lots "+m.Lot+" and "+other.Lot] = true, true
				}
			}
			lots = append(lots, m)
		}
		v := new(verifying)
		v.overlaps(lots)
		if (len(v.found.Problems) > 0) != (len(pairs) > 0) {
			t.Fatalf("%v: %v, and %v by pairs", lots, v.found.Problems, pairs)
		}
		for _, p := range v.found.Problems {
			if pair, _, _ := strings.Cut(p, ":"); !pairs[pair] {
				t.Errorf("%s", p)
			}
		}
	}
	// In this process's time on all cores, of which other work takes none.
	used := func() int64 {
		var u syscall.Rusage
		must.Do(t, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
		return u.Utime.Nano() + u.Stime.Nano()
	}
	took := func(n int) int64 {
		lots := make([]*directory.Manifest, n)
		for i := range lots {
			lots[i] = &directory.Manifest{Lot: "L", Ranges: []directory.Range{{TAC: tacs[i%2], First: i, Count: 2}}}
		}
		least := int64(math.MaxInt64)
		for range 5 {
			before := used()
			new(verifying).overlaps(lots)
			least = min(least, used()-before)
		}
		return least
	}
	if few, many := took(1_000), took(64_000); many > 1000*few {
		t.Errorf("1,000 lots took %d ns, 64,000 took %d", few, many)
	}
}
