package sqlstore

import (
	"context"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sightings"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/ledger"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/seen"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/subscription"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/kme"
)

func (s *Store) Equipment(
	ctx context.Context, imei kme.IMEI, imsi kme.IMSI, now time.Time,
) (own *binding.Subscription, of []*binding.Binding, err error) {
	if err := s.chains.Refusal(); err != nil {
		return nil, nil, err
	}
	q := sqlconn.Conn{Operation: "check equipment", DB: s.lookUp}
	return subscription.Equipment(ctx, s.macs, q, imei, imsi, now)
}

// changing is the key of all changes of the operator's list.
const changing = "equipment"

func (s *Store) List(ctx context.Context, all []binding.Listing) (changed int, err error) {
	err = s.change(ctx, "list devices", changing, func(ctx context.Context, tx *txn) error {
		changed = 0 // it may be called again
		var last int64
		if _, err := tx.One(ctx, []any{&last}, `SELECT COALESCE(MAX(change), 0) FROM equipment`); err != nil {
			return err
		}
		for _, e := range all {
			was, err := s.listing(ctx, tx, e.Prefix)
			if err != nil {
				return err
			}
			if was.Status == e.Status && (was.Reason == e.Reason || e.Status == "") {
				continue
			}
			event, detail := binding.EventListed, string(e.Status)+": "+e.Reason
			if e.Status == "" {
				event, detail = binding.EventUnlisted, e.Reason
			}
			seq, err := s.chains.Enter(ctx, &tx.Tx, ledger.Entry{Event: event,
				Subject: binding.ListingSubject(e.Prefix), Detail: detail})
			if err != nil {
				return err
			}
			last++
			changed++
			if err := s.macs.Put(ctx, tx.Conn, tables.Equipment, e.Prefix, string(e.Status), e.Reason,
				tables.Millis(e.Listed), last, seq); err != nil {
				return err
			}
		}
		if changed == 0 { // it was listed before, maybe by a change with an unknown result
			return s.confirm(ctx, tx)
		}
		return nil
	})
	return changed, err
}

// listing is the entry of a prefix, compared with the ledger; the zero entry if there never was one.
func (s *Store) listing(ctx context.Context, tx *txn, prefix string) (l binding.Listing, err error) {
	var have, want int64
	err = s.macs.Each(ctx, tx.Conn, tables.Equipment, func(r tables.Row) error {
		l, have = tables.Listing(r), r.Int(5)
		return nil
	}, `WHERE prefix = $1`, prefix)
	if err == nil {
		_, err = tx.One(ctx, []any{&want}, `SELECT COALESCE(MAX(seq), 0) FROM ledger WHERE subject = $1`,
			binding.ListingSubject(prefix))
	}
	if err == nil && (have != want || have > 0 && l.Prefix != prefix) {
		err = tables.Damaged(tables.Equipment, tables.Row{prefix}, "is gone, another's, or an earlier one than the "+
			"service has written last")
	}
	return l, err
}

func (s *Store) Listed(ctx context.Context, after int64) (all []binding.Listing, err error) {
	if err := s.chains.Refusal(); err != nil {
		return nil, err
	}
	err = s.settled(ctx, "read the list of devices", changing, func(q sqlconn.Conn) error {
		all, err = s.listed(ctx, q, after)
		return err
	})
	return all, err
}

func (s *Store) listed(ctx context.Context, q sqlconn.Conn, after int64) (all []binding.Listing, err error) {
	found := map[string]int64{}
	err = s.macs.Each(ctx, q, tables.Equipment, func(r tables.Row) error {
		all = append(all, tables.Listing(r))
		found[r.Text(0)] = r.Int(5)
		return nil
	}, `WHERE change > $1 ORDER BY change`, after)
	if err == nil && after == 0 {
		err = s.same(ctx, q, tables.Equipment, found, binding.ListingSubject(""))
	}
	return all, err
}

func (s *Store) See(ctx context.Context, all []sightings.Sighting) (moves []sightings.Move, err error) {
	err = s.change(ctx, "note sightings", "sightings", func(ctx context.Context, tx *txn) (err error) {
		moves, err = seen.Note(ctx, s.macs, tx.Conn, all)
		return err
	})
	return moves, err
}

func (s *Store) Sightings(ctx context.Context, imsi kme.IMSI, imei kme.IMEI) (all []sightings.Sighting, err error) {
	q, err := s.chains.Reading("read sightings")
	if err != nil {
		return nil, err
	}
	err = s.macs.Each(ctx, q, tables.Sightings, func(r tables.Row) error {
		seen, err := tables.Sighting(r)
		all = append(all, seen)
		return err
	}, `WHERE imsi = $1 OR imei = $2 ORDER BY imsi, last_at, imei, evidence`, imsi.String(), imei.String())
	return all, err
}

func (s *Store) Forget(ctx context.Context, before time.Time, most int) (forgotten int, err error) {
	q, err := s.chains.Reading("count sightings")
	if err != nil {
		return 0, err
	}
	var all, old int64
	if _, err := q.One(ctx, []any{&all}, `SELECT COUNT(*) FROM sightings`); err != nil {
		return 0, err
	}
	if _, err := q.One(ctx, []any{&old}, `SELECT COUNT(*) FROM sightings WHERE last_at < $1`,
		tables.Millis(before)); err != nil {
		return 0, err
	}
	const together = 1000 // in one change: others' changes wait for it
	for left := max(old, all-int64(most)); left > 0; {
		var n int64
		err := s.change(ctx, "forget sightings", "sightings", func(ctx context.Context, tx *txn) (err error) {
			n, err = tx.Changed(ctx, `DELETE FROM sightings WHERE (imsi, imei, evidence) IN (SELECT imsi, imei, evidence
				FROM sightings ORDER BY last_at LIMIT $1)`, min(left, together))
			return err
		})
		if forgotten += int(n); err != nil || n == 0 {
			return forgotten, err
		}
		left -= n
	}
	return forgotten, nil
}
