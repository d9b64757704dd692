package factory

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory/shard"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/kme"
)

func options(out string, workers int) ProvisionOptions {
	return ProvisionOptions{Out: out, Workers: workers}
}

// keeping is the line with its state beside the packages.
func keeping(line *Line, out string) *Line {
	l := *line
	l.state = State{Dir: filepath.Join(out, "state")}
	return &l
}

// changeJournal does to a line's journal what no run does.
func changeJournal(t *testing.T, line *Line, query string, args ...any) {
	t.Helper()
	db := must(sql.Open("sqlite3", line.state.path("journal.db")))
	_, err := db.ExecContext(t.Context(), query, args...)
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
}

func provision(t *testing.T, line *Line, out string) Progress {
	t.Helper()
	p, err := keeping(line, out).Provision(t.Context(), "L1", options(out, 3))
	if err != nil {
		t.Fatal(err)
	}
	if p.Done != p.Total {
		t.Errorf("%+v", p)
	}
	return p
}

// checkLot compares what is published with the injection packages, device by device.
func checkLot(t *testing.T, line *Line, out string) {
	t.Helper()
	m, err := line.Lot(t.Context(), "L1")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[kme.IMEI]bool{}
	j := must(keeping(line, out).state.journal(t.Context(), line.Manufacturer()))
	entries, err := j.Entries(t.Context(), "L1")
	if err := errors.Join(err, j.Close()); err != nil {
		t.Fatal(err)
	}
	for n := range m.Shards() {
		if entries[n].State != shard.Acknowledged {
			t.Errorf("shard %d: the journal has %+v", n, entries[n])
		}
		published, err := line.reader.ReadShard(t.Context(), m, n)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(out, "L1", handover.InjectionFile(n))
		lines, packed, err := handover.ReadPackage(m, n, path)
		if err != nil {
			t.Fatal(err)
		}
		hash := sha256.Sum256(must(os.ReadFile(path)))
		if !packed.Equal(published) || !bytes.Equal(published.Package, hash[:]) ||
			!bytes.Equal(entries[n].Package, hash[:]) {
			t.Errorf("shard %d: package, directory and journal differ", n)
		}
		for _, l := range lines {
			if seen[l.IMEI] {
				t.Errorf("%s twice", l.IMEI)
			}
			seen[l.IMEI] = true
		}
	}
	if len(seen) != m.Devices() {
		t.Errorf("%d devices, want %d", len(seen), m.Devices())
	}
}

