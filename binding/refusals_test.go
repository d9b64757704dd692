package binding

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/kme"
)

func imsi(t testing.TB, n int) kme.IMSI {
	t.Helper()
	imsi, err := kme.ParseIMSI(fmt.Sprintf("00101%010d", n))
	if err != nil {
		t.Fatal(err)
	}
	return imsi
}

// However many subscriptions are refused, a bounded number is remembered: those that were refused last.
func TestRefusalsAreBounded(t *testing.T) {
	r := new(Refusals)
	for n := range 5 * maxRefusals {
		r.put(PastRefusal{IMSI: imsi(t, n), Reason: kme.NoAttempt})
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
	r, now := new(Refusals), time.Now().UTC()
	r.put(PastRefusal{IMSI: imsi(t, 1), Reason: kme.NoAttempt, Time: now})
	r.older, r.last = r.last, nil
	r.put(PastRefusal{IMSI: imsi(t, 1), Reason: kme.KMERejected, Time: now.Add(time.Second), Cause: "signature"})
	saved, err := r.Save()
	if err != nil {
		t.Fatal(err)
	}
	again := new(Refusals)
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

// Calls of the network are remembered, with what the log has of them; those of an administrator are not.
func TestWhichRefusalsAreRemembered(t *testing.T) {
	r := new(Refusals)
	s := NewService(Options{Times: DefaultTimes(), Log: slog.New(slog.NewJSONHandler(io.Discard, nil)), Refusals: r})
	ctx := WithActor(t.Context(), Actor{Client: "hss-1"})
	s.failed(ctx, "establish", imsi(t, 1), rejected(errors.New("signature")), "imei", "35209900000001", "origin",
		"mme1")
	p := r.Of(imsi(t, 1))
	if p == nil || p.Call != "establish" || p.Reason != kme.KMERejected || p.Cause != "signature" ||
		p.IMEI != "35209900000001" || p.Origin != "mme1" || p.Client != "hss-1" {
		t.Fatalf("%+v", p)
	}
	s.failed(ctx, "get", imsi(t, 1), refuse(kme.NotBound, "none", nil))
	s.Refused(ctx, refuse(kme.CallerNotAllowed, "no", nil), "imsi", imsi(t, 1), "call",
		"/kme.v1.KeyService/RevokeBinding")
	if p := r.Of(imsi(t, 1)); p.Reason != kme.KMERejected {
		t.Errorf("an administrator's call is remembered: %+v", p)
	}
	s.Refused(ctx, refuse(kme.CallerNotAllowed, "no", nil), "imsi", imsi(t, 1), "call",
		"/kme.v1.KeyService/PrepareVector")
	if p := r.Of(imsi(t, 1)); p.Reason != kme.CallerNotAllowed {
		t.Errorf("%+v", p)
	}
	s.Refused(ctx, refuse(kme.CallerNotAllowed, "no", nil), "call", "/metrics") // of no subscription
	if len(r.last) != 1 {
		t.Errorf("%d are remembered", len(r.last))
	}
}
