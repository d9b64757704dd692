package sqlstore

import (
	"context"
	"database/sql"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/ledger"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/subscription"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/internal/postgres"
	"github.com/kmehsm/kmehsm/internal/rowmac"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/internal/sqlite"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/kme"
)

var (
	//go:embed schema.sql
	schema string

	// known is the schema of both databases. The release before must work beside this one:
	// docs/decisions/0050-upgrades.md says what a migration may do.
	known = sqlconn.First(schema)
)

// CheckName refuses a text that is no store's name, as wrong usage. Its error has no password.
func CheckName(name string) error {
	for _, kind := range []string{"sqlite:", "postgres://", "postgresql://"} {
		if where, ok := strings.CutPrefix(name, kind); ok && where != "" {
			return nil
		}
	}
	return usage.Errorf("the store is neither sqlite:PATH nor postgres://USER@HOST/DATABASE")
}

// Open opens a store, or makes it: sqlite:PATH, or postgres://USER@HOST/DATABASE?sslmode=verify-full. Keep a password
// in PGPASSFILE, not in the name. Tables in PostgreSQL are made by their owner: see Upgrade.
//
// key is that of the rows' MACs, Derive of hsmkeys for RowKey: with another key, a store is damaged. It is copied.
func Open(ctx context.Context, name string, key kme.Secret) (*Store, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	own, err := kme.NewSecret(key.Bytes())
	if err != nil {
		return nil, err
	}
	s := &Store{key: own, macs: tables.Key{Key: rowmac.New(own)}}
	if path := File(name); path != "" {
		err = s.openSQLite(ctx, path)
	} else {
		err = s.openPostgres(ctx, name)
	}
	if err != nil {
		return nil, err
	}
	s.chains = ledger.New(s.macs, s.read, s.settle)
	s.Ledger = s.chains.Ledger()
	return s, nil
}

// Look says whether a store exists, and fails if this release cannot work with it. It changes nothing.
func Look(ctx context.Context, name string) (there bool, err error) {
	if err := CheckName(name); err != nil {
		return false, err
	}
	var number int
	if path := File(name); path == "" {
		number, err = postgres.Look(ctx, name, known)
	} else if _, err = os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err == nil {
		number, err = sqlite.Look(ctx, path)
	}
	if err == nil {
		if _, err = known.Lacks(number); err != nil {
			err = fmt.Errorf("the store cannot be used: %w", err)
		}
	}
	return number != 0, err
}

// RowKey is the purpose of the key that Open takes.
const RowKey = "rows"

// InFolder is the name of the embedded store of a service whose own folder is dir.
func InFolder(dir string) string { return "sqlite:" + filepath.Join(dir, "keysvc.db") }

// File is the file of an embedded store; empty if the store is in a server.
func File(name string) string {
	path, ok := strings.CutPrefix(name, "sqlite:")
	if !ok {
		return ""
	}
	return path
}

func (s *Store) openSQLite(ctx context.Context, path string) error {
	read, write, err := sqlite.Open(ctx, path, known)
	if err != nil {
		return err
	}
	s.read, s.close, s.soon, s.recent = read, write.Close, write.Soon, new(subscription.Recent)
	s.lookUp = sqlconn.NewBrief(read)
	// SQLite has one writer at a time, so it needs no locks.
	s.begin = func(ctx context.Context, key string, f begun) error {
		return write.Do(ctx, func(ctx context.Context, tx *sqlconn.Tx) error {
			known := s.recent.Begin(tx.Version, key)
			return f(ctx, sqlconn.SQL{DB: tx}, &s.recent.Heads, known)
		})
	}
	s.inPlace, s.writable, s.warnings = write.InPlace, write.Writable, write.Warnings
	s.schema = func(ctx context.Context) (int, error) { return sqlite.Number(ctx, read) }
	return nil
}

