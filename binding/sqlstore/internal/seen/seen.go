// Package seen notes in a transaction with which devices subscriptions were seen.
package seen

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strings"

	"github.com/kmehsm/kmehsm/binding/sightings"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/kme"
)

// Note notes sightings, the most recent of each subscription, and gives those of a subscription in another device than
// before.
func Note(
	ctx context.Context, macs tables.Key, q sqlconn.Conn, all []sightings.Sighting,
) (moves []sightings.Move, err error) {
	seen, err := with(ctx, macs, q, all)
	if err != nil {
		return nil, err
	}
	type key struct {
		kme.IMSI
		kme.IMEI
		sightings.Evidence
	}
	of := func(b sightings.Sighting) key { return key{IMSI: b.IMSI, IMEI: b.IMEI, Evidence: b.Evidence} }
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
			if err := q.Do(ctx, `DELETE FROM sightings WHERE imsi = $1 AND imei = $2 AND evidence = $3`,
				oldest.IMSI.String(), oldest.IMEI.String(), string(oldest.Evidence)); err != nil {
				return nil, err
			}
			before[slices.Index(before, oldest)] = now
		}
		seen[now.IMSI], changed[of(now)] = before, now
	}
	return moves, together(slices.Collect(maps.Values(changed)), func(part []sightings.Sighting) error {
		var rows []any
		for _, now := range part {
			values := []any{now.IMSI.String(), now.IMEI.String(), string(now.Evidence), tables.Millis(now.First),
				tables.Millis(now.Last)}
			rows = append(append(rows, values...), macs.Of(tables.Sightings.Name, values...))
		}
		return q.Do(ctx, putSightings[len(part)], rows...)
	})
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

// with gives the sightings of the IMSIs of some, but for rows that somebody has changed: these are replaced, and
// forgotten as others are.
func with(
	ctx context.Context, macs tables.Key, q sqlconn.Conn, of []sightings.Sighting,
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
			if macs.Check(tables.Sightings, r) != nil {
				return nil
			}
			b, err := tables.Sighting(r)
			seen[b.IMSI] = append(seen[b.IMSI], b)
			return err
		}, seenOf[len(part)], imsis...)
	})
	return seen, err
}
