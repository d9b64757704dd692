package sqlstore

import (
	"context"
	"errors"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/ledger"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/subscription"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
)

// A txn is a change that is under way.
type txn struct {
	ledger.Tx
	known *subscription.Stored // the rows of its key, if they are known
}

// everything is the key of a change that excludes every other.
const everything = ""

// change makes a change durably, and none with the same key meanwhile. f may be called again; only its last call
// counts. An error of f changes nothing, and does not name the operation.
func (s *Store) change(ctx context.Context, operation, key string, f func(context.Context, *txn) error) error {
	if err := s.chains.Refusal(); err != nil {
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
	for _, f := range tx.After {
		f()
	}
	return nil
}

// transaction is change also while the ledger is rolled back.
func (s *Store) transaction(ctx context.Context, operation, key string, f func(context.Context, *txn) error) error {
	var own error
	err := s.begin(ctx, key, func(ctx context.Context, db sqlconn.Statements, h *ledger.Heads,
		known *subscription.Stored) error {
		own = f(ctx, &txn{Tx: ledger.Tx{Conn: sqlconn.Conn{Operation: operation, DB: db}, Heads: h}, known: known})
		return own
	})
	if err == nil || own != nil && errors.Is(err, own) {
		return err
	}
	return sqlconn.Conn{Operation: operation}.Named(err)
}

// settled reads without a key's lock; if f finds damage, again with it, when nothing can change meanwhile.
func (s *Store) settled(ctx context.Context, operation, key string, f func(sqlconn.Conn) error) error {
	err := f(sqlconn.Conn{Operation: operation, DB: s.lookUp})
	if tables.IsDamaged(err) {
		err = s.transaction(ctx, operation, key, func(_ context.Context, tx *txn) error { return f(tx.Conn) })
	}
	return err
}

func (s *Store) Note(ctx context.Context, event binding.Event, subject, detail string) error {
	return s.change(ctx, "note", subject, func(ctx context.Context, tx *txn) error {
		_, err := s.chains.Enter(ctx, &tx.Tx, ledger.Entry{Event: event, Subject: subject, Detail: detail})
		return err
	})
}
