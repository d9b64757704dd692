package postgres

import (
	"context"
	"database/sql"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/kmehsm/kmehsm/internal/sqlconn"
)

// Rights are what a service's role is granted.
type Rights struct {
	On         map[string]string // each table: SELECT, INSERT, ...
	AppendOnly []string          // the tables whose rows it may neither change nor remove: see MayChange
}

// Upgrade makes the tables of a database, or brings them up to date, as the role that owns them, and grants a service's
// role its rights. A role that has more on the tables that are AppendOnly is refused, and nothing is changed then.
func Upgrade(ctx context.Context, name, role string, rights Rights, schema sqlconn.Schema) error {
	db, err := connect(name, schema)
	if err != nil {
		return err
	}
	defer db.Close()
	return reached(db.changeTables(ctx, func(ctx context.Context, tx *sql.Tx) error {
		have, err := Number(ctx, tx)
		if err != nil {
			return err
		}
		if version := schema.Newer(have); version > 0 { // whose rights this program does not know either
			return fmt.Errorf("its schema has version %d already, and this program knows %d: use the keysvc of the "+
				"newest release", version, len(schema.Migrations))
		}
		if err := migrate(ctx, tx, schema); err != nil {
			return err
		}
		db := sqlconn.SQL{DB: tx}
		if err := grant(ctx, sqlconn.Conn{Operation: "grant role " + role + " its rights", DB: db}, role,
			rights.On); err != nil {
			return err
		}
		why, err := mayChange(ctx, db, role, rights.AppendOnly)
		if err == nil && why != "" {
			err = fmt.Errorf("the role %s %s: give the service a role without that", role, why)
		}
		return err
	}))
}

func grant(ctx context.Context, db sqlconn.Conn, role string, rights map[string]string) error {
	var schema string
	known, err := db.One(ctx, []any{&schema}, "SELECT current_schema() FROM pg_roles WHERE rolname = $1", role)
	if err != nil {
		return err
	}
	if !known {
		return fmt.Errorf("PostgreSQL has no role %q: make it with CREATE ROLE ... LOGIN", role)
	}
	grantee := pgx.Identifier{role}.Sanitize()
	statements := []string{"GRANT USAGE ON SCHEMA " + pgx.Identifier{schema}.Sanitize() + " TO " + grantee}
	if err := db.Each(ctx, func(scan func(...any) error) error {
		var table string
		if err := scan(&table); err != nil {
			return err
		}
		if may := rights[table]; may != "" {
			statements = append(statements,
				"REVOKE ALL ON "+table+" FROM PUBLIC, "+grantee,
				"GRANT "+may+" ON "+table+" TO "+grantee)
		}
		return nil
	}, "SELECT tablename FROM pg_tables WHERE schemaname = $1", schema); err != nil {
		return err
	}
	for _, s := range statements {
		if err := db.Do(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

// MayChange says by what the role of this connection could change or remove rows of some tables, or nothing.
func (db *DB) MayChange(ctx context.Context, tables ...string) (role, why string, err error) {
	if err = db.QueryRowContext(ctx, "SELECT current_user").Scan(&role); err != nil {
		return "", "", fmt.Errorf("look at which role this is: %w", err)
	}
	why, err = mayChange(ctx, sqlconn.SQL{DB: db}, role, tables)
	return role, why, err
}

// mayChange says by what a role could change or remove rows of some tables, or nothing. A member of the role that
// owns something is as good as that, and so is one that has to SET ROLE first; the owner of a schema or of the database
// may drop what others have in it; and whoever runs programs on the server, or writes its files, may do all that the
// server may.
func mayChange(ctx context.Context, db sqlconn.Statements, role string, tables []string) (why string, err error) {
	_, err = sqlconn.Conn{Operation: "look at the rights of role " + role, DB: db}.One(ctx, []any{&why}, `
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
		WHERE r.rolname = $1 AND n.nspname = current_schema() AND c.relname = ANY($2)
			AND d.datname = current_database()`, role, tables)
	return why, err
}
