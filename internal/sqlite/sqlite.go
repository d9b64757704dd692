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
	"sync"
	"sync/atomic"
	"time"

	"github.com/mattn/go-sqlite3"

	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
)

const busyTimeout = 5 * time.Second // for the lock of another process

// Open opens the database at path, or makes it, for its owner only. Other processes may have it open too. Every commit
// is synced to disk before it returns (WAL with synchronous=FULL). The migrations make an empty database what it is
// now, one after the other; PRAGMA user_version says how many of them a database has had.
func Open(ctx context.Context, path string, migrations ...string) (read *sql.DB, write *Writer, err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, nil, fmt.Errorf("the database's folder cannot be made: %w", err)
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
	db, err := sql.Open("sqlite3", dsn("&_txlock=immediate&_cache_size=-65536"))
	if err != nil {
		return nil, nil, err
	}
	db.SetMaxOpenConns(1) // SQLite has one writer at a time
	// Whoever finds another in the switch to WAL is told SQLITE_BUSY at once, whatever the busy timeout.
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		var busy sqlite3.Error
		if err = migrate(ctx, db, migrations); !errors.As(err, &busy) || busy.Code != sqlite3.ErrBusy ||
			time.Since(start) > busyTimeout {
			break
		}
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("the database %s cannot be used: %w", path, err), db.Close())
	}
	// Pages that change again before a checkpoint are written to their place once.
	if _, err := db.ExecContext(ctx, "PRAGMA wal_autocheckpoint = 4000"); err != nil {
		return nil, nil, errors.Join(err, db.Close())
	}
	if read, err = sql.Open("sqlite3", dsn("&_query_only=on")); err != nil {
		return nil, nil, errors.Join(err, db.Close())
	}
	read.SetMaxOpenConns(2 * runtime.GOMAXPROCS(0))
	read.SetMaxIdleConns(2 * runtime.GOMAXPROCS(0))
	write = &Writer{db: db, version: 1, changes: make(chan change), stopped: make(chan struct{}), ended: make(chan struct{})}
	for _, s := range []struct {
		to   **sql.Stmt
		text string
	}{{&write.savepoint, "SAVEPOINT change"}, {&write.release, "RELEASE change"},
		{&write.rollback, "ROLLBACK TO change"}, {&write.dataVersion, "PRAGMA data_version"}} {
		if *s.to, err = db.PrepareContext(ctx, s.text); err != nil {
			return nil, nil, errors.Join(err, read.Close(), db.Close())
		}
	}
	write.done = func() { write.tickets.Add(-1) }
	write.stop = sync.OnceFunc(func() { close(write.stopped) })
	go write.run()
	return read, write, nil
}

var creating sync.Mutex

// create makes the file, and leaves one that is there alone: closing a file takes away every lock that the process has
// on it, SQLite's too (https://www.sqlite.org/howtocorrupt.html, 2.2).
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

func migrate(ctx context.Context, db *sql.DB, migrations []string) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // no effect after Commit
	var have int
	if err := tx.QueryRowContext(ctx, "PRAGMA user_version").Scan(&have); err != nil {
		return err
	}
	switch {
	case have == len(migrations):
		return nil
	case have > len(migrations):
		return fmt.Errorf("its schema has version %d, this program knows %d: use the program that wrote it, or a "+
			"newer one", have, len(migrations))
	}
	for _, m := range migrations[have:] {
		if _, err := tx.ExecContext(ctx, m); err != nil {
			return err
		}
	}
	if _, err := tx.ExecContext(ctx, fmt.Sprintf("PRAGMA user_version = %d", len(migrations))); err != nil {
		return err
	}
	return tx.Commit()
}

// A Writer makes changes. Those who wait at the same time share one commit, and with it one sync of the disk; each
// change is made or not made by itself. It may be used concurrently.
type Writer struct {
	db      *sql.DB
	changes chan change

	tickets atomic.Int64 // that are out: see Soon
	done    func()       // gives one back

	savepoint, release, rollback *sql.Stmt // around each change
	dataVersion                  *sql.Stmt

	// Of the goroutine that makes the changes:
	version int64 // see sqlconn.Tx
	others  int64 // data_version as it was last: another one when another connection has made a commit

	stop    func()        // once
	stopped chan struct{} // closed by stop
	ended   chan struct{} // closed when no change is made any more
}

