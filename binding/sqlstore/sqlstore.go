// Package sqlstore keeps the service's state: in SQLite, the embedded default, or in PostgreSQL, for several instances.
//
// Both get the same statements: SQLite takes $1 as PostgreSQL does, if parameters first appear in their order.
package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// A Store implements binding.Store and binding.Registry.
type Store struct {
	read *sql.DB
	// change makes a change durably and alone: no other with the same key is under way.
	change func(ctx context.Context, key string, f func(context.Context, *sql.Tx) error) error
	// lock has no other change with the key until the transaction ends.
	lock  func(ctx context.Context, tx *sql.Tx, key string) error
	close func() error
	// company is sqlite.Writer's; nil for PostgreSQL, which has commit_delay of its own.
	company func(func() int)
}

var (
	_ binding.Store       = (*Store)(nil)
	_ binding.Registry    = (*Store)(nil)
	_ binding.SealedStore = (*Store)(nil)
)

// Close ends all connections.
func (s *Store) Close() error { return errors.Join(s.read.Close(), s.close()) }

// Company tells how many calls will soon make a change, those included that wait for their commit: a commit waits for half of them.
func (s *Store) Company(n func() int) {
	if s.company != nil {
		s.company(n)
	}
}

// Ping says whether the store can be read. (The driver of SQLite says of every open database that it can.)
func (s *Store) Ping(ctx context.Context) error {
	var n int
	return s.read.QueryRowContext(ctx, "SELECT COUNT(*) FROM manufacturers").Scan(&n)
}

func (s *Store) exec(ctx context.Context, key, query string, args ...any) error {
	return s.change(ctx, key, func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, query, args...)
		return err
	})
}

const bindingColumns = `imsi, state, imei, manufacturer, lot, device_key, sealed, nw_sig, attempt_id, payload_sha256, ` +
	`established_at, activated_at, revoked_at, origin, expires_at, sent`

func scanBinding(scan func(...any) error) (*binding.Binding, error) {
	var b binding.Binding
	var imsi, imei, origin, sent string
	var established, activated, revoked, expires int64
	if err := scan(&imsi, &b.State, &imei, &b.Manufacturer, &b.Lot, &b.DeviceKey, &b.Sealed, &b.NWSig, &b.AttemptID, &b.PayloadSHA256,
		&established, &activated, &revoked, &origin, &expires, &sent); err != nil {
		return nil, err
	}
	err := errors.Join(b.IMSI.UnmarshalText([]byte(imsi)), b.IMEI.UnmarshalText([]byte(imei)),
		b.Origin.UnmarshalText([]byte(origin)))
	for line := range strings.Lines(sent) {
		var o kme.Origin
		err = errors.Join(err, o.UnmarshalText([]byte(strings.TrimSuffix(line, "\n"))))
		b.Sent = append(b.Sent, o)
	}
	if err != nil {
		return nil, fmt.Errorf("the database is damaged: %w", err)
	}
	b.Established, b.Activated, b.Revoked, b.Expires = fromMillis(established), fromMillis(activated),
		fromMillis(revoked), fromMillis(expires)
	return &b, nil
}

// sentText is a Binding's Sent as its column has it: each with its end of line, since an origin may be empty.
func sentText(sent []kme.Origin) string {
	var b strings.Builder
	for _, o := range sent {
		b.WriteString(o.String() + "\n")
	}
	return b.String()
}

type queryer interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// query calls each for every row.
func query(ctx context.Context, q queryer, each func(scan func(...any) error) error, text string, args ...any) error {
	rows, err := q.QueryContext(ctx, text, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := each(rows.Scan); err != nil {
			return err
		}
	}
	return rows.Err()
}

func (s *Store) Subscription(ctx context.Context, imsi kme.IMSI, now time.Time) (*binding.Subscription, error) {
	sub, _, err := subscription(ctx, s.read, imsi, now)
	return sub, err
}

