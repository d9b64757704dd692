package sqlite

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/mattn/go-sqlite3"

	"github.com/kmehsm/kmehsm/internal/durable"
)

// Backup copies the state that the database at from has at one moment to the file to, for its owner only. Others may
// change the database meanwhile. It replaces an earlier backup, and nothing else, after check has accepted the copy; if
// Backup fails, to is as before. A process that is killed meanwhile leaves a folder beside to, which the next backup to
// that file removes. report is called with the pages copied so far, and with how many there are.
func Backup(
	ctx context.Context, from, to string, report func(pages, of int), check func(copied string) error,
) (err error) {
	if isPart(from, to) {
		return fmt.Errorf("a backup cannot take the place of %s, which is a part of the database: give it another name",
			to)
	}
	if there, err := os.Stat(to); err == nil {
		if own, err := os.Stat(from); err != nil {
			return err
		} else if os.SameFile(own, there) || !there.Mode().IsRegular() {
			return fmt.Errorf("a backup cannot take the place of %s, which is the database itself, or no file: give "+
				"it another name", to)
		}
		if err := replaceable(ctx, from, to); err != nil {
			return err
		}
	}
	folder, remove, err := workFolder(to) // SQLite has more files beside a database
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()
	copied := filepath.Join(folder, filepath.Base(to))
	if err := create(copied); err != nil {
		return err
	}
	if err := copyAll(ctx, from, copied, report); err != nil {
		return fmt.Errorf("%s cannot be copied to %s: %w", from, to, err)
	}
	if err := check(copied); err != nil {
		return err
	}
	if err := syncFile(copied); err != nil {
		return err
	}
	if err := os.Rename(copied, to); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(to))
}

// replaceable fails unless the file to is an earlier backup of the database at from: it has no tables that from does
// not have, and no process has it open. An empty file has no tables.
func replaceable(ctx context.Context, from, to string) error {
	if _, err := os.Stat(to + "-wal"); err == nil {
		return fmt.Errorf("%s is a database that is in use: name another file", to)
	}
	err := withConn(ctx, from, "&_query_only=on", func(conn *sql.Conn, _ *sqlite3.SQLiteConn) error {
		if _, err := conn.ExecContext(ctx, "ATTACH ? AS there", to); err != nil {
			return err
		}
		var foreign int
		err := conn.QueryRowContext(ctx, `SELECT COUNT(*) FROM there.sqlite_schema
			WHERE name NOT IN (SELECT name FROM main.sqlite_schema)`).Scan(&foreign)
		if err == nil && foreign > 0 {
			err = errors.New("it is a database of something else")
		}
		return err
	})
	if err != nil {
		err = fmt.Errorf("%s is there already, with another content than an earlier backup (%w): name another file, "+
			"or move that one away", to, err)
	}
	return err
}

// workFolder gives an empty folder beside a file, for this process alone. If a killed process has left one, it is
// emptied first: only this user can have made it.
func workFolder(to string) (folder string, remove func() error, err error) {
	folder = filepath.Join(filepath.Dir(to), ".backup-"+filepath.Base(to))
	if err := os.Mkdir(folder, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", nil, err
	}
	info, err := os.Lstat(folder)
	if errors.Is(err, os.ErrNotExist) { // the process whose it was has ended
		return workFolder(to)
	}
	if err != nil {
		return "", nil, err
	}
	if own, ok := info.Sys().(*syscall.Stat_t); !ok || info.Mode() != os.ModeDir|0o700 || int(own.Uid) != os.Geteuid() {
		return "", nil, fmt.Errorf("%s is not a folder that a backup of this user has left: remove it", folder)
	}
	unlock, err := durable.Lock(folder)
	if errors.Is(err, os.ErrNotExist) {
		return workFolder(to)
	}
	if err != nil {
		os.Remove(folder) // only an empty one goes
		return "", nil, err
	}
	empty := func() error {
		left, err := os.ReadDir(folder)
		for _, f := range left {
			if f.Name() != durable.LockName {
				err = errors.Join(err, os.RemoveAll(filepath.Join(folder, f.Name())))
			}
		}
		return err
	}
	remove = func() error {
		err := empty()
		unlock()
		os.Remove(folder) // unless another process has it by now
		return err
	}
	if err := empty(); err != nil {
		return "", nil, errors.Join(err, remove())
	}
	return folder, remove, nil
}

// isPart says whether to is a file of the database at from, or one that belongs to it.
func isPart(from, to string) bool {
	real, err := filepath.EvalSymlinks(from)
	if err != nil {
		return false // and there is nothing to be copied
	}
	here, err := os.Stat(filepath.Dir(real))
	there, err2 := os.Stat(filepath.Dir(to))
	suffix, ours := strings.CutPrefix(filepath.Base(to), filepath.Base(real))
	return err == nil && err2 == nil && os.SameFile(here, there) && ours &&
		slices.Contains([]string{"-wal", "-shm", "-journal", turnSuffix}, suffix)
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// together is how many pages are copied between two checks of the context.
const together = 1000

// copyAll copies a database to an empty file. Its transaction holds the state of one moment: a copy without one begins
// again whenever another process makes a change.
func copyAll(ctx context.Context, from, to string, report func(pages, of int)) error {
	return withConn(ctx, from, "&_query_only=on", func(conn *sql.Conn, source *sqlite3.SQLiteConn) error {
		var n int
		if _, err := conn.ExecContext(ctx, "BEGIN"); err != nil {
			return err
		}
		if err := conn.QueryRowContext(ctx, "SELECT COUNT(*) FROM sqlite_schema").Scan(&n); err != nil {
			return err
		}
		return withConn(ctx, to, "&_synchronous=OFF", func(_ *sql.Conn, target *sqlite3.SQLiteConn) error {
			b, err := target.Backup("main", source, "main")
			if err != nil {
				return err
			}
			for done := false; !done; report(b.PageCount()-b.Remaining(), b.PageCount()) {
				if err = ctx.Err(); err != nil {
					break
				}
				if done, err = b.Step(together); err != nil {
					break
				}
			}
			return cmp.Or(err, b.Finish()) // which gives the error of a Step again
		})
	})
}

// withConn runs f with a connection of its own.
func withConn(ctx context.Context, path, options string, f func(*sql.Conn, *sqlite3.SQLiteConn) error) error {
	db, err := sql.Open("sqlite3", (&url.URL{Scheme: "file", OmitHost: true, Path: path}).String()+
		fmt.Sprintf("?mode=rw&_busy_timeout=%d", busyTimeout.Milliseconds())+options)
	if err != nil {
		return err
	}
	defer db.Close()
	conn, err := db.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	var raw *sqlite3.SQLiteConn
	if err := conn.Raw(func(driver any) error { raw = driver.(*sqlite3.SQLiteConn); return nil }); err != nil {
		return err
	}
	return f(conn, raw)
}