type change struct {
	ctx  context.Context
	make func(context.Context, *sqlconn.Tx) error
	done chan error
}

func (c change) run(tx *sqlconn.Tx) (err error) {
	defer panics.Recover(&err)
	return c.make(context.WithoutCancel(c.ctx), tx)
}

// maxBatch bounds how long the first of a commit's changes waits for the last.
const maxBatch = 64

// Do makes a change, and returns when it is durable. An error of f leaves everything as it was. A change whose
// context has ended before its turn is not made; one that is under way is finished, since its transaction is
// others' too: f gets a context that does not end. f is called again when another change has failed, and only its
// last call counts. A panic of f is its error, a *panics.Error.
func (w *Writer) Do(ctx context.Context, f func(context.Context, *sqlconn.Tx) error) error {
	c := change{ctx, f, make(chan error, 1)}
	select {
	case w.changes <- c:
		return <-c.done
	case <-w.stopped:
		return sql.ErrConnDone
	case <-ctx.Done():
		return ctx.Err()
	}
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
	w.stop()
	<-w.ended
	return w.db.Close()
}

// Soon takes a ticket: whoever has it will soon make a change. done gives it back, once, when
// that is made or will not be.
//
// A commit costs as much as several changes, most of it for the disk: so it waits for half of the tickets that are out,
// but only until pause after the commit before. While no tickets are out, no commit waits; what comes during one is in
// the next.
func (w *Writer) Soon() (done func()) {
	w.tickets.Add(1)
	return w.done
}

const pause = 20 * time.Millisecond

func (w *Writer) run() {
	defer close(w.ended)
	var last time.Time // when a commit began
	for {
		select {
		case c := <-w.changes:
			batch := w.gather(c, last)
			last = time.Now()
			w.commit(batch)
		case <-w.stopped:
			return
		}
	}
}

// gather adds to a change those that are to be made with it.
func (w *Writer) gather(first change, last time.Time) []change {
	batch := []change{first}
	var due <-chan time.Time
	for len(batch) < maxBatch {
		select {
		case c := <-w.changes:
			batch = append(batch, c)
			continue
		default:
		}
		if int64(2*len(batch)) >= w.tickets.Load() {
			break
		}
		if due == nil {
			due = time.After(time.Until(last.Add(pause)))
		}
		select {
		case c := <-w.changes:
			batch = append(batch, c)
		case <-due:
			return batch
		case <-w.stopped:
			return batch
		}
	}
	return batch
}

func (w *Writer) commit(batch []change) {
	// A savepoint copies each page that is changed behind it, and failures are rare: the changes are only
	// kept apart if one of them fails.
	results, err := w.try(batch, false)
	if errors.Is(err, errTogether) && len(batch) > 1 {
		results, err = w.try(batch, true)
	}
	for i, c := range batch {
		if results[i] == nil {
			results[i] = err
		}
		c.done <- results[i]
	}
}

var errTogether = errors.New("one of the changes that were not kept apart failed")

// try makes the changes in one transaction. If one fails, apart undoes it alone; without, it undoes
// all, and fails with errTogether.
func (w *Writer) try(batch []change, apart bool) (results []error, err error) {
	defer func() {
		if err != nil {
			w.version++
		}
	}()
	defer panics.Recover(&err) // of the driver
	results = make([]error, len(batch))
	tx, err := w.db.BeginTx(context.Background(), nil)
	if err != nil {
		return results, err
	}
	defer tx.Rollback() // no effect after Commit
	before := w.others
	if err := tx.Stmt(w.dataVersion).QueryRow().Scan(&w.others); err != nil {
		return results, err
	}
	if w.others != before {
		w.version++
	}
	for i, c := range batch {
		if results[i] = c.ctx.Err(); results[i] != nil {
			continue
		}
		if apart {
			if _, err := tx.Stmt(w.savepoint).Exec(); err != nil {
				return results, err
			}
		}
		results[i] = c.run(&sqlconn.Tx{Tx: tx, Version: w.version})
		if !apart {
			if results[i] != nil {
				return results, errTogether
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
	return results, tx.Commit()
}
