package sqlstore

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"slices"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/ledger"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/subscription"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/kme"
)

func (s *Store) Prepare(ctx context.Context, q binding.VectorRequest) (d binding.Decision, err error) {
	if err := s.chains.Refusal(); err != nil {
		return d, err
	}
	// A caller whose vectors are Ready has read the pending binding, and will be noted in it. That change reads it
	// again, unless it knows what is stored.
	if q.Ready == "" {
		if d, changes, err := s.prepared(ctx, q); !changes || err != nil {
			return d, err
		}
	}
	return s.prepare(ctx, q)
}

// prepared is Prepare without vectors that are Ready, if that changes nothing that is stored. changes says that it
// would.
func (s *Store) prepared(
	ctx context.Context, q binding.VectorRequest,
) (d binding.Decision, changes bool, err error) {
	if b := s.recent.Pending(q); b != nil {
		spent, err := s.isSpent(ctx, q.IMSI, q.RANDs...)
		if err != nil || !spent {
			return binding.Decision{Binding: b}, false, err
		}
		// If the binding was ended meanwhile, the vector may leave all the same.
	}
	sub, err := s.current(ctx, "prepare", q.IMSI, q.Now, q.RANDs...)
	if err != nil {
		return d, false, err
	}
	_, opened := sub.Opened(q.Origin)
	b := sub.Under(q.Origin.Name)
	// Nearly every vector is for an active binding: it changes nothing and needs no lock. Nor does a vector for a
	// pending one that the HSM has not made yet, nor an attempt that is not opened: what closes it, also at the same
	// time, changes its MAC.
	switch told := b != nil && len(b.Sent) < q.PendingVectors; {
	case opened || sub.Expired != nil && b == nil:
	case b == nil && q.Origin.Provisioning == binding.Allowed:
		d.Attempt = s.issue(sub, q)
		return d, false, s.change(ctx, "prepare", q.IMSI.String(), func(ctx context.Context, tx *txn) error {
			return s.spend(ctx, tx, q)
		})
	case b == nil:
		return d, false, binding.ErrNotBound
	case b == sub.Active || told:
		if sub.Spent {
			return d, false, binding.ErrSpent
		}
		return binding.Decision{Binding: b}, false, nil
	}
	return d, true, nil
}

// prepare is Prepare in a change.
func (s *Store) prepare(ctx context.Context, q binding.VectorRequest) (d binding.Decision, err error) {
	var refused error // bindings that have ended stay ended, refused or not
	err = s.change(ctx, "prepare", q.IMSI.String(), func(ctx context.Context, tx *txn) (err error) {
		d, refused = binding.Decision{}, nil
		sub, err := s.again(ctx, tx, q)
		if err != nil {
			return err
		}
		if d.Ended = sub.Expired; sub.Pending != nil && len(sub.Pending.Sent) >= q.PendingVectors {
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
		case opened:
			if d.Attempt, err = s.within(ctx, tx, sub, q, until); err != nil {
				return err
			}
			return s.spend(ctx, tx, q)
		case b == nil && q.Origin.Provisioning == binding.Allowed:
			d.Attempt = s.issue(sub, q)
			return s.spend(ctx, tx, q)
		case b == nil:
			refused = binding.ErrNotBound
			return nil
		case sub.Spent:
			refused = binding.ErrSpent
			return nil
		}
		if d.Binding = b; b == sub.Pending && q.Ready == b.AttemptID {
			b.Sent = append(slices.Clip(b.Sent), q.Origin.Name)
			s.recent.Put(q.IMSI.String(), sub)
			return tx.Do(ctx, `UPDATE bindings SET sent = $1, mac = $2 WHERE imsi = $3 AND state = 'PENDING'`,
				tables.SentText(b.Sent), s.macs.Of(tables.Bindings.Name, tables.OfBinding(b, sub.Seq.Pending)...),
				b.IMSI.String())
		}
		return nil
	})
	if err != nil {
		return binding.Decision{}, err
	}
	return d, refused
}

