// Package sqlite opens SQLite databases whose commits outlive a loss of power.
package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mattn/go-sqlite3"
	"golang.org/x/sys/unix"

	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/groupcommit"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
)

const busyTimeout = 5 * time.Second // for the lock of another process

// Open opens the database at path, or makes it, for its owner only. Other processes may have it open too. Every commit
// is synced to disk before it returns (WAL with synchronous=FULL). An earlier schema is brought up to date; PRAGMA
// user_version has the schema's number.
func Open(ctx context.Context, path string, schema sqlconn.Schema) (read *sql.DB, write *Writer, err error) {
	if err := durable.Mkdir(filepath.Dir(path), 0o700); err != nil {
		return nil, nil, fmt.Errorf("the database's folder cannot be made: %w", err)
	}
	if err := writable(path); err != nil {
		return nil, nil, err
	}
	// SQLite would make it with the umask's mode, and gives its own other files the mode of this one.
	if err := create(path); err != nil {
		return nil, nil, fmt.Errorf("the database cannot be opened: %w", err)
	}
	dsn := func(extra string) string {
		return (&url.URL{Scheme: "file", OmitHost: true, Path: path}).String() +
			fmt.Sprintf(
				"?_journal_mode=WAL&_synchronous=FULL&_busy_timeout=%d&_foreign_keys=on&_stmt_cache_size=32&_mutex=no",
				busyTimeout.Milliseconds()) + extra
	}
	file, err := os.OpenFile(path+turnSuffix, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, nil, fmt.Errorf("the database cannot be opened: %w", err)
	}
	turn := &turn{File: file}
	db, err := sql.Open("sqlite3", dsn("&_txlock=immediate&_cache_size=-65536"))
	if err != nil {
		return nil, nil, errors.Join(err, turn.Close())
	}
	db.SetMaxOpenConns(1) // SQLite has one writer at a time
	// While another process switches to WAL, SQLite returns SQLITE_BUSY at once, whatever the busy timeout.
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		err = migrate(ctx, db, turn, schema)
		busy, ok := errors.AsType[sqlite3.Error](err)
		if !ok || busy.Code != sqlite3.ErrBusy || time.Since(start) > busyTimeout {
			break
		}
	}
	if err == nil {
		if write, err = newWriter(ctx, db, schema); err == nil {
			write.path, write.turn = path, turn
			write.file, write.log, err = files(path)
		}
	}
	if err == nil {
		read, err = sql.Open("sqlite3", dsn("&_query_only=on"))
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("the database %s cannot be used: %w", path, err), db.Close(),
			turn.Close())
	}
	read.SetMaxOpenConns(2 * runtime.GOMAXPROCS(0))
	read.SetMaxIdleConns(2 * runtime.GOMAXPROCS(0))
	write.Writer = groupcommit.New(write.try)
	return read, write, nil
}

// newWriter prepares the statements of a Writer, which does not run yet.
func newWriter(ctx context.Context, db *sql.DB, schema sqlconn.Schema) (w *Writer, err error) {
	// With fewer checkpoints, a page that changes several times is written to its place once.
	if _, err := db.ExecContext(ctx, "PRAGMA wal_autocheckpoint = 4000"); err != nil {
		return nil, fmt.Errorf("set how often pages are written to their place: %w", err)
	}
	w = &Writer{db: db, schema: schema, version: 1}
	for text, to := range map[string]**sql.Stmt{
		"SAVEPOINT change": &w.savepoint, "RELEASE change": &w.release, "ROLLBACK TO change": &w.rollback,
		"PRAGMA data_version": &w.dataVersion,
	} {
		if *to, err = db.PrepareContext(ctx, text); err != nil {
			return nil, fmt.Errorf("prepare %s: %w", text, err)
		}
	}
	return w, nil
}

// writable fails if the folder of a database cannot be written to. SQLite needs that for its log, even to read, and its
// error does not say so.
func writable(path string) error {
	dir := filepath.Dir(path)
	if err := unix.Access(dir, unix.W_OK); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("the database %s cannot be used: its folder %s cannot be written to: %w", path, dir, err)
	}
	return nil
}

var creating sync.Mutex

