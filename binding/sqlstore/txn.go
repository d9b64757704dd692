package sqlstore

import (
	"context"
	"database/sql"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
)

// A txn is a change that is under way.
type txn struct {
	sqlconn.Conn
	raw   *sql.Tx
	known *stored                       // what is recent of its key, if anything is
	after []func()                      // to be called when it is durable
	heads [binding.Chains]*binding.Head // of the ledger's chains whose locks it has; nil: not read yet
}

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
	err := s.begin(ctx, key, func(ctx context.Context, raw *sqlconn.Tx) error {
		own = f(ctx, &txn{Conn: sqlconn.Conn{Operation: operation, DB: raw}, raw: raw.Tx,
			known: s.recent.begin(raw.Version, key)})
		return own
	})
	if err == nil || own != nil {
		return err
	}
	return sqlconn.Conn{Operation: operation}.Named(err)
}

// locked has no other change with the key until the transaction ends.
func (s *Store) locked(ctx context.Context, tx *txn, key string) error {
	s.recent.forget(key)
	return tx.Named(s.lock(ctx, tx.raw, key))
}

// reading is for what only reads, and not while the ledger is rolled back.
func (s *Store) reading(operation string) (sqlconn.Conn, error) {
	return s.reads(operation), s.refusal()
}

func (s *Store) reads(operation string) sqlconn.Conn {
	return sqlconn.Conn{Operation: operation, DB: s.read}
}

// settled reads without the lock of a key, and if f finds damage, again with it: only then nothing has changed between
// its statements.
func (s *Store) settled(ctx context.Context, operation, key string, f func(sqlconn.Conn) error) error {
	err := f(s.reads(operation))
	if isDamaged(err) {
		err = s.transaction(ctx, operation, key, func(_ context.Context, tx *txn) error { return f(tx.Conn) })
	}
	return err
}
