package refusals

import (
	"fmt"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

func TestMain(m *testing.M) { testproc.Main(m.Run) }

func imsi(t testing.TB, n int) kme.IMSI {
	t.Helper()
	return must.Get[kme.IMSI](t)(kme.ParseIMSI(fmt.Sprintf("00101%010d", n)))
}

// However many subscriptions are refused, a bounded number is remembered: those that were refused last.
func TestRefusalsAreBounded(t *testing.T) {
	r := new(Memory)
	for n := range 5 * maxRefusals {
		r.Put(Past{IMSI: imsi(t, n), Reason: kme.NoAttempt})
	}
	if n := len(r.last) + len(r.older); n > 2*maxRefusals {
		t.Errorf("%d are remembered", n)
	}
	for n := 4 * maxRefusals; n < 5*maxRefusals; n++ {
		if r.Of(imsi(t, n)) == nil {
			t.Fatalf("%d of the last %d is forgotten", n, maxRefusals)
		}
	}
	if r.Of(imsi(t, 0)) != nil {
		t.Error("the first is still known")
	}
}

// The last refusal counts, also where the one before is saved; and nothing is saved twice.
func TestRefusalsSaved(t *testing.T) {
	r, now := new(Memory), time.Now().UTC()
	r.Put(Past{IMSI: imsi(t, 1), Reason: kme.NoAttempt, Time: now})
	r.older, r.last = r.last, nil
	r.Put(Past{IMSI: imsi(t, 1), Reason: kme.KMERejected, Time: now.Add(time.Second), Cause: "signature"})
	saved, err := r.Save()
	if err != nil {
		t.Fatal(err)
	}
	again := new(Memory)
	if err := again.Load(saved); err != nil {
		t.Fatal(err)
	}
	if p := again.Of(imsi(t, 1)); p == nil || p.Reason != kme.KMERejected || p.Cause != "signature" {
		t.Errorf("%+v", p)
	}
	if saved, err := r.Save(); saved != nil || err != nil {
		t.Error("what has not changed is saved again", err)
	}
	if again.Load(saved[:len(saved)/2]) == nil {
		t.Error("half of it is taken")
	}
}