// create makes the file, and does not open one that exists: closing a file releases every lock that the process has on
// it, SQLite's too (https://www.sqlite.org/howtocorrupt.html, 2.2).
func create(path string) error {
	creating.Lock()
	defer creating.Unlock()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return f.Close()
}

const turnSuffix = "-turn"

// A turn is the lock of a file: see begin.
type turn struct {
	*os.File
	vain bool // the last wait for it was in vain: whoever has it may be stopped, and is not waited for again
}

// begin begins a change. A process that makes one change after the other would keep all others out: SQLite's lock has
// no queue, and whoever waits only asks for it again, up to 100 ms later. So it is asked for by the process whose turn
// it is, and nobody else asks until that one has it. The turn is only a matter of order: without it, begin goes on.
func begin(ctx context.Context, db *sql.DB, turn *turn) (*sql.Tx, error) {
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		err := unix.Flock(int(turn.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			defer unix.Flock(int(turn.Fd()), unix.LOCK_UN)
		}
		taken := errors.Is(err, unix.EWOULDBLOCK)
		if !taken || turn.vain || time.Since(start) > busyTimeout || ctx.Err() != nil {
			turn.vain = taken
			break
		}
	}
	tx, err := db.BeginTx(ctx, nil)
	if busy, ok := errors.AsType[sqlite3.Error](err); ok && busy.Code == sqlite3.ErrBusy {
		err = fmt.Errorf("another process keeps it locked: try again when that one has ended its work: %w", err)
	}
	return tx, err
}

func migrate(ctx context.Context, db *sql.DB, turn *turn, schema sqlconn.Schema) error {
	tx, err := begin(ctx, db, turn)
	if err != nil {
		return err
	}
	defer tx.Rollback() // no effect after Commit
	have, err := Number(ctx, tx)
	if err != nil {
		return err
	}
	lacks, err := schema.Lacks(have)
	if err != nil || len(lacks) == 0 {
		return err
	}
	version := fmt.Sprintf("PRAGMA user_version = %d", schema.Number())
	for _, statement := range append(lacks[:len(lacks):len(lacks)], version) {
		if _, err := tx.ExecContext(ctx, statement); err != nil {
			return err
		}
	}
	return tx.Commit()
}

// Number is that of a database's schema.
func Number(ctx context.Context, q interface {
	QueryRowContext(context.Context, string, ...any) *sql.Row
}) (number int, err error) {
	return number, q.QueryRowContext(ctx, "PRAGMA user_version").Scan(&number)
}

// Look gives the number of the schema of an existing database, 0 if it has none, and changes nothing.
func Look(ctx context.Context, path string) (number int, err error) {
	if err := writable(path); err != nil {
		return 0, err
	}
	err = withConn(ctx, path, "&_query_only=on", func(conn *sql.Conn, _ *sqlite3.SQLiteConn) (err error) {
		number, err = Number(ctx, conn)
		return err
	})
	if err != nil {
		err = fmt.Errorf("the database %s cannot be used: %w", path, err)
	}
	return number, err
}

// A Writer makes changes: see groupcommit. Changes share a sync of the disk, too. Its errors do not name the operation:
// its caller does.
type Writer struct {
	*groupcommit.Writer[*sqlconn.Tx]
	db     *sql.DB
	turn   *turn // see begin
	schema sqlconn.Schema
	path   string
	file   os.FileInfo // what was there when it was opened
	log    os.FileInfo // its write-ahead log, which stays as long as a connection is open

	refused atomic.Bool // the disk did not take a change, and was not found to take one since

	savepoint, release, rollback *sql.Stmt // around each change that is kept apart
	dataVersion                  *sql.Stmt

	// Of the goroutine that makes the changes:
	version int64 // see sqlconn.Tx
	others  int64 // data_version as it was last: another one when another connection has made a commit
}

// Do is groupcommit's: SQLite makes all changes one after the other.
func (w *Writer) Do(ctx context.Context, f func(context.Context, *sqlconn.Tx) error) error {
	return w.Writer.Do(ctx, "", f)
}

// Exec is Do with one statement.
func (w *Writer) Exec(ctx context.Context, query string, args ...any) error {
	return w.Do(ctx, func(ctx context.Context, tx *sqlconn.Tx) error {
		_, err := tx.ExecContext(ctx, query, args...)
		return err
	})
}