// subscription also gives the pending binding that has expired, if its row is still there.
func subscription(ctx context.Context, q queryer, imsi kme.IMSI,
	now time.Time) (sub *binding.Subscription, expired *binding.Binding, err error) {
	sub = new(binding.Subscription)
	// Attempts first: without a lock, a binding that was established in an opening in between is seen beside it.
	err = query(ctx, q, func(scan func(...any) error) error {
		a := binding.Attempt{IMSI: imsi}
		var origin string
		var expires int64
		if err := scan(&a.ID, &origin, &expires, &a.Opened); err != nil {
			return err
		}
		if err := a.Origin.UnmarshalText([]byte(origin)); err != nil {
			return fmt.Errorf("the database is damaged: %w", err)
		}
		a.Expires = fromMillis(expires)
		sub.Attempts = append(sub.Attempts, a)
		return nil
	}, `SELECT id, origin, expires_at, opened FROM attempts WHERE imsi = $1 AND expires_at > $2`,
		imsi.String(), now.UnixMilli())
	if err != nil {
		return nil, nil, err
	}
	err = query(ctx, q, func(scan func(...any) error) error {
		b, err := scanBinding(scan)
		switch {
		case err != nil:
			return err
		case b.State == binding.Active:
			sub.Active = b
		case b.State == binding.Revoked:
			sub.Revoked = b
		case b.Expires.After(now):
			sub.Pending = b
		default:
			expired = b
		}
		return nil
	}, `SELECT `+bindingColumns+` FROM bindings WHERE imsi = $1`, imsi.String())
	if err != nil {
		return nil, nil, err
	}
	return sub, expired, nil
}

func (s *Store) Bindings(ctx context.Context, after string, imei kme.IMEI, limit int,
	now time.Time) ([]*binding.Binding, error) {
	where, args := "imsi > $1", []any{after}
	if imei != (kme.IMEI{}) {
		where, args = "imsi > $1 AND imei = $2 AND imsi IN (SELECT imsi FROM ledger WHERE imei = $2)", append(args, imei.String())
	}
	at := fmt.Sprint("$", len(args)+1)
	// One row an IMSI: the latest of its bindings.
	var all []*binding.Binding
	err := query(ctx, s.read, func(scan func(...any) error) error {
		b, err := scanBinding(scan)
		all = append(all, b)
		return err
	}, `SELECT `+bindingColumns+` FROM bindings AS b
		WHERE `+where+` AND (state <> 'PENDING' OR expires_at > `+at+`) AND NOT EXISTS (
			SELECT 1 FROM bindings AS o WHERE o.imsi = b.imsi AND
				(o.state = 'PENDING' AND o.expires_at > `+at+` AND b.state <> 'PENDING' OR
				o.state = 'ACTIVE' AND b.state = 'REVOKED'))
		ORDER BY imsi LIMIT $`+fmt.Sprint(len(args)+2), append(args, now.UnixMilli(), limit)...)
	if err != nil {
		return nil, err
	}
	return all, nil
}

func (s *Store) Prepare(ctx context.Context, q binding.VectorRequest) (d binding.Decision, err error) {
	sub, _, err := subscription(ctx, s.read, q.IMSI, q.Now)
	if err != nil {
		return d, err
	}
	// Nearly every vector is for an active binding: it changes nothing and needs no lock. Nor does a vector for a pending one
	// that the HSM has not made yet.
	_, opened := sub.Opened(q.Origin)
	b := sub.Under(q.Origin.Name)
	told := b != nil && b == sub.Pending && q.Ready != b.AttemptID && len(b.Sent) < q.PendingVectors
	if b != nil && !opened && (b == sub.Active || told) {
		return binding.Decision{Binding: b}, unspent(ctx, s.read, q.IMSI, q.RANDs)
	}
	var refused error // what has ended has ended, refused or not
	err = s.change(ctx, q.IMSI.String(), func(ctx context.Context, tx *sql.Tx) (err error) {
		d, refused = binding.Decision{}, nil
		sub, expired, err := subscription(ctx, tx, q.IMSI, q.Now)
		if err != nil {
			return err
		}
		if d.Ended = expired; sub.Pending != nil && len(sub.Pending.Sent) >= q.PendingVectors {
			d.Ended, sub.Pending = sub.Pending, nil
		}
		if d.Ended != nil {
			if _, err := tx.ExecContext(ctx, `DELETE FROM bindings WHERE imsi = $1 AND state = 'PENDING'`,
				q.IMSI.String()); err != nil {
				return err
			}
		}
		until, opened := sub.Opened(q.Origin)
		b := sub.Under(q.Origin.Name)
		switch {
		case opened || b == nil && q.Origin.Provisioning == binding.Allowed:
			return attempt(ctx, tx, sub, q, until, &d)
		case b == nil:
			refused = binding.ErrNotBound
			return nil
		}
		if err := unspent(ctx, tx, q.IMSI, q.RANDs); errors.Is(err, binding.ErrSpent) {
			refused = err
			return nil
		} else if err != nil {
			return err
		}
		if d.Binding = b; b == sub.Pending && q.Ready == b.AttemptID {
			b.Sent = append(b.Sent, q.Origin.Name)
			_, err = tx.ExecContext(ctx, `UPDATE bindings SET sent = $1 WHERE imsi = $2 AND state = 'PENDING'`,
				sentText(b.Sent), q.IMSI.String())
		}
		return err
	})
	if err != nil {
		return binding.Decision{}, err
	}
	return d, refused
}