func TestProvision(t *testing.T) {
	line, dir, _ := newLine(t)
	if _, err := line.CreateLot(t.Context(), spec(t, "L1", 0, 30)); err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	var reports []Progress
	o := options(out, 3)
	o.Report = func(p Progress) { reports = append(reports, p) }
	p, err := keeping(line, out).Provision(t.Context(), "L1", o)
	if err != nil || p.Total != 30 || p.Generated != 30 || p.Done != 30 || p.Made != 30 || len(reports) != 16 ||
		reports[15] != p {
		t.Fatal(p, reports, err)
	}
	if p.HSM <= 0 || p.HSM > 1 || p.Publish <= 0 || p.Publish > 1 {
		t.Errorf("shares %+v", p)
	}
	checkLot(t, line, out)
	if p := provision(t, line, out); p.Made != 0 {
		t.Errorf("a second run made %d keys", p.Made)
	}
	for _, path := range []string{"L1/" + handover.InjectionFile(0), "L1/" + handover.ManifestFile} {
		if info, err := os.Stat(filepath.Join(out, path)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", path, info, err)
		}
	}

	pkg := func(n int) string { return filepath.Join(out, "L1", handover.InjectionFile(n)) }
	object := func(n int) string {
		return filepath.Join(dir, filepath.FromSlash(directory.ShardPath("L1", n)))
	}
	read := func(path string) []byte {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	refused := func(t *testing.T, want string) {
		t.Helper()
		p, err := keeping(line, out).Provision(t.Context(), "L1", options(out, 1))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %q", err, want)
		}
		if p.Made != 0 {
			t.Errorf("%d keys were made", p.Made)
		}
	}
	// Each case harms a file, expects a refusal, and puts back what was there.
	harm := func(t *testing.T, path, want string, change func([]byte) []byte) {
		t.Helper()
		was := read(path)
		if now := change(bytes.Clone(was)); now == nil {
			os.Remove(path)
		} else if err := os.WriteFile(path, now, 0o600); err != nil {
			t.Fatal(err)
		}
		refused(t, want)
		if err := os.WriteFile(path, was, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	truncate := func(b []byte) []byte { return b[:len(b)/2] }
	flip := func(b []byte) []byte { b[len(b)/2] ^= 1; return b }
	remove := func([]byte) []byte { return nil }

	t.Run("published, package lost", func(t *testing.T) { harm(t, pkg(2), "bring it back", remove) })
	t.Run("published, package truncated", func(t *testing.T) { harm(t, pkg(2), "damaged", truncate) })
	t.Run("published, package of another shard", func(t *testing.T) {
		harm(t, pkg(2), "not of this lot and shard", func([]byte) []byte { return read(pkg(3)) })
	})
	t.Run("published, package of another lot", func(t *testing.T) {
		harm(t, pkg(2), "not of this lot and shard", func(b []byte) []byte {
			return bytes.Replace(b, []byte(`"lot":"L1"`), []byte(`"lot":"L2"`), 1)
		})
	})
	t.Run("shard tampered with", func(t *testing.T) { harm(t, object(2), "refused", flip) })
	t.Run("shard truncated", func(t *testing.T) { harm(t, object(2), "refused", truncate) })
	t.Run("another shard in its place", func(t *testing.T) {
		harm(t, object(2), "it is shard 3", func([]byte) []byte { return read(object(3)) })
	})
	t.Run("manifest tampered with", func(t *testing.T) {
		harm(t, filepath.Join(dir, "lots", "L1", "manifest"), "refused", flip)
	})
	checkLot(t, line, out)

	forget := func() { // as on a machine that has lost its journal
		if err := os.RemoveAll(filepath.Join(out, "state")); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("lost by the directory", func(t *testing.T) {
		was := read(pkg(5))
		os.Remove(object(5))
		if p := provision(t, line, out); p.Made != 0 || !bytes.Equal(read(pkg(5)), was) {
			t.Errorf("a whole package was not published as it is: %+v", p)
		}
		checkLot(t, line, out)
	})
	t.Run("lost by the directory, package lost", func(t *testing.T) {
		signed := read(object(5))
		os.Remove(object(5))
		harm(t, pkg(5), "the journal knows of its keys", remove)
		harm(t, pkg(5), "the journal knows of its keys", truncate)
		if err := os.WriteFile(object(5), signed, 0o644); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("journal lost", func(t *testing.T) {
		forget()
		if p := provision(t, line, out); p.Made != 0 || p.Done != 30 {
			t.Errorf("%+v", p)
		}
		checkLot(t, line, out)
	})
	t.Run("journal lost, nothing published, no package", func(t *testing.T) {
		forget()
		os.Remove(object(5))
		os.Remove(pkg(5))
		if p := provision(t, line, out); p.Made != 4 {
			t.Errorf("%+v", p)
		}
		checkLot(t, line, out)
	})
	t.Run("journal lost, not published, package damaged", func(t *testing.T) {
		forget()
		signed := read(object(5))
		os.Remove(object(5))
		harm(t, pkg(5), "move it away", truncate)
		if err := os.WriteFile(object(5), signed, 0o644); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("planned, package damaged", func(t *testing.T) {
		provision(t, line, out)
		changeJournal(t, keeping(line, out), "UPDATE shard SET state = ?, package = NULL WHERE number = 5",
			shard.Planned)
		os.Remove(object(5))
		if err := os.WriteFile(pkg(5), truncate(read(pkg(5))), 0o600); err != nil {
			t.Fatal(err)
		}
		if p := provision(t, line, out); p.Made != 4 {
			t.Errorf("%+v", p)
		}
		checkLot(t, line, out)
	})
	t.Run("keys swapped after publication", func(t *testing.T) {
		other := plant(t, must(line.Lot(t.Context(), "L1")), 1, t.TempDir())
		harm(t, pkg(1), "is not the package of the published keys", func([]byte) []byte { return read(other) })
	})
	t.Run("the journal has another package", func(t *testing.T) {
		changeJournal(t, keeping(line, out), "UPDATE shard SET package = x'00' WHERE number = 5")
		refused(t, "factory reconcile L1 --repair")
		must(keeping(line, out).Reconcile(t.Context(), "L1", out, true))
		provision(t, line, out)
		checkLot(t, line, out)
	})
	t.Run("folder not writable", func(t *testing.T) {
		if _, err := line.Provision(t.Context(), "L1", options("/dev/null/x", 1)); err == nil ||
			!strings.Contains(err.Error(), "cannot be made") {
			t.Error(err)
		}
	})
	t.Run("unknown lot", func(t *testing.T) {
		if _, err := line.Provision(t.Context(), "L9", options(out, 1)); err == nil ||
			!strings.Contains(err.Error(), "lot create") {
			t.Error(err)
		}
	})
}

// An interrupted run finishes what it has begun, and the next goes on. It removes what a killed run was writing.
func TestProvisionInterrupted(t *testing.T) {
	line, _, _ := newLine(t)
	if _, err := line.CreateLot(t.Context(), spec(t, "L1", 0, 40)); err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	o := options(out, 2)
	o.Report = func(Progress) { cancel() }
	first, err := keeping(line, out).Provision(ctx, "L1", o)
	if !errors.Is(err, ErrInterrupted) || first.Made == 0 || first.Done == first.Total {
		t.Fatal(first, err)
	}
	for _, left := range []string{".injection-000002.jsonl123", ".manifest.jws123"} {
		if err := os.WriteFile(filepath.Join(out, "L1", left), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if second := provision(t, line, out); first.Made+second.Made != 40 {
		t.Errorf("%+v and then %+v", first, second)
	}
	checkLot(t, line, out)
	if r, err := keeping(line, out).Reconcile(t.Context(), "L1", out, false); err != nil || len(r.Differences) > 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

// failing is a token that fails after some devices.
type failing struct {
	Token
	left int
}

func (f *failing) MakeDeviceKey(ctx context.Context, s kme.Suite, k hsmkeys.Key) (crypto.PublicKey, []byte, error) {
	if f.left--; f.left < 0 {
		return nil, nil, errors.New("the token has gone")
	}
	return f.Token.MakeDeviceKey(ctx, s, k)
}

func TestProvisionTokenFails(t *testing.T) {
	line, _, token := newLine(t)
	if _, err := line.CreateLot(t.Context(), spec(t, "L1", 0, 40)); err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	line.token = &failing{token, 10}
	p, err := keeping(line, out).Provision(t.Context(), "L1", options(out, 1))
	if err == nil || !strings.Contains(err.Error(), "gone") || p.Done != 8 {
		t.Error(p, err)
	}
	line.token = token
	if p := provision(t, line, out); p.Made != 32 {
		t.Errorf("%+v", p)
	}
	checkLot(t, line, out)
}

// away is a directory that cannot be reached for a while.
type away struct {
	directory.Store
	mu    sync.Mutex
	until time.Time // guarded by mu
	err   error
}

func (a *away) Create(ctx context.Context, path string, data []byte) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if time.Now().Before(a.until) {
		return fmt.Errorf("create %s: %w", path, a.err)
	}
	return a.Store.Create(ctx, path, data)
}

// The token does not wait for the directory: all keys are made while it is away, and published when it is back. The
// real fault, a sealed Vault, is in package proof.
func TestProvisionDirectoryAway(t *testing.T) {
	line, _, _ := newLine(t)
	if _, err := line.CreateLot(t.Context(), spec(t, "L1", 0, 120)); err != nil {
		t.Fatal(err)
	}
	store, out := &away{Store: line.store, until: time.Now().Add(time.Hour), err: directory.ErrUnavailable}, t.TempDir()
	line.store = store
	o := options(out, 2)
	o.Patience = time.Minute
	waited := false
	o.Report = func(p Progress) {
		waited = waited || p.Waiting != ""
		if p.Done > 0 && p.Generated < p.Total {
			t.Errorf("published with the directory away: %+v", p)
		}
		if p.Generated == p.Total {
			store.mu.Lock()
			store.until = time.Time{}
			store.mu.Unlock()
		}
	}
	p, err := keeping(line, out).Provision(t.Context(), "L1", o)
	if err != nil || p.Done != 120 || p.Waiting != "" || !waited {
		t.Errorf("%+v, waited %v, %v", p, waited, err)
	}
	checkLot(t, line, out)

	// Away for longer than anybody waits; what was made is published by the next run, as it is.
	if _, err := line.CreateLot(t.Context(), spec(t, "L2", 200, 20)); err != nil {
		t.Fatal(err)
	}
	store.until, o.Patience, o.Report = time.Now().Add(time.Hour), time.Millisecond, nil
	if p, err = keeping(line, out).Provision(t.Context(), "L2", o); !errors.Is(err, directory.ErrUnavailable) ||
		p.Generated != 20 || p.Done != 0 {
		t.Errorf("%+v, %v", p, err)
	}
	store.until = time.Time{}
	if p, err = keeping(line, out).Provision(t.Context(), "L2", o); err != nil || p.Made != 0 || p.Done != 20 {
		t.Errorf("%+v, %v", p, err)
	}
	// What no waiting helps against ends the run at once.
	if _, err := line.CreateLot(t.Context(), spec(t, "L3", 300, 400)); err != nil {
		t.Fatal(err)
	}
	store.until, store.err, o.Patience = time.Now().Add(time.Hour), errors.New("forbidden"), time.Hour
	if p, err = keeping(line, out).Provision(t.Context(), "L3", o); err == nil ||
		!strings.Contains(err.Error(), "forbidden") || p.Generated == 400 {
		t.Errorf("%+v, %v", p, err)
	}
}

// Two machines, each with a journal and a folder of its own, share a lot.
func TestProvisionShardRanges(t *testing.T) {
	line, _, _ := newLine(t)
	m, err := line.CreateLot(t.Context(), spec(t, "L1", 0, 40))
	if err != nil {
		t.Fatal(err)
	}
	var both sync.WaitGroup
	for i, r := range [][2]int{{0, 4}, {4, 10}} {
		out := t.TempDir()
		both.Go(func() {
			o := options(out, 2)
			o.From, o.To = r[0], r[1]
			p, err := keeping(line, out).Provision(t.Context(), "L1", o)
			if want := (r[1] - r[0]) * 4; err != nil || p.Done != want || p.Total != want {
				t.Errorf("machine %d: %+v, %v", i, p, err)
			}
		})
	}
	both.Wait()
	for n := range m.Shards() {
		if _, err := line.reader.ReadShard(t.Context(), m, n); err != nil {
			t.Error(err)
		}
	}
	for _, r := range [][2]int{{-1, 2}, {3, 3}, {5, 2}, {9, 11}} {
		o := options(t.TempDir(), 1)
		o.From, o.To = r[0], r[1]
		if _, err := line.Provision(t.Context(), "L1", o); err == nil ||
			!strings.Contains(err.Error(), "shards 0 to 9") {
			t.Errorf("%v: %v", r, err)
		}
	}
}

// The rate of a run that goes on is that of its own work: what it finds published, or finds made and only has to
// publish, is none.
func TestProgressAfterResume(t *testing.T) {
	line, dir, _ := newLine(t)
	m, err := line.CreateLot(t.Context(), spec(t, "L1", 0, 30))
	if err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	o := options(out, 2)
	o.To = 3
	if p, err := keeping(line, out).Provision(t.Context(), "L1", o); err != nil || p.Now != p.Total {
		t.Fatal(p, err)
	}
	if err := os.Remove(filepath.Join(dir, filepath.FromSlash(directory.ShardPath("L1", 2)))); err != nil {
		t.Fatal(err)
	}
	before, _ := m.ShardRange(3)
	if p := provision(t, line, out); p.Now != 30-before || p.Now != p.Made {
		t.Errorf("%+v", p)
	}
}
