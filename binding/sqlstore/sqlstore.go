// Package sqlstore keeps the service's state: in SQLite, the embedded default, or in PostgreSQL, for several instances.
//
// Both get the same statements: SQLite takes $1 as PostgreSQL does, if parameters first appear in their order.
package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/kme"
)

// A Store implements binding.Store and binding.Registry.
type Store struct {
	read *sql.DB
	// change makes a change durably and alone: no other with the same key is under way.
	change func(ctx context.Context, key string, f func(context.Context, *sql.Tx) error) error
	close  func() error
	// company is sqlite.Writer's; nil for PostgreSQL, which has commit_delay of its own.
	company func(func() int)
}

var (
	_ binding.Store    = (*Store)(nil)
	_ binding.Registry = (*Store)(nil)
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

type queryer interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

const bindingColumns = `imsi, state, imei, manufacturer, lot, sealed, nw_sig, attempt_id, payload_sha256, established_at, activated_at, revoked_at`

func scanBinding(scan func(...any) error) (*binding.Binding, error) {
	var b binding.Binding
	var imsi, imei string
	var established, activated, revoked int64
	err := scan(&imsi, &b.State, &imei, &b.Manufacturer, &b.Lot, &b.Sealed, &b.NWSig, &b.AttemptID, &b.PayloadSHA256, &established, &activated, &revoked)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, binding.ErrNotBound
	}
	if err != nil {
		return nil, err
	}
	if err := errors.Join(b.IMSI.UnmarshalText([]byte(imsi)), b.IMEI.UnmarshalText([]byte(imei))); err != nil {
		return nil, fmt.Errorf("the database is damaged: %w", err)
	}
	b.Established, b.Activated, b.Revoked = fromMillis(established), fromMillis(activated), fromMillis(revoked)
	return &b, nil
}

// latest is the pending binding before the active, and that before the revoked one.
func latest(ctx context.Context, q queryer, imsi kme.IMSI) (*binding.Binding, error) {
	return scanBinding(q.QueryRowContext(ctx, `SELECT `+bindingColumns+` FROM bindings WHERE imsi = $1
		ORDER BY CASE state WHEN 'PENDING' THEN 0 WHEN 'ACTIVE' THEN 1 ELSE 2 END LIMIT 1`, imsi.String()).Scan)
}

// current is the latest that is not revoked.
func current(ctx context.Context, q queryer, imsi kme.IMSI) (*binding.Binding, error) {
	b, err := latest(ctx, q, imsi)
	if err == nil && b.State == binding.Revoked {
		return nil, binding.ErrNotBound
	}
	return b, err
}

func (s *Store) Binding(ctx context.Context, imsi kme.IMSI) (*binding.Binding, error) {
	return latest(ctx, s.read, imsi)
}

func (s *Store) Bindings(ctx context.Context, after string, imei kme.IMEI, limit int) ([]*binding.Binding, error) {
	where, args := "imsi > $1", []any{after}
	if imei != (kme.IMEI{}) {
		where, args = "imsi > $1 AND imei = $2 AND imsi IN (SELECT imsi FROM ledger WHERE imei = $2)", append(args, imei.String())
	}
	// One row an IMSI: the latest of its bindings.
	query := fmt.Sprintf(`SELECT `+bindingColumns+` FROM bindings AS b WHERE `+where+` AND NOT EXISTS (
			SELECT 1 FROM bindings AS o WHERE o.imsi = b.imsi AND (o.state = 'PENDING' AND b.state <> 'PENDING' OR o.state = 'ACTIVE' AND b.state = 'REVOKED'))
		ORDER BY imsi LIMIT $%d`, len(args)+1)
	rows, err := s.read.QueryContext(ctx, query, append(args, limit)...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []*binding.Binding
	for rows.Next() {
		b, err := scanBinding(rows.Scan)
		if err != nil {
			return nil, err
		}
		all = append(all, b)
	}
	return all, rows.Err()
}

func (s *Store) Prepare(ctx context.Context, fresh binding.Attempt, now, reuse time.Time) (*binding.Binding, *binding.Attempt, error) {
	b, a, err := prepared(ctx, s.read, fresh.IMSI, now, reuse)
	if b != nil || a != nil || err != nil {
		return b, a, err
	}
	err = s.change(ctx, fresh.IMSI.String(), func(ctx context.Context, tx *sql.Tx) (err error) {
		// Looked up again: a binding that came up since must not get an attempt beside it.
		if b, a, err = prepared(ctx, tx, fresh.IMSI, now, reuse); b != nil || a != nil || err != nil {
			return err
		}
		a = &fresh
		return insertAttempt(ctx, tx, fresh)
	})
	if err != nil {
		return nil, nil, err
	}
	return b, a, nil
}

func insertAttempt(ctx context.Context, tx *sql.Tx, a binding.Attempt) error {
	opened := 0
	if a.Opened {
		opened = 1
	}
	_, err := tx.ExecContext(ctx, `INSERT INTO attempts (id, imsi, expires_at, opened) VALUES ($1, $2, $3, $4)`, a.ID, a.IMSI.String(), a.Expires.UnixMilli(), opened)
	return err
}

func prepared(ctx context.Context, q queryer, imsi kme.IMSI, now, reuse time.Time) (*binding.Binding, *binding.Attempt, error) {
	a := &binding.Attempt{IMSI: imsi}
	var expires int64
	err := q.QueryRowContext(ctx, `SELECT id, expires_at, opened FROM attempts WHERE imsi = $1 AND (opened = 1 AND expires_at > $2 OR expires_at >= $3)
		ORDER BY opened DESC, expires_at DESC LIMIT 1`, imsi.String(), now.UnixMilli(), reuse.UnixMilli()).Scan(&a.ID, &expires, &a.Opened)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		a = nil
	case err != nil:
		return nil, nil, err
	default:
		if a.Expires = fromMillis(expires); a.Opened {
			return nil, a, nil
		}
	}
	b, err := current(ctx, q, imsi)
	switch {
	case errors.Is(err, binding.ErrNotBound):
		return nil, a, nil
	case err != nil:
		return nil, nil, err
	}
	return b, nil, nil
}

