package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmehsm/kmehsm/internal/groupcommit"
	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
)

func open(t *testing.T, path string, migrations ...string) (*sql.DB, *Writer) {
	t.Helper()
	read, write, err := Open(t.Context(), path, sqlconn.Schema{Migrations: migrations})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { read.Close() })
	return read, write
}

// Changes that share a commit are made each by itself: one that fails, or whose caller has
// gone, takes no other with it.
func TestGroupCommit(t *testing.T) {
	read, write := open(t, filepath.Join(t.TempDir(), "db"), "CREATE TABLE t (n INTEGER PRIMARY KEY)")
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	// The first holds the commit until all others wait.
	hold := make(chan struct{})
	var g sync.WaitGroup
	g.Go(func() {
		if err := write.Do(t.Context(), func(context.Context, *sqlconn.Tx) error { <-hold; return nil }); err != nil {
			t.Error(err)
		}
	})
	time.Sleep(20 * time.Millisecond)
	wrong := errors.New("wrong")
	for n := range 50 {
		g.Go(func() {
			ctx := t.Context()
			if n%5 == 3 {
				ctx = gone
			}
			err := write.Do(ctx, func(ctx context.Context, tx *sqlconn.Tx) error {
				if _, err := tx.ExecContext(ctx, "INSERT INTO t VALUES (?)", n); err != nil {
					return err
				}
				if n%5 == 4 {
					_, err := tx.ExecContext(ctx, "INSERT INTO t VALUES (?)", n)
					return errors.Join(wrong, err)
				}
				return nil
			})
			switch n % 5 {
			case 3:
				if !errors.Is(err, context.Canceled) {
					t.Errorf("%d, whose caller has gone: %v", n, err)
				}
			case 4:
				if !errors.Is(err, wrong) {
					t.Errorf("%d, which fails: %v", n, err)
				}
			default:
				if err != nil {
					t.Errorf("%d: %v", n, err)
				}
			}
		})
	}
	time.Sleep(20 * time.Millisecond)
	close(hold)
	g.Wait()
	var n, sum int
	if err := read.QueryRow("SELECT count(*), sum(n % 5) FROM t").Scan(&n, &sum); err != nil || n != 30 || sum != 30 {
		t.Errorf("%d rows, sum %d, %v", n, sum, err)
	}
	if err := write.Close(); err != nil {
		t.Error(err)
	}
}

// Whoever waits for a connection waits no longer than its deadline.
func TestBriefWaits(t *testing.T) {
	read, write := open(t, filepath.Join(t.TempDir(), "db"), "CREATE TABLE t (n INTEGER PRIMARY KEY)")
	defer write.Close()
	read.SetMaxOpenConns(1)
	held, err := read.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		ended <- sqlconn.NewBrief(read).Each(short, func(func(...any) error) error { return nil }, "SELECT n FROM t")
	}()
	select {
	case err := <-ended:
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Error("it waits for a connection, and its deadline is long over")
	}
}

// A database whose schema has a number that no release gives is refused, and left as it is.
func TestNumberOfNoRelease(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	_, write := open(t, path, "CREATE TABLE t (n INTEGER PRIMARY KEY)")
	if _, err := write.db.Exec("PRAGMA user_version = -5"); err != nil {
		t.Fatal(err)
	}
	if err := write.Close(); err != nil {
		t.Fatal(err)
	}
	_, _, err := Open(t.Context(), path, sqlconn.First("CREATE TABLE t (n INTEGER PRIMARY KEY)"))
	if err == nil || !strings.Contains(err.Error(), "-5") {
		t.Error(err)
	}
}

// panicsOnErr is a context that panics in the writer, outside of every change.
type panicsOnErr struct{ context.Context }

func (panicsOnErr) Err() error { panic("no error") }

// A panic is the error of the change that panicked, and of no other, and the writer goes on.
func TestPanic(t *testing.T) {
	read, write := open(t, filepath.Join(t.TempDir(), "db"), "CREATE TABLE t (n INTEGER PRIMARY KEY)")
	defer write.Close()
	insert := func(ctx context.Context, n int) error {
		return write.Do(ctx, func(ctx context.Context, tx *sqlconn.Tx) error {
			if _, err := tx.ExecContext(ctx, "INSERT INTO t VALUES (?)", n); err != nil {
				return err
			}
			if n%2 == 1 {
				panic("odd")
			}
			return nil
		})
	}
	hold := tickets(write)
	hold(20) // several share a commit
	var g sync.WaitGroup
	for n := range 20 {
		g.Go(func() {
			var p *panics.Error
			if err := insert(t.Context(), n); n%2 == 0 && err != nil ||
				n%2 == 1 && (!errors.As(err, &p) || p.Value != "odd") {
				t.Errorf("%d: %v", n, err)
			}
		})
	}
	g.Wait()
	hold(0)
	var p *panics.Error
	if err := insert(panicsOnErr{t.Context()}, 100); !errors.As(err, &p) || p.Value != "no error" {
		t.Errorf("a panic beside the changes: %v", err)
	}
	if err := insert(t.Context(), 102); err != nil {
		t.Errorf("after panics: %v", err)
	}
	var n, sum int
	if err := read.QueryRow("SELECT count(*), sum(n % 2) FROM t").Scan(&n, &sum); err != nil || n != 11 || sum != 0 {
		t.Errorf("%d rows, %d of them of changes that panicked, %v", n, sum, err)
	}
}

