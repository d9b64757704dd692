package storetest

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sightings"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/kme"
)

func equipment(t *testing.T, s Store) {
	one, two, other := subscription(t, 1), subscription(t, 2), subscription(t, 3)
	phone, another := device(t, 1), device(t, 2)
	check := func(what string, imei kme.IMEI, imsi kme.IMSI, of ...kme.IMSI) {
		t.Helper()
		own, all, err := s.Equipment(t.Context(), imei, imsi, t0)
		must.Do(t, err)
		want := new(binding.Subscription)
		if imsi != (kme.IMSI{}) {
			want = subscriptionOf(t, s, imsi, t0)
		}
		if !reflect.DeepEqual(own, want) {
			t.Errorf("%s: the subscription is\n%+v, want\n%+v", what, own, want)
		}
		var got []kme.IMSI
		for _, b := range all {
			if got = append(got, b.IMSI); !reflect.DeepEqual(b, subscriptionOf(t, s, b.IMSI, t0).Active) {
				t.Errorf("%s: the binding of %s is %+v", what, b.IMSI, b)
			}
		}
		slices.SortFunc(got, func(a, b kme.IMSI) int { return strings.Compare(a.String(), b.String()) })
		if !slices.Equal(got, of) {
			t.Errorf("%s: the device is bound to %v, want %v", what, got, of)
		}
	}
	check("nothing", phone, one)
	bind(t, s, one, phone, []byte("one"))
	check("pending", phone, one)
	activate(t, s, one, t0)
	check("active", phone, one, one)
	check("alone", phone, kme.IMSI{}, one)
	bind(t, s, two, phone, []byte("two"))
	activate(t, s, two, t0)
	bind(t, s, other, another, []byte("three"))
	activate(t, s, other, t0)
	check("of two", phone, kme.IMSI{}, one, two)
	check("of two, asked by a third", phone, other, one, two)
	// The IMSI is bound to another device: the ledger still knows it as this one's.
	open(t, s, two)
	check("opened", phone, two, one, two)
	_, a := prepare(t, s, two, t0)
	must.Do(t, s.Establish(t.Context(), newBinding(two, another, a.ID), []byte("four"), true, t0))
	check("pending beside active", another, two, other)
	activate(t, s, two, t0.Add(time.Second))
	check("gone", phone, two, one)
	check("there", another, two, two, other)
	must.Get[*binding.Binding](t)(s.Revoke(t.Context(), one, t0))
	check("revoked", phone, one)
}

func listed(t *testing.T, s Store) {
	check := func(after int64, want ...binding.Listing) []binding.Listing {
		t.Helper()
		got := must.Get[[]binding.Listing](t)(s.Listed(t.Context(), after))
		for i := range got {
			if want = slices.Clone(want); i < len(want) {
				want[i].Change = got[i].Change
			}
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("after %d:\n got %+v\nwant %+v", after, got, want)
		}
		return got
	}
	list := func(changed int, all ...binding.Listing) {
		t.Helper()
		if n := must.Get[int](t)(s.List(t.Context(), all)); n != changed {
			t.Errorf("%d entries have changed, want %d", n, changed)
		}
	}
	check(0)
	stolen := binding.Listing{Prefix: "01234567000001", Status: binding.Blacklisted, Reason: "stolen", Listed: t0}
	model := binding.Listing{Prefix: "01234567", Status: binding.Whitelisted, Reason: "ours", Listed: t0}
	gone := binding.Listing{Prefix: stolen.Prefix, Reason: "found", Listed: t0.Add(time.Hour)}
	list(2, stolen, model)
	all := check(0, stolen, model)
	again := stolen
	again.Listed = t0.Add(time.Hour)
	list(0, again, binding.Listing{Prefix: "99", Listed: t0}) // the same, and nothing to remove
	check(0, stolen, model)
	list(1, gone)
	check(all[1].Change, gone)
	check(0, model, gone)
	list(0, gone)
	grey := model
	grey.Status = binding.Greylisted
	list(1, grey)
	check(0, gone, grey)

	entries := must.Get[[]binding.Entry](t)(s.History(t.Context(), binding.ListingSubject(stolen.Prefix)))
	if len(entries) != 2 || entries[0].Event != binding.EventListed || entries[0].Detail != "BLACKLISTED: stolen" ||
		entries[1].Event != binding.EventUnlisted || entries[1].Detail != "found" {
		t.Errorf("the ledger has %+v", entries)
	}
}

