// Package sqlconn runs SQL statements. Their errors name the operation.
package sqlconn

import (
	"context"
	"database/sql"
	"fmt"
)

// A Conn runs the statements of one operation. The database's errors are named here, and nowhere else, by the operation
// that they have ended: "establish: disk I/O error".
type Conn struct {
	Operation string
	DB        Statements
}

// Statements runs statements. Each calls f for every row, and gives its error as it is.
type Statements interface {
	// Do changes rows. In a transaction its error may come later, as that of another statement or of the commit.
	Do(ctx context.Context, text string, args ...any) error
	Changed(ctx context.Context, text string, args ...any) (rows int64, err error)
	Each(ctx context.Context, f func(scan func(...any) error) error, text string, args ...any) error
}

// Named names an error that comes from no method, such as that of a commit.
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
	return c.Named(c.DB.Do(ctx, text, args...))
}

// Changed is Do, and says how many rows it has changed.
func (c Conn) Changed(ctx context.Context, text string, args ...any) (rows int64, err error) {
	rows, err = c.DB.Changed(ctx, text, args...)
	return rows, c.Named(err)
}

// One reads a row into to, if there is one.
func (c Conn) One(ctx context.Context, to []any, text string, args ...any) (found bool, err error) {
	err = c.DB.Each(ctx, func(scan func(...any) error) error {
		found = true
		return scan(to...)
	}, text, args...)
	return found && err == nil, c.Named(err)
}

// Each calls f for every row. An error of f is its own.
func (c Conn) Each(ctx context.Context, f func(scan func(...any) error) error, text string, args ...any) error {
	var own error
	err := c.DB.Each(ctx, func(scan func(...any) error) error {
		own = f(func(to ...any) error { return c.Named(scan(to...)) })
		return own
	}, text, args...)
	if own != nil {
		return own
	}
	return c.Named(err)
}

// SQL runs statements on a *sql.DB or a *sql.Tx.
type SQL struct {
	DB interface {
		ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
		QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	}
}

func (s SQL) Do(ctx context.Context, text string, args ...any) error {
	_, err := s.DB.ExecContext(ctx, text, args...)
	return err
}

func (s SQL) Changed(ctx context.Context, text string, args ...any) (rows int64, err error) {
	result, err := s.DB.ExecContext(ctx, text, args...)
	if err != nil {
		return 0, err
	}
	return result.RowsAffected()
}

func (s SQL) Each(ctx context.Context, f func(scan func(...any) error) error, text string, args ...any) error {
	rows, err := s.DB.QueryContext(ctx, text, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := f(rows.Scan); err != nil {
			return err
		}
	}
	return rows.Err()
}

// Brief is SQL for statements that take no longer than a look into an index: one that has begun is not interrupted. To
// be ready for that costs more than to finish. The wait for a connection ends with the context.
type Brief struct {
	SQL
	db *sql.DB
}

// NewBrief gives the Brief of a database.
func NewBrief(db *sql.DB) Brief { return Brief{SQL: SQL{DB: db}, db: db} }

func (s Brief) Each(ctx context.Context, f func(scan func(...any) error) error, text string, args ...any) error {
	conn, err := s.db.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	return SQL{DB: conn}.Each(context.WithoutCancel(ctx), f, text, args...)
}
