package sqlstore

import (
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/storetest"
	"github.com/kmehsm/kmehsm/kme"
)

func open(t *testing.T, path string) *Store {
	t.Helper()
	s, err := Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// path has what a file: URI would take for its own syntax.
func path(t *testing.T) string { return filepath.Join(t.TempDir(), "state 100%?#", "keysvc.db") }

func TestContract(t *testing.T) {
	storetest.Run(t, func(t *testing.T) storetest.Store { return open(t, path(t)) })
}

var t0 = time.UnixMilli(1_800_000_000_000).UTC()

func imsi(t *testing.T, s string) kme.IMSI {
	t.Helper()
	v, err := kme.ParseIMSI(s)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func newBinding(t *testing.T, id, attempt string) *binding.Binding {
	t.Helper()
	imei, err := kme.ParseIMEI("35209900000001")
	if err != nil {
		t.Fatal(err)
	}
	return &binding.Binding{
		IMSI: imsi(t, id), IMEI: imei, Manufacturer: "maker", Lot: "L1", State: binding.Pending, Sealed: []byte("sealed " + attempt), Established: t0,
		AttemptID: attempt, PayloadSHA256: []byte("digest"), NWSig: []byte("answer"),
	}
}

func beginAttempt(t *testing.T, s *Store, b *binding.Binding) {
	t.Helper()
	_, a, err := s.Prepare(t.Context(), binding.Attempt{ID: b.AttemptID, IMSI: b.IMSI, Expires: t0.Add(time.Hour)}, t0, t0.Add(time.Hour))
	if err != nil || a == nil || a.ID != b.AttemptID {
		t.Fatalf("attempt %v, error %v", a, err)
	}
}

func checkBinding(t *testing.T, s *Store, want *binding.Binding) {
	t.Helper()
	if got, err := s.Binding(t.Context(), want.IMSI); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("binding %+v, error %v, want %+v", got, err, want)
	}
}

// childFile tells the test binary to be the process of TestAnotherProcess.
const childFile = "SQLSTORE_TEST_FILE"

// What one process has committed, another sees at once, and it is there after all have closed the file. The other process
// dies without closing it.
func TestAnotherProcess(t *testing.T) {
	b := newBinding(t, "001010000000001", "a1")
	if file := os.Getenv(childFile); file != "" {
		s, err := Open(t.Context(), file)
		if err != nil {
			t.Fatal(err)
		}
		beginAttempt(t, s, b)
		if err := s.Establish(t.Context(), b, []byte("tag"), t0); err != nil {
			t.Fatal(err)
		}
		os.Exit(0)
	}

	file := path(t)
	first, err := Open(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := first.Binding(t.Context(), b.IMSI); !errors.Is(err, binding.ErrNotBound) {
		t.Fatal(err)
	}
	child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestAnotherProcess$")
	child.Env = append(os.Environ(), childFile+"="+file)
	if out, err := child.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	checkBinding(t, first, b)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	again := open(t, file)
	checkBinding(t, again, b)
	if used, err := again.Used(t.Context(), b.IMEI, []byte("tag")); err != nil || !used {
		t.Errorf("the ledger has forgotten: %v, error %v", used, err)
	}
}

// Two services on one file: what is allowed once is allowed to one of them.
func TestTwoStores(t *testing.T) {
	file := path(t)
	stores := []*Store{open(t, file), open(t, file)}
	for round := range 10 {
		b := newBinding(t, fmt.Sprintf("0010100000%05d", round), fmt.Sprint("a", round))
		beginAttempt(t, stores[0], b)
		var all sync.WaitGroup
		errs := make([]error, 16)
		for i := range errs {
			all.Go(func() { errs[i] = stores[i%2].Establish(t.Context(), b, []byte{byte(round), byte(i)}, t0) })
		}
		all.Wait()
		won := 0
		for _, err := range errs {
			if err == nil {
				won++
			} else if !errors.Is(err, binding.ErrNoAttempt) {
				t.Error(err)
			}
		}
		if won != 1 {
			t.Errorf("%d of 16 calls used the one attempt", won)
		}
		checkBinding(t, stores[1], b)
	}
}

// Services that start at once on a machine's first day both make the file.
func TestOpenAtOnce(t *testing.T) {
	file := path(t)
	errs := make([]error, 8)
	var all sync.WaitGroup
	for i := range errs {
		all.Go(func() {
			var s *Store
			if s, errs[i] = Open(t.Context(), file); errs[i] == nil {
				errs[i] = s.Close()
			}
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
}

// The Store's interface opens no attempt for an IMSI that is bound, but a row may come of another version of the program:
// then an active binding has a pending one beside it.
func TestPendingBesideActive(t *testing.T) {
	for _, ok := range []bool{true, false} {
		t.Run(fmt.Sprint(ok), func(t *testing.T) {
			s := open(t, path(t))
			active, pending := newBinding(t, "001010000000001", "a1"), newBinding(t, "001010000000001", "a2")
			beginAttempt(t, s, active)
			if err := s.Establish(t.Context(), active, []byte("tag"), t0); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Report(t.Context(), active.IMSI, true, t0); err != nil {
				t.Fatal(err)
			}
			active.State, active.Activated = binding.Active, t0
			if _, err := s.write.ExecContext(t.Context(), `INSERT INTO attempts VALUES ('a2', ?, ?)`, active.IMSI.String(), t0.Add(time.Hour).UnixMilli()); err != nil {
				t.Fatal(err)
			}
			if err := s.Establish(t.Context(), pending, []byte("tag 2"), t0); err != nil {
				t.Fatal(err)
			}
			checkBinding(t, s, pending)
			if b, _, err := s.Prepare(t.Context(), binding.Attempt{ID: "a3", IMSI: active.IMSI}, t0, t0); err != nil || !reflect.DeepEqual(b, pending) {
				t.Errorf("Prepare gives %+v, error %v, want the pending binding", b, err)
			}

			want := active // the earlier binding stands
			if ok {
				want = pending
				want.State, want.Activated = binding.Active, t0.Add(time.Minute)
			}
			if b, err := s.Report(t.Context(), active.IMSI, ok, t0.Add(time.Minute)); err != nil || !reflect.DeepEqual(b, want) {
				t.Errorf("the report gives %+v, error %v, want %+v", b, err, want)
			}
			checkBinding(t, s, want)
			var rows int
			if err := s.read.QueryRow(`SELECT COUNT(*) FROM bindings`).Scan(&rows); err != nil || rows != 1 {
				t.Errorf("%d bindings are left, error %v", rows, err)
			}
		})
	}
}

// Sealed KMEs and answers are for the service's own user.
func TestFileMode(t *testing.T) {
	file := path(t)
	s := open(t, file)
	beginAttempt(t, s, newBinding(t, "001010000000001", "a1"))
	for name, want := range map[string]os.FileMode{filepath.Dir(file): 0o700, file: 0o600, file + "-wal": 0o600, file + "-shm": 0o600} {
		if info, err := os.Stat(name); err != nil {
			t.Error(err)
		} else if info.Mode().Perm() != want {
			t.Errorf("%s has mode %04o, want %04o", name, info.Mode().Perm(), want)
		}
	}
}

// Durable when it returns: in WAL mode only FULL syncs each commit (https://www.sqlite.org/pragma.html#pragma_synchronous).
func TestPragmas(t *testing.T) {
	s := open(t, path(t))
	for _, c := range []struct {
		name       string
		db         *sql.DB
		query      string
		wantString string
	}{
		{"write", s.write, "PRAGMA journal_mode", "wal"},
		{"write", s.write, "PRAGMA synchronous", "2"},
		{"write", s.write, "PRAGMA foreign_keys", "1"},
		{"write", s.write, "PRAGMA query_only", "0"},
		{"write", s.write, "PRAGMA user_version", "1"},
		{"read", s.read, "PRAGMA journal_mode", "wal"},
		{"read", s.read, "PRAGMA query_only", "1"},
	} {
		var got string
		if err := c.db.QueryRowContext(t.Context(), c.query).Scan(&got); err != nil || got != c.wantString {
			t.Errorf("%s of the %s connection: %q, error %v, want %q", c.query, c.name, got, err, c.wantString)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, c := range []struct {
		name string
		make func(t *testing.T) string
		want []string
	}{
		{"a newer schema", func(t *testing.T) string {
			file := path(t)
			s, err := Open(t.Context(), file)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.write.ExecContext(t.Context(), "PRAGMA user_version = 2"); err != nil {
				t.Fatal(err)
			}
			s.Close()
			return file
		}, []string{"version 2", "knows 1", "keysvc.db"}},
		{"a folder that cannot be made", func(t *testing.T) string {
			file := filepath.Join(t.TempDir(), "file")
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			return filepath.Join(file, "state", "keysvc.db")
		}, []string{"folder cannot be made"}},
		{"a folder in its place", func(t *testing.T) string { return t.TempDir() }, []string{"cannot be opened", "directory"}},
		{"no database", func(t *testing.T) string {
			file := filepath.Join(t.TempDir(), "keysvc.db")
			if err := os.WriteFile(file, []byte(strings.Repeat("no database ", 100)), 0o600); err != nil {
				t.Fatal(err)
			}
			return file
		}, []string{"cannot be used", "not a database"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := Open(t.Context(), c.make(t))
			if err == nil {
				s.Close()
				t.Fatal("opened")
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error %q does not say %q", err, w)
				}
			}
		})
	}
}