// attempt gives the attempt of an origin, in an administrator's if that is open until then, and notes what leaves in
// clear.
func attempt(ctx context.Context, tx *sql.Tx, sub *binding.Subscription, q binding.VectorRequest, until time.Time,
	d *binding.Decision) error {
	opened := !until.IsZero()
	reuse := q.Now.Add(q.AttemptTTL / 2)
	if opened {
		reuse = until
	} else {
		until = q.Now.Add(q.AttemptTTL)
	}
	if d.Attempt = sub.Reusable(q.Origin.Name, opened, reuse); d.Attempt == nil {
		d.Attempt = &binding.Attempt{ID: q.AttemptID, IMSI: q.IMSI, Origin: q.Origin.Name, Expires: until, Opened: opened}
		d.Fresh = true
		if err := insertAttempt(ctx, tx, *d.Attempt); err != nil {
			return err
		}
	}
	for _, r := range q.RANDs {
		if _, err := tx.ExecContext(ctx, `INSERT INTO spent_rands (imsi, rand) VALUES ($1, $2) ON CONFLICT DO NOTHING`,
			q.IMSI.String(), r[:]); err != nil {
			return err
		}
	}
	return nil
}

// unspent fails with ErrSpent if an IMSI was sent one of these RANDs in clear.
func unspent(ctx context.Context, q queryer, imsi kme.IMSI, rands []hsmkeys.RAND) error {
	for _, r := range rands {
		if spent, err := isSpent(ctx, q, imsi, r); err != nil {
			return err
		} else if spent {
			return binding.ErrSpent
		}
	}
	return nil
}

func isSpent(ctx context.Context, q queryer, imsi kme.IMSI, rand hsmkeys.RAND) (spent bool, err error) {
	err = q.QueryRowContext(ctx, `SELECT EXISTS (SELECT 1 FROM spent_rands WHERE imsi = $1 AND rand = $2)`,
		imsi.String(), rand[:]).Scan(&spent)
	return spent, err
}

func (s *Store) Spent(ctx context.Context, imsi kme.IMSI, rand hsmkeys.RAND) (bool, error) {
	return isSpent(ctx, s.read, imsi, rand)
}

func insertAttempt(ctx context.Context, tx *sql.Tx, a binding.Attempt) error {
	opened := 0
	if a.Opened {
		opened = 1
	}
	_, err := tx.ExecContext(ctx,
		`INSERT INTO attempts (id, imsi, origin, expires_at, opened) VALUES ($1, $2, $3, $4, $5)`,
		a.ID, a.IMSI.String(), a.Origin.String(), a.Expires.UnixMilli(), opened)
	return err
}

func (s *Store) OpenAttempt(ctx context.Context, a binding.Attempt) error {
	return s.change(ctx, a.IMSI.String(), func(ctx context.Context, tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, `DELETE FROM attempts WHERE imsi = $1`, a.IMSI.String()); err != nil {
			return err
		}
		return insertAttempt(ctx, tx, a)
	})
}

