package sqlstore

import (
	"context"
	"errors"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/kme"
)

func (s *Store) Prepare(ctx context.Context, q binding.VectorRequest) (d binding.Decision, err error) {
	sub, err := s.Subscription(ctx, q.IMSI, q.Now)
	if err != nil {
		return d, err
	}
	// Nearly every vector is for an active binding: it changes nothing and needs no lock. Nor does a vector for a
	// pending one that the HSM has not made yet.
	_, opened := sub.Opened(q.Origin)
	b := sub.Under(q.Origin.Name)
	told := b != nil && b == sub.Pending && q.Ready != b.AttemptID && len(b.Sent) < q.PendingVectors
	if b != nil && !opened && (b == sub.Active || told) {
		return binding.Decision{Binding: b}, s.unspent(ctx, s.reads("prepare"), q.IMSI, q.RANDs)
	}
	var refused error // what has ended has ended, refused or not
	err = s.change(ctx, "prepare", q.IMSI.String(), func(ctx context.Context, tx *txn) (err error) {
		d, refused = binding.Decision{}, nil
		sub, err := s.subscription(ctx, tx.Conn, q.IMSI, q.Now)
		if err != nil {
			return err
		}
		if d.Ended = sub.expired; sub.Pending != nil && len(sub.Pending.Sent) >= q.PendingVectors {
			d.Ended, sub.Pending = sub.Pending, nil
		}
		if d.Ended != nil {
			if err := dropPending(ctx, tx, q.IMSI); err != nil {
				return err
			}
		}
		until, opened := sub.Opened(q.Origin)
		b := sub.Under(q.Origin.Name)
		switch {
		case opened || b == nil && q.Origin.Provisioning == binding.Allowed:
			return s.attempt(ctx, tx, sub, q, until, &d)
		case b == nil:
			refused = binding.ErrNotBound
			return nil
		}
		if err := s.unspent(ctx, tx.Conn, q.IMSI, q.RANDs); errors.Is(err, binding.ErrSpent) {
			refused = err
			return nil
		} else if err != nil {
			return err
		}
		if d.Binding = b; b == sub.Pending && q.Ready == b.AttemptID {
			b.Sent = append(b.Sent, q.Origin.Name)
			return s.put(ctx, tx, bindings, values(b, *sub.seq.of(b.State))...)
		}
		return nil
	})
	if err != nil {
		return binding.Decision{}, err
	}
	return d, refused
}

func dropPending(ctx context.Context, tx *txn, imsi kme.IMSI) error {
	return tx.Do(ctx, `DELETE FROM bindings WHERE imsi = $1 AND state = 'PENDING'`, imsi.String())
}

// attempt gives the attempt of an origin, in an administrator's if that is open until then, and notes what leaves in
// clear.
func (s *Store) attempt(
	ctx context.Context, tx *txn, sub *stored, q binding.VectorRequest, until time.Time, d *binding.Decision,
) error {
	opened := !until.IsZero()
	reuse := q.Now.Add(q.AttemptTTL / 2)
	if opened {
		reuse = until
	} else {
		until = q.Now.Add(q.AttemptTTL)
	}
	if d.Attempt = sub.Reusable(q.Origin.Name, opened, reuse); d.Attempt == nil {
		d.Attempt = &binding.Attempt{ID: q.AttemptID, IMSI: q.IMSI, Origin: q.Origin.Name, Expires: until,
			Opened: opened}
		d.Fresh = true
		if err := s.addAttempt(ctx, tx, *d.Attempt, sub.last.closed); err != nil {
			return err
		}
	}
	imsi := q.IMSI.String()
	for _, r := range q.RANDs {
		if err := tx.Do(ctx, spentRANDs.insert+` ON CONFLICT DO NOTHING`, imsi, r[:],
			s.macs.Of(spentRANDs.name, imsi, r[:])); err != nil {
			return err
		}
	}
	return nil
}

