package storetest

import (
	"errors"
	"reflect"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/must"
)

// race runs f in many goroutines that begin together, and gives what each returned.
func race(f func(i int) error) []error {
	errs := make([]error, racers)
	var begin, done sync.WaitGroup
	begin.Add(1)
	for i := range racers {
		done.Go(func() {
			begin.Wait()
			errs[i] = f(i)
		})
	}
	begin.Done()
	done.Wait()
	return errs
}

// checkOneWon insists that one call succeeded and the others failed as they should, and gives its number.
func checkOneWon(t *testing.T, errs []error, lost error) (winner int) {
	t.Helper()
	winner = -1
	for i, err := range errs {
		switch {
		case err == nil && winner >= 0:
			t.Errorf("calls %d and %d both succeeded", winner, i)
		case err == nil:
			winner = i
		case !errors.Is(err, lost):
			t.Errorf("call %d failed with %v, want %v", i, err, lost)
		}
	}
	if winner < 0 {
		t.Fatal("no call succeeded")
	}
	return winner
}

func racePrepare(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	ids := make([]string, racers)
	for _, err := range race(func(i int) error {
		d, err := s.Prepare(t.Context(), request(imsi, nobody, t0))
		if d.Attempt != nil {
			ids[i] = d.Attempt.ID
		}
		return err
	}) {
		must.Do(t, err)
	}
	if slices.ContainsFunc(ids, func(id string) bool { return id == "" || id != ids[0] }) {
		t.Errorf("vectors prepared at once got the attempts %q, not one", ids)
	}
	checkOpen(t, s, imsi, ids[0], t0, true)
}

func raceAttempt(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	id := openAttempt(t, s, imsi, t0)
	bindings := make([]*binding.Binding, racers)
	for i := range bindings {
		bindings[i] = newBinding(imsi, device(t, i), id)
	}
	errs := race(func(i int) error { return s.Establish(t.Context(), bindings[i], []byte{byte(i)}, true, t0) })
	winner := checkOneWon(t, errs, binding.ErrNoAttempt)
	checkBinding(t, s, imsi, bindings[winner])
	for i, b := range bindings {
		checkUsed(t, s, b.IMEI, []byte{byte(i)}, i == winner)
	}
}

func raceLedger(t *testing.T, s Store) {
	imei := device(t, 1)
	bindings := make([]*binding.Binding, racers)
	for i := range bindings {
		imsi := subscription(t, i)
		bindings[i] = newBinding(imsi, imei, openAttempt(t, s, imsi, t0))
	}
	errs := race(func(i int) error { return s.Establish(t.Context(), bindings[i], []byte("tag"), true, t0) })
	winner := checkOneWon(t, errs, binding.ErrUsed)
	for i, b := range bindings {
		checkOpen(t, s, b.IMSI, b.AttemptID, t0, i != winner)
		if i != winner {
			b = nil
		}
		checkBinding(t, s, bindings[i].IMSI, b)
	}
}

func raceReport(t *testing.T, s Store) {
	imsi := subscription(t, 1)
	want := bind(t, s, imsi, device(t, 1), []byte("tag"))
	prepare(t, s, imsi, t0)
	got := make([]*binding.Subscription, racers)
	errs := race(func(i int) (err error) {
		got[i], err = s.Report(t.Context(), imsi, nobody.Name, true, t0.Add(time.Minute))
		return err
	})
	want = active(want, t0.Add(time.Minute))
	for i := range got {
		if errs[i] != nil || !reflect.DeepEqual(got[i], &binding.Subscription{Active: want}) {
			t.Errorf("report %d: %+v, error %v", i, got[i], errs[i])
		}
	}
	checkBinding(t, s, imsi, want)
}
