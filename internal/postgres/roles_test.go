package postgres

import (
	"context"
	"database/sql"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
)

// An error of PostgreSQL names what was being done.
func TestPostgresErrorsNameTheOperation(t *testing.T) {
	db, err := Open(t.Context(), pgtest.Start(t).Database(t), sqlconn.First(table))
	if err != nil {
		t.Fatal(err)
	}
	ended, err := db.BeginTx(t.Context(), nil)
	if err == nil {
		err = ended.Rollback()
	}
	if err != nil {
		t.Fatal(err)
	}
	tx := sqlconn.SQL{DB: ended}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	for want, err := range map[string]error{
		"begin a transaction: ": db.Alone(ctx, func(context.Context, *sql.Tx) error { return nil }),
		"look at which role ":   third(db.MayChange(ctx, "chain")),
		"look at the rights of ": func() error {
			_, err := mayChange(ctx, tx, "keysvc", []string{"chain"})
			return err
		}(),
		"grant role keysvc ": grant(ctx, sqlconn.Conn{Operation: "grant role keysvc its rights", DB: tx}, "keysvc",
			nil),
		"look who is connected: ":       nobodyBelow(ctx, ended, 1),
		"read the version of its table": second(Number(ctx, db)),
	} {
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
}

// A warning that is none of the commit's is no doubt about it.
func TestPostgresWarnedBefore(t *testing.T) {
	db, err := Open(t.Context(), pgtest.Start(t).Database(t), sqlconn.First(table))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.Alone(t.Context(), func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "DO $$ BEGIN RAISE WARNING 'another one'; END $$")
		return err
	}); err != nil {
		t.Error(err)
	}
}

func second(_ int, err error) error      { return err }
func third(_, _ string, err error) error { return err }
