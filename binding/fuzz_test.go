package binding_test

import (
	"errors"
	"log/slog"
	"slices"
	"testing"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/kme"
)

// Whatever a caller sends, a service that has no lot accepts nothing, says why, and does not touch its token: there is
// none, and a call would panic.
func FuzzEstablish(f *testing.F) {
	store := must[*sqlstore.Store](f)(sqlstore.Open(f.Context(), sqlstore.InFolder(f.TempDir()), kme.RandomSecret()))
	f.Cleanup(func() { store.Close() })
	service := binding.NewService(nil, store, new(binding.Lots), times(), slog.New(slog.DiscardHandler))
	const imsi = "001010000000001"
	attempt := func() string {
		return must[*binding.Prepared](f)(service.PrepareVector(f.Context(), imsi, newRANDs(1), here)).AttemptID
	}()

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
			id = attempt
		}
		e, err := service.EstablishKME(t.Context(), imsi, imei, id, payload, here, false)
		var r *binding.Refusal
		if e != nil || !errors.As(err, &r) || !slices.Contains(allowed, r.Reason) {
			t.Errorf("answer %v, error %v", e, err)
		}
	})
}