func (s *Store) Establish(ctx context.Context, b *binding.Binding, tag []byte, good bool, now time.Time) error {
	return s.change(ctx, b.IMSI.String(), func(ctx context.Context, tx *sql.Tx) error {
		var expires int64
		var origin string
		var opened, bound, used bool
		err := tx.QueryRowContext(ctx, `SELECT expires_at, origin, opened = 1,
			EXISTS (SELECT 1 FROM bindings WHERE imsi = $1 AND state = 'ACTIVE'),
			EXISTS (SELECT 1 FROM ledger WHERE imei = $2 AND tag = $3) FROM attempts WHERE imsi = $1 AND id = $4`,
			b.IMSI.String(), b.IMEI.String(), tag, b.AttemptID).Scan(&expires, &origin, &opened, &bound, &used)
		switch {
		case errors.Is(err, sql.ErrNoRows), err == nil && (expires <= now.UnixMilli() || origin != b.Origin.String()):
			return binding.ErrNoAttempt
		case err != nil:
			return err
		case bound && !opened:
			return binding.ErrBound
		case used:
			return binding.ErrUsed
		case !good:
			return binding.ErrNotGood
		}
		if _, err := tx.ExecContext(ctx, `INSERT INTO ledger (imei, tag, imsi) VALUES ($1, $2, $3)`, b.IMEI.String(), tag, b.IMSI.String()); err != nil {
			if isDuplicate(err) { // entered meanwhile, for another IMSI
				return binding.ErrUsed
			}
			return err
		}
		if _, err := tx.ExecContext(ctx, `DELETE FROM attempts WHERE imsi = $1`, b.IMSI.String()); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `INSERT INTO bindings (`+bindingColumns+`)
			VALUES ($1, 'PENDING', $2, $3, $4, $5, $6, $7, $8, $9, $10, 0, 0, $11, $12, '')
			ON CONFLICT (imsi, state) DO UPDATE SET
			imei = excluded.imei, manufacturer = excluded.manufacturer, lot = excluded.lot,
			device_key = excluded.device_key, sealed = excluded.sealed, nw_sig = excluded.nw_sig,
			attempt_id = excluded.attempt_id, payload_sha256 = excluded.payload_sha256,
			established_at = excluded.established_at,
			origin = excluded.origin, expires_at = excluded.expires_at, sent = ''`,
			b.IMSI.String(), b.IMEI.String(), b.Manufacturer, b.Lot, b.DeviceKey, b.Sealed, b.NWSig, b.AttemptID, b.PayloadSHA256,
			b.Established.UnixMilli(), b.Origin.String(), b.Expires.UnixMilli())
		return err
	})
}

func (s *Store) Report(ctx context.Context, imsi kme.IMSI, o kme.Origin, ok bool,
	now time.Time) (*binding.Subscription, error) {
	// Nearly every report is the success of a binding that is active already: it changes nothing and needs no lock.
	sub, _, err := subscription(ctx, s.read, imsi, now)
	if err == nil && sub.Standing() == nil {
		err = binding.ErrNotBound
	}
	if err == nil && sub.Ends(o, ok) {
		err = s.change(ctx, imsi.String(), func(ctx context.Context, tx *sql.Tx) (err error) {
			if sub, _, err = subscription(ctx, tx, imsi, now); err != nil || !sub.Ends(o, ok) {
				return err
			}
			return end(ctx, tx, sub, ok, now)
		})
	}
	if err != nil {
		return nil, err
	}
	return sub, nil
}

// end makes the pending binding the active one, and drops those before it; or drops it.
func end(ctx context.Context, tx *sql.Tx, sub *binding.Subscription, ok bool, now time.Time) error {
	b := sub.Pending
	sub.Pending = nil
	if !ok {
		_, err := tx.ExecContext(ctx, `DELETE FROM bindings WHERE imsi = $1 AND state = 'PENDING'`, b.IMSI.String())
		return err
	}
	b.State, b.Activated, b.Expires, b.Sent = binding.Active, fromMillis(now.UnixMilli()), time.Time{}, nil
	sub.Active, sub.Revoked = b, nil
	if _, err := tx.ExecContext(ctx, `DELETE FROM bindings WHERE imsi = $1 AND state <> 'PENDING'`,
		b.IMSI.String()); err != nil {
		return err
	}
	_, err := tx.ExecContext(ctx,
		`UPDATE bindings SET state = 'ACTIVE', activated_at = $1, expires_at = 0, sent = '' WHERE imsi = $2`,
		now.UnixMilli(), b.IMSI.String())
	return err
}