// tickets gives what takes tickets, and gives some back, until so many are out.
func tickets(w *Writer) func(n int) {
	var out []func()
	return func(n int) {
		for len(out) < n {
			out = append(out, w.Soon())
		}
		for len(out) > n {
			out[len(out)-1]()
			out = out[:len(out)-1]
		}
	}
}

// A commit waits for half of the tickets that are out, and for no more than that; and it does not wait for ever.
func TestTickets(t *testing.T) {
	_, write := open(t, filepath.Join(t.TempDir(), "db"), "CREATE TABLE t (n INTEGER)")
	defer write.Close()
	insert := func() (commit *sql.Tx) {
		if err := write.Do(t.Context(), func(ctx context.Context, tx *sqlconn.Tx) error {
			commit = tx.Tx
			_, err := tx.ExecContext(ctx, "INSERT INTO t VALUES (1)")
			return err
		}); err != nil {
			t.Error(err)
		}
		return commit
	}
	// How long 20 changes take with each number of tickets, at their fastest: other work meets some. One after the
	// other: other work may begin meanwhile.
	hold, out := tickets(write), [3]int{0, 2, 1000}
	best := [3]time.Duration{math.MaxInt64, math.MaxInt64, math.MaxInt64}
	for range 5 {
		for i, n := range out {
			hold(n)
			start := time.Now()
			for range 20 {
				insert()
			}
			best[i] = min(best[i], time.Since(start))
		}
	}
	alone, one, many := best[0], best[1], best[2]
	if many < 19*groupcommit.Pause || one > alone+many/2 {
		t.Errorf("20 changes one after the other take %s; where one more may come, %s; where many may, %s",
			alone, one, many)
	}
	// The second of four comes within the pause, if the machine is not too busy for that.
	hold(4)
	for range 100 {
		var g sync.WaitGroup
		var commits [2]*sql.Tx
		for i := range commits {
			g.Go(func() { commits[i] = insert() })
		}
		g.Wait()
		if commits[0] == commits[1] {
			return
		}
	}
	t.Error("no two changes have shared a commit")
}

func TestMigrations(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	one, two := "CREATE TABLE a (n INTEGER); INSERT INTO a VALUES (1)", "ALTER TABLE a ADD COLUMN m INTEGER NOT NULL "+
		"DEFAULT 7"
	for _, migrations := range [][]string{{one}, {one}, {one, two}, {one, two}} {
		_, write := open(t, path, migrations...)
		if err := write.Close(); err != nil {
			t.Fatal(err)
		}
	}
	read, write := open(t, path, one, two)
	defer write.Close()
	var n, m int
	if err := read.QueryRow("SELECT n, m FROM a").Scan(&n, &m); err != nil || n != 1 || m != 7 {
		t.Error(n, m, err)
	}
	if _, _, err := Open(t.Context(), path, sqlconn.First("nonsense")); err != nil {
		t.Errorf("a newer database, for any program: %v", err)
	}
	if _, _, err := Open(t.Context(), path, sqlconn.Schema{Migrations: []string{one, two, "nonsense"}}); err == nil {
		t.Error("a migration that fails was passed over")
	}
	three := sqlconn.Schema{Migrations: []string{one, two, "DROP TABLE a"}, Least: 2}
	if _, write, err := Open(t.Context(), path, three); err != nil {
		t.Error(err)
	} else if err := write.Close(); err != nil {
		t.Error(err)
	}
	open(t, path, one, two)
	if _, _, err := Open(t.Context(), path, sqlconn.First(one)); err == nil || !strings.Contains(err.Error(),
		"version 3, and only a program that knows version 2 can work with it: this one knows version 1") {
		t.Errorf("a newer database, for newer programs: %v", err)
	}
}

// An error names what was being done also when the tables are up to date already.
func TestErrorsNameTheOperation(t *testing.T) {
	_, write := open(t, filepath.Join(t.TempDir(), "db"), "CREATE TABLE t (n INTEGER PRIMARY KEY)")
	if err := write.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := newWriter(t.Context(), write.db, write.schema); err == nil ||
		!strings.HasPrefix(err.Error(), "set how often ") {
		t.Errorf("%v", err)
	}
	if err := write.Exec(t.Context(), "DELETE FROM t"); !errors.Is(err, groupcommit.ErrClosed) {
		t.Errorf("a change after Close: %v", err)
	}
}