// unspent fails with ErrSpent if an IMSI was sent one of these RANDs in clear.
func (s *Store) unspent(ctx context.Context, q sqlconn.Conn, imsi kme.IMSI, rands []hsmkeys.RAND) error {
	for _, r := range rands {
		if spent, err := s.isSpent(ctx, q, imsi, r); err != nil {
			return err
		} else if spent {
			return binding.ErrSpent
		}
	}
	return nil
}

func (s *Store) isSpent(ctx context.Context, q sqlconn.Conn, imsi kme.IMSI, rand hsmkeys.RAND) (spent bool, err error) {
	err = s.rows(ctx, q, spentRANDs, func(row) error {
		spent = true
		return nil
	}, `WHERE imsi = $1 AND rand = $2`, imsi.String(), rand[:])
	return spent, err
}

func (s *Store) Spent(ctx context.Context, imsi kme.IMSI, rand hsmkeys.RAND) (bool, error) {
	q, err := s.reading("look for a spent RAND")
	if err != nil {
		return false, err
	}
	return s.isSpent(ctx, q, imsi, rand)
}

func (s *Store) addAttempt(ctx context.Context, tx *txn, a binding.Attempt, seq int64) error {
	return s.add(ctx, tx, attempts, a.IMSI.String(), a.ID, a.Origin.String(), a.Expires.UnixMilli(),
		asInt(a.Opened), seq)
}