func (s *Store) Revoke(ctx context.Context, imsi kme.IMSI, now time.Time) (b *binding.Binding, err error) {
	err = s.change(ctx, imsi.String(), func(ctx context.Context, tx *sql.Tx) error {
		sub, _, err := subscription(ctx, tx, imsi, now)
		if err != nil {
			return err
		}
		b = sub.Latest()
		before := b == nil || b.State == binding.Revoked // what else there is has expired
		drop := `DELETE FROM bindings WHERE imsi = $1`
		if before {
			drop += ` AND state <> 'REVOKED'`
		}
		for _, query := range []string{`DELETE FROM attempts WHERE imsi = $1`, drop} {
			if _, err := tx.ExecContext(ctx, query, imsi.String()); err != nil {
				return err
			}
		}
		if before {
			return nil
		}
		b.State, b.Revoked, b.Sealed, b.Expires, b.Sent = binding.Revoked, fromMillis(now.UnixMilli()),
			[]byte{}, time.Time{}, nil
		_, err = tx.ExecContext(ctx, `INSERT INTO bindings (`+bindingColumns+`)
			VALUES ($1, 'REVOKED', $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, 0, '')`,
			imsi.String(), b.IMEI.String(), b.Manufacturer, b.Lot, b.DeviceKey, b.Sealed, b.NWSig, b.AttemptID, b.PayloadSHA256,
			b.Established.UnixMilli(),
			millis(b.Activated), now.UnixMilli(), b.Origin.String())
		return err
	})
	if err == nil && b == nil {
		err = binding.ErrNotBound
	}
	if err != nil {
		return nil, err
	}
	return b, nil
}

func (s *Store) Bound(ctx context.Context, manufacturer, lot string, now time.Time) (n int, err error) {
	err = s.read.QueryRowContext(ctx, `SELECT COUNT(*) FROM bindings WHERE manufacturer = $1 AND (lot = $2 OR $2 = '') AND
		(state = 'ACTIVE' OR state = 'PENDING' AND expires_at > $3)`, manufacturer, lot, now.UnixMilli()).Scan(&n)
	return n, err
}

const sealedBelow = `sealed < $1 AND state <> 'REVOKED'`

func (s *Store) CountSealed(ctx context.Context, below []byte) (n int, err error) {
	err = s.read.QueryRowContext(ctx, `SELECT COUNT(*) FROM bindings WHERE `+sealedBelow, below).Scan(&n)
	return n, err
}

func (s *Store) Sealed(ctx context.Context, after binding.Sealed, below []byte, limit int) (all []binding.Sealed, err error) {
	err = query(ctx, s.read, func(scan func(...any) error) error {
		var b binding.Sealed
		var imsi string
		if err := scan(&imsi, &b.State, &b.KME); err != nil {
			return err
		}
		if err := b.IMSI.UnmarshalText([]byte(imsi)); err != nil {
			return fmt.Errorf("the database is damaged: %w", err)
		}
		all = append(all, b)
		return nil
	}, `SELECT imsi, state, sealed FROM bindings WHERE `+sealedBelow+` AND (imsi, state) > ($2, $3) ORDER BY imsi, state LIMIT $4`,
		below, after.IMSI.String(), string(after.State), limit)
	return all, err
}

func (s *Store) Reseal(ctx context.Context, all []binding.Resealed) (changed int, err error) {
	err = s.change(ctx, "reseal", func(ctx context.Context, tx *sql.Tx) error {
		changed = 0 // it may be called again
		for _, r := range all {
			// One after the other: whoever changes an IMSI has no other's lock.
			if err := s.lock(ctx, tx, r.IMSI.String()); err != nil {
				return err
			}
			result, err := tx.ExecContext(ctx, `UPDATE bindings SET sealed = $1 WHERE imsi = $2 AND sealed = $3`,
				r.Again, r.IMSI.String(), r.KME)
			if err != nil {
				return err
			}
			n, err := result.RowsAffected()
			if err != nil {
				return err
			}
			changed += int(n)
		}
		return nil
	})
	return changed, err
}

func (s *Store) DropExpired(ctx context.Context, now time.Time) error {
	return s.exec(ctx, "expired", `DELETE FROM attempts WHERE expires_at <= $1`, now.UnixMilli())
}

func (s *Store) PutManufacturer(ctx context.Context, m *binding.Manufacturer) error {
	return s.exec(ctx, "registry", `INSERT INTO manufacturers (key_id, pem, operator, directory, enrolled_at) VALUES ($1, $2, $3, $4, $5)
		ON CONFLICT (key_id) DO UPDATE SET pem = excluded.pem, operator = excluded.operator, directory = excluded.directory, enrolled_at = excluded.enrolled_at`,
		m.KeyID, m.PEM, m.Operator, m.Directory, m.Enrolled.UnixMilli())
}

