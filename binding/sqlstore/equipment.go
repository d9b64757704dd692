package sqlstore

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sightings"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/ledger"
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
			var was binding.Listing
			err := s.macs.Each(ctx, tx.Conn, tables.Equipment, func(r tables.Row) error {
				was = tables.Listing(r)
				return nil
			}, `WHERE prefix = $1`, e.Prefix)
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
		return nil
	})
	return changed, err
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
	err = s.change(ctx, "note sightings", "sightings", func(ctx context.Context, tx *txn) error {
		moves = nil // it may be called again
		seen, err := s.seenWith(ctx, tx.Conn, all)
		if err != nil {
			return err
		}
		type key struct {
			kme.IMSI
			kme.IMEI
			sightings.Evidence
		}
		of := func(b sightings.Sighting) key { return key{b.IMSI, b.IMEI, b.Evidence} }
		changed := map[key]sightings.Sighting{}
		for _, now := range all {
			before := seen[now.IMSI]
			last := func(same bool) (latest sightings.Sighting) {
				for _, b := range before {
					if (b.IMEI == now.IMEI) == same && b.Last.After(latest.Last) {
						latest = b
					}
				}
				return latest
			}
			if other := last(false); other.Last.After(last(true).Last) && !other.Last.After(now.Last) {
				moves = append(moves, sightings.Move{Sighting: now, Before: other})
			}
			at := slices.IndexFunc(before, func(b sightings.Sighting) bool { return of(b) == of(now) })
			switch {
			case at >= 0:
				if now.First = before[at].First; before[at].Last.After(now.Last) {
					now.Last = before[at].Last
				}
				before[at] = now
			case len(before) < sightings.MaxDevices:
				before = append(before, now)
			default:
				oldest := slices.MinFunc(before, func(a, b sightings.Sighting) int {
					return cmp.Or(strings.Compare(string(a.Evidence), string(b.Evidence)), a.Last.Compare(b.Last))
				})
				delete(changed, of(oldest))
				if err := tx.Do(ctx, `DELETE FROM sightings WHERE imsi = $1 AND imei = $2 AND evidence = $3`,
					oldest.IMSI.String(), oldest.IMEI.String(), string(oldest.Evidence)); err != nil {
					return err
				}
				before[slices.Index(before, oldest)] = now
			}
			seen[now.IMSI], changed[of(now)] = before, now
		}
		return together(slices.Collect(maps.Values(changed)), func(part []sightings.Sighting) error {
			var rows []any
			for _, now := range part {
				values := []any{now.IMSI.String(), now.IMEI.String(), string(now.Evidence), tables.Millis(now.First),
					tables.Millis(now.Last)}
				rows = append(append(rows, values...), s.macs.Of(tables.Sightings.Name, values...))
			}
			return tx.Do(ctx, putSightings[len(part)], rows...)
		})
	})
	return moves, err
}

// parts are how many rows of sightings one statement is about: it is compiled once for each.
var parts = [...]int{64, 8, 1}

var seenOf, putSightings = func() (read, put map[int]string) {
	read, put = map[int]string{}, map[int]string{}
	for _, n := range parts {
		read[n] = tables.Sightings.SelectAll + "WHERE imsi IN (" + tables.Marks(1, n) + ")"
		put[n] = tables.Sightings.Puts(n)
	}
	return read, put
}()

// together calls f with all, as many at once as there is a statement for.
func together[T any](all []T, f func(part []T) error) error {
	for len(all) > 0 {
		for _, n := range parts {
			if n <= len(all) {
				if err := f(all[:n]); err != nil {
					return err
				}
				all = all[n:]
				break
			}
		}
	}
	return nil
}

// seenWith gives the sightings of the IMSIs of some, but for rows that somebody has changed: these are replaced, and
// forgotten as others are.
func (s *Store) seenWith(
	ctx context.Context, q sqlconn.Conn, of []sightings.Sighting,
) (map[kme.IMSI][]sightings.Sighting, error) {
	seen := map[kme.IMSI][]sightings.Sighting{}
	for _, now := range of {
		seen[now.IMSI] = nil
	}
	err := together(slices.Collect(maps.Keys(seen)), func(part []kme.IMSI) error {
		var imsis []any
		for _, imsi := range part {
			imsis = append(imsis, imsi.String())
		}
		return tables.Scan(ctx, q, len(tables.Sightings.Columns)+1, func(r tables.Row) error {
			if s.macs.Check(tables.Sightings, r) != nil {
				return nil
			}
			b, err := tables.Sighting(r)
			seen[b.IMSI] = append(seen[b.IMSI], b)
			return err
		}, seenOf[len(part)], imsis...)
	})
	return seen, err
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
