// Package sqlconn has the errors of a database name what was being done.
package sqlconn

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
)

// A Conn runs the statements of one operation. The database's errors are named here, and nowhere else, by the operation
// that they have ended: "establish: disk I/O error".
type Conn struct {
	Operation string
	DB        Statements
}

// Statements is a *sql.DB or a *sql.Tx.
type Statements interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// Named names an error of the database that no method has seen, as that of a commit.
func (c Conn) Named(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", c.Operation, err)
}

// A Tx is a change that is under way.
type Tx struct {
	*sql.Tx
	// Version is the same in two changes only if, from the first to the second, nothing has changed the database but
	// changes of the same process that were made between them, and none of these was undone. 0: that is not known.
	Version int64
}

// Do changes rows.
func (c Conn) Do(ctx context.Context, text string, args ...any) error {
	_, err := c.DB.ExecContext(ctx, text, args...)
	return c.Named(err)
}

// Changed is Do, and says how many rows it has changed.
func (c Conn) Changed(ctx context.Context, text string, args ...any) (rows int64, err error) {
	result, err := c.DB.ExecContext(ctx, text, args...)
	if err == nil {
		rows, err = result.RowsAffected()
	}
	return rows, c.Named(err)
}

// One reads a row into to, if there is one.
func (c Conn) One(ctx context.Context, to []any, text string, args ...any) (found bool, err error) {
	err = c.DB.QueryRowContext(ctx, text, args...).Scan(to...)
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	return err == nil, c.Named(err)
}

// Each calls f for every row. An error of f is its own.
func (c Conn) Each(ctx context.Context, f func(scan func(...any) error) error, text string, args ...any) error {
	rows, err := c.DB.QueryContext(ctx, text, args...)
	if err != nil {
		return c.Named(err)
	}
	defer rows.Close()
	scan := func(to ...any) error { return c.Named(rows.Scan(to...)) }
	for rows.Next() {
		if err := f(scan); err != nil {
			return err
		}
	}
	return c.Named(rows.Err())
}
