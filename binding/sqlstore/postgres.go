package sqlstore

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

// connect gives the connections of a connection string, and of what the environment adds to it (PGHOST, PGSSLMODE,
// PGSERVICE, ...). Each host that it may come to is on this machine, or proves by TLS that it has the name by which
// it is called: a server that somebody else put in its place would be told every sealed KME, and asked for them.
func connect(name string) (*sql.DB, error) {
	config, err := pgx.ParseConfig(name)
	if err != nil {
		// err may have the password.
		return nil, errors.New("the connection string of PostgreSQL cannot be parsed, or a file that it names cannot be read")
	}
	ways := append([]*pgconn.FallbackConfig{{Host: config.Host, TLSConfig: config.TLSConfig}}, config.Fallbacks...)
	for _, way := range ways {
		tls := way.TLSConfig
		if filepath.IsAbs(way.Host) || tls != nil && !tls.InsecureSkipVerify && tls.ServerName == way.Host && way.Host != "" {
			continue
		}
		return nil, errors.New("the connection string of PostgreSQL allows a server that does not prove its name: " +
			"write ?sslmode=verify-full&sslrootcert=FILE after the database's name, with the CA's certificate in FILE; or, " +
			"for a server on this machine, postgres://USER@/DATABASE?host=/FOLDER with the folder of its Unix socket")
	}
	return stdlib.OpenDB(*config), nil
}

// Two roles of PostgreSQL: the owner of the tables makes and changes them; the service's own may do what it has to,
// and neither change nor remove an entry of the ledger.

// serviceMay is what the service's role is granted on each table.
var serviceMay = map[string]string{
	"schema_version": "SELECT",
	"manufacturers":  "SELECT, INSERT, UPDATE",
	"lots":           "SELECT, INSERT, UPDATE",
	"attempts":       "SELECT, INSERT, UPDATE, DELETE",
	"bindings":       "SELECT, INSERT, UPDATE, DELETE",
	"ledger":         "SELECT, INSERT",
	"spent_rands":    "SELECT, INSERT",
	"actors":         "SELECT, INSERT",
}

// Upgrade makes the tables of a PostgreSQL database, or brings them up to date, as the role that owns them, and
// grants the service's role what it needs of them, and no more. A role that could change the ledger all the same is
// refused, and nothing is changed then.
func Upgrade(ctx context.Context, name, role string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	if strings.HasPrefix(name, "sqlite:") {
		return errors.New("only a store in PostgreSQL has roles; one in SQLite is brought up to date when it is opened")
	}
	db, err := connect(name)
	if err != nil {
		return err
	}
	defer db.Close()
	return changePostgres(db)(ctx, schemaLock, func(ctx context.Context, tx *sql.Tx) error {
		if err := migrate(ctx, tx); err != nil {
			return err
		}
		if err := grant(ctx, tx, role); err != nil {
			return err
		}
		why, err := mayChangeLedger(ctx, tx, role)
		if err == nil && why != "" {
			err = fmt.Errorf("the role %s %s: give the service a role without that", role, why)
		}
		return err
	})
}

func grant(ctx context.Context, tx *sql.Tx, role string) error {
	var known bool
	if err := tx.QueryRowContext(ctx, "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", role).Scan(&known); err != nil {
		return err
	}
	if !known {
		return fmt.Errorf("PostgreSQL has no role %q: make it with CREATE ROLE ... LOGIN", role)
	}
	var schema string
	if err := tx.QueryRowContext(ctx, "SELECT current_schema()").Scan(&schema); err != nil {
		return err
	}
	grantee := pgx.Identifier{role}.Sanitize()
	statements := []string{"GRANT USAGE ON SCHEMA " + pgx.Identifier{schema}.Sanitize() + " TO " + grantee}
	rows, err := tx.QueryContext(ctx, "SELECT tablename FROM pg_tables WHERE schemaname = $1", schema)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var table string
		if err := rows.Scan(&table); err != nil {
			return err
		}
		if may := serviceMay[table]; may != "" {
			statements = append(statements,
				"REVOKE ALL ON "+table+" FROM PUBLIC, "+grantee,
				"GRANT "+may+" ON "+table+" TO "+grantee)
		}
	}
	if err := rows.Err(); err != nil {
		return err
	}
	for _, s := range statements {
		if _, err := tx.ExecContext(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

// Warnings says what of the database is not as it should be for a service: a role that could change or remove what is
// in the ledger, or in the table of spent RANDs. The row MACs and the high-water mark show that afterwards; a role of
// its own prevents it.
func (s *Store) Warnings(ctx context.Context) ([]string, error) {
	if s.company != nil { // SQLite, which has no roles
		return nil, nil
	}
	var role string
	if err := s.read.QueryRowContext(ctx, "SELECT current_user").Scan(&role); err != nil {
		return nil, err
	}
	why, err := mayChangeLedger(ctx, s.read, role)
	if err != nil || why == "" {
		return nil, err
	}
	const warning = "the store's role %s could change or remove entries of the ledger, since it %s: " +
		"give the service a role of its own (keysvc store upgrade)"
	return []string{fmt.Sprintf(warning, role, why)}, nil
}

// mayChangeLedger says by what a role could, or nothing. A member of the role that owns something is as good as that,
// and so is one that has to SET ROLE first; the owner of a schema or of the database may drop what others have in it;
// and whoever runs programs on the server, or writes its files, may do all that the server may.
func mayChangeLedger(ctx context.Context, db interface {
	QueryRowContext(context.Context, string, ...any) *sql.Row
}, role string,
) (why string, err error) {
	err = db.QueryRowContext(ctx, `
		SELECT coalesce(min(CASE
			WHEN r.rolsuper THEN 'is a superuser'
			WHEN m.rolcreaterole AND NOT m.rolsuper THEN 'may make roles, and give itself those of others'
			WHEN m.rolname = 'pg_execute_server_program' THEN 'may run programs on the server'
			WHEN m.rolname = 'pg_write_server_files' THEN 'may write files of the server'
			WHEN pg_has_role(r.oid, c.relowner, 'MEMBER') THEN 'owns the table ' || c.relname
			WHEN pg_has_role(r.oid, n.nspowner, 'MEMBER') THEN 'owns the schema ' || n.nspname
			WHEN pg_has_role(r.oid, d.datdba, 'MEMBER') THEN 'owns the database ' || d.datname
			WHEN has_any_column_privilege(m.oid, c.oid, 'UPDATE')
				OR has_table_privilege(m.oid, c.oid, 'DELETE, TRUNCATE, TRIGGER')
				THEN 'has more than SELECT and INSERT on the table ' || c.relname
		END), '')
		FROM pg_roles r JOIN pg_roles m ON pg_has_role(r.oid, m.oid, 'MEMBER'),
			pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace, pg_database d
		WHERE r.rolname = $1 AND n.nspname = current_schema() AND c.relname IN ('ledger', 'spent_rands')
			AND d.datname = current_database()`, role).Scan(&why)
	return why, err
}
