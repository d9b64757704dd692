package storetest

import (
	"errors"
	"slices"
	"testing"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/tokenkeys"
	"github.com/kmehsm/kmehsm/internal/must"
)

var actor = binding.Actor{Client: "ops", Role: "admin", Certificate: "ab12", Address: "192.0.2.1"}

func events(t *testing.T, s Store, subject string) (all []binding.Event) {
	t.Helper()
	history := must.Get[[]binding.Entry](t)(s.History(t.Context(), subject))
	for i, e := range history {
		if e.Subject != subject || e.Time.IsZero() || i > 0 && e.Seq <= history[i-1].Seq {
			t.Errorf("entry %+v of %s", e, subject)
		}
		all = append(all, e.Event)
	}
	return all
}

// Every decision is in the ledger, with whoever has taken it.
func noted(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	ctx := binding.WithActor(t.Context(), actor)
	bind(t, s, imsi, device(t, 1), []byte("a"))
	activate(t, s, imsi, t0)
	must.Do(t, s.OpenAttempt(ctx, binding.Attempt{ID: "o", IMSI: imsi, Expires: t0.Add(ttl), Opened: true}))
	must.Get[*binding.Binding](t)(s.Revoke(ctx, imsi, t0))
	must.Do(t, s.Note(ctx, binding.EventExported, imsi.String(), "to nobody"))
	want := []binding.Event{binding.EventEstablished, binding.EventActivated, binding.EventOpened, binding.EventRevoked,
		binding.EventExported}
	if got := events(t, s, imsi.String()); !slices.Equal(got, want) {
		t.Errorf("the ledger has %v, want %v", got, want)
	}
	history := must.Get[[]binding.Entry](t)(s.History(t.Context(), imsi.String()))
	for i, e := range history {
		by := binding.Actor{}
		if i >= 2 {
			by = actor
		}
		if e.Actor != by {
			t.Errorf("%s is by %+v, want %+v", e.Event, e.Actor, by)
		}
	}
	if history[0].IMEI != device(t, 1).String() || history[4].Detail != "to nobody" {
		t.Errorf("%+v", history)
	}

	m := newMaker(t, s)
	lot := m.lot(t, "L1", 0)
	for range 2 {
		must.Do(t, s.PutLot(ctx, lot, allowed))
	}
	for _, withdrawn := range []bool{true, true, false} {
		v := registry.Verdict{Withdrawn: withdrawn, By: "a@h", Reason: "why", Time: t0}
		for _, name := range []string{"", "L1"} {
			must.Get[registry.Verdict](t)(s.Decide(ctx, m.KeyID, name, v, allowed))
		}
	}
	if got, want := events(t, s, binding.ManufacturerSubject(m.KeyID)), []binding.Event{binding.EventEnrolled,
		binding.EventDistrusted, binding.EventTrusted}; !slices.Equal(got, want) {
		t.Errorf("the ledger has %v, want %v", got, want)
	}
	if got, want := events(t, s, binding.LotSubject(m.KeyID, "L1")), []binding.Event{binding.EventImported,
		binding.EventRetired, binding.EventReinstated}; !slices.Equal(got, want) {
		t.Errorf("the ledger has %v, want %v", got, want)
	}

	// What did not happen is not there.
	nothing := subscription(t, 2)
	_, err := s.Revoke(ctx, nothing, t0)
	refused(t, "revoked nothing", err, binding.ErrNotBound)
	if got, want := events(t, s, nothing.String()), []binding.Event{binding.EventClosed}; !slices.Equal(got, want) {
		t.Errorf("the ledger has %v, want %v", got, want)
	}
	if n, err := s.VerifyLedger(t.Context()); err != nil || n != 12 {
		t.Errorf("%d entries, error %v", n, err)
	}
}

func lastNote(t *testing.T, s Store) {
	if _, found, err := s.LastNote(t.Context(), "X", "s"); found || err != nil {
		t.Errorf("found %v, error %v", found, err)
	}
	for _, n := range [][3]string{{"X", "s", "1"}, {"Y", "s", "2"}, {"X", "s", "3"}, {"X", "r", "4"}} {
		must.Do(t, s.Note(t.Context(), binding.Event(n[0]), n[1], n[2]))
	}
	for _, want := range [][3]string{{"X", "s", "3"}, {"Y", "s", "2"}, {"X", "r", "4"}} {
		if detail, found, err := s.LastNote(t.Context(), binding.Event(want[0]), want[1]); !found || err != nil ||
			detail != want[2] {
			t.Errorf("%v: detail %q, found %v, error %v", want, detail, found, err)
		}
	}
}

