// Package sqlstore keeps the service's state in SQLite, the embedded default.
package sqlstore

import (
	"context"
	"database/sql"
	_ "embed"
	"errors"
	"fmt"
	"time"

	"github.com/mattn/go-sqlite3"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/sqlite"
	"github.com/kmehsm/kmehsm/kme"
)

//go:embed schema.sql
var schema string

// schemaVersion is what PRAGMA user_version says of a database that this code can use.
const schemaVersion = 1

// A Store implements binding.Store and binding.Registry.
type Store struct {
	read, write *sql.DB
}

var (
	_ binding.Store    = (*Store)(nil)
	_ binding.Registry = (*Store)(nil)
)

// Open opens the database at path, or makes it. Every commit is synced to disk before it returns.
func Open(ctx context.Context, path string) (*Store, error) {
	read, write, err := sqlite.Open(ctx, path, schema, schemaVersion)
	if err != nil {
		return nil, err
	}
	return &Store{read, write}, nil
}

// Close ends all connections.
func (s *Store) Close() error { return errors.Join(s.read.Close(), s.write.Close()) }

func (s *Store) tx(ctx context.Context, f func(*sql.Tx) error) error {
	tx, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // no effect after Commit
	if err := f(tx); err != nil {
		return err
	}
	return tx.Commit()
}

type queryer interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

const bindingColumns = `imsi, state, imei, manufacturer, lot, sealed, nw_sig, attempt_id, payload_sha256, established_at, activated_at`

// current is the pending binding before the active one; 'PENDING' sorts after 'ACTIVE'.
func current(ctx context.Context, q queryer, imsi kme.IMSI) (*binding.Binding, error) {
	var b binding.Binding
	var imsiText, imei string
	var established, activated int64
	err := q.QueryRowContext(ctx, `SELECT `+bindingColumns+` FROM bindings WHERE imsi = ? ORDER BY state DESC LIMIT 1`, imsi.String()).
		Scan(&imsiText, &b.State, &imei, &b.Manufacturer, &b.Lot, &b.Sealed, &b.NWSig, &b.AttemptID, &b.PayloadSHA256, &established, &activated)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, binding.ErrNotBound
	}
	if err != nil {
		return nil, err
	}
	if err := errors.Join(b.IMSI.UnmarshalText([]byte(imsiText)), b.IMEI.UnmarshalText([]byte(imei))); err != nil {
		return nil, fmt.Errorf("the database is damaged: %w", err)
	}
	b.Established, b.Activated = fromMillis(established), fromMillis(activated)
	return &b, nil
}

func (s *Store) Binding(ctx context.Context, imsi kme.IMSI) (*binding.Binding, error) {
	return current(ctx, s.read, imsi)
}

