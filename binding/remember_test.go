package binding

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/binding/refusals"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/kme"
)

func imsi(t testing.TB, n int) kme.IMSI {
	t.Helper()
	return must.Get[kme.IMSI](t)(kme.ParseIMSI(fmt.Sprintf("00101%010d", n)))
}

// Calls of the network are remembered, with what the log has of them; those of an administrator are not.
func TestWhichRefusalsAreRemembered(t *testing.T) {
	r := new(refusals.Memory)
	s := NewService(Options{Times: DefaultTimes(), Log: slog.New(slog.NewJSONHandler(io.Discard, nil)), Refusals: r})
	ctx := WithActor(t.Context(), Actor{Client: "hss-1"})
	s.failed(ctx, "EstablishKME", imsi(t, 1), rejected(errors.New("signature")), "imei", "35209900000001", "origin",
		"mme1")
	p := r.Of(imsi(t, 1))
	if p == nil || p.Call != "EstablishKME" || p.Reason != kme.KMERejected || p.Cause != "signature" ||
		p.IMEI != "35209900000001" || p.Origin != "mme1" || p.Client != "hss-1" {
		t.Fatalf("%+v", p)
	}
	s.failed(ctx, "GetBinding", imsi(t, 1), refuse(kme.NotBound, "none", nil))
	s.Refused(ctx, refuse(kme.CallerNotAllowed, "no", nil), "imsi", imsi(t, 1), "call", "RevokeBinding")
	if p := r.Of(imsi(t, 1)); p.Reason != kme.KMERejected {
		t.Errorf("an administrator's call is remembered: %+v", p)
	}
	s.Refused(ctx, refuse(kme.CallerNotAllowed, "no", nil), "imsi", imsi(t, 1), "call", "PrepareVector")
	if p := r.Of(imsi(t, 1)); p.Reason != kme.CallerNotAllowed {
		t.Errorf("%+v", p)
	}
	s.Refused(ctx, refuse(kme.CallerNotAllowed, "no", nil), "path", "/metrics") // of no subscription
	err := r.Save(func(saved []byte) error {
		if strings.Count(string(saved), `"imsi"`) != 1 {
			t.Errorf("these are remembered: %s", saved)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
