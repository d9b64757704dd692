package sqlstore

import (
	"context"
	"errors"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
)

// A txn is a change that is under way.
type txn struct {
	sqlconn.Conn
	known *stored  // what is recent of its key, if anything is
	after []func() // to be called when it is durable
	heads *heads
}

// heads are the last entries of the ledger's chains in a transaction; nil: not read yet.
type heads [binding.Chains]*binding.Head

// read takes in what was read of a chain, unless another change of the transaction has added to it meanwhile.
func (h *heads) read(chain int64, head binding.Head) {
	if h[chain] == nil {
		h[chain] = &head
	}
}

// everything is the key of a change that excludes every other.
const everything = ""

// change makes a change durably: none with the same key is under way meanwhile. f may be called again, and only its
// last call counts; an error of f leaves everything as it was, and is not named.
func (s *Store) change(ctx context.Context, operation, key string, f func(context.Context, *txn) error) error {
	if err := s.refusal(); err != nil {
		return err
	}
	var tx *txn
	err := s.transaction(ctx, operation, key, func(ctx context.Context, of *txn) error {
		tx = of
		return f(ctx, tx)
	})
	if err != nil {
		return err
	}
	for _, f := range tx.after {
		f()
	}
	return nil
}

// transaction is change also while the ledger is rolled back, and nothing is called after it.
func (s *Store) transaction(ctx context.Context, operation, key string, f func(context.Context, *txn) error) error {
	var own error
	err := s.begin(ctx, key, func(ctx context.Context, db sqlconn.Statements, h *heads, known *stored) error {
		own = f(ctx, &txn{Conn: sqlconn.Conn{Operation: operation, DB: db}, heads: h, known: known})
		return own
	})
	if err == nil || own != nil && errors.Is(err, own) {
		return err
	}
	return sqlconn.Conn{Operation: operation}.Named(err)
}

// reading is for what only reads, and not while the ledger is rolled back.
func (s *Store) reading(operation string) (sqlconn.Conn, error) {
	return s.reads(operation), s.refusal()
}

func (s *Store) reads(operation string) sqlconn.Conn {
	return sqlconn.Conn{Operation: operation, DB: sqlconn.SQL{DB: s.read}}
}

// settled reads without the lock of a key, and if f finds damage, again with it: only then nothing has changed between
// its statements.
func (s *Store) settled(ctx context.Context, operation, key string, f func(sqlconn.Conn) error) error {
	err := f(sqlconn.Conn{Operation: operation, DB: s.lookUp})
	if tables.IsDamaged(err) {
		err = s.transaction(ctx, operation, key, func(_ context.Context, tx *txn) error { return f(tx.Conn) })
	}
	return err
}
