package refusals

import (
	"bytes"
	"errors"
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
	away := errors.New("the disk is full")
	if err := r.Save(func([]byte) error { return away }); !errors.Is(err, away) {
		t.Error(err)
	}
	var saved []byte
	save := func(text []byte) error { saved = text; return nil }
	if err := r.Save(save); err != nil || saved == nil { // what was not written is tried again
		t.Fatal(err)
	}
	again := new(Memory)
	if err := again.Load(saved); err != nil {
		t.Fatal(err)
	}
	if p := again.Of(imsi(t, 1)); p == nil || p.Reason != kme.KMERejected || p.Cause != "signature" {
		t.Errorf("%+v", p)
	}
	if err := r.Save(func([]byte) error { return away }); err != nil {
		t.Error("what has not changed is saved again", err)
	}
	r.Put(Past{IMSI: imsi(t, 2), Time: now})
	must.Do(t, r.Save(func([]byte) error { r.Put(Past{IMSI: imsi(t, 3), Time: now}); return nil }))
	must.Do(t, r.Save(save)) // the one that came while it was saved
	if n := bytes.Count(saved, []byte(`"imsi"`)); n != 3 {
		t.Errorf("%d are saved", n)
	}
	if again.Load(saved[:len(saved)/2]) == nil {
		t.Error("half of it is taken")
	}
}