// Of several who enter the same entry at the same time one has changed the list.
func raceListed(t *testing.T, s Store) {
	for round := range 5 {
		var changed atomic.Int64
		var all sync.WaitGroup
		for racer := range racers {
			all.Go(func() {
				own := binding.Listing{Prefix: fmt.Sprintf("1%03d", racer), Status: binding.Greylisted, Listed: t0}
				same := binding.Listing{Prefix: fmt.Sprintf("2%03d", round), Status: binding.Greylisted, Listed: t0}
				n, err := s.List(t.Context(), []binding.Listing{own, same})
				if err != nil {
					t.Error(err)
				}
				changed.Add(int64(n))
			})
		}
		all.Wait()
		want := 1 // the same; and of each its own, the first time
		if round == 0 {
			want += racers
		}
		if int(changed.Load()) != want {
			t.Errorf("round %d: %d entries have changed, want %d", round, changed.Load(), want)
		}
	}
	changes := map[int64]bool{}
	for _, e := range must.Get[[]binding.Listing](t)(s.Listed(t.Context(), 0)) {
		changes[e.Change] = true
	}
	if len(changes) != racers+5 {
		t.Errorf("%d entries have changes of their own, want %d", len(changes), racers+5)
	}
}

// see notes one sighting, and gives the device that the subscription was in before, if this is a move.
func see(t *testing.T, s Store, imsi kme.IMSI, imei kme.IMEI, e sightings.Evidence, at time.Time) (before kme.IMEI) {
	t.Helper()
	seen := sightings.Sighting{IMSI: imsi, IMEI: imei, Evidence: e, First: at, Last: at}
	for _, m := range must.Get[[]sightings.Move](t)(s.See(t.Context(), []sightings.Sighting{seen})) {
		if m.Sighting.IMSI != imsi || m.Sighting.IMEI != imei || m.Before.IMSI != imsi {
			t.Errorf("a move of others: %+v", m)
		}
		before = m.Before.IMEI
	}
	return before
}

func seenDevices(t *testing.T, s Store) {
	one, two := subscription(t, 1), subscription(t, 2)
	a, b := device(t, 1), device(t, 2)
	none := kme.IMEI{}
	at := func(n int) time.Time { return t0.Add(time.Duration(n) * time.Minute) }
	for n, step := range []struct {
		imsi   kme.IMSI
		imei   kme.IMEI
		e      sightings.Evidence
		before kme.IMEI
	}{
		{one, a, sightings.Asserted, none},
		{two, b, sightings.Asserted, none}, // another subscription
		{one, a, sightings.Shown, none},    // the same device
		{one, a, sightings.Asserted, none},
		{one, b, sightings.Asserted, a},
		{one, b, sightings.Asserted, none}, // it stays there
		{one, a, sightings.Shown, b},       // and is back
		{one, b, sightings.Shown, a},
	} {
		if before := see(t, s, step.imsi, step.imei, step.e, at(n)); before != step.before {
			t.Errorf("step %d: before it was in %v, want %v", n, before, step.before)
		}
	}
	// One that comes late is no move: it was there before.
	if before := see(t, s, one, a, sightings.Asserted, at(5)); before != none {
		t.Errorf("a late one is a move from %v", before)
	}
	check := func(imsi kme.IMSI, imei kme.IMEI, want ...sightings.Sighting) {
		t.Helper()
		got := must.Get[[]sightings.Sighting](t)(s.Sightings(t.Context(), imsi, imei))
		if !reflect.DeepEqual(got, want) {
			t.Errorf("of %s and %s:\n got %+v\nwant %+v", imsi, imei, got, want)
		}
	}
	bOfTwo := sightings.Sighting{IMSI: two, IMEI: b, Evidence: sightings.Asserted, First: at(1), Last: at(1)}
	bOfOne := sightings.Sighting{IMSI: one, IMEI: b, Evidence: sightings.Asserted, First: at(4), Last: at(5)}
	shownB := sightings.Sighting{IMSI: one, IMEI: b, Evidence: sightings.Shown, First: at(7), Last: at(7)}
	check(one, none, sightings.Sighting{IMSI: one, IMEI: a, Evidence: sightings.Asserted, First: at(0), Last: at(5)},
		bOfOne, sightings.Sighting{IMSI: one, IMEI: a, Evidence: sightings.Shown, First: at(2), Last: at(6)}, shownB)
	check(kme.IMSI{}, b, bOfOne, shownB, bOfTwo)

	forget := func(before time.Time, most, want int) {
		t.Helper()
		if n := must.Get[int](t)(s.Forget(t.Context(), before, most)); n != want {
			t.Errorf("%d were forgotten, want %d", n, want)
		}
	}
	forget(at(1), 100, 0)
	forget(at(5), 100, 1)
	check(two, none)
	forget(at(0), 1, 3)
	check(one, none, shownB)
}