// A ledger behind its mark has everything refused until it is accepted.
func rolledBack(t *testing.T, s Store) {
	ctx := t.Context()
	imsi := subscription(t, 1)
	if now, err := s.Check(ctx, nil); err != nil || now.Epoch != 0 {
		t.Fatalf("an empty ledger of a token without a mark: %+v, %v", now, err)
	}
	bind(t, s, imsi, device(t, 1), []byte("a"))
	mark := must.Get[*binding.Mark](t)(s.Check(ctx, new(binding.Mark)))
	for range 3 { // the same again is good, and so is a lower mark
		must.Get[*binding.Mark](t)(s.Check(ctx, mark))
	}
	if seen := s.Seen(); seen.Epoch != mark.Epoch || len(seen.Heads) != len(mark.Heads) {
		t.Errorf("seen %+v", seen)
	}
	ahead, other, q, v := *mark, *mark, binding.BindingQuery{Limit: 1, Now: t0}, registry.Verdict{}
	for i := range ahead.Heads {
		if ahead.Heads[i].Seq > 0 {
			ahead.Heads[i].Seq++
			other.Heads[i].MAC = []byte("of another history")
		}
	}
	for _, bad := range []*binding.Mark{&ahead, &other} {
		if _, err := s.Check(ctx, bad); !errors.Is(err, binding.ErrRolledBack) {
			t.Fatalf("behind its mark: %v", err)
		}
		for name, call := range map[string]func() error{
			"Subscription": func() error { _, err := s.Subscription(ctx, imsi, t0); return err },
			"Prepare":      func() error { _, err := s.Prepare(ctx, request(imsi, nobody, t0)); return err },
			"Spent":        func() error { _, err := s.Spent(ctx, imsi, [16]byte{}); return err },
			"OpenAttempt": func() error {
				return s.OpenAttempt(ctx, binding.Attempt{ID: "x", IMSI: imsi, Expires: t0.Add(ttl)})
			},
			"Establish": func() error {
				return s.Establish(ctx, newBinding(imsi, device(t, 1), "x"), []byte("x"), true, t0)
			},
			"Report":          func() error { _, err := s.Report(ctx, imsi, nobody.Name, true, t0); return err },
			"Bindings":        func() error { _, err := s.Bindings(ctx, q); return err },
			"Revoke":          func() error { _, err := s.Revoke(ctx, imsi, t0); return err },
			"DropExpired":     func() error { return s.DropExpired(ctx, t0) },
			"Note":            func() error { return s.Note(ctx, "X", "s", "") },
			"LastNote":        func() error { _, _, err := s.LastNote(ctx, "X", "s"); return err },
			"History":         func() error { _, err := s.History(ctx, "s"); return err },
			"Manufacturers":   func() error { _, err := s.Manufacturers(ctx); return err },
			"PutManufacturer": func() error { return s.PutManufacturer(ctx, newMaker(t, nil).Manufacturer) },
			"Lots":            func() error { _, err := s.Lots(ctx); return err },
			"Decide":          func() error { _, err := s.Decide(ctx, "m", "", v, allowed); return err },
			"Count":           func() error { _, err := s.Count(ctx, t0); return err },
			"Bound":           func() error { _, err := s.Bound(ctx, "m", "", t0); return err },
			"CountSealed":     func() error { _, err := s.CountSealed(ctx, []byte{2}); return err },
			"Sealed":          func() error { _, err := s.Sealed(ctx, tokenkeys.Sealed{}, []byte{2}, 1); return err },
			"Reseal":          func() error { _, err := s.Reseal(ctx, nil); return err },
			"Equipment":       func() error { _, _, err := s.Equipment(ctx, device(t, 1), imsi, t0); return err },
			"List":            func() error { _, err := s.List(ctx, nil); return err },
			"Listed":          func() error { _, err := s.Listed(ctx, 0); return err },
			"See":             func() error { _, err := s.See(ctx, nil); return err },
			"Sightings":       func() error { _, err := s.Sightings(ctx, imsi, device(t, 1)); return err },
			"Forget":          func() error { _, err := s.Forget(ctx, t0, 1); return err },
		} {
			refused(t, name+" of a store that is rolled back", call(), binding.ErrRolledBack)
		}
		if bad == &other {
			break
		}
		must.Get[*binding.Mark](t)(s.Check(ctx, mark)) // it was the token's mistake
	}

	accepted, err := s.Accept(binding.WithActor(ctx, actor), &ahead,
		binding.Acceptance{Reason: "the disk was lost", Missing: new(binding.Missing)})
	if err != nil || accepted.Mark.Epoch != ahead.Epoch+1 {
		t.Fatalf("%+v, %v", accepted, err)
	}
	must.Get[*binding.Mark](t)(s.Check(ctx, accepted.Mark))
	must.Get[*binding.Mark](t)(s.Check(ctx, &ahead)) // of an earlier epoch: no matter
	if sub, err := s.Subscription(ctx, imsi, t0); err != nil || sub.Pending == nil {
		t.Errorf("%+v, %v", sub, err)
	}
	if n, err := s.VerifyLedger(ctx); err != nil || n != 1+binding.Chains {
		t.Errorf("%d entries, error %v", n, err)
	}
	entries := must.Get[[]binding.Entry](t)(s.History(ctx, binding.StoreSubject))
	if len(entries) == 0 {
		t.Error("nobody accepted it")
	}
	for _, e := range entries {
		if e.Event != binding.EventAccepted || e.Actor != actor {
			t.Errorf("%+v", e)
		}
	}
}