func asInt(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

func dropAttempts(ctx context.Context, tx *txn, imsi kme.IMSI) error {
	return tx.Do(ctx, `DELETE FROM attempts WHERE imsi = $1`, imsi.String())
}

func (s *Store) OpenAttempt(ctx context.Context, a binding.Attempt) error {
	return s.change(ctx, "open provisioning", a.IMSI.String(), func(ctx context.Context, tx *txn) error {
		if err := dropAttempts(ctx, tx, a.IMSI); err != nil {
			return err
		}
		seq, err := s.note(ctx, tx, entry{event: binding.EventOpened, subject: a.IMSI.String(),
			detail: "until " + a.Expires.UTC().Format(time.RFC3339)})
		if err != nil {
			return err
		}
		return s.addAttempt(ctx, tx, a, seq)
	})
}

func (s *Store) Establish(ctx context.Context, b *binding.Binding, tag []byte, good bool, now time.Time) error {
	return s.change(ctx, "establish", b.IMSI.String(), func(ctx context.Context, tx *txn) error {
		sub, err := s.toChange(ctx, tx, b.IMSI, now)
		if err != nil {
			return err
		}
		of := entry{event: binding.EventEstablished, subject: b.IMSI.String(), imei: b.IMEI.String(), tag: tag}
		switch a := sub.Attempt(b.AttemptID, b.Origin); {
		case a == nil:
			return binding.ErrNoAttempt
		case sub.Active != nil && !a.Opened:
			return binding.ErrBound
		case !good:
			if err := used(ctx, tx.Conn, of); err != nil {
				return err
			}
			return binding.ErrNotGood
		}
		seq, err := s.note(ctx, tx, of)
		if err == nil {
			err = dropAttempts(ctx, tx, b.IMSI)
		}
		if err != nil {
			return err
		}
		return s.put(ctx, tx, bindings, values(b, seq)...)
	})
}

func (s *Store) Report(ctx context.Context, imsi kme.IMSI, o kme.Origin, ok bool,
	now time.Time) (*binding.Subscription, error) {
	// Nearly every report is the success of a binding that is active already: it changes nothing and needs no lock.
	sub, err := s.Subscription(ctx, imsi, now)
	if err == nil && sub.Standing() == nil {
		err = binding.ErrNotBound
	}
	if err == nil && sub.Ends(o, ok) {
		err = s.change(ctx, "report", imsi.String(), func(ctx context.Context, tx *txn) error {
			all, err := s.toChange(ctx, tx, imsi, now)
			if err != nil {
				return err
			}
			if sub = &all.Subscription; !sub.Ends(o, ok) {
				return nil
			}
			return s.end(ctx, tx, sub, ok, now)
		})
	}
	if err != nil {
		return nil, err
	}
	return sub, nil
}

// end makes the pending binding the active one, and drops those before it; or drops it.
func (s *Store) end(ctx context.Context, tx *txn, sub *binding.Subscription, ok bool, now time.Time) error {
	b := sub.Pending
	sub.Pending = nil
	if !ok {
		return dropPending(ctx, tx, b.IMSI)
	}
	b.State, b.Activated, b.Expires, b.Sent = binding.Active, fromMillis(now.UnixMilli()), time.Time{}, nil
	sub.Active, sub.Revoked = b, nil
	return s.replace(ctx, tx, b, entry{event: binding.EventActivated, subject: b.IMSI.String()})
}

// replace makes a binding the only one of its IMSI.
func (s *Store) replace(ctx context.Context, tx *txn, b *binding.Binding, because entry) error {
	seq, err := s.note(ctx, tx, because)
	if err == nil {
		err = tx.Do(ctx, `DELETE FROM bindings WHERE imsi = $1`, b.IMSI.String())
	}
	if err != nil {
		return err
	}
	return s.add(ctx, tx, bindings, values(b, seq)...)
}

func (s *Store) Revoke(ctx context.Context, imsi kme.IMSI, now time.Time) (b *binding.Binding, err error) {
	err = s.change(ctx, "revoke", imsi.String(), func(ctx context.Context, tx *txn) error {
		b = nil
		sub, err := s.toChange(ctx, tx, imsi, now)
		switch {
		case isDamaged(err): // which ends so too
			if b, err = s.lastDevice(ctx, tx.Conn, imsi); err == nil {
				err = tx.Do(ctx, `DELETE FROM bindings WHERE imsi = $1`, imsi.String())
			}
			if err != nil {
				return err
			}
		case err != nil:
			return err
		default:
			b = sub.Latest()
		}
		if err := dropAttempts(ctx, tx, imsi); err != nil {
			return err
		}
		if b == nil || b.State == binding.Revoked { // what else there is has expired
			if err := dropPending(ctx, tx, imsi); err != nil || sub != nil && len(sub.Attempts) == 0 {
				return err
			}
			_, err := s.note(ctx, tx, entry{event: binding.EventClosed, subject: imsi.String()})
			return err
		}
		b.State, b.Revoked, b.Sealed, b.Expires, b.Sent = binding.Revoked, fromMillis(now.UnixMilli()),
			[]byte{}, time.Time{}, nil
		return s.replace(ctx, tx, b, entry{event: binding.EventRevoked, subject: imsi.String()})
	})
	if err == nil && b == nil {
		err = binding.ErrNotBound
	}
	if err != nil {
		return nil, err
	}
	return b, nil
}

// lastDevice is what the ledger knows of an IMSI whose rows are damaged: the device that it was bound to last.
func (s *Store) lastDevice(ctx context.Context, q sqlconn.Conn, imsi kme.IMSI) (b *binding.Binding, err error) {
	err = s.entries(ctx, q, func(e binding.Entry) error {
		b = &binding.Binding{IMSI: imsi, Established: e.Time}
		return b.IMEI.UnmarshalText([]byte(e.IMEI))
	}, `WHERE e.subject = $1 AND e.event = $2 ORDER BY e.seq`, imsi.String(), string(binding.EventEstablished))
	return b, err
}

func (s *Store) Bound(ctx context.Context, manufacturer, lot string, now time.Time) (n int, err error) {
	q, err := s.reading("count bindings")
	if err != nil {
		return 0, err
	}
	_, err = q.One(ctx, []any{&n}, `SELECT COUNT(*) FROM bindings WHERE manufacturer = $1 AND (lot = $2 OR $2 = '') AND
		(state = 'ACTIVE' OR state = 'PENDING' AND expires_at > $3)`, manufacturer, lot, now.UnixMilli())
	return n, err
}

func (s *Store) DropExpired(ctx context.Context, now time.Time) error {
	return s.change(ctx, "drop what has expired", "expired", func(ctx context.Context, tx *txn) error {
		return tx.Do(ctx, `DELETE FROM attempts WHERE expires_at <= $1`, now.UnixMilli())
	})
}
