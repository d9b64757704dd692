package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/kmehsm/kmehsm/internal/sqlite"
	"github.com/kmehsm/kmehsm/kme"
)

// CheckName refuses what is no name of a store. Its error has no password.
func CheckName(name string) error {
	for _, kind := range []string{"sqlite:", "postgres://", "postgresql://"} {
		if where, ok := strings.CutPrefix(name, kind); ok && where != "" {
			return nil
		}
	}
	return errors.New("the store is neither sqlite:PATH nor postgres://USER@HOST/DATABASE")
}

// Open opens the store that name stands for, or makes it: sqlite:PATH, or a connection string of PostgreSQL,
// postgres://USER@HOST/DATABASE?sslmode=verify-full. A password for that is better in PGPASSFILE than in the string.
// Tables in PostgreSQL are made by the role that owns them: see Upgrade.
//
// key is that of the rows' MACs, hsmkeys' Derive for RowKey: a store that was written under another one is damaged.
// It is copied.
func Open(ctx context.Context, name string, key kme.Secret) (*Store, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	own, err := kme.NewSecret(key.Bytes())
	if err != nil {
		return nil, err
	}
	s := &Store{key: own, macs: newMACs(own), moved: make(chan struct{}, 1)}
	if path, ok := strings.CutPrefix(name, "sqlite:"); ok {
		err = s.openSQLite(ctx, path)
	} else {
		err = s.openPostgres(ctx, name)
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// RowKey is the purpose of the key that Open takes.
const RowKey = "rows"

// InFolder is the name of the embedded store of a service whose own folder is dir.
func InFolder(dir string) string { return "sqlite:" + filepath.Join(dir, "keysvc.db") }

func (s *Store) openSQLite(ctx context.Context, path string) error {
	read, write, err := sqlite.Open(ctx, path, migrations...)
	if err != nil {
		return err
	}
	s.read, s.close, s.company = read, write.Close, write.Company
	// SQLite has one writer at a time: what must not happen at once does not.
	s.begin = func(ctx context.Context, _ string, f func(context.Context, *sql.Tx) error) error {
		return write.Do(ctx, f)
	}
	s.lock = func(context.Context, *sql.Tx, string) error { return nil }
	return nil
}

func (s *Store) openPostgres(ctx context.Context, name string) error {
	db, err := connect(name)
	if err != nil {
		return err
	}
	db.SetMaxOpenConns(32)
	db.SetMaxIdleConns(32)
	s.read, s.begin, s.lock, s.close = db, changePostgres(db), lockPostgres, func() error { return nil }
	if err = checkPostgres(ctx, db); err == nil {
		err = s.upToDate(ctx)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("the PostgreSQL database cannot be used: %w", err), db.Close())
	}
	return nil
}

// checkPostgres refuses a server that confirms what it could still forget.
func checkPostgres(ctx context.Context, db *sql.DB) error {
	for _, setting := range []string{"fsync", "synchronous_commit", "full_page_writes"} {
		var value string
		if err := db.QueryRowContext(ctx, "SELECT current_setting($1)", setting).Scan(&value); err != nil {
			return err
		}
		if value == "off" {
			return fmt.Errorf("its setting %s is off: a loss of power would take bindings that were confirmed", setting)
		}
	}
	return nil
}

// changePostgres makes changes with the same key one after the other, whichever instance makes them: each sees all that
// the one before did. What has to be unique besides, a KME of an IMEI, is so by a key of its table.
func changePostgres(db *sql.DB) func(context.Context, string, func(context.Context, *sql.Tx) error) error {
	return func(ctx context.Context, key string, f func(context.Context, *sql.Tx) error) error {
		tx, err := db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		defer tx.Rollback() // no effect after Commit
		if err := lockPostgres(ctx, tx, key); err != nil {
			return err
		}
		if err := f(ctx, tx); err != nil {
			return err
		}
		return tx.Commit()
	}
}

func lockPostgres(ctx context.Context, tx *sql.Tx, key string) error {
	_, err := tx.ExecContext(ctx, "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", key)
	return err
}

// forPostgres turns a migration into PostgreSQL's dialect. Texts are compared byte by byte, as SQLite does.
var forPostgres = strings.NewReplacer("BLOB", "BYTEA", " WITHOUT ROWID", "", " TEXT", ` TEXT COLLATE "C"`)

// schemaLock is the key under which one instance after the other looks after the schema.
const schemaLock = "schema"

// upToDate brings the schema up to date, if it is not and s has the role that may.
func (s *Store) upToDate(ctx context.Context) error {
	have, err := schemaVersion(ctx, s.read)
	if err == nil && have < len(migrations) {
		err = s.begin(ctx, schemaLock, migrate)
	}
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == "42501" { // insufficient_privilege
		err = fmt.Errorf("its tables are not what this program needs, or this role may not use them: "+
			"run keysvc store upgrade with the role that owns them: %w", err)
	}
	return err
}

// schemaVersion is 0 for an empty database.
func schemaVersion(ctx context.Context, db interface {
	QueryRowContext(context.Context, string, ...any) *sql.Row
},
) (have int, err error) {
	var table sql.NullString
	if err := db.QueryRowContext(ctx, "SELECT to_regclass('schema_version')::text").Scan(&table); err != nil || !table.Valid {
		return 0, err
	}
	if err = db.QueryRowContext(ctx, "SELECT version FROM schema_version").Scan(&have); errors.Is(err, sql.ErrNoRows) {
		err = nil
	}
	if have > len(migrations) {
		err = fmt.Errorf("its schema has version %d, this program knows %d: use a newer program", have, len(migrations))
	}
	return have, err
}

func migrate(ctx context.Context, tx *sql.Tx) error {
	have, err := schemaVersion(ctx, tx)
	if err != nil || have == len(migrations) {
		return err
	}
	statements := []string{"CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)"}
	for _, m := range migrations[have:] {
		statements = append(statements, forPostgres.Replace(m))
	}
	statements = append(statements, "DELETE FROM schema_version", fmt.Sprintf("INSERT INTO schema_version VALUES (%d)", len(migrations)))
	for _, statement := range statements {
		if _, err := tx.ExecContext(ctx, statement); err != nil {
			return err
		}
	}
	return nil
}
