package registry

import (
	"slices"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/kme"
)

// A device's lot is the one that is served, else the one that was imported last, in whatever order a store has them.
func TestLotOf(t *testing.T) {
	tac := must.Get[kme.TAC](t)(kme.ParseTAC("35209900"))
	served, withdrawn := Verdict{}, Verdict{Withdrawn: true}
	lot := func(name string, day, first int, retired, distrusted Verdict) *Lot {
		return &Lot{Imported: time.Date(2026, 1, day, 0, 0, 0, 0, time.UTC), Retired: retired, Distrusted: distrusted,
			Manifest: &directory.Manifest{Lot: name, Ranges: []directory.Range{{TAC: tac, First: first, Count: 10}}}}
	}
	lots := []*Lot{
		lot("retired first", 1, 0, withdrawn, served), lot("served", 2, 0, served, served),
		lot("retired later", 3, 0, withdrawn, served), lot("old", 1, 10, withdrawn, served),
		lot("older", 2, 10, served, withdrawn), lot("newest", 3, 10, withdrawn, withdrawn),
		lot("alone", 1, 20, served, withdrawn),
	}
	for number, want := range map[string]string{"35209900000000": "served", "35209900000019": "newest",
		"35209900000020": "alone", "35209900000030": ""} {
		imei := must.Get[kme.IMEI](t)(kme.ParseIMEI(number))
		for range 2 {
			slices.Reverse(lots)
			got := ""
			if l := LotOf(lots, imei); l != nil {
				got = l.Manifest.Lot
			}
			if got != want {
				t.Errorf("%s is of lot %q, want %q", number, got, want)
			}
		}
	}
}

func TestState(t *testing.T) {
	withdrawn := Verdict{Withdrawn: true}
	for want, m := range map[string]Manufacturer{"trusted": {}, "distrusted": {Verdict: withdrawn}} {
		if got := m.State(); got != want {
			t.Errorf("%+v is %s, want %s", m, got, want)
		}
	}
	for want, l := range map[string]Lot{"served": {}, "retired": {Retired: withdrawn, Distrusted: withdrawn},
		"distrusted": {Distrusted: withdrawn}} {
		if got := l.State(); got != want || l.Served() != (want == "served") {
			t.Errorf("%+v is %s, want %s", l, got, want)
		}
	}
}
