package sqlstore

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/kme"
)

// everBoundTo are the IMSIs that were ever bound to a device: the ledger knows them.
const everBoundTo = `(SELECT subject FROM ledger WHERE imei = $2 AND tag IS NOT NULL)`

// ofDevice reads what ofIMSI reads of an IMSI, also of all that were ever bound to a device, at one moment.
var ofDevice = strings.NewReplacer(
	"WHERE imsi = $1", "WHERE (imsi = $1 OR imsi IN "+everBoundTo+")",
	"WHERE subject = $1", "WHERE (subject = $1 OR subject IN "+everBoundTo+")",
).Replace(ofIMSI[nothing])

func (s *Store) Equipment(
	ctx context.Context, imei kme.IMEI, imsi kme.IMSI, now time.Time,
) (own *binding.Subscription, of []*binding.Binding, err error) {
	if err := s.refusal(); err != nil {
		return nil, nil, err
	}
	subs := map[string]*stored{imsi.String(): new(stored)}
	q := sqlconn.Conn{Operation: "check equipment", DB: s.lookUp}
	err = scan(ctx, q, len(bindings.columns)+2, func(r row) error {
		digits := r.text(1)
		if subs[digits] == nil {
			subs[digits] = new(stored)
		}
		return s.takeAny(subs[digits], r, now)
	}, ofDevice, imsi.String(), imei.String())
	if err != nil {
		return nil, nil, err
	}
	for digits, sub := range subs {
		if err := sub.fresh(digits); err != nil {
			return nil, nil, err
		}
		if b := sub.Active; b != nil && b.IMEI == imei {
			of = append(of, b)
		}
	}
	return &subs[imsi.String()].Subscription, of, nil
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
			err := s.rows(ctx, tx.Conn, equipment, func(r row) error {
				was = toListing(r)
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
			seq, err := s.note(ctx, tx, entry{event: event, subject: binding.ListingSubject(e.Prefix), detail: detail})
			if err != nil {
				return err
			}
			last++
			changed++
			if err := s.put(ctx, tx, equipment, e.Prefix, string(e.Status), e.Reason, millis(e.Listed), last,
				seq); err != nil {
				return err
			}
		}
		return nil
	})
	return changed, err
}

func toListing(r row) binding.Listing {
	return binding.Listing{Prefix: r.text(0), Status: binding.EquipmentStatus(r.text(1)), Reason: r.text(2),
		Listed: fromMillis(r.int(3)), Change: r.int(4)}
}

func (s *Store) Listed(ctx context.Context, after int64) (all []binding.Listing, err error) {
	if err := s.refusal(); err != nil {
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
	err = s.rows(ctx, q, equipment, func(r row) error {
		all = append(all, toListing(r))
		found[r.text(0)] = r.int(5)
		return nil
	}, `WHERE change > $1 ORDER BY change`, after)
	if err == nil && after == 0 {
		err = s.same(ctx, q, equipment, found, binding.ListingSubject(""))
	}
	return all, err
}

func (s *Store) See(ctx context.Context, all []binding.Sighting) (moves []binding.Move, err error) {
	err = s.change(ctx, "note sightings", "sightings", func(ctx context.Context, tx *txn) error {
		moves = nil // it may be called again
		for _, now := range all {
			before, err := s.seenWith(ctx, tx.Conn, now.IMSI)
			if err != nil {
				return err
			}
			last := func(ok func(binding.Sighting) bool) (latest binding.Sighting) {
				for _, b := range before {
					if ok(b) && b.Last.After(latest.Last) {
						latest = b
					}
				}
				return latest
			}
			same := last(func(b binding.Sighting) bool { return b.IMEI == now.IMEI })
			other := last(func(b binding.Sighting) bool { return b.IMEI != now.IMEI })
			if other.Last.After(same.Last) && !other.Last.After(now.Last) {
				moves = append(moves, binding.Move{Sighting: now, Before: other})
			}
			if row := last(func(b binding.Sighting) bool {
				return b.IMEI == now.IMEI && b.Evidence == now.Evidence
			}); !row.Last.IsZero() {
				now.First = row.First
				if row.Last.After(now.Last) {
					now.Last = row.Last
				}
			} else if len(before) >= binding.MaxDevices {
				oldest := slices.MinFunc(before, func(a, b binding.Sighting) int {
					return cmp.Or(strings.Compare(string(a.Evidence), string(b.Evidence)), a.Last.Compare(b.Last))
				})
				if err := tx.Do(ctx, `DELETE FROM sightings WHERE imsi = $1 AND imei = $2 AND evidence = $3`,
					oldest.IMSI.String(), oldest.IMEI.String(), string(oldest.Evidence)); err != nil {
					return err
				}
			}
			if err := s.put(ctx, tx, sightings, now.IMSI.String(), now.IMEI.String(), string(now.Evidence),
				millis(now.First), millis(now.Last)); err != nil {
				return err
			}
		}
		return nil
	})
	return moves, err
}

// seenWith gives an IMSI's sightings but for rows that somebody has changed, which are replaced, and forgotten as
// others are.
func (s *Store) seenWith(ctx context.Context, q sqlconn.Conn, imsi kme.IMSI) (all []binding.Sighting, err error) {
	err = scan(ctx, q, len(sightings.columns)+1, func(r row) error {
		if s.checkMAC(sightings, r) != nil {
			return nil
		}
		seen, err := toSighting(r)
		all = append(all, seen)
		return err
	}, sightings.selectAll+`WHERE imsi = $1`, imsi.String())
	return all, err
}

func toSighting(r row) (seen binding.Sighting, err error) {
	seen = binding.Sighting{Evidence: binding.Evidence(r.text(2)), First: fromMillis(r.int(3)),
		Last: fromMillis(r.int(4))}
	return seen, errors.Join(seen.IMSI.UnmarshalText([]byte(r.text(0))), seen.IMEI.UnmarshalText([]byte(r.text(1))))
}

func (s *Store) Sightings(ctx context.Context, imsi kme.IMSI, imei kme.IMEI) (all []binding.Sighting, err error) {
	q, err := s.reading("read sightings")
	if err != nil {
		return nil, err
	}
	err = s.rows(ctx, q, sightings, func(r row) error {
		seen, err := toSighting(r)
		all = append(all, seen)
		return err
	}, `WHERE imsi = $1 OR imei = $2 ORDER BY imsi, last_at, imei, evidence`, imsi.String(), imei.String())
	return all, err
}

func (s *Store) Forget(ctx context.Context, before time.Time, most int) (forgotten int, err error) {
	q, err := s.reading("count sightings")
	if err != nil {
		return 0, err
	}
	var all, old int64
	if _, err := q.One(ctx, []any{&all}, `SELECT COUNT(*) FROM sightings`); err != nil {
		return 0, err
	}
	if _, err := q.One(ctx, []any{&old}, `SELECT COUNT(*) FROM sightings WHERE last_at < $1`,
		millis(before)); err != nil {
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
