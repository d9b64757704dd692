// Package postgres opens PostgreSQL databases whose commits outlive a loss of power, for several instances at once.
package postgres

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
)

// A DB is one that is open. Its own methods read.
type DB struct {
	*sql.DB
	hosts int // that its connection string names
}

// Open opens the database of a connection string. Its tables are made by the role that owns them: the service's own
// where that is so, else see Upgrade.
func Open(ctx context.Context, name string, migrations ...string) (*DB, error) {
	db, err := connect(name)
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(32)
	db.SetMaxIdleConns(32)
	if err = db.upToDate(ctx, migrations); err != nil {
		return nil, errors.Join(fmt.Errorf("the PostgreSQL database cannot be used: %w", err), db.Close())
	}
	return db, nil
}

// connect gives the connections of a connection string, and of what the environment adds to it (PGHOST, PGSSLMODE,
// PGSERVICE, ...). Each host that it may come to is on this machine, or proves by TLS that it has the name by which
// it is called: a server that somebody else put in its place would be told every sealed KME, and asked for them.
func connect(name string) (*DB, error) {
	config, err := pgx.ParseConfig(name)
	if err != nil {
		// err may have the password.
		return nil, errors.New("the connection string of PostgreSQL cannot be parsed, or a file that it names cannot " +
			"be read")
	}
	ways := append([]*pgconn.FallbackConfig{{Host: config.Host, Port: config.Port,
		TLSConfig: config.TLSConfig}}, config.Fallbacks...)
	hosts := map[string]bool{}
	for _, way := range ways {
		hosts[fmt.Sprint(way.Host, way.Port)] = true
		tls := way.TLSConfig
		if filepath.IsAbs(way.Host) || tls != nil && !tls.InsecureSkipVerify && tls.ServerName == way.Host &&
			way.Host != "" {
			continue
		}
		return nil, errors.New("the connection string of PostgreSQL allows a server that does not prove its name: " +
			"write ?sslmode=verify-full&sslrootcert=FILE after the database's name, with the CA's certificate in " +
			"FILE; or, for a server on this machine, postgres://USER@/DATABASE?host=/FOLDER with the folder of its " +
			"Unix socket")
	}
	return &DB{stdlib.OpenDB(*config, stdlib.OptionAfterConnect(ready)), len(hosts)}, nil
}

// ready has a new connection read by an index where it can, and refuses a server that confirms what it could still
// forget: after a failover, it is another one. (A plan is made when a connection uses a statement first, and that of an
// empty table, by bitmaps, reads a sixteenth of a ledger to find the last entry of a chain.)
func ready(ctx context.Context, conn *pgx.Conn) error {
	for _, setting := range []string{"fsync", "synchronous_commit", "full_page_writes"} {
		var value, plans string
		if err := conn.QueryRow(ctx, "SELECT current_setting($1), set_config('enable_bitmapscan', 'off', false)",
			setting).Scan(&value, &plans); err != nil {
			return err
		}
		if value == "off" {
			return fmt.Errorf("its setting %s is off: a loss of power would take bindings that were confirmed", setting)
		}
	}
	return nil
}

// Unsynchronised says what is wrong with a server's standbys; nothing if there are none, or what is confirmed is on the
// disk of one too.
func (db *DB) Unsynchronised(ctx context.Context) (what string, err error) {
	var standbys int
	var names, commit string
	if err := db.QueryRowContext(ctx, "SELECT (SELECT count(*) FROM pg_stat_replication), "+
		"current_setting('synchronous_standby_names'), current_setting('synchronous_commit')").Scan(&standbys, &names,
		&commit); err != nil {
		return "", err
	}
	switch {
	case names != "" && (commit == "local" || commit == "remote_write"):
		return fmt.Sprintf("its setting synchronous_commit is %s: what it confirms is not yet on a standby's disk",
			commit), nil
	case names == "" && (standbys > 0 || db.hosts > 1):
		return "its standbys are asynchronous, since its setting synchronous_standby_names is empty", nil
	}
	return "", nil
}

// Alone makes a change while no other is made, whichever instance makes it. It returns when the change is durable; an
// error of f leaves everything as it was.
func (db *DB) Alone(ctx context.Context, f func(context.Context, *sql.Tx) error) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // no effect after Commit
	if _, err := tx.ExecContext(ctx, lock); err != nil {
		return err
	}
	if err := f(ctx, tx); err != nil {
		return err
	}
	return tx.Commit()
}

// lock has no other instance change anything until the transaction ends.
const lock = "SELECT pg_advisory_xact_lock(hashtextextended('kmehsm', 0))"

// dialect turns a migration into PostgreSQL's dialect. Texts are compared byte by byte, as SQLite does.
var dialect = strings.NewReplacer("BLOB", "BYTEA", " WITHOUT ROWID", "", " TEXT", ` TEXT COLLATE "C"`)

// upToDate brings the schema up to date, if it is not and the role may.
func (db *DB) upToDate(ctx context.Context, migrations []string) error {
	have, err := schemaVersion(ctx, db, migrations)
	if err == nil && have < len(migrations) {
		err = db.Alone(ctx, func(ctx context.Context, tx *sql.Tx) error {
			return migrate(ctx, tx, migrations)
		})
	}
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == "42501" { // insufficient_privilege
		err = fmt.Errorf("its tables are not what this program needs, or this role may not use them: "+
			"run keysvc store upgrade with the role that owns them: %w", err)
	}
	return err
}

// A queryer is a database or a transaction.
type queryer interface {
	QueryRowContext(context.Context, string, ...any) *sql.Row
}

// schemaVersion is 0 for an empty database.
func schemaVersion(ctx context.Context, q queryer, migrations []string) (have int, err error) {
	var table sql.NullString
	if err := q.QueryRowContext(ctx, "SELECT to_regclass('schema_version')::text").Scan(&table); err != nil ||
		!table.Valid {
		return 0, err
	}
	if err = q.QueryRowContext(ctx, "SELECT version FROM schema_version").Scan(&have); errors.Is(err, sql.ErrNoRows) {
		err = nil
	}
	if have > len(migrations) {
		err = fmt.Errorf("its schema has version %d, this program knows %d: use a newer program", have, len(migrations))
	}
	return have, err
}

func migrate(ctx context.Context, tx *sql.Tx, migrations []string) error {
	have, err := schemaVersion(ctx, tx, migrations)
	if err != nil || have == len(migrations) {
		return err
	}
	statements := []string{"CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)"}
	for _, m := range migrations[have:] {
		statements = append(statements, dialect.Replace(m))
	}
	statements = append(statements, "DELETE FROM schema_version", fmt.Sprintf("INSERT INTO schema_version VALUES (%d)",
		len(migrations)))
	for _, statement := range statements {
		if _, err := tx.ExecContext(ctx, statement); err != nil {
			return err
		}
	}
	return nil
}