// again reads inside a change what was read before it. It does not check for spent RANDs if vectors are ready: that was
// done before they were made, and a RAND that was sent in clear since then counts as a later one.
func (s *Store) again(ctx context.Context, tx *txn, q binding.VectorRequest) (*subscription.Stored, error) {
	if tx.known != nil && q.Ready != "" {
		return tx.known.At(q.Now), nil
	}
	return subscription.Read(ctx, s.macs, tx.Conn, q.IMSI, q.Now, q.RANDs...)
}

func dropPending(ctx context.Context, tx *txn, imsi kme.IMSI) error {
	return tx.Do(ctx, `DELETE FROM bindings WHERE imsi = $1 AND state = 'PENDING'`, imsi.String())
}

// issue makes an attempt that is in no row: its id has the time of its end, and a MAC. The MAC also covers the last
// entry of the ledger that has closed attempts, so that the next such entry closes this one; and the mark's epoch, so
// that none outlives accept-rollback.
func (s *Store) issue(sub *subscription.Stored, q binding.VectorRequest) *binding.Attempt {
	a := &binding.Attempt{IMSI: q.IMSI, Origin: q.Origin.Name,
		Expires: tables.Time(q.Now.Add(q.AttemptTTL).UnixMilli())}
	a.ID = s.issuedID(sub, a)
	return a
}

func (s *Store) issuedID(sub *subscription.Stored, a *binding.Attempt) string {
	expires := tables.Millis(a.Expires)
	id := binary.BigEndian.AppendUint64(nil, uint64(expires))
	id = append(id, s.macs.Of("attempt", a.IMSI.String(), a.Origin.String(), expires, sub.Last.Closed,
		int64(s.Seen().Epoch))...)
	return base64.RawURLEncoding.EncodeToString(id)
}

// attempt is an origin's open attempt with an id, opened or issued; nil if there is none.
func (s *Store) attempt(
	sub *subscription.Stored, imsi kme.IMSI, o kme.Origin, id string, now time.Time,
) *binding.Attempt {
	if a := sub.Attempt(id, o); a != nil {
		return a
	}
	raw, err := base64.RawURLEncoding.DecodeString(id)
	if err != nil || len(raw) < 8 {
		return nil
	}
	a := &binding.Attempt{ID: id, IMSI: imsi, Origin: o, Expires: tables.Time(int64(binary.BigEndian.Uint64(raw)))}
	if !hmac.Equal([]byte(id), []byte(s.issuedID(sub, a))) || !a.Expires.After(now) {
		return nil
	}
	return a
}

func (s *Store) Attempt(
	ctx context.Context, imsi kme.IMSI, o kme.Origin, id string, now time.Time,
) (*binding.Attempt, error) {
	if err := s.chains.Refusal(); err != nil {
		return nil, err
	}
	sub, err := s.current(ctx, "look for an attempt", imsi, now)
	if err != nil {
		return nil, err
	}
	if a := s.attempt(sub, imsi, o, id, now); a != nil {
		return a, nil
	}
	return nil, binding.ErrNoAttempt
}

// within gives an origin's attempt within an administrator's, which is open until then.
func (s *Store) within(
	ctx context.Context, tx *txn, sub *subscription.Stored, q binding.VectorRequest, until time.Time,
) (*binding.Attempt, error) {
	if a := sub.Until(q.Origin.Name, until); a != nil {
		return a, nil
	}
	a := &binding.Attempt{ID: rand.Text(), IMSI: q.IMSI, Origin: q.Origin.Name, Expires: until, Opened: true}
	return a, s.addAttempt(ctx, tx, *a, sub.Last.Closed)
}