func (s *Store) Prepare(ctx context.Context, fresh binding.Attempt, now, reuse time.Time) (*binding.Binding, *binding.Attempt, error) {
	b, a, err := prepared(ctx, s.read, fresh.IMSI, reuse)
	if b != nil || a != nil || err != nil {
		return b, a, err
	}
	err = s.tx(ctx, func(tx *sql.Tx) error {
		// Looked up again: a binding that came up since must not get an attempt beside it.
		if b, a, err = prepared(ctx, tx, fresh.IMSI, reuse); b != nil || a != nil || err != nil {
			return err
		}
		a = &fresh
		_, err := tx.ExecContext(ctx, `INSERT INTO attempts (id, imsi, expires_at) VALUES (?, ?, ?)`, fresh.ID, fresh.IMSI.String(), fresh.Expires.UnixMilli())
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	return b, a, nil
}

func prepared(ctx context.Context, q queryer, imsi kme.IMSI, reuse time.Time) (*binding.Binding, *binding.Attempt, error) {
	b, err := current(ctx, q, imsi)
	if !errors.Is(err, binding.ErrNotBound) {
		return b, nil, err
	}
	a := &binding.Attempt{IMSI: imsi}
	var expires int64
	err = q.QueryRowContext(ctx, `SELECT id, expires_at FROM attempts WHERE imsi = ? AND expires_at >= ? ORDER BY expires_at DESC LIMIT 1`,
		imsi.String(), reuse.UnixMilli()).Scan(&a.ID, &expires)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	a.Expires = fromMillis(expires)
	return nil, a, nil
}

func (s *Store) Attempt(ctx context.Context, imsi kme.IMSI, id string, now time.Time) (*binding.Attempt, error) {
	return openAttempt(ctx, s.read, imsi, id, now)
}

func openAttempt(ctx context.Context, q queryer, imsi kme.IMSI, id string, now time.Time) (*binding.Attempt, error) {
	a := &binding.Attempt{ID: id, IMSI: imsi}
	var expires int64
	err := q.QueryRowContext(ctx, `SELECT expires_at FROM attempts WHERE id = ? AND imsi = ? AND expires_at > ?`, id, imsi.String(), now.UnixMilli()).Scan(&expires)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, binding.ErrNoAttempt
	}
	a.Expires = fromMillis(expires)
	return a, err
}

func (s *Store) Used(ctx context.Context, imei kme.IMEI, tag []byte) (bool, error) {
	var n int
	err := s.read.QueryRowContext(ctx, `SELECT COUNT(*) FROM ledger WHERE imei = ? AND tag = ?`, imei.String(), tag).Scan(&n)
	return n > 0, err
}

func (s *Store) Establish(ctx context.Context, b *binding.Binding, tag []byte, now time.Time) error {
	return s.tx(ctx, func(tx *sql.Tx) error {
		if _, err := openAttempt(ctx, tx, b.IMSI, b.AttemptID, now); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, `INSERT INTO ledger (imei, tag) VALUES (?, ?)`, b.IMEI.String(), tag); err != nil {
			if isDuplicate(err) {
				return binding.ErrUsed
			}
			return err
		}
		if _, err := tx.ExecContext(ctx, `DELETE FROM attempts WHERE imsi = ?`, b.IMSI.String()); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, `DELETE FROM bindings WHERE imsi = ? AND state = 'PENDING'`, b.IMSI.String()); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, `INSERT INTO bindings (`+bindingColumns+`) VALUES (?, 'PENDING', ?, ?, ?, ?, ?, ?, ?, ?, 0)`,
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
	err = s.tx(ctx, func(tx *sql.Tx) error {
		if b, err = current(ctx, tx, imsi); err != nil || b.State == binding.Active {
			return err
		}
		if ok {
			if _, err = tx.ExecContext(ctx, `DELETE FROM bindings WHERE imsi = ? AND state = 'ACTIVE'`, imsi.String()); err != nil {
				return err
			}
			_, err = tx.ExecContext(ctx, `UPDATE bindings SET state = 'ACTIVE', activated_at = ? WHERE imsi = ?`, now.UnixMilli(), imsi.String())
		} else {
			_, err = tx.ExecContext(ctx, `DELETE FROM bindings WHERE imsi = ? AND state = 'PENDING'`, imsi.String())
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

func (s *Store) DropExpired(ctx context.Context, now time.Time) error {
	_, err := s.write.ExecContext(ctx, `DELETE FROM attempts WHERE expires_at <= ?`, now.UnixMilli())
	return err
}

func (s *Store) PutManufacturer(ctx context.Context, m *binding.Manufacturer) error {
	_, err := s.write.ExecContext(ctx, `INSERT INTO manufacturers (key_id, pem, operator, directory, enrolled_at) VALUES (?, ?, ?, ?, ?)
		ON CONFLICT (key_id) DO UPDATE SET pem = excluded.pem, operator = excluded.operator, directory = excluded.directory, enrolled_at = excluded.enrolled_at`,
		m.KeyID, m.PEM, m.Operator, m.Directory, m.Enrolled.UnixMilli())
	return err
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
	return s.tx(ctx, func(tx *sql.Tx) error {
		all, err := lots(ctx, tx)
		if err != nil {
			return err
		}
		if err := check(all); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `INSERT INTO lots (manufacturer, lot, manifest, imported_at) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING`,
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

func isDuplicate(err error) bool {
	var e sqlite3.Error
	return errors.As(err, &e) && e.Code == sqlite3.ErrConstraint &&
		(e.ExtendedCode == sqlite3.ErrConstraintPrimaryKey || e.ExtendedCode == sqlite3.ErrConstraintUnique)
}

func fromMillis(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}