func (s *Store) openPostgres(ctx context.Context, name string) error {
	db, err := postgres.Open(ctx, name, known)
	if err != nil {
		return err
	}
	s.warnings = func(ctx context.Context) ([]string, error) { return postgresWarnings(ctx, db) }
	s.schema = func(ctx context.Context) (int, error) { return postgres.Number(ctx, db) }
	write := postgres.NewWriter[ledger.Heads](db)
	reader := postgres.NewReader(db)
	s.read, s.lookUp, s.soon, s.recent = db.DB, reader, write.Soon, &subscription.Recent{OnlyHints: true}
	s.close = func() error {
		write.Close()
		reader.Close()
		return nil
	}
	s.begin = func(ctx context.Context, key string, f begun) error {
		if key == everything {
			return db.Alone(ctx, func(ctx context.Context, tx *sql.Tx) error {
				return f(ctx, sqlconn.SQL{DB: tx}, new(ledger.Heads), nil)
			})
		}
		return write.Do(ctx, key, func(ctx context.Context, tx *postgres.Tx[ledger.Heads]) error {
			s.recent.Begin(0, key)
			return f(ctx, tx, tx.Shared, nil)
		})
	}
	return nil
}

// Two roles of PostgreSQL: the owner makes and changes the tables; the service's role can neither change nor remove an
// entry of the ledger.
var rights = postgres.Rights{
	On: map[string]string{
		"schema_version": "SELECT",
		"manufacturers":  "SELECT, INSERT, UPDATE",
		"lots":           "SELECT, INSERT, UPDATE",
		"attempts":       "SELECT, INSERT, UPDATE, DELETE",
		"bindings":       "SELECT, INSERT, UPDATE, DELETE",
		"ledger":         "SELECT, INSERT",
		"spent_rands":    "SELECT, INSERT",
		"actors":         "SELECT, INSERT",
		"equipment":      "SELECT, INSERT, UPDATE",
		"sightings":      "SELECT, INSERT, UPDATE, DELETE",
	},
	AppendOnly: []string{"ledger", "spent_rands"},
}

// Upgrade makes the tables of a PostgreSQL database, or brings them up to date, as their owner, and grants the
// service's role only what it needs. It refuses a role that could change the ledger all the same, and changes nothing
// then.
func Upgrade(ctx context.Context, name, role string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	if File(name) != "" {
		return errors.New("only a store in PostgreSQL has roles; one in SQLite is brought up to date when it is opened")
	}
	return postgres.Upgrade(ctx, name, role, rights, known)
}

// Warnings says what is wrong with a service's database: a role that could change or remove entries of the ledger or
// spent RANDs; standbys that could miss what was confirmed; an upgrade by a newer release. It is an error if this
// release cannot work with it any more.
func (s *Store) Warnings(ctx context.Context) ([]string, error) {
	warnings, err := s.warnings(ctx)
	var number int
	if err == nil {
		number, err = s.schema(ctx)
	}
	if err == nil {
		_, err = known.Lacks(number)
	}
	if version := known.Newer(number); version > 0 {
		warnings = append(warnings, fmt.Sprintf("a newer release has upgraded the store to schema version %d, and "+
			"this one knows %d: it can serve from it, and not migrate or upgrade it; upgrade this instance too",
			version, len(known.Migrations)))
	}
	return warnings, s.chains.Reads("look at the database").Named(err)
}

func postgresWarnings(ctx context.Context, db *postgres.DB) (warnings []string, err error) {
	role, why, err := db.MayChange(ctx, rights.AppendOnly...)
	if err == nil && why != "" {
		warnings = append(warnings, fmt.Sprintf("the store's role %s could change or remove entries of the ledger, "+
			"since it %s: give the service a role of its own (keysvc store upgrade)", role, why))
	}
	if err == nil {
		why, err = db.Unsynchronised(ctx)
	}
	if err == nil && why != "" {
		warnings = append(warnings, why)
	}
	return warnings, err
}