// spend notes RANDs that are sent in clear.
func (s *Store) spend(ctx context.Context, tx *txn, q binding.VectorRequest) error {
	imsi := q.IMSI.String()
	for _, r := range q.RANDs {
		if err := tx.Do(ctx, tables.SpentRANDs.Insert+` ON CONFLICT DO NOTHING`, imsi, r[:],
			s.macs.Of(tables.SpentRANDs.Name, imsi, r[:])); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) Spent(ctx context.Context, imsi kme.IMSI, rand hsmkeys.RAND) (spent bool, err error) {
	if err := s.chains.Refusal(); err != nil {
		return false, err
	}
	return s.isSpent(ctx, imsi, rand)
}

// isSpent says whether an IMSI was sent one of some RANDs in clear.
func (s *Store) isSpent(ctx context.Context, imsi kme.IMSI, rands ...hsmkeys.RAND) (bool, error) {
	return subscription.Spent(ctx, s.macs, sqlconn.Conn{Operation: "look for a spent RAND", DB: s.lookUp}, imsi,
		rands...)
}

func (s *Store) addAttempt(ctx context.Context, tx *txn, a binding.Attempt, seq int64) error {
	return s.macs.Add(ctx, tx.Conn, tables.Attempts, a.IMSI.String(), a.ID, a.Origin.String(), a.Expires.UnixMilli(),
		seq)
}

func dropAttempts(ctx context.Context, tx *txn, imsi kme.IMSI) error {
	return tx.Do(ctx, `DELETE FROM attempts WHERE imsi = $1`, imsi.String())
}

func (s *Store) OpenAttempt(ctx context.Context, a binding.Attempt) error {
	return s.change(ctx, "open provisioning", a.IMSI.String(), func(ctx context.Context, tx *txn) error {
		if err := dropAttempts(ctx, tx, a.IMSI); err != nil {
			return err
		}
		seq, err := s.chains.Enter(ctx, &tx.Tx, ledger.Entry{Event: binding.EventOpened, Subject: a.IMSI.String(),
			Detail: "until " + a.Expires.UTC().Format(time.RFC3339)})
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
		of := ledger.Entry{Event: binding.EventEstablished, Subject: b.IMSI.String(), IMEI: b.IMEI.String(), Tag: tag}
		switch a := s.attempt(sub, b.IMSI, b.Origin, b.AttemptID, now); {
		case a == nil:
			return binding.ErrNoAttempt
		case sub.Active != nil && !a.Opened:
			return binding.ErrBound
		}
		// This is asked for good KMEs, too, although the insert would find it: on PostgreSQL, a failed statement makes
		// the whole batch run again.
		if err := ledger.Used(ctx, tx.Conn, of); err != nil {
			return err
		}
		if !good {
			return binding.ErrNotGood
		}
		seq, err := s.chains.Enter(ctx, &tx.Tx, of)
		if err == nil && sub.HasRows {
			err = dropAttempts(ctx, tx, b.IMSI)
		}
		if err != nil {
			return err
		}
		sub.Pending, sub.Expired, sub.Attempts, sub.HasRows, sub.Seq.Pending = b, nil, nil, false, seq
		sub.Last.Note(of.Event, seq)
		s.recent.Put(b.IMSI.String(), sub)
		return s.macs.Put(ctx, tx.Conn, tables.Bindings, tables.OfBinding(b, seq)...)
	})
}

func (s *Store) Settle(ctx context.Context) error {
	if err := s.chains.Refusal(); err != nil {
		return err
	}
	return s.settle(ctx)
}

// settle waits for a commit of its own. After a failover, another server may have made it: so callers read again what
// they rely on.
func (s *Store) settle(ctx context.Context) error {
	if !s.recent.OnlyHints {
		return s.chains.Reads("settle").Named(s.inPlace())
	}
	return s.transaction(ctx, "settle", "settle", s.confirm)
}

// confirm commits a transaction that writes to the log and changes nothing: PostgreSQL confirms that after everything
// that it has shown. SQLite shows a change only when it is on the disk.
func (s *Store) confirm(ctx context.Context, tx *txn) error {
	if !s.recent.OnlyHints {
		return nil
	}
	return tx.Do(ctx, `SELECT pg_logical_emit_message(true, 'kmehsm', '')`)
}

func (s *Store) Report(
	ctx context.Context, imsi kme.IMSI, o kme.Origin, ok bool, now time.Time,
) (*binding.Subscription, error) {
	// Nearly every report is the success of a binding that is active already: it changes nothing and needs no lock.
	var sub *binding.Subscription
	if !s.recent.Has(imsi.String()) {
		var err error
		if sub, err = s.Subscription(ctx, imsi, now); err != nil {
			return nil, err
		}
	}
	if sub != nil && !sub.Ends(o, ok) {
		return bound(sub)
	}
	err := s.change(ctx, "report", imsi.String(), func(ctx context.Context, tx *txn) error {
		all, err := s.toChange(ctx, tx, imsi, now)
		if err != nil {
			return err
		}
		if sub = &all.Subscription; sub.Ends(o, ok) {
			return s.end(ctx, tx, sub, ok, now)
		}
		if all.Pending != nil {
			s.recent.Put(imsi.String(), all)
		}
		_, err = bound(sub)
		return err
	})
	if err != nil {
		return nil, err
	}
	return sub, nil
}

func bound(sub *binding.Subscription) (*binding.Subscription, error) {
	if sub.Standing() == nil {
		return nil, binding.ErrNotBound
	}
	return sub, nil
}

// end makes the pending binding the active one and drops earlier ones; or drops it.
func (s *Store) end(ctx context.Context, tx *txn, sub *binding.Subscription, ok bool, now time.Time) error {
	b, others := sub.Pending, sub.Active != nil || sub.Revoked != nil
	sub.Pending = nil
	if !ok {
		return dropPending(ctx, tx, b.IMSI)
	}
	b.State, b.Activated, b.Expires, b.Sent = binding.Active, tables.Time(now.UnixMilli()), time.Time{}, nil
	sub.Active, sub.Revoked = b, nil
	seq, err := s.chains.Enter(ctx, &tx.Tx, ledger.Entry{Event: binding.EventActivated, Subject: b.IMSI.String()})
	if err == nil && others {
		err = tx.Do(ctx, `DELETE FROM bindings WHERE imsi = $1 AND state <> 'PENDING'`, b.IMSI.String())
	}
	if err != nil {
		return err
	}
	return tx.Do(ctx, `UPDATE bindings SET state = 'ACTIVE', activated_at = $1, expires_at = 0, sent = '', seq = $2,
		mac = $3 WHERE imsi = $4 AND state = 'PENDING'`, tables.Millis(b.Activated), seq,
		s.macs.Of(tables.Bindings.Name, tables.OfBinding(b, seq)...), b.IMSI.String())
}

func (s *Store) Revoke(ctx context.Context, imsi kme.IMSI, now time.Time) (b *binding.Binding, err error) {
	err = s.change(ctx, "revoke", imsi.String(), func(ctx context.Context, tx *txn) (err error) {
		b, err = s.revoke(ctx, tx, imsi, now)
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

// revoke is Revoke in a change. It gives nil if nothing was ever bound.
func (s *Store) revoke(ctx context.Context, tx *txn, imsi kme.IMSI, now time.Time) (b *binding.Binding, err error) {
	sub, err := s.toChange(ctx, tx, imsi, now)
	switch {
	case tables.IsDamaged(err): // damaged rows are ended, too
		if b, err = s.lastDevice(ctx, tx.Conn, imsi); err == nil {
			err = tx.Do(ctx, `DELETE FROM bindings WHERE imsi = $1`, imsi.String())
		}
		if err != nil {
			return nil, err
		}
	case err != nil:
		return nil, err
	default:
		b = sub.Latest()
	}
	if err := dropAttempts(ctx, tx, imsi); err != nil {
		return nil, err
	}
	if b == nil || b.State == binding.Revoked { // other rows have expired
		if err := dropPending(ctx, tx, imsi); err != nil {
			return nil, err
		}
		_, err := s.chains.Enter(ctx, &tx.Tx, ledger.Entry{Event: binding.EventClosed, Subject: imsi.String()})
		return b, err
	}
	return b, s.endAsRevoked(ctx, tx, b, now)
}

// endAsRevoked makes a binding revoked, and the only one of its IMSI.
func (s *Store) endAsRevoked(ctx context.Context, tx *txn, b *binding.Binding, now time.Time) error {
	b.State, b.Revoked, b.Sealed, b.Expires, b.Sent = binding.Revoked, tables.Time(now.UnixMilli()), []byte{},
		time.Time{}, nil
	seq, err := s.chains.Enter(ctx, &tx.Tx, ledger.Entry{Event: binding.EventRevoked, Subject: b.IMSI.String()})
	if err == nil {
		err = tx.Do(ctx, `DELETE FROM bindings WHERE imsi = $1`, b.IMSI.String())
	}
	if err != nil {
		return err
	}
	return s.macs.Add(ctx, tx.Conn, tables.Bindings, tables.OfBinding(b, seq)...)
}

// lastDevice is the device that an IMSI was last bound to, by the ledger: its rows are damaged.
func (s *Store) lastDevice(ctx context.Context, q sqlconn.Conn, imsi kme.IMSI) (b *binding.Binding, err error) {
	err = s.chains.Each(ctx, q, func(e binding.Entry) error {
		var imei kme.IMEI
		if imei.UnmarshalText([]byte(e.IMEI)) == nil { // else somebody has changed it, and that was accepted
			b = &binding.Binding{IMSI: imsi, IMEI: imei, Established: e.Time}
		}
		return nil
	}, `WHERE e.chain = $1 AND e.subject = $2 AND e.event = $3 ORDER BY e.seq`, ledger.ChainOf(imsi.String()),
		imsi.String(),
		string(binding.EventEstablished))
	return b, err
}

func (s *Store) Bound(ctx context.Context, manufacturer, lot string, now time.Time) (n int, err error) {
	q, err := s.chains.Reading("count bindings")
	if err != nil {
		return 0, err
	}
	_, err = q.One(ctx, []any{&n}, `SELECT COUNT(*) FROM bindings WHERE manufacturer = $1 AND (lot = $2 OR $2 = '') AND
		(state = 'ACTIVE' OR state = 'PENDING' AND expires_at > $3)`, manufacturer, lot, now.UnixMilli())
	return n, err
}

// countBindings reads only columns in an index, except for the few pending bindings.
const countBindings = `WITH pending AS MATERIALIZED (SELECT imsi FROM bindings WHERE state = 'PENDING')
	SELECT COUNT(*) FILTER (WHERE state = 'ACTIVE'), COUNT(*) FILTER (WHERE state = 'REVOKED'), (SELECT COUNT(*)
		FROM pending AS p JOIN bindings AS b ON b.imsi = p.imsi AND b.state = 'PENDING' AND b.expires_at > $1)
	FROM bindings`

// Count counts the bindings in each state, without expired ones. It reads an index twice: see TestCountByIndex.
func (s *Store) Count(ctx context.Context, now time.Time) (map[binding.State]int64, error) {
	q, err := s.chains.Reading("count bindings")
	if err != nil {
		return nil, err
	}
	var active, revoked, pending int64
	_, err = q.One(ctx, []any{&active, &revoked, &pending}, countBindings, now.UnixMilli())
	return map[binding.State]int64{binding.Pending: pending, binding.Active: active, binding.Revoked: revoked}, err
}

func (s *Store) DropExpired(ctx context.Context, now time.Time) error {
	return s.change(ctx, "drop what has expired", "expired", func(ctx context.Context, tx *txn) error {
		return tx.Do(ctx, `DELETE FROM attempts WHERE expires_at <= $1`, now.UnixMilli())
	})
}
