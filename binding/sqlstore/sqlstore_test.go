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
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/storetest"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/sqlite"
	"github.com/kmehsm/kmehsm/kme"
)

// rowKey is the same in each process of a test.
var rowKey, _ = kme.NewSecret(make([]byte, kme.SecretSize))

func open(t *testing.T, path string) *Store {
	t.Helper()
	s, err := Open(t.Context(), "sqlite:"+path, rowKey)
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
		IMSI: imsi(t, id), IMEI: imei, Manufacturer: "maker", Lot: "L1", State: binding.Pending,
		Sealed: []byte("sealed " + attempt), Established: t0, Expires: t0.Add(time.Hour),
		AttemptID: attempt, PayloadSHA256: []byte("digest"), NWSig: []byte("answer"),
	}
}

// request is one that opens an attempt for b.
func request(b *binding.Binding) binding.VectorRequest {
	return binding.VectorRequest{
		IMSI: b.IMSI, Origin: binding.Origin{Provisioning: binding.Allowed}, RANDs: make([]hsmkeys.RAND, 1),
		Now: t0, AttemptTTL: time.Hour, PendingVectors: 3,
	}
}

// beginAttempt opens an attempt, which from then on is b's.
func beginAttempt(t *testing.T, s *Store, b *binding.Binding) {
	t.Helper()
	d, err := s.Prepare(t.Context(), request(b))
	if err != nil || d.Attempt == nil {
		t.Fatalf("attempt %v, error %v", d.Attempt, err)
	}
	b.AttemptID = d.Attempt.ID
}

func checkBinding(t *testing.T, s *Store, want *binding.Binding) {
	t.Helper()
	if sub, err := s.Subscription(t.Context(), want.IMSI, t0); err != nil || !reflect.DeepEqual(sub.Latest(), want) {
		t.Errorf("binding %+v, error %v, want %+v", sub, err, want)
	}
}

// childFile tells the test binary to be the process of TestAnotherProcess.
const childFile = "SQLSTORE_TEST_FILE"

