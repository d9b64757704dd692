package factory

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory/inspect"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/kme"
)

// A device that came back: a new key and package, the old key revoked; the same return again changes nothing, nor does
// a run that was killed after it had written the package cost the device a key.
func TestReissue(t *testing.T) {
	line, _, _ := newLine(t)
	m := must(line.CreateLot(t.Context(), spec(t, "L1", 0, 8)))
	out, imei := t.TempDir(), m.IMEI(5)
	if _, err := line.Reissue(t.Context(), "L1", imei, "return 1", "", out); err == nil ||
		!strings.Contains(err.Error(), "provision the lot") {
		t.Errorf("before the lot is provisioned: %v", err)
	}
	provision(t, line, out)
	reissue := func(reason, name string) handover.InjectionLine {
		t.Helper()
		path, err := line.Reissue(t.Context(), "L1", imei, reason, "", out)
		if err != nil || path != filepath.Join(out, "L1", name) {
			t.Fatal(path, err)
		}
		issued, _, err := handover.ReadReissue(path, "L1", imei)
		if err != nil {
			t.Fatal(err)
		}
		d := must(directory.NewReader(line.store, line.verifier, directory.ReaderOptions{}).Device(t.Context(), m,
			imei))
		if d.Revoked != nil ||
			(directory.DeviceKey{IMEI: imei, Key: d.Key}).Fingerprint() != issued.PublicKey.Fingerprint() {
			t.Errorf("the directory has %+v", d)
		}
		return issued
	}
	first := reissue("return 1", "reissue-35209900000005-1.jsonl")
	if again := reissue("return 1", "reissue-35209900000005-1.jsonl"); again.PublicKey.Fingerprint() !=
		first.PublicKey.Fingerprint() {
		t.Error("the same return made another key")
	}
	copied := filepath.Join(out, "L1", handover.ReissueFile(imei, 2))
	if err := os.WriteFile(copied, must(os.ReadFile(filepath.Join(out, "L1", handover.ReissueFile(imei, 1)))),
		0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := line.Reissue(t.Context(), "L1", imei, "return 2", "", out); err == nil ||
		!strings.Contains(err.Error(), "has not made") {
		t.Errorf("a copy of the first package as the second: %v", err)
	}
	if err := os.Remove(copied); err != nil {
		t.Fatal(err)
	}
	j := must(line.state.journal(t.Context(), line.Manufacturer()))
	defer j.Close()
	killed, _, err := line.makeReissue(t.Context(), j, m, 5, "",
		filepath.Join(out, "L1", handover.ReissueFile(imei, 2)))
	if err != nil {
		t.Fatal(err)
	}
	if second := reissue("return 2", "reissue-35209900000005-2.jsonl"); second.PublicKey.Fingerprint() !=
		killed.PublicKey.Fingerprint() {
		t.Error("a package that was there was not used")
	}
	v, err := inspect.Lot(t.Context(), line.guard.Store, line.verifier, "L1", out, nil)
	if err != nil || !v.OK() || v.Packages != 4 || v.Revoked != 2 {
		t.Errorf("%+v, %v", v, err)
	}
	if err := os.Rename(filepath.Join(out, "L1", handover.ReissueFile(imei, 1)),
		filepath.Join(out, "L1", handover.ReissueFile(imei, 2))); err != nil {
		t.Fatal(err)
	}
	v, err = inspect.Lot(t.Context(), line.guard.Store, line.verifier, "L1", out, nil)
	if err != nil || len(v.Problems) != 2 {
		t.Errorf("%+v, %v", v, err)
	}
	// What the line would never sign: another key than that of the package.
	other := m.IMEI(6)
	_, hash, err := line.makeReissue(t.Context(), j, m, 6, "",
		filepath.Join(out, "L1", handover.ReissueFile(other, 1)))
	key := directory.DeviceKey{IMEI: other, Key: &must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)).PublicKey}
	if err := errors.Join(err, directory.Reissue(t.Context(), line.store, line.signer, m, key, hash, "x",
		time.Now())); err != nil {
		t.Fatal(err)
	}
	v, err = inspect.Lot(t.Context(), line.guard.Store, line.verifier, "L1", out, nil)
	if err != nil || len(v.Problems) != 3 ||
		!strings.Contains(v.Problems[2], "is not the package of the published key") {
		t.Errorf("%+v, %v", v, err)
	}
	for name, err := range map[string]error{
		"a damaged package": second(line.Reissue(t.Context(), "L1", m.IMEI(0), "r", "", damaged(t, m, out))),
		"no reason":         second(line.Reissue(t.Context(), "L1", imei, " ", "", out)),
		"no such lot":       second(line.Reissue(t.Context(), "L9", imei, "r", "", out)),
	} {
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// killing is a store that a run is killed before it has written a path of.
type killing struct {
	directory.Store
	path string
}

func (k killing) Update(ctx context.Context, path string, data []byte, version string) error {
	if path == k.path {
		return errors.New("killed")
	}
	return k.Store.Update(ctx, path, data, version)
}

// A run of lot reissue that was killed between a part and the list is finished by the next one with its reason, also
// when the device has got another key since.
func TestReissueKilled(t *testing.T) {
	line, _, _ := newLine(t)
	ctx, out := t.Context(), t.TempDir()
	must(line.CreateLot(ctx, spec(t, "L1", 0, 8)))
	provision(t, line, out)
	m := must(line.Lot(ctx, "L1"))
	reissue := func(reason string) (string, error) { return line.Reissue(ctx, "L1", m.IMEI(5), reason, "", out) }
	problems := func() []string {
		t.Helper()
		return must(inspect.Lot(ctx, line.store, line.verifier, "L1", out, nil)).Problems
	}
	for _, reason := range []string{"return 1", "return 2"} {
		whole := line.store
		line.store = killing{Store: whole, path: directory.RevocationsPath("L1")}
		if _, err := reissue(reason); err == nil {
			t.Fatal("it was not killed")
		}
		line.store = whole
		if len(problems()) == 0 {
			t.Fatal("nothing was left to be done")
		}
		for _, again := range []string{"return 1", reason} { // the first one of the part finishes the other's, too
			if _, err := reissue(again); err != nil || len(problems()) > 0 {
				t.Errorf("%s, killed; %s: %v, %q", reason, again, err, problems())
			}
		}
	}
	if h := must(line.reader.History(ctx, m, m.IMEI(5))); len(h) != 2 {
		t.Errorf("%d keys, want one for each return: %+v", len(h), h)
	}
}

// A run of lot revoke that was killed between a part and the list is found by verify and reconcile, and finished by
// repair. So are parts that the store has put back, or made up.
func TestRevocationsReconciled(t *testing.T) {
	line, dir, _ := newLine(t)
	ctx, out := t.Context(), t.TempDir()
	must(line.CreateLot(ctx, spec(t, "L1", 0, 8)))
	provision(t, line, out)
	m := must(line.Lot(ctx, "L1"))
	revoke := func(i int) error { return line.Revoke(ctx, "L1", []kme.IMEI{m.IMEI(i)}, "stolen", nil) }
	problems := func() string {
		t.Helper()
		return strings.Join(must(inspect.Lot(ctx, line.guard.Store, line.verifier, "L1", out, nil)).Problems, "\n")
	}
	reconcile := func(repair bool) *Reconciliation {
		t.Helper()
		return must(keeping(line, out).Reconcile(ctx, "L1", out, repair))
	}
	if err := revoke(1); err != nil {
		t.Fatal(err)
	}
	part := filepath.Join(dir, filepath.FromSlash(directory.RevocationPartPath("L1", 0)))
	first := must(os.ReadFile(part))
	files := line.store
	line.store = killing{files, directory.RevocationsPath("L1")}
	if err := revoke(2); err == nil {
		t.Fatal("not killed")
	}
	line.store = files
	if p := problems(); !strings.Contains(p, "does not name it yet") {
		t.Error(p)
	}
	if r := reconcile(false); len(r.Differences) != 1 || !r.Differences[0].Safe || r.Open() != 1 {
		t.Errorf("%+v", r)
	}
	if r := reconcile(true); r.Open() != 0 {
		t.Errorf("%+v", r)
	}
	if p, r := problems(), reconcile(false); p != "" || len(r.Differences) != 0 {
		t.Errorf("%s %+v", p, r)
	}
	if d, err := directory.NewReader(files, line.verifier, directory.ReaderOptions{}).Device(ctx, m,
		m.IMEI(2)); err != nil || d.Revoked == nil {
		t.Errorf("%+v, %v", d, err)
	}
	// The store goes back to the first part, and the line has no copy.
	removeObject(t, line.state.Dir, directory.RevocationPartPath("L1", 0))
	if err := errors.Join(os.WriteFile(part, first, 0o600), os.WriteFile(filepath.Join(filepath.Dir(part), "x"), nil,
		0o600)); err != nil {
		t.Fatal(err)
	}
	if p := problems(); !strings.Contains(p, "ask whoever runs the store why") || !strings.Contains(p, "no such part") {
		t.Error(p)
	}
	if r := reconcile(true); r.Open() != 1 || r.Differences[0].Safe ||
		!strings.Contains(r.Differences[0].Remedy, "backup") {
		t.Errorf("%+v", r)
	}
}

// Whoever revokes devices is told what that means, and repeats the name of what it is about. What is revoked has
// nothing to lose, and a device of another lot ends it before anything is asked.
func TestRevocationLoss(t *testing.T) {
	line, _, _ := newLine(t)
	m := must(line.CreateLot(t.Context(), spec(t, "L1", 0, 8)))
	other := must(line.CreateLot(t.Context(), spec(t, "L2", 100, 8)))
	for name, c := range map[string]struct {
		imeis       []kme.IMEI
		named, says string
	}{
		"the lot":     {nil, "L1", "All 8 devices of lot L1, for good"},
		"a device":    {[]kme.IMEI{m.IMEI(3)}, m.IMEI(3).String(), "1 of the 8 devices of lot L1"},
		"two devices": {[]kme.IMEI{m.IMEI(3), m.IMEI(4)}, "L1", "2 of the 8 devices of lot L1"},
	} {
		loss, err := line.RevocationLoss(t.Context(), "L1", c.imeis)
		if err != nil || loss == nil || loss.Name != c.named || !strings.HasPrefix(loss.Says, c.says) {
			t.Errorf("%s: %+v, %v", name, loss, err)
		}
	}
	if loss, err := line.RevocationLoss(t.Context(), "L1", []kme.IMEI{m.IMEI(3), other.IMEI(0)}); err == nil ||
		!strings.Contains(err.Error(), other.IMEI(0).String()+" is not in lot L1") {
		t.Errorf("a device of another lot: %+v, %v", loss, err)
	}
	if err := line.Revoke(t.Context(), "L1", []kme.IMEI{m.IMEI(3)}, "stolen", nil); err != nil {
		t.Fatal(err)
	}
	if loss, err := line.RevocationLoss(t.Context(), "L1", []kme.IMEI{m.IMEI(3)}); loss != nil || err != nil {
		t.Errorf("a device that is revoked: %+v, %v", loss, err)
	}
	if loss, err := line.RevocationLoss(t.Context(), "L1", []kme.IMEI{m.IMEI(3), m.IMEI(4)}); err != nil ||
		loss == nil || loss.Name != m.IMEI(4).String() || !strings.HasPrefix(loss.Says, "1 of the 8 devices") {
		t.Errorf("a device that is revoked and another: %+v, %v", loss, err)
	}
	if err := line.RevokeLot(t.Context(), "L1", "stolen"); err != nil {
		t.Fatal(err)
	}
	if loss, err := line.RevocationLoss(t.Context(), "L1", []kme.IMEI{m.IMEI(3)}); loss != nil || err != nil {
		t.Errorf("in a lot that is revoked: %+v, %v", loss, err)
	}
}