func (s *Store) Manufacturers(ctx context.Context) (all []*binding.Manufacturer, err error) {
	err = query(ctx, s.read, func(scan func(...any) error) error {
		m := new(binding.Manufacturer)
		var enrolled, decided int64
		err := scan(&m.KeyID, &m.PEM, &m.Operator, &m.Directory, &enrolled, &m.Verdict.Withdrawn, &m.Verdict.By, &m.Verdict.Reason, &decided)
		m.Enrolled, m.Verdict.Time = fromMillis(enrolled), fromMillis(decided)
		all = append(all, m)
		return err
	}, `SELECT key_id, pem, operator, directory, enrolled_at, `+verdictColumns+` FROM manufacturers ORDER BY key_id`)
	return all, err
}

const verdictColumns = `withdrawn, decided_by, decided_because, decided_at`

func (s *Store) Decide(ctx context.Context, manufacturer, lot string, v binding.Verdict,
	check func([]*binding.Lot) error) (stands binding.Verdict, err error) {
	table, where := "manufacturers", "key_id = $%d AND $%d = ''"
	if lot != "" {
		table, where = "lots", "manufacturer = $%d AND lot = $%d"
	}
	withdrawn := 0
	if v.Withdrawn {
		withdrawn = 1
	}
	err = s.change(ctx, "registry", func(ctx context.Context, tx *sql.Tx) error {
		var decided int64
		err := tx.QueryRowContext(ctx, `SELECT `+verdictColumns+` FROM `+table+` WHERE `+fmt.Sprintf(where, 1, 2),
			manufacturer, lot).Scan(&stands.Withdrawn, &stands.By, &stands.Reason, &decided)
		stands.Time = fromMillis(decided)
		switch {
		case errors.Is(err, sql.ErrNoRows):
			return binding.ErrNotTaken
		case err != nil || stands.Withdrawn == v.Withdrawn:
			return err
		}
		all, err := lots(ctx, tx)
		if err == nil {
			err = check(all)
		}
		if err != nil {
			return err
		}
		stands = v
		_, err = tx.ExecContext(ctx, `UPDATE `+table+` SET withdrawn = $1, decided_by = $2, decided_because = $3, decided_at = $4
			WHERE `+fmt.Sprintf(where, 5, 6), withdrawn, v.By, v.Reason, v.Time.UnixMilli(), manufacturer, lot)
		return err
	})
	return stands, err
}

func (s *Store) PutLot(ctx context.Context, lot *binding.Lot, check func([]*binding.Lot) error) error {
	return s.change(ctx, "registry", func(ctx context.Context, tx *sql.Tx) error {
		all, err := lots(ctx, tx)
		if err != nil {
			return err
		}
		if err := check(all); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `INSERT INTO lots (manufacturer, lot, manifest, imported_at) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING`,
			lot.Manufacturer, lot.Manifest.Lot, lot.ManifestJWS, lot.Imported.UnixMilli())
		return err
	})
}

func (s *Store) Lots(ctx context.Context) ([]*binding.Lot, error) { return lots(ctx, s.read) }

func lots(ctx context.Context, q queryer) (all []*binding.Lot, err error) {
	err = query(ctx, q, func(scan func(...any) error) error {
		l := new(binding.Lot)
		var name, pem string
		var imported, retired, distrusted int64
		if err := scan(&l.Manufacturer, &name, &l.ManifestJWS, &imported, &pem,
			&l.Retired.Withdrawn, &l.Retired.By, &l.Retired.Reason, &retired,
			&l.Distrusted.Withdrawn, &l.Distrusted.By, &l.Distrusted.Reason, &distrusted); err != nil {
			return err
		}
		verifier, err := directory.ParseVerifier([]byte(pem))
		if err != nil {
			return fmt.Errorf("manufacturer %s: %w", l.Manufacturer, err)
		}
		if l.Manifest, err = verifier.Manifest(name, []byte(l.ManifestJWS)); err != nil {
			return err
		}
		l.Imported, l.Retired.Time, l.Distrusted.Time = fromMillis(imported), fromMillis(retired), fromMillis(distrusted)
		all = append(all, l)
		return nil
	}, `SELECT l.manufacturer, l.lot, l.manifest, l.imported_at, m.pem,
		l.withdrawn, l.decided_by, l.decided_because, l.decided_at, m.withdrawn, m.decided_by, m.decided_because, m.decided_at FROM lots l
		JOIN manufacturers m ON m.key_id = l.manufacturer
		ORDER BY l.manufacturer, l.lot`)
	return all, err
}

func millis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func fromMillis(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}