// What one process has committed, another sees at once, and it is there after all have closed the file. The other
// process dies without closing it.
func TestAnotherProcess(t *testing.T) {
	b := newBinding(t, "001010000000001", "a1")
	if file := os.Getenv(childFile); file != "" {
		s, err := Open(t.Context(), "sqlite:"+file, rowKey)
		if err != nil {
			t.Fatal(err)
		}
		beginAttempt(t, s, b)
		if err := s.Establish(t.Context(), b, []byte("tag"), true, t0); err != nil {
			t.Fatal(err)
		}
		os.Exit(0)
	}

	file := path(t)
	first, err := Open(t.Context(), "sqlite:"+file, rowKey)
	if err != nil {
		t.Fatal(err)
	}
	if sub, err := first.Subscription(t.Context(), b.IMSI, t0); err != nil || sub.Latest() != nil {
		t.Fatal(sub, err)
	}
	child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestAnotherProcess$")
	child.Env = append(os.Environ(), childFile+"="+file)
	if out, err := child.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	beginAttempt(t, open(t, path(t)), b) // it is the same as the other process's
	checkBinding(t, first, b)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	again := open(t, file)
	checkBinding(t, again, b)
	checkUsed(t, again, b, []byte("tag"))
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
			all.Go(func() { errs[i] = stores[i%2].Establish(t.Context(), b, []byte{byte(round), byte(i)}, true, t0) })
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

// What a change has left is not asked for by the next one; but what another store has changed since is seen.
func TestRecent(t *testing.T) {
	file := path(t)
	s, other := open(t, file), open(t, file)
	ctx, o := t.Context(), binding.Origin{Provisioning: binding.Allowed}
	b := newBinding(t, "001010000000001", "a1")
	establish := func(tag string) {
		t.Helper()
		beginAttempt(t, s, b)
		if err := s.Establish(ctx, b, []byte(tag), true, t0); err != nil {
			t.Fatal(err)
		}
		if !s.recent.Has(b.IMSI.String()) {
			t.Error("what was established is not recent")
		}
	}
	send := func(in *Store) {
		t.Helper()
		q := request(b)
		q.RANDs[0][0], q.Ready = 1, b.AttemptID
		if d, err := in.Prepare(ctx, q); err != nil || d.Binding == nil {
			t.Fatal(d, err)
		}
	}
	report := func(want error) {
		t.Helper()
		if sub, err := s.Report(ctx, b.IMSI, o.Name, true, t0); !errors.Is(err, want) ||
			err == nil && sub.Active == nil {
			t.Errorf("%+v, %v; want %v", sub, err, want)
		}
	}
	establish("1")
	if _, err := other.Revoke(ctx, b.IMSI, t0); err != nil {
		t.Fatal(err)
	}
	report(binding.ErrNotBound)
	establish("2")
	send(other)
	report(nil)
	if _, err := s.Revoke(ctx, b.IMSI, t0); err != nil {
		t.Fatal(err)
	}
	establish("3")
	lookUp := s.lookUp
	s.lookUp = nil // for vectors that are ready, nothing is read before the change
	send(s)
	s.lookUp = lookUp
	if err := errors.Join(s.Note(ctx, binding.EventExported, b.IMSI.String(), ""),
		other.Note(ctx, binding.EventExported, b.IMSI.String(), "")); err != nil {
		t.Fatal(err)
	}
	report(nil)
	if n, err := s.VerifyLedger(ctx); err != nil || n != 9 {
		t.Error(n, err)
	}

	// Vectors may be made under what is recent, but leave only under what is there.
	if _, err := s.Revoke(ctx, b.IMSI, t0); err != nil {
		t.Fatal(err)
	}
	establish("4")
	q := request(b)
	if _, err := s.Prepare(ctx, q); !errors.Is(err, binding.ErrSpent) {
		t.Errorf("a RAND that has left in clear: %v", err)
	}
	q.RANDs[0][0] = 2
	if d, err := s.Prepare(ctx, q); err != nil || d.Binding == nil || d.Binding.AttemptID != b.AttemptID {
		t.Error(d, err)
	}
	if _, err := other.Revoke(ctx, b.IMSI, t0); err != nil {
		t.Fatal(err)
	}
	if d, err := s.Prepare(ctx, request(b)); err != nil || d.Attempt == nil {
		t.Errorf("a RAND that has left in clear, where nothing is bound any more: %+v, %v", d, err)
	}
	q.Ready = b.AttemptID
	if d, err := s.Prepare(ctx, q); err != nil || d.Binding != nil || d.Attempt == nil {
		t.Errorf("vectors under a binding that was revoked meanwhile: %+v, %v", d, err)
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
			if s, errs[i] = Open(t.Context(), "sqlite:"+file, rowKey); errs[i] == nil {
				errs[i] = s.Close()
			}
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
}

// Sealed KMEs and answers are for the service's own user.
func TestFileMode(t *testing.T) {
	file := path(t)
	s := open(t, file)
	beginAttempt(t, s, newBinding(t, "001010000000001", "a1"))
	for name, want := range map[string]os.FileMode{filepath.Dir(file): 0o700, file: 0o600, file + "-wal": 0o600,
		file + "-shm": 0o600, file + "-turn": 0o600} {
		if info, err := os.Stat(name); err != nil {
			t.Error(err)
		} else if info.Mode().Perm() != want {
			t.Errorf("%s has mode %04o, want %04o", name, info.Mode().Perm(), want)
		}
	}
}

// Durable when it returns: in WAL mode only FULL syncs each commit
// (https://www.sqlite.org/pragma.html#pragma_synchronous).
func TestOpenRefuses(t *testing.T) {
	for _, c := range []struct {
		name string
		make func(t *testing.T) string
		want []string
	}{
		{"a folder that cannot be made", func(t *testing.T) string {
			file := filepath.Join(t.TempDir(), "file")
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			return filepath.Join(file, "state", "keysvc.db")
		}, []string{"folder cannot be made"}},
		{"a folder in its place", func(t *testing.T) string {
			return t.TempDir()
		}, []string{"cannot be used", "directory"}},
		{"no database", func(t *testing.T) string {
			file := filepath.Join(t.TempDir(), "keysvc.db")
			if err := os.WriteFile(file, []byte(strings.Repeat("no database ", 100)), 0o600); err != nil {
				t.Fatal(err)
			}
			return file
		}, []string{"cannot be used", "not a database"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := Open(t.Context(), "sqlite:"+c.make(t), rowKey)
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

// An error of the database names what was being done, whatever that was, and is still the error.
func TestErrorsNameTheOperation(t *testing.T) {
	s, err := Open(t.Context(), "sqlite:"+filepath.Join(t.TempDir(), "keysvc.db"), rowKey)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, imsi, none := t.Context(), kme.IMSI{}, func([]*registry.Lot) error { return nil }
	for want, call := range map[string]func() error{
		"read a subscription: ":   func() error { _, err := s.Subscription(ctx, imsi, t0); return err },
		"look for a spent RAND: ": func() error { _, err := s.Spent(ctx, imsi, hsmkeys.RAND{}); return err },
		"establish: ":             func() error { return s.Establish(ctx, &binding.Binding{}, nil, true, t0) },
		"open provisioning: ":     func() error { return s.OpenAttempt(ctx, binding.Attempt{}) },
		"list bindings: ": func() error {
			_, err := s.Bindings(ctx, binding.BindingQuery{Limit: 1})
			return err
		},
		"revoke: ":                func() error { _, err := s.Revoke(ctx, imsi, t0); return err },
		"drop what has expired: ": func() error { return s.DropExpired(ctx, t0) },
		"note: ":                  func() error { return s.Note(ctx, binding.EventExported, "x", "") },
		"read the ledger: ":       func() error { _, err := s.History(ctx, "x"); return err },
		"check the ledger: ":      func() error { _, err := s.Check(ctx, nil); return err },
		"verify the ledger: ":     func() error { _, err := s.VerifyLedger(ctx); return err },
		"read the registry: ":     func() error { _, err := s.Lots(ctx); return err },
		"enroll: ":                func() error { return s.PutManufacturer(ctx, &registry.Manufacturer{}) },
		"import a lot: ":          func() error { return s.PutLot(ctx, &registry.Lot{}, none) },
		"decide: ": func() error {
			_, err := s.Decide(ctx, "", "", registry.Verdict{}, none)
			return err
		},
		"count bindings: ": func() error { _, err := s.Bound(ctx, "", "", t0); return err },
		"ping: ":           func() error { return s.Ping(ctx) },
		"copy: ":           func() error { _, err := s.Copy(ctx, s, func(int) {}); return err },
		"verify: ":         func() error { _, err := s.Verify(ctx, func(int, int) {}); return err },
	} {
		err := call()
		if !strings.HasPrefix(err.Error(), want) || !errors.Is(err, sql.ErrConnDone) &&
			!strings.HasSuffix(err.Error(), "database is closed") {
			t.Errorf("%v, want %q and that the database is closed", err, want)
		}
	}
}

// A backup that is put in the place of a database in use is no loss that nobody notices: what is made after it is told
// to nobody, also when it is asked for again, and /readyz says no.
func TestRestoredWhileInUse(t *testing.T) {
	ctx, p, copied := t.Context(), path(t), filepath.Join(t.TempDir(), "copy.db")
	s := must(Open(ctx, "sqlite:"+p, rowKey))
	defer s.Close()
	done(t, sqlite.Backup(ctx, p, copied, func(int, int) {}, func(string) error { return nil }))
	b := newBinding(t, "001010000000001", "a")
	beginAttempt(t, s, b)
	done(t, s.Settle(ctx))
	must(s.Warnings(ctx))
	done(t, os.Rename(copied, p))
	if err := s.Establish(ctx, b, []byte("tag"), true, t0); err == nil {
		t.Error("a binding is told that nobody finds again")
	}
	if err := s.Settle(ctx); err == nil {
		t.Error("it may be told again")
	}
	if _, err := s.Warnings(ctx); err == nil || !strings.Contains(err.Error(), "somebody has put another file") {
		t.Errorf("the service is ready: %v", err)
	}
}
