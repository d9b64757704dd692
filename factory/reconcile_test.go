package factory

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/handover"
)

// Each case does one harm to a lot of which all agrees, and says what reconcile must make of it. What it repairs agrees
// afterwards, and no device gets another key by it; what it does not repair, it leaves alone.
func TestReconcile(t *testing.T) {
	line, dir, token := newLine(t)
	m := must(line.CreateLot(t.Context(), spec(t, "L1", 0, 30)))
	out := t.TempDir()
	folder := line.state.Dir
	line = keeping(line, out)
	reconcile := func(t *testing.T, repair bool) *Reconciliation {
		t.Helper()
		r, err := line.Reconcile(t.Context(), "L1", out, repair)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := reconcile(t, true); r.Pending != 8 || len(r.Differences) != 0 {
		t.Errorf("before anything is made: %+v", r)
	}
	removeObject(t, dir, directory.RevocationsPath("L1"))
	removeObject(t, folder, directory.RevocationsPath("L1")) // the line's copy
	if r := reconcile(t, true); len(r.Differences) != 1 || !r.Differences[0].Repaired ||
		must(line.Revocations(t.Context(), m)).Version != 1 {
		t.Errorf("killed before the list was published: %+v", r)
	}
	provision(t, line, out)
	if r := reconcile(t, false); r.Agreed != 8 || r.Pending != 0 || len(r.Differences) != 0 {
		t.Fatalf("%+v", r)
	}
	pkg, shard := filepath.Join(out, "L1", handover.InjectionFile(2)), filepath.Join(dir,
		filepath.FromSlash(directory.ShardPath("L1", 2)))
	revocations := filepath.Join(dir, filepath.FromSlash(directory.RevocationsPath("L1")))
	write := func(path string, data []byte) {
		t.Helper()
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	journal := func(query string, args ...any) {
		t.Helper()
		changeJournal(t, line, query, args...)
	}
	remove := func(path string) {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	whole, signed, hash := must(os.ReadFile(pkg)), must(os.ReadFile(shard)), must(line.reader.ReadShard(t.Context(),
		m, 2)).Package
	list := must(os.ReadFile(revocations))
	others := plant(t, m, 2, t.TempDir())
	forget := func() { journal("DELETE FROM shard WHERE number = 2") }
	plan := func() { journal("UPDATE shard SET state = 0 WHERE number = 2") }
	for name, c := range map[string]struct {
		harm    func()
		want    string
		safe    bool
		pending bool // after the repair the shard is to be made anew
	}{
		"journal lost": {forget, "the journal does not know", true, false},
		"killed after publishing": {func() {
			journal("UPDATE shard SET state = 1 WHERE number = 2")
		}, "the journal does not know", true, false},
		"the journal has another": {func() {
			journal("UPDATE shard SET package = x'00' WHERE number = 2")
		}, "the journal does not know", true, false},
		"the directory has lost it": {func() { remove(shard) }, "the directory has lost it", true, false},
		"killed before publishing": {func() {
			remove(shard)
			journal("UPDATE shard SET state = 1 WHERE number = 2")
		}, "it is made, and not published", true, false},
		"killed before the journal": {func() {
			remove(shard)
			plan()
		}, "it is made, and not published", true, false},
		"journal and directory lost": {func() {
			remove(shard)
			forget()
		}, "the journal does not know it", false, false},
		"planned, package of other keys": {func() {
			remove(shard)
			plan()
			write(pkg, must(os.ReadFile(others)))
		}, "the journal does not know it", false, false},
		"planned, cut": {func() {
			remove(shard)
			plan()
			write(pkg, whole[:99])
		}, "is damaged", true, true},
		"cut, journal lost": {func() {
			remove(shard)
			forget()
			write(pkg, whole[:99])
		}, "the journal does not know it", false, false},
		"package lost": {func() { remove(pkg) }, "is missing", false, false},
		"package cut": {func() {
			write(pkg, whole[:99])
		}, "its keys are published, and", false, false},
		"package of other keys": {func() {
			write(pkg, must(os.ReadFile(others)))
		}, "is not the package of the published keys", false, false},
		"package of other keys, lost": {func() {
			remove(shard)
			write(pkg, must(os.ReadFile(others)))
		}, "is not the package that the journal knows of", false, false},
		"both lost": {func() {
			remove(shard)
			remove(pkg)
		}, "the journal knows of its keys", false, false},
		"the directory's is changed": {func() { write(shard, bytes.ToUpper(signed)) }, "is refused", false, false},
		"the revocations are changed": {func() {
			write(revocations, must(os.ReadFile(shard)))
		}, "revocations is refused", true, false},
		"the revocations are gone": {func() { remove(revocations) }, "it is not there, and the copy", true,
			false},
		"the revocations are changed, and there is no copy": {func() {
			write(revocations, must(os.ReadFile(shard)))
			removeObject(t, folder, directory.RevocationsPath("L1"))
		}, "revocations is refused", false, false},
		"the revocations are gone, and there is no copy": {func() {
			remove(revocations)
			removeObject(t, folder, directory.RevocationsPath("L1"))
		}, "revocations is not there", false, false},
		"a file that a killed run left": {func() {
			write(filepath.Join(out, "L1", ".injection-000002.jsonl123"), nil)
		}, "left by a run that was killed", true, false},
		"a file that belongs to nothing": {func() {
			write(filepath.Join(out, "L1", "injection-000008.jsonl"), nil)
		}, "belongs to nothing", false, false},
		"a file of no name that we write": {func() {
			write(filepath.Join(out, "L1", "injection-2.jsonl"), nil)
		}, "belongs to nothing", false, false},
	} {
		t.Run(name, func(t *testing.T) {
			c.harm()
			for _, repair := range []bool{false, true} {
				r := reconcile(t, repair)
				if len(r.Differences) != 1 || !strings.Contains(r.Differences[0].What, c.want) ||
					r.Differences[0].Safe != c.safe || r.Differences[0].Repaired != (repair && c.safe) ||
					r.Differences[0].Remedy == "" {
					t.Fatalf("%+v, want %q", r, c.want)
				}
			}
			r := reconcile(t, true)
			switch {
			case c.pending && (r.Pending != 1 || r.Agreed != 7):
				t.Errorf("after the repair: %+v", r)
			case c.safe && !c.pending:
				if now := must(line.reader.ReadShard(t.Context(), m, 2)).Package; r.Agreed != 8 ||
					len(r.Differences) != 0 || !bytes.Equal(now, hash) || !bytes.Equal(must(os.ReadFile(pkg)), whole) {
					t.Errorf("after the repair: %+v", r)
				}
			case !c.safe && len(r.Differences) != 1:
				t.Errorf("it went away by itself: %+v", r)
			}
			for _, stray := range []string{"injection-000008.jsonl", "injection-2.jsonl"} {
				os.Remove(filepath.Join(out, "L1", stray))
			}
			write(revocations, list)
			write(pkg, whole)
			write(shard, signed)
			journal("INSERT OR REPLACE INTO shard (manufacturer, lot, number, state, package) VALUES (?, 'L1', "+
				"2, 3, ?)", line.Manufacturer(), hash)
			if r := reconcile(t, false); r.Agreed != 8 || len(r.Differences) != 0 {
				t.Fatalf("what was as before does not agree: %+v", r)
			}
		})
	}
	if err := token.RemoveLotKey(t.Context(), line.lotKey("L1")); err != nil {
		t.Fatal(err)
	}
	if r := reconcile(t, true); len(r.Differences) != 1 || !strings.Contains(r.Differences[0].What, "token") ||
		r.Open() != 1 {
		t.Errorf("a token without the lot's key: %+v", r)
	}
	if _, err := line.Reconcile(t.Context(), "L9", out, false); err == nil {
		t.Error("an unknown lot")
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := line.Reconcile(ended, "L1", out, false); err == nil {
		t.Error("an ended context was not heeded")
	}
}
