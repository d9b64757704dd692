package api

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"testing"

	"connectrpc.com/connect"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/kme"
)

// Whatever comes as IMSI, IMEI, attempt and payload is refused before the HSM where there is no such device: the
// service has none, and a call would panic.
func FuzzEstablish(f *testing.F) {
	store, err := sqlstore.Open(f.Context(), sqlstore.InFolder(f.TempDir()), kme.RandomSecret())
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { store.Close() })
	s := &server{service: binding.NewService(binding.Options{Store: store, Times: binding.DefaultTimes(),
		Log: slog.New(slog.DiscardHandler)})}
	anybody := &caller{client: &Client{Roles: []Role{RoleHSS}, ProvisionFrom: []string{anywhere}}}
	as := func(ctx context.Context) context.Context { return context.WithValue(ctx, callerKey{}, anybody) }
	const imsi = "001010000000001"
	prepared, err := s.PrepareVector(as(f.Context()),
		connect.NewRequest(&kmev1.PrepareVectorRequest{Imsi: imsi, Rands: [][]byte{make([]byte, 16)}}))
	if err != nil {
		f.Fatal(err)
	}

	f.Add(imsi, "35209900000001", "", make([]byte, 256))
	f.Add(imsi, "352099000000014", "@", make([]byte, 384))
	f.Add(imsi, "3520990000000199", "@", []byte(nil))
	f.Add("", "", "", []byte{})
	f.Add("00101", "35209900000001", "@", []byte{0})
	f.Add("0010100000000011", "352099000000011", "\x00", []byte{0xff})
	f.Add("001010000000\x00", "٣٥٢٠٩٩٠", "' OR 1=1 --", []byte{1})
	allowed := []kme.Reason{kme.Malformed, kme.NoAttempt, kme.UnknownDevice}
	f.Fuzz(func(t *testing.T, imsi, imei, id string, payload []byte) {
		if id == "@" { // stands for an attempt that is open
			id = prepared.Msg.AttemptId
		}
		e, err := s.EstablishKME(as(t.Context()),
			connect.NewRequest(&kmev1.EstablishKMERequest{Imsi: imsi, Imei: imei, AttemptId: id, Payload: payload}))
		var r *binding.Refusal
		if e != nil || !errors.As(err, &r) || !slices.Contains(allowed, r.Reason) {
			t.Errorf("answer %v, error %v", e, err)
		}
	})
}
