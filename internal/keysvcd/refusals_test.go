package keysvcd

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/binding/refusals"
	"github.com/kmehsm/kmehsm/internal/keysvcd/operator"
	"github.com/kmehsm/kmehsm/internal/keysvcd/settings"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// What could not be written down is written when it can be, without another refusal.
func TestRefusalsAreSavedLater(t *testing.T) {
	state, log, r := filepath.Join(t.TempDir(), "away"), new(testproc.Log), new(refusals.Memory)
	imsi := must.Get[kme.IMSI](t)(kme.ParseIMSI("001010123456789"))
	r.Put(refusals.Past{IMSI: imsi, Reason: kme.NoAttempt})
	d := &daemon{live: &live{started: &settings.Config{State: state}, log: slog.New(slog.NewJSONHandler(log, nil))}}
	stop := d.keepRefusals(t.Context(), r)
	testproc.Await(t, "a failure", func() bool { return strings.Contains(log.String(), "were not written down") })
	must.Do(t, os.Mkdir(state, 0o700))
	stop()
	if saved := must.Get[*refusals.Memory](t)(operator.ReadRefusals(state)); saved.Of(imsi) == nil {
		t.Errorf("nothing is saved; the log: %s", log)
	}
}