// A database that could not be written to says so until it can.
func TestWritable(t *testing.T) {
	_, w := open(t, filepath.Join(t.TempDir(), "db"), "CREATE TABLE a (n INTEGER PRIMARY KEY)")
	defer w.Close()
	insert := func() error { return w.Exec(t.Context(), "INSERT INTO a VALUES (1)") }
	readOnly := func(yes bool) { // to SQLite as a disk that is
		t.Helper()
		if _, err := w.db.Exec(fmt.Sprintf("PRAGMA query_only = %v", yes)); err != nil {
			t.Fatal(err)
		}
	}
	writable := func(want bool) {
		t.Helper()
		warnings, err := w.Warnings(t.Context())
		if got := w.Writable(t.Context()); (got == nil) != want || err != nil || (len(warnings) == 0) != want {
			t.Errorf("writable: %v, want %v; warnings %q, %v", got, want, warnings, err)
		}
	}
	if err := insert(); err != nil {
		t.Fatal(err)
	}
	if err := insert(); err == nil {
		t.Fatal("a row is there twice")
	}
	writable(true) // it was the change that was refused, and not by the disk
	readOnly(true)
	if err := insert(); err == nil {
		t.Fatal("it was changed")
	}
	writable(false)
	writable(false)
	readOnly(false)
	writable(true)
}

// A database whose file was replaced or removed while it is open takes no change: it would be told, and lost.
func TestReplacedWhileOpen(t *testing.T) {
	for what, replace := range map[string]func(path, other string) error{
		"replaced": func(path, other string) error { return os.Rename(other, path) },
		"moved":    func(path, other string) error { return os.Rename(path, other+"2") },
		"removed":  func(path, _ string) error { return os.Remove(path) },
		"written over": func(path, other string) error { // it is the same file, but its log is not
			data, err := os.ReadFile(other)
			return errors.Join(err, os.Remove(path+"-wal"), os.Remove(path+"-shm"), os.WriteFile(path, data, 0o600))
		},
	} {
		dir := t.TempDir()
		path, other := filepath.Join(dir, "db"), filepath.Join(dir, "other")
		_, w := open(t, path, "CREATE TABLE a (n INTEGER)")
		_, restored := open(t, other, "CREATE TABLE a (n INTEGER)")
		insert := func() error { return w.Exec(t.Context(), "INSERT INTO a VALUES (1)") }
		if err := errors.Join(insert(), restored.Close(), replace(path, other)); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := insert(); err == nil || !strings.Contains(err.Error(), "stop the service, and start it again") {
				t.Errorf("%s: %v", what, err)
			}
		}
		w.Close()
	}
}

// A process that is stopped while it is its turn delays one change of another process, and not each.
func TestTurnOfWhoIsStopped(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	_, w := open(t, path, "CREATE TABLE t (n INTEGER)")
	defer w.Close()
	stopped, err := os.Open(path + turnSuffix)
	if err == nil {
		err = unix.Flock(int(stopped.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	insert := func() time.Duration {
		start := time.Now()
		if err := w.Exec(t.Context(), "INSERT INTO t VALUES (1)"); err != nil {
			t.Error(err)
		}
		return time.Since(start)
	}
	if first := insert(); first < busyTimeout {
		t.Errorf("it has waited for its turn for %s", first)
	}
	if next := min(insert(), insert()); next >= busyTimeout {
		t.Errorf("the next change has waited, too: it took %s", next)
	}
	if err := stopped.Close(); err != nil {
		t.Fatal(err)
	}
	if insert(); w.turn.vain {
		t.Error("nobody has the turn, and it is not taken")
	}
}

// A process that makes one change after the other keeps nobody out: a command beside a busy service is one of others.
func TestOthersGetATurn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	table := "CREATE TABLE t (n INTEGER)"
	read, busy := open(t, path, table)
	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	defer all.Wait()
	defer stop()
	for range 8 {
		all.Go(func() {
			for ctx.Err() == nil {
				err := busy.Do(t.Context(), func(ctx context.Context, tx *sqlconn.Tx) error {
					time.Sleep(time.Millisecond) // with the lock
					_, err := tx.ExecContext(ctx, "INSERT INTO t VALUES (1)")
					return err
				})
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	const others = 20
	for range others {
		_, other := open(t, path, table)
		if err := errors.Join(other.Exec(t.Context(), "INSERT INTO t VALUES (2)"), other.Close()); err != nil {
			t.Fatal(err)
		}
	}
	var theirs, own int
	if err := read.QueryRow("SELECT SUM(n = 2), SUM(n = 1) FROM t").Scan(&theirs, &own); err != nil {
		t.Fatal(err)
	}
	if theirs != others || own < others {
		t.Errorf("%d of %d changes of others, beside %d", theirs, others, own)
	}
}
