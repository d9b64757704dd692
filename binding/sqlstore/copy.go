package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/ledger"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
)

// ErrNotEmpty: the store to copy to has something in it already.
var ErrNotEmpty = errors.New("the store to copy to is not empty: give it a new database")

// Copy copies everything to an empty store, in one transaction. Rows keep their MACs, which it verifies; to gets one
// more entry in its ledger, which says so. Nothing may change s meanwhile. report is told the number of rows so far.
func (s *Store) Copy(ctx context.Context, to *Store, report func(rows int)) (rows int, err error) {
	from, err := s.chains.Reading("copy")
	if err != nil {
		return 0, err
	}
	number, err := s.schema(ctx)
	if err != nil {
		return 0, from.Named(err)
	}
	if version := known.Newer(number); version > 0 {
		return 0, fmt.Errorf("the store to copy from has schema version %d, and this program knows %d, so that the "+
			"copy would not have all of it: use the newest release's keysvc", version, len(known.Migrations))
	}
	read, err := s.read.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return 0, from.Named(err)
	}
	defer read.Rollback()
	from.DB = sqlconn.SQL{DB: read}
	err = to.change(ctx, "copy", everything, func(ctx context.Context, tx *txn) error {
		rows = 0 // it may be called again
		copied := func() { rows++; report(rows) }
		for _, t := range append(tables.All, tables.Ledger) {
			var n int
			if _, err := tx.One(ctx, []any{&n}, "SELECT COUNT(*) FROM "+t.Name); err != nil {
				return err
			}
			if n > 0 {
				return ErrNotEmpty
			}
		}
		for _, t := range tables.All {
			insert := func(r tables.Row) error {
				copied()
				return to.macs.Add(ctx, tx.Conn, t, r...)
			}
			if err := s.macs.Each(ctx, from, t, insert, ""); err != nil {
				return err
			}
		}
		for chain := range int64(binding.Chains) {
			_, _, err := s.chains.Verify(ctx, from, chain, func(r tables.Row) error {
				copied()
				return tx.Do(ctx, tables.Ledger.Insert, r...)
			}, nil)
			if err != nil {
				return err
			}
		}
		if err := ledger.CopyActors(ctx, from, tx.Conn); err != nil {
			return err
		}
		_, err := to.chains.Enter(ctx, &tx.Tx, ledger.Entry{Event: binding.EventMigrated, Subject: binding.StoreSubject,
			Detail: fmt.Sprintf("%d rows", rows)})
		return err
	})
	return rows, err
}