// Of many devices of one IMSI, those that it was seen with the longest ago are forgotten, and those that have proven
// something last.
func sightingsBounded(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	see(t, s, imsi, device(t, 0), sightings.Shown, t0)
	for n := range 2 * sightings.MaxDevices {
		see(t, s, imsi, device(t, n+1), sightings.Asserted, t0.Add(time.Duration(n+1)*time.Second))
	}
	got := must.Get[[]sightings.Sighting](t)(s.Sightings(t.Context(), imsi, kme.IMEI{}))
	if len(got) != sightings.MaxDevices || got[0].Evidence != sightings.Shown ||
		got[len(got)-1].IMEI != device(t, 2*sightings.MaxDevices) {
		t.Errorf("%d are kept: %+v", len(got), got)
	}
}

// Sightings that are noted together are noted as one after the other: a move within them, the same one twice, and more
// devices of one IMSI than are kept.
func sightingsTogether(t *testing.T, s Store) {
	note := func(first int, together bool) (moves []sightings.Move, kept [][]sightings.Sighting) {
		var all []sightings.Sighting
		for n := range 3 * sightings.MaxDevices {
			at := t0.Add(time.Duration(n) * time.Second)
			if n%7 == 0 { // a late one
				at = t0.Add(-time.Duration(n) * time.Second)
			}
			seen := sightings.Sighting{IMSI: subscription(t, first), IMEI: device(t, n/2), Evidence: sightings.Asserted,
				First: at, Last: at}
			if n%2 == 1 {
				seen.IMSI, seen.IMEI, seen.Evidence = subscription(t, first+1+n%5), device(t, n%3), sightings.Shown
			}
			all = append(all, seen)
		}
		if together {
			moves = must.Get[[]sightings.Move](t)(s.See(t.Context(), all))
		} else {
			for _, seen := range all {
				moves = append(moves, must.Get[[]sightings.Move](t)(s.See(t.Context(), []sightings.Sighting{seen}))...)
			}
		}
		for n := range 6 {
			of := must.Get[[]sightings.Sighting](t)(s.Sightings(t.Context(), subscription(t, first+n), kme.IMEI{}))
			for i := range of {
				of[i].IMSI = subscription(t, n)
			}
			kept = append(kept, of)
		}
		for i := range moves {
			moves[i].IMSI, moves[i].Before.IMSI = kme.IMSI{}, kme.IMSI{}
		}
		return moves, kept
	}
	moves, kept := note(10, false)
	if movesTogether, keptTogether := note(20, true); !reflect.DeepEqual(movesTogether, moves) ||
		!reflect.DeepEqual(keptTogether, kept) || len(moves) < 10 || len(kept[0]) != sightings.MaxDevices {
		t.Errorf("together:\n%+v\n%+v\none after the other:\n%+v\n%+v", movesTogether, keptTogether, moves, kept)
	}
}
