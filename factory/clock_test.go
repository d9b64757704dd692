package factory

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory/auditlog"
	"github.com/kmehsm/kmehsm/factory/inspect"
	"github.com/kmehsm/kmehsm/kme"
)

// The clock is set back by a day in the middle of a lot: here, as what was written before, dated a day too late.
// Nothing of the line rests on the order of two times of day, so all goes on.
func TestClockSetBack(t *testing.T) {
	ctx := t.Context()
	line, _, token := newLine(t)
	if _, err := line.CreateLot(ctx, spec(t, "L1", 0, 20)); err != nil {
		t.Fatal(err)
	}
	m := must(line.Lot(ctx, "L1"))
	out, state := t.TempDir(), line.state
	if _, err := line.Provision(ctx, "L1", ProvisionOptions{Out: out, Workers: 2, From: 0, To: 2}); err != nil {
		t.Fatal(err)
	}
	tomorrow := time.Now().Add(24 * time.Hour)
	if err := directory.Revoke(ctx, line.store, line.signer, m, []kme.IMEI{m.IMEI(2)}, "stolen", tomorrow,
		nil); err != nil {
		t.Fatal(err)
	}
	if err := filepath.WalkDir(out, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Chtimes(path, tomorrow, tomorrow)
	}); err != nil {
		t.Fatal(err)
	}
	dated, err := json.Marshal(auditlog.Entry{Seq: 1, Time: tomorrow, Who: "a@b", Process: 1,
		Command: []string{"factory"}, Result: auditlog.Begun, Previous: fmt.Sprintf("%x", sha256.Sum256(nil))})
	if err == nil {
		err = os.WriteFile(state.path("log.jsonl"), append(dated, '\n'), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}

	if p, err := line.Provision(ctx, "L1", ProvisionOptions{Out: out, Workers: 2}); err != nil || p.Made != 12 {
		t.Errorf("%+v, %v", p, err)
	}
	if _, err := line.Reissue(ctx, "L1", m.IMEI(2), "found again", "", out); err != nil {
		t.Error(err)
	}
	if v, err := inspect.Lot(ctx, line.store, line.verifier, "L1", out, nil); err != nil || !v.OK() {
		t.Errorf("%+v, %v", v, err)
	}
	if r, err := line.Reconcile(ctx, "L1", out, false); err != nil || r.Open() != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	head, err := state.Log().Append([]string{"factory"}, token.Serial(), auditlog.Done)
	if err == nil {
		err = state.SignLog(token, head)
	}
	if err != nil {
		t.Fatal(err)
	}
	if r, err := state.Log().Verify(line.verifier); err != nil || r.Lines != 2 || r.Signed != 2 {
		t.Errorf("%+v, %v", r, err)
	}
}
