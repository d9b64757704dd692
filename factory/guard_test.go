package factory

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/kme"
)

// Whoever runs the directory puts an earlier list of revoked devices back, with its parts, or takes all of them away.
// The line signs nothing that rests on it, grants nothing, and puts back what it has published.
func TestRevocationsPutBack(t *testing.T) {
	line, dir, token := newLine(t)
	ctx, out := t.Context(), t.TempDir()
	m := must(line.CreateLot(ctx, spec(t, "L1", 0, 8)))
	must(line.CreateLot(ctx, spec(t, "L2", 100, 8)))
	provision(t, line, out)
	anew := func() { // another command of the same line
		t.Helper()
		line = must(NewLine(token, line.guard.Store, line.state))
	}
	revoke := func(i int) error { return line.Revoke(ctx, "L1", []kme.IMEI{m.IMEI(i)}, "stolen", nil) }
	revoked := func(i int) bool {
		t.Helper()
		r := directory.NewReader(line.guard.Store, line.verifier, directory.ReaderOptions{}) // an operator's
		return must(r.Device(ctx, m, m.IMEI(i))).Revoked != nil
	}
	must(line.Refresh(ctx, "L2", 0, false)) // so that it has a later version than L1's
	must(line.Refresh(ctx, "L2", 0, false))
	if err := revoke(1); err != nil {
		t.Fatal(err)
	}
	earlier := t.TempDir()
	if err := os.CopyFS(earlier, os.DirFS(filepath.Join(dir, "lots", "L1"))); err != nil {
		t.Fatal(err)
	}
	if err := revoke(2); err != nil {
		t.Fatal(err)
	}
	list, part := filepath.Join("lots", "L1", "revocations"), filepath.Join("lots", "L1", "revoked", "000000")
	// A process was killed while it wrote a copy.
	if err := os.WriteFile(filepath.Join(line.state.Dir, filepath.Dir(part), ".00000012345"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	put := func(path, from string) error {
		return os.WriteFile(filepath.Join(dir, path), must(os.ReadFile(from)), 0o600)
	}
	for name, attack := range map[string]func() error{
		"an earlier list and part": func() error {
			return errors.Join(put(list, filepath.Join(earlier, "revocations")),
				put(part, filepath.Join(earlier, "revoked", "000000")))
		},
		"no list and no part": func() error {
			return errors.Join(os.Remove(filepath.Join(dir, list)), os.Remove(filepath.Join(dir, part)))
		},
		"the list of another lot": func() error { return put(list, filepath.Join(dir, "lots", "L2", "revocations")) },
		"no object of ours":       func() error { return nil },
		"no list at all":          func() error { return os.WriteFile(filepath.Join(dir, list), nil, 0o600) },
	} {
		if err := attack(); err != nil {
			t.Fatal(err)
		}
		anew()
		if name == "no object of ours" {
			line.guard.Store = &foreign{Store: line.guard.Store, path: directory.RevocationsPath("L1")}
			line.store = line.guard
		}
		for what, err := range map[string]error{
			"refresh":   second(line.Refresh(ctx, "L1", 0, false)),
			"begin":     second(line.Refresh(ctx, "L1", 0, true)),
			"revoke":    revoke(3),
			"create":    second(line.CreateLot(ctx, spec(t, "L1", 0, 8))),
			"provision": second(line.Provision(ctx, "L1", ProvisionOptions{Out: out})),
			"grant":     line.Grant(ctx, "L1", "op", func([]byte) error { return nil }),
		} {
			if err == nil || what != "create" && !errors.As(err, new(*directory.RefusedError)) {
				t.Errorf("%s, and %s: %v", name, what, err)
			}
		}
		if r := must(line.Reconcile(ctx, "L1", out, true)); len(r.Differences) == 0 || r.Open() != 0 {
			t.Errorf("%s: %+v", name, r)
		}
		if r := must(line.Reconcile(ctx, "L1", out, false)); len(r.Differences) != 0 {
			t.Errorf("%s, put back: %+v", name, r)
		}
		if !revoked(1) || !revoked(2) || revoked(3) {
			t.Errorf("%s, put back: other devices are revoked than were", name)
		}
	}
	if l, err := line.Refresh(ctx, "L1", 0, false); err != nil || l.Version != 4 {
		t.Errorf("%+v, %v", l, err)
	}
	// A lot is revoked for good.
	if err := errors.Join(line.RevokeLot(ctx, "L1", "its key has leaked"),
		put(list, filepath.Join(earlier, "revocations"))); err != nil {
		t.Fatal(err)
	}
	anew()
	if _, err := line.Reissue(ctx, "L1", m.IMEI(4), "return", "", out); !errors.As(err,
		new(*directory.RefusedError)) {
		t.Error(err)
	}
}

// foreign is a store that has something else than an object at a path, until that is replaced.
type foreign struct {
	directory.Store
	path string
}

func (f *foreign) Read(ctx context.Context, path string) ([]byte, string, error) {
	jws, version, err := f.Store.Read(ctx, path)
	if path == f.path {
		return nil, version, &directory.RefusedError{Object: path, Reason: "it is no object of ours"}
	}
	return jws, version, err
}

func (f *foreign) Update(ctx context.Context, path string, jws []byte, version string) error {
	err := f.Store.Update(ctx, path, jws, version)
	if err == nil && path == f.path {
		f.path = ""
	}
	return err
}

// What another line has published meanwhile is later than this line's copy.
func TestTwoLinesRevoke(t *testing.T) {
	line, _, token := newLine(t)
	ctx := t.Context()
	m := must(line.CreateLot(ctx, spec(t, "L1", 0, 8)))
	other := must(NewLine(token, line.guard.Store, State{Dir: t.TempDir()}))
	for i, l := range []*Line{other, line, other, line} {
		if err := l.Revoke(ctx, "L1", []kme.IMEI{m.IMEI(i)}, "stolen", nil); err != nil {
			t.Fatal(err)
		}
	}
}

// during is a store in which something happens while the list of revoked devices is read: what the reader gets is of
// before.
type during struct {
	directory.Store
	path string
	once func()
}

func (d *during) Read(ctx context.Context, path string) ([]byte, string, error) {
	jws, version, err := d.Store.Read(ctx, path)
	if path == d.path && d.once != nil {
		once := d.once
		d.once = nil
		once()
	}
	return jws, version, err
}

// Two commands of one line, with one folder, revoke devices at the same time: neither takes the other's list for an
// attack.
func TestRevokeAtTheSameTime(t *testing.T) {
	line, _, token := newLine(t)
	ctx := t.Context()
	m := must(line.CreateLot(ctx, spec(t, "L1", 0, 8)))
	provision(t, line, t.TempDir())
	revoke := func(l *Line, i int) error { return l.Revoke(ctx, "L1", []kme.IMEI{m.IMEI(i)}, "stolen", nil) }
	slow := &during{Store: line.guard.Store, path: directory.RevocationsPath("L1")}
	slow.once = func() {
		if err := revoke(line, 0); err != nil {
			t.Error(err)
		}
	}
	if err := revoke(must(NewLine(token, slow, line.state)), 1); err != nil {
		t.Error(err)
	}
	for i := range 3 {
		if got := must(line.reader.Device(ctx, m, m.IMEI(i))).Revoked != nil; got != (i < 2) {
			t.Errorf("device %d: revoked is %t", i, got)
		}
	}
}

// deleted is a store in which an object was deleted that was published: it cannot be created.
type deleted struct {
	directory.Store
	path string
}

func (d deleted) Create(ctx context.Context, path string, data []byte) error {
	if path == d.path {
		return errors.New("undelete it")
	}
	return d.Store.Create(ctx, path, data)
}

// What cannot be repaired keeps nothing else from it.
func TestRepairGoesOn(t *testing.T) {
	line, dir, _ := newLine(t)
	ctx, out := t.Context(), t.TempDir()
	must(line.CreateLot(ctx, spec(t, "L1", 0, 12)))
	provision(t, line, out)
	for _, n := range []int{0, 2} {
		removeObject(t, dir, directory.ShardPath("L1", n))
	}
	line.store = deleted{Store: line.store, path: directory.ShardPath("L1", 0)}
	r := must(keeping(line, out).Reconcile(ctx, "L1", out, true))
	if r.Agreed != 1 || len(r.Differences) != 2 || r.Open() != 1 || r.Differences[0].Remedy != "undelete it" ||
		r.Differences[0].Safe || !r.Differences[1].Repaired {
		t.Errorf("%+v", r)
	}
}