func (s *Store) OpenAttempt(ctx context.Context, a binding.Attempt) error {
	return s.change(ctx, a.IMSI.String(), func(ctx context.Context, tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, `DELETE FROM attempts WHERE imsi = $1`, a.IMSI.String()); err != nil {
			return err
		}
		return insertAttempt(ctx, tx, a)
	})
}

func (s *Store) Attempt(ctx context.Context, imsi kme.IMSI, id string, now time.Time) (*binding.Attempt, error) {
	return openAttempt(ctx, s.read, imsi, id, now)
}

func openAttempt(ctx context.Context, q queryer, imsi kme.IMSI, id string, now time.Time) (*binding.Attempt, error) {
	a := &binding.Attempt{ID: id, IMSI: imsi}
	var expires int64
	err := q.QueryRowContext(ctx, `SELECT expires_at, opened FROM attempts WHERE id = $1 AND imsi = $2 AND expires_at > $3`, id, imsi.String(), now.UnixMilli()).Scan(&expires, &a.Opened)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, binding.ErrNoAttempt
	}
	a.Expires = fromMillis(expires)
	return a, err
}

func (s *Store) Establish(ctx context.Context, b *binding.Binding, tag []byte, good bool, now time.Time) error {
	return s.change(ctx, b.IMSI.String(), func(ctx context.Context, tx *sql.Tx) error {
		var expires int64
		var opened, bound, used bool
		err := tx.QueryRowContext(ctx, `SELECT expires_at, opened = 1, EXISTS (SELECT 1 FROM bindings WHERE imsi = $1 AND state = 'ACTIVE'),
			EXISTS (SELECT 1 FROM ledger WHERE imei = $2 AND tag = $3) FROM attempts WHERE imsi = $1 AND id = $4`,
			b.IMSI.String(), b.IMEI.String(), tag, b.AttemptID).Scan(&expires, &opened, &bound, &used)
		switch {
		case errors.Is(err, sql.ErrNoRows), err == nil && expires <= now.UnixMilli():
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
		_, err = tx.ExecContext(ctx, `INSERT INTO bindings (`+bindingColumns+`) VALUES ($1, 'PENDING', $2, $3, $4, $5, $6, $7, $8, $9, 0, 0)
			ON CONFLICT (imsi, state) DO UPDATE SET imei = excluded.imei, manufacturer = excluded.manufacturer, lot = excluded.lot, sealed = excluded.sealed,
			nw_sig = excluded.nw_sig, attempt_id = excluded.attempt_id, payload_sha256 = excluded.payload_sha256, established_at = excluded.established_at`,
			b.IMSI.String(), b.IMEI.String(), b.Manufacturer, b.Lot, b.Sealed, b.NWSig, b.AttemptID, b.PayloadSHA256, b.Established.UnixMilli())
		return err
	})
}

func (s *Store) Report(ctx context.Context, imsi kme.IMSI, ok bool, now time.Time) (*binding.Binding, error) {
	// Nearly every report is the success of a binding that is active already: it changes nothing and needs no lock.
	b, err := current(ctx, s.read, imsi)
	if err != nil || b.State == binding.Active {
		return b, err
	}
	err = s.change(ctx, imsi.String(), func(ctx context.Context, tx *sql.Tx) (err error) {
		if b, err = current(ctx, tx, imsi); err != nil || b.State == binding.Active {
			return err
		}
		if ok {
			// The binding before it, or one that was revoked, has ended.
			if _, err = tx.ExecContext(ctx, `DELETE FROM bindings WHERE imsi = $1 AND state <> 'PENDING'`, imsi.String()); err != nil {
				return err
			}
			_, err = tx.ExecContext(ctx, `UPDATE bindings SET state = 'ACTIVE', activated_at = $1 WHERE imsi = $2`, now.UnixMilli(), imsi.String())
		} else {
			_, err = tx.ExecContext(ctx, `DELETE FROM bindings WHERE imsi = $1 AND state = 'PENDING'`, imsi.String())
		}
		if err != nil {
			return err
		}
		if b, err = current(ctx, tx, imsi); errors.Is(err, binding.ErrNotBound) {
			b, err = nil, nil
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return b, nil
}

func (s *Store) Revoke(ctx context.Context, imsi kme.IMSI, now time.Time) (b *binding.Binding, err error) {
	err = s.change(ctx, imsi.String(), func(ctx context.Context, tx *sql.Tx) (err error) {
		if b, err = latest(ctx, tx, imsi); err != nil || b.State == binding.Revoked {
			return err
		}
		for _, query := range []string{`DELETE FROM attempts WHERE imsi = $1`, `DELETE FROM bindings WHERE imsi = $1`} {
			if _, err := tx.ExecContext(ctx, query, imsi.String()); err != nil {
				return err
			}
		}
		b.State, b.Revoked, b.Sealed = binding.Revoked, fromMillis(now.UnixMilli()), []byte{}
		_, err = tx.ExecContext(ctx, `INSERT INTO bindings (`+bindingColumns+`) VALUES ($1, 'REVOKED', $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)`,
			imsi.String(), b.IMEI.String(), b.Manufacturer, b.Lot, b.Sealed, b.NWSig, b.AttemptID, b.PayloadSHA256, b.Established.UnixMilli(), millis(b.Activated), now.UnixMilli())
		return err
	})
	if err != nil {
		return nil, err
	}
	return b, nil
}

func (s *Store) DropExpired(ctx context.Context, now time.Time) error {
	return s.exec(ctx, "expired", `DELETE FROM attempts WHERE expires_at <= $1`, now.UnixMilli())
}

func (s *Store) PutManufacturer(ctx context.Context, m *binding.Manufacturer) error {
	return s.exec(ctx, "registry", `INSERT INTO manufacturers (key_id, pem, operator, directory, enrolled_at) VALUES ($1, $2, $3, $4, $5)
		ON CONFLICT (key_id) DO UPDATE SET pem = excluded.pem, operator = excluded.operator, directory = excluded.directory, enrolled_at = excluded.enrolled_at`,
		m.KeyID, m.PEM, m.Operator, m.Directory, m.Enrolled.UnixMilli())
}

func (s *Store) Manufacturers(ctx context.Context) ([]*binding.Manufacturer, error) {
	rows, err := s.read.QueryContext(ctx, `SELECT key_id, pem, operator, directory, enrolled_at FROM manufacturers ORDER BY key_id`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []*binding.Manufacturer
	for rows.Next() {
		m := new(binding.Manufacturer)
		var enrolled int64
		if err := rows.Scan(&m.KeyID, &m.PEM, &m.Operator, &m.Directory, &enrolled); err != nil {
			return nil, err
		}
		m.Enrolled = fromMillis(enrolled)
		all = append(all, m)
	}
	return all, rows.Err()
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

func lots(ctx context.Context, q interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}) ([]*binding.Lot, error) {
	rows, err := q.QueryContext(ctx, `SELECT l.manufacturer, l.lot, l.manifest, l.imported_at, m.pem FROM lots l JOIN manufacturers m ON m.key_id = l.manufacturer
		ORDER BY l.manufacturer, l.lot`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []*binding.Lot
	for rows.Next() {
		l := new(binding.Lot)
		var name, pem string
		var imported int64
		if err := rows.Scan(&l.Manufacturer, &name, &l.ManifestJWS, &imported, &pem); err != nil {
			return nil, err
		}
		verifier, err := directory.ParseVerifier([]byte(pem))
		if err != nil {
			return nil, fmt.Errorf("manufacturer %s: %w", l.Manufacturer, err)
		}
		if l.Manifest, err = verifier.Manifest(name, []byte(l.ManifestJWS)); err != nil {
			return nil, err
		}
		l.Imported = fromMillis(imported)
		all = append(all, l)
	}
	return all, rows.Err()
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