// Close finishes the changes under way; later ones fail.
func (w *Writer) Close() error {
	w.Writer.Close()
	return errors.Join(w.db.Close(), w.turn.Close())
}

// try makes changes: see groupcommit.New. A savepoint costs a copy of each page that is changed after it.
func (w *Writer) try(batch []*groupcommit.Change[*sqlconn.Tx], apart bool) (results []error, err error) {
	whole := false
	defer func() {
		if !whole {
			w.version++
		}
		if slices.ContainsFunc(append(results, err), ofDisk) {
			w.refused.Store(true)
		}
	}()
	results = make([]error, len(batch))
	tx, err := begin(context.Background(), w.db, w.turn)
	if err != nil {
		return results, err
	}
	defer tx.Rollback() // no effect after Commit
	var others int64
	if err := tx.Stmt(w.dataVersion).QueryRow().Scan(&others); err != nil {
		return results, err
	}
	if w.others != others {
		w.version++
		number, err := Number(context.Background(), tx) // a newer release may have upgraded it
		if err == nil {
			_, err = w.schema.Lacks(number)
		}
		if err != nil {
			return results, fmt.Errorf("the database cannot be used: %w", err)
		}
		w.others = others
	}
	for i, c := range batch {
		if results[i] = c.Gone(); results[i] != nil {
			continue
		}
		if apart {
			if _, err := tx.Stmt(w.savepoint).Exec(); err != nil {
				return results, err
			}
		}
		results[i] = c.Make(&sqlconn.Tx{Tx: tx, Version: w.version})
		if !apart {
			if results[i] != nil {
				return results, groupcommit.ErrTogether
			}
			continue
		}
		if results[i] != nil {
			if _, err := tx.Stmt(w.rollback).Exec(); err != nil {
				return results, err
			}
			w.version++
		}
		if _, err := tx.Stmt(w.release).Exec(); err != nil {
			return results, err
		}
	}
	if err = tx.Commit(); err == nil {
		err = w.InPlace()
	}
	whole = err == nil
	return results, err
}

// ofDisk says whether an error is that the disk takes no change: it is full, read-only or broken.
func ofDisk(err error) bool {
	e, ok := errors.AsType[sqlite3.Error](err)
	return ok && (e.Code == sqlite3.ErrFull || e.Code == sqlite3.ErrIoErr || e.Code == sqlite3.ErrReadonly ||
		e.Code == sqlite3.ErrCantOpen)
}

// Writable fails if the disk takes no changes, or InPlace fails. Only after the disk has refused a change, this writes
// one, which changes nothing.
func (w *Writer) Writable(ctx context.Context) error {
	if !w.refused.Load() {
		return w.InPlace()
	}
	err := w.Do(ctx, func(ctx context.Context, tx *sqlconn.Tx) error {
		number, err := Number(ctx, tx)
		if err == nil {
			_, err = tx.ExecContext(ctx, fmt.Sprintf("PRAGMA user_version = %d", number))
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("the database %s takes no changes: %w", w.path, err)
	}
	w.refused.Store(false)
	return nil
}

// Warnings says whether the database can be read, and takes no changes. It fails as InPlace does.
func (w *Writer) Warnings(ctx context.Context) (warnings []string, err error) {
	if w.Writable(ctx) != nil {
		warnings = []string{"the database takes no changes: make room on its disk, or repair it; the log says why"}
	}
	return warnings, w.InPlace()
}

// InPlace fails if somebody has renamed or removed the database's file or its log, as when another database is written
// over it: SQLite would go on with files that nobody finds again.
func (w *Writer) InPlace() error {
	file, log, err := files(w.path)
	if err == nil && os.SameFile(file, w.file) && os.SameFile(log, w.log) {
		return nil
	}
	return fmt.Errorf("somebody has put another file in the place of the database %s, or removed it, while it was in "+
		"use: changes are lost; stop the service, and start it again with the file that is to be used", w.path)
}

func files(path string) (file, log os.FileInfo, err error) {
	if file, err = os.Stat(path); err == nil {
		log, err = os.Stat(path + "-wal")
	}
	return file, log, err
}
