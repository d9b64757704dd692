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

	_ "github.com/mattn/go-sqlite3" // the driver
)

// Open opens the database at path, or makes it, for its owner only. Other processes may have it open too. Every commit
// is synced to disk before it returns (WAL with synchronous=FULL). PRAGMA user_version says which version of the schema
// a database has.
//
// write has one connection: SQLite has one writer at a time, and waiting for the connection is fair and honours
// contexts, which waiting for SQLite's file lock does not.
func Open(ctx context.Context, path, schema string, version int) (read, write *sql.DB, err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, nil, fmt.Errorf("the database's folder cannot be made: %w", err)
	}
	// SQLite would make it with the umask's mode, and gives its own other files the mode of this one.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, nil, fmt.Errorf("the database cannot be opened: %w", err)
	}
	f.Close()
	dsn := func(extra string) string {
		return (&url.URL{Scheme: "file", OmitHost: true, Path: path}).String() +
			"?_journal_mode=WAL&_synchronous=FULL&_busy_timeout=5000&_foreign_keys=on" + extra
	}
	if write, err = sql.Open("sqlite3", dsn("&_txlock=immediate")); err != nil {
		return nil, nil, err
	}
	write.SetMaxOpenConns(1)
	if err := migrate(ctx, write, schema, version); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("the database %s cannot be used: %w", path, err), write.Close())
	}
	if read, err = sql.Open("sqlite3", dsn("&_query_only=on")); err != nil {
		return nil, nil, errors.Join(err, write.Close())
	}
	read.SetMaxOpenConns(2 * runtime.GOMAXPROCS(0))
	read.SetMaxIdleConns(2 * runtime.GOMAXPROCS(0))
	return read, write, nil
}

func migrate(ctx context.Context, db *sql.DB, schema string, version int) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // no effect after Commit
	var have int
	if err := tx.QueryRowContext(ctx, "PRAGMA user_version").Scan(&have); err != nil {
		return err
	}
	switch have {
	case version:
		return nil
	case 0:
		if _, err := tx.ExecContext(ctx, schema+fmt.Sprintf("PRAGMA user_version = %d;", version)); err != nil {
			return err
		}
		return tx.Commit()
	}
	return fmt.Errorf("its schema has version %d, this program knows %d: use the program that wrote it, or a newer one", have, version)
}
