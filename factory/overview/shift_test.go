package overview

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/factory/station"
)

// What is to be done with a lot follows from how it stands, the most urgent first.
func TestNext(t *testing.T) {
	now := time.Now()
	lot := func(change func(*Shift)) *Shift { // one that is published, granted, sealed and injected, of 40 devices
		s := &Shift{
			LotState: &LotState{Manifest: &directory.Manifest{Lot: "L1"}, Devices: 40, Published: 40, Sealed: true,
				Granted: []factory.Granted{{Operator: "op"}}, NextUpdate: now.Add(time.Hour)},
			Work:      new(Work),
			Injection: &station.Counts{Devices: 40, Results: station.Results{Injected: 40}},
		}
		change(s)
		return s
	}
	for name, c := range map[string]struct {
		s    *Shift
		want []string
	}{
		"done": {lot(func(*Shift) {}), []string{"nothing: the lot is done"}},
		"revoked": {lot(func(s *Shift) { s.Revoked, s.Published = new(directory.LotRevocation), 3 }),
			[]string{"nothing: the lot is revoked for good"}},
		"planned": {lot(func(s *Shift) { s.Published, s.Sealed, s.Granted, s.Injection = 0, false, nil, nil }),
			[]string{"factory lot provision L1: 40 devices"}},
		"in work": {lot(func(s *Shift) { s.Published, s.Sealed, s.Granted, s.Injection = 30, false, nil, nil }),
			[]string{"factory lot provision L1: 10 devices", "factory station serve"}},
		"the directory is away": {lot(func(s *Shift) { s.Published, s.Waiting, s.Injection = 0, 8, nil }),
			[]string{"see whether the directory can be reached: 8 devices"}},
		"the list is late": {lot(func(s *Shift) { s.NextUpdate = now.Add(-time.Hour) }),
			[]string{"factory lot refresh L1"}},
		"no list": {lot(func(s *Shift) { s.NoList, s.NextUpdate = "not found", time.Time{} }),
			[]string{"factory reconcile L1"}},
		"not granted": {lot(func(s *Shift) { s.Sealed, s.Granted = false, nil }),
			[]string{"factory lot grant L1"}},
		"not sealed": {lot(func(s *Shift) { s.Sealed = false }), []string{"factory lot seal L1"}},
		"sealed and not granted": {lot(func(s *Shift) { s.Granted = nil }),
			[]string{"find out whether another folder"}},
		"failed, and overdue": {lot(func(s *Shift) {
			*s.Injection = station.Counts{Devices: 40, Results: station.Results{Injected: 35, Failed: 3, Overdue: 2}}
		}),
			[]string{"factory station report L1: 3 devices have failed, and 2 are overdue"}},
		"to be injected": {lot(func(s *Shift) {
			*s.Injection = station.Counts{Devices: 40, Waiting: 7, Results: station.Results{Injected: 33}}
		}),
			[]string{"stations: 7 published devices wait"}},
		"no station yet": {lot(func(s *Shift) { s.Injection = nil }), []string{"factory station serve, or take"}},
		"all at once": {lot(func(s *Shift) {
			s.Published, s.Waiting, s.Sealed, s.NoList = 20, 5, false, "not found"
			*s.Injection = station.Counts{Devices: 40, Waiting: 25, Results: station.Results{Failed: 1, Injected: 14}}
		}),
			[]string{"factory reconcile L1", "see whether", "factory station report L1", "stations: 5 published"}},
	} {
		got := c.s.next(now)
		if !slices.EqualFunc(got, c.want, strings.HasPrefix) {
			t.Errorf("%s: %q; want %q", name, got, c.want)
		}
	}
}

// A lot that is not whole, or that nobody was granted, is not sealed; what sealing it loses is said.
func TestMaySeal(t *testing.T) {
	m := &directory.Manifest{Lot: "L1"}
	granted := []factory.Granted{{Operator: "a"}, {Operator: "b"}}
	for name, c := range map[string]struct {
		s    LotState
		want string
	}{
		"whole and granted": {LotState{Manifest: m, Devices: 4, Published: 4, Granted: granted}, ""},
		"not whole": {LotState{Manifest: m, Devices: 4, Published: 3, Granted: granted},
			"1 of its 4 devices are not"},
		"granted to nobody": {LotState{Manifest: m, Devices: 4, Published: 4}, "nobody, as far as the folder here"},
	} {
		if err := c.s.MaySeal("here"); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(),
			c.want) {
			t.Errorf("%s: %v", name, err)
		}
		want := "granted to " + c.s.Operators() + ": its key can never leave token X again"
		if got := c.s.SealLoss(token{}); !strings.Contains(got, want) {
			t.Errorf("%s: %s", name, got)
		}
	}
}

type token struct{}

func (token) String() string { return "token X" }
