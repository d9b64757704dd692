package sqlstore

import (
	"bytes"
	"context"
	"slices"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/binding/tokenkeys"
)

const sealedBelow = `sealed < $1 AND state <> 'REVOKED'`

func (s *Store) CountSealed(ctx context.Context, below []byte) (n int, err error) {
	q, err := s.chains.Reading("count sealed KMEs")
	if err != nil {
		return 0, err
	}
	// It counts all rows, whatever their state: a storage key is destroyed when none is left under it.
	err = s.macs.Each(ctx, q, tables.Bindings, func(r tables.Row) error {
		if r.Text(1) != string(binding.Revoked) && bytes.Compare(r.Bytes(6), below) < 0 {
			n++
		}
		return nil
	}, "")
	return n, err
}

func (s *Store) Sealed(
	ctx context.Context, after tokenkeys.Sealed, below []byte, limit int,
) (all []tokenkeys.Sealed, err error) {
	q, err := s.chains.Reading("read sealed KMEs")
	if err != nil {
		return nil, err
	}
	err = s.macs.Each(ctx, q, tables.Bindings, func(r tables.Row) error {
		b, _, err := tables.Binding(r)
		all = append(all, tokenkeys.Sealed{IMSI: b.IMSI, State: b.State, KME: b.Sealed})
		return err
	}, `WHERE `+sealedBelow+` AND (imsi, state) > ($2, $3) ORDER BY imsi, state LIMIT $4`, below, after.IMSI.String(),
		string(after.State), limit)
	return all, err
}

func (s *Store) Reseal(ctx context.Context, all []tokenkeys.Resealed) (changed int, err error) {
	err = s.change(ctx, "reseal", everything, func(ctx context.Context, tx *txn) error {
		changed = 0 // it may be called again
		for _, r := range all {
			s.recent.Forget(r.IMSI.String())
			var again []any
			err := s.macs.Each(ctx, tx.Conn, tables.Bindings, func(now tables.Row) error {
				if now.Text(0) != r.IMSI.String() || !bytes.Equal(now.Bytes(6), r.KME) {
					return tables.Damaged(tables.Bindings, now, "is not the one that was asked for")
				}
				again = slices.Clone(now)
				again[6] = r.Again
				return nil
			}, `WHERE imsi = $1 AND sealed = $2`, r.IMSI.String(), r.KME)
			if err != nil {
				return err
			}
			if again == nil {
				continue
			}
			if err := s.macs.Put(ctx, tx.Conn, tables.Bindings, again...); err != nil {
				return err
			}
			changed++
		}
		return nil
	})
	return changed, err
}
