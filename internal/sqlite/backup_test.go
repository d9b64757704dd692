package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/kmehsm/kmehsm/internal/durable"
)

const pair = `CREATE TABLE a (n INTEGER PRIMARY KEY, pad BLOB NOT NULL); CREATE TABLE b (n INTEGER PRIMARY KEY);
	INSERT INTO a WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 20000)
		SELECT n, zeroblob(500) FROM c;
	INSERT INTO b SELECT n FROM a`

// count says how many rows the tables have that get theirs in the same changes.
func count(t *testing.T, db *sql.DB) (a, b int) {
	t.Helper()
	if err := db.QueryRow("SELECT (SELECT COUNT(*) FROM a), (SELECT COUNT(*) FROM b)").Scan(&a, &b); err != nil {
		t.Fatal(err)
	}
	return a, b
}

// A backup has the state of one moment, however often the database changes meanwhile; and takes the place of the last
// one only when it is whole.
func TestBackup(t *testing.T) {
	dir := t.TempDir()
	path, to := filepath.Join(dir, "db"), filepath.Join(dir, "backup")
	read, write := open(t, path, pair)
	at, _ := count(t, read)
	steps, looked := 0, false
	change := func(int, int) { // at each step of the copy
		steps++
		if err := write.Exec(t.Context(), "INSERT INTO a VALUES ($1, zeroblob(500))", at+steps); err != nil {
			t.Fatal(err)
		}
	}
	good := func(copied string) error {
		looked = true
		if _, err := os.Stat(to); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the backup is there before it was looked at: %v", err)
		}
		return nil
	}
	if err := Backup(t.Context(), path, to, change, good); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(to)
	if err != nil || info.Mode() != 0o600 || !looked {
		t.Fatalf("%v, %v, looked at: %v", info, err, looked)
	}
	copied, w := open(t, to, pair)
	if a, b := count(t, copied); a != at || b != at || steps < 2 {
		t.Errorf("the backup has %d and %d rows after %d steps; there were %d when it began", a, b, steps, at)
	}
	if err := errors.Join(copied.Close(), w.Close()); err != nil {
		t.Fatal(err)
	}
	// One that was killed has left its work; it is removed by the next one, and not while the first is still at it.
	left := filepath.Join(dir, ".backup-backup")
	if err := errors.Join(os.Mkdir(left, 0o700), os.WriteFile(filepath.Join(left, "backup"), []byte("half"), 0o600),
		os.WriteFile(filepath.Join(left, "backup-journal"), []byte("half"), 0o600)); err != nil {
		t.Fatal(err)
	}
	unlock, err := durable.Lock(left)
	if err != nil {
		t.Fatal(err)
	}
	all := func(string) error { return nil }
	if err := Backup(t.Context(), path, to, func(int, int) {}, all); err == nil ||
		!strings.Contains(err.Error(), "another process is at work") {
		t.Errorf("two backups at once to the same file: %v", err)
	}
	unlock()
	if err := Backup(t.Context(), path, to, func(int, int) {}, all); err != nil {
		t.Errorf("after one that was killed: %v", err)
	}
	before, err := os.ReadFile(to)
	if err != nil {
		t.Fatal(err)
	}

	foreign, used, text := filepath.Join(dir, "db-other"), filepath.Join(dir, "db-used"), filepath.Join(dir, "db-text")
	_, w = open(t, foreign, "CREATE TABLE mine (n INTEGER)")
	if err := errors.Join(w.Close(), os.WriteFile(text, []byte("a grant, say"), 0o600)); err != nil {
		t.Fatal(err)
	}
	open(t, used, pair)
	wrong := errors.New("wrong")
	gone, cancel := context.WithCancel(t.Context())
	nothing := func(int, int) {}
	for name, try := range map[string]func() error{
		"a copy that is not good": func() error {
			return Backup(t.Context(), path, to, nothing, func(string) error { return wrong })
		},
		"interrupted":  func() error { return Backup(gone, path, to, func(int, int) { cancel() }, good) },
		"onto itself":  func() error { return Backup(t.Context(), path, path, nothing, good) },
		"onto its log": func() error { return Backup(t.Context(), path, path+"-wal", nothing, good) },
		"onto what may be its log": func() error {
			return Backup(t.Context(), path, filepath.Join(dir, ".", "db-journal"), nothing, good)
		},
		"onto a folder": func() error {
			return Backup(t.Context(), path, dir, nothing, good)
		},
		"onto another's":   func() error { return Backup(t.Context(), path, foreign, nothing, good) },
		"onto one in use":  func() error { return Backup(t.Context(), path, used, nothing, good) },
		"onto no database": func() error { return Backup(t.Context(), path, text, nothing, good) },
		"into no folder": func() error {
			return Backup(t.Context(), path, filepath.Join(dir, "none", "b"), nothing, good)
		},
		"of nothing": func() error { return Backup(t.Context(), filepath.Join(dir, "none"), to, nothing, good) },
	} {
		if err := try(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	after, err := os.ReadFile(to)
	if err != nil || string(after) != string(before) {
		t.Errorf("the last backup was changed by one that failed (%v)", err)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !strings.HasPrefix(f.Name(), "db") && !strings.HasPrefix(f.Name(), "backup") {
			t.Errorf("%s is left", f.Name())
		}
	}
}

// A folder for the work of a backup is one process's at a time, also in the moment in which the one before removes it.
func TestWorkFolderAlone(t *testing.T) {
	to := filepath.Join(t.TempDir(), "backup")
	var holders, had atomic.Int32
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for had.Load() < 500 && !t.Failed() {
				folder, remove, err := workFolder(to)
				if err != nil {
					if !strings.Contains(err.Error(), "another process is at work") {
						t.Error(err)
					}
					runtime.Gosched()
					continue
				}
				if n := holders.Add(1); n != 1 {
					t.Errorf("%d have the folder", n)
				}
				if err := os.WriteFile(filepath.Join(folder, "backup"), nil, 0o600); err != nil {
					t.Error(err)
				}
				holders.Add(-1)
				had.Add(1)
				if err := remove(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if left, err := os.ReadDir(filepath.Dir(to)); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// fullDisk tells the test binary to be the process that can write no more; it has the database's path.
const fullDisk = "SQLITE_TEST_FULL_DISK"

// The error of a copy that has no place says so once.
func TestBackupWithoutPlace(t *testing.T) {
	if path := os.Getenv(fullDisk); path != "" {
		err := Backup(t.Context(), path, path+"-copy", func(int, int) {}, func(string) error { return nil })
		if err == nil || strings.Count(err.Error(), "disk") != 1 {
			t.Errorf("a copy without place: %v", err)
		}
		return
	}
	path := filepath.Join(t.TempDir(), "db")
	_, write := open(t, path, pair)
	if err := write.Close(); err != nil {
		t.Fatal(err)
	}
	child := exec.Command("sh", "-c", `ulimit -f 1000; exec "$0" -test.run='^TestBackupWithoutPlace$'`, os.Args[0])
	child.Env = append(os.Environ(), fullDisk+"="+path)
	if out, err := child.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}
