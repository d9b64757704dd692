package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
)

// tables are all, in an order that their references allow, with their columns; the first ones are the key.
var tables = []struct {
	name    string
	columns []string
}{
	{"manufacturers", []string{"key_id", "pem", "operator", "directory", "enrolled_at", "withdrawn", "decided_by", "decided_because", "decided_at"}},
	{"lots", []string{"manufacturer", "lot", "manifest", "imported_at", "withdrawn", "decided_by", "decided_because", "decided_at"}},
	{"attempts", []string{"id", "imsi", "origin", "expires_at", "opened"}},
	{"spent_rands", []string{"imsi", "rand"}},
	{"ledger", []string{"imei", "tag", "imsi"}},
	{"bindings", strings.Split(bindingColumns, ", ")},
}

// ErrNotEmpty: the store to copy to has something in it already.
var ErrNotEmpty = errors.New("the store to copy to is not empty: give it a new database")

// Copy copies everything to an empty store, in one transaction: it has all of it, or nothing. Nobody may be changing s meanwhile. report is
// called with the rows copied so far.
func (s *Store) Copy(ctx context.Context, to *Store, report func(rows int)) (rows int, err error) {
	from, err := s.read.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return 0, err
	}
	defer from.Rollback()
	err = to.change(ctx, "schema", func(ctx context.Context, tx *sql.Tx) error {
		rows = 0 // it may be called again
		for _, t := range tables {
			var n int
			if err := tx.QueryRowContext(ctx, "SELECT COUNT(*) FROM "+t.name).Scan(&n); err != nil {
				return err
			}
			if n > 0 {
				return ErrNotEmpty
			}
		}
		for _, t := range tables {
			if err := copyTable(ctx, from, tx, t.name, t.columns, func() { rows++; report(rows) }); err != nil {
				return fmt.Errorf("table %s: %w", t.name, err)
			}
		}
		return nil
	})
	return rows, err
}

func copyTable(ctx context.Context, from, to *sql.Tx, name string, columns []string, copied func()) error {
	list := strings.Join(columns, ", ")
	rows, err := from.QueryContext(ctx, "SELECT "+list+" FROM "+name)
	if err != nil {
		return err
	}
	defer rows.Close()
	marks := make([]string, len(columns))
	values, pointers := make([]any, len(columns)), make([]any, len(columns))
	for i := range columns {
		marks[i], pointers[i] = fmt.Sprintf("$%d", i+1), &values[i]
	}
	insert, err := to.PrepareContext(ctx, "INSERT INTO "+name+" ("+list+") VALUES ("+strings.Join(marks, ", ")+")")
	if err != nil {
		return err
	}
	defer insert.Close()
	for rows.Next() {
		if err := rows.Scan(pointers...); err != nil {
			return err
		}
		if _, err := insert.ExecContext(ctx, values...); err != nil {
			return err
		}
		copied()
	}
	return rows.Err()
}
