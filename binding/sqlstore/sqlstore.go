// Package sqlstore keeps the service's state: in SQLite, the embedded default, or in PostgreSQL, for several instances.
//
// Both get the same statements: SQLite takes $1 as PostgreSQL does, if parameters first appear in their order.
package sqlstore

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/tokenkeys"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// A Store implements binding.Store, binding.Registry and binding.Ledger.
type Store struct {
	read *sql.DB
	// begin makes a change durably and alone: no other with the same key is under way.
	begin func(ctx context.Context, key string, f func(context.Context, *sql.Tx) error) error
	// lock has no other change with the key until the transaction ends.
	lock     func(ctx context.Context, tx *sql.Tx, key string) error
	close    func() error
	soon     func() (done func()) // sqlite.Writer's; PostgreSQL has commit_delay of its own
	hasRoles bool                 // it is PostgreSQL, whose roles may be allowed too much

	key     kme.Secret // of the MACs
	macs    *macs
	moved   chan struct{}
	refused atomic.Pointer[error] // the ledger is behind its mark: see refusal
	broken  atomic.Pointer[error] // an entry of it is not what it was
	actors  sync.Map              // binding.Actor to []byte, of those that are entered
	known   atomic.Int64          // how many

	accepted sync.Map // chain to the number of its last entry ACCEPTED, where what it accepts is as it was

	mu    sync.Mutex
	epoch int                          // of seen; guarded by mu
	seen  [binding.Chains]binding.Head // how far this process knows that the ledger had come; guarded by mu
}

var (
	_ binding.Store         = (*Store)(nil)
	_ binding.Registry      = (*Store)(nil)
	_ tokenkeys.SealedStore = (*Store)(nil)
)

// Close ends all connections.
func (s *Store) Close() error {
	err := errors.Join(s.read.Close(), s.close())
	s.key.Wipe()
	return err
}

func (s *Store) Soon() (done func()) { return s.soon() }

// Ping says whether the store can be read. (The driver of SQLite says of every open database that it can.)
func (s *Store) Ping(ctx context.Context) error {
	var n int
	return s.read.QueryRowContext(ctx, "SELECT COUNT(*) FROM manufacturers").Scan(&n)
}

// A txn is a change that is under way.
type txn struct {
	*sql.Tx
	after []func()                      // to be called when it is durable
	heads [binding.Chains]*binding.Head // of the ledger's chains whose locks it has; nil: not read yet
}

func (s *Store) change(ctx context.Context, key string, f func(context.Context, *txn) error) error {
	if err := s.refusal(); err != nil {
		return err
	}
	var tx *txn
	err := s.begin(ctx, key, func(ctx context.Context, raw *sql.Tx) error {
		tx = &txn{Tx: raw} // it may be called again
		return f(ctx, tx)
	})
	if err != nil {
		return err
	}
	for _, f := range tx.after {
		f()
	}
	return nil
}

func (tx *txn) do(ctx context.Context, query string, args ...any) error {
	_, err := tx.ExecContext(ctx, query, args...)
	return err
}

// values is a binding as its row has it.
func values(b *binding.Binding, seq int64) []any {
	return []any{
		b.IMSI.String(), string(b.State), b.IMEI.String(), b.Manufacturer, b.Lot, int64(b.DeviceKey), orEmpty(b.Sealed), orEmpty(b.NWSig), b.AttemptID,
		orEmpty(b.PayloadSHA256), millis(b.Established), millis(b.Activated), millis(b.Revoked), b.Origin.String(), millis(b.Expires), sentText(b.Sent), seq,
	}
}

// orEmpty has no NULL in a row.
func orEmpty(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}

func toBinding(r row) (b *binding.Binding, seq int64, err error) {
	b = &binding.Binding{
		State: binding.State(r.text(1)), Manufacturer: r.text(3), Lot: r.text(4), DeviceKey: int(r.int(5)), Sealed: r.bytes(6), NWSig: r.bytes(7),
		AttemptID: r.text(8), PayloadSHA256: r.bytes(9), Established: fromMillis(r.int(10)), Activated: fromMillis(r.int(11)),
		Revoked: fromMillis(r.int(12)), Expires: fromMillis(r.int(14)),
	}
	err = errors.Join(b.IMSI.UnmarshalText([]byte(r.text(0))), b.IMEI.UnmarshalText([]byte(r.text(2))), b.Origin.UnmarshalText([]byte(r.text(13))))
	for line := range strings.Lines(r.text(15)) {
		var o kme.Origin
		err = errors.Join(err, o.UnmarshalText([]byte(strings.TrimSuffix(line, "\n"))))
		b.Sent = append(b.Sent, o)
	}
	return b, r.int(16), err
}

// sentText is a Binding's Sent as its column has it: each with its end of line, since an origin may be empty.
func sentText(sent []kme.Origin) string {
	var b strings.Builder
	for _, o := range sent {
		b.WriteString(o.String() + "\n")
	}
	return b.String()
}

func (s *Store) Subscription(ctx context.Context, imsi kme.IMSI, now time.Time) (*binding.Subscription, error) {
	if err := s.refusal(); err != nil {
		return nil, err
	}
	return s.current(ctx, imsi, now)
}

func (s *Store) current(ctx context.Context, imsi kme.IMSI, now time.Time) (*binding.Subscription, error) {
	var sub *stored
	err := s.settled(ctx, imsi.String(), func(q queryer) (err error) {
		sub, err = s.subscription(ctx, q, imsi, now)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &sub.Subscription, nil
}

// settled reads without the lock of a key, and if f finds damage, again with it: only then nothing has changed between
// its statements.
func (s *Store) settled(ctx context.Context, key string, f func(queryer) error) error {
	err := f(s.read)
	if isDamaged(err) {
		err = s.begin(ctx, key, func(_ context.Context, tx *sql.Tx) error { return f(tx) })
	}
	return err
}

func isDamaged(err error) bool {
	var d *binding.DamagedRow
	return errors.As(err, &d)
}

// stored is what there is of an IMSI, and what of its rows is not in a Subscription.
type stored struct {
	binding.Subscription
	expired *binding.Binding // the pending binding that has expired
	seq     seqs             // of the bindings
	last    last             // what the ledger says
}

// seqs has the number of the entry of the ledger that has made a binding what it is; 0 if there is none.
type seqs struct{ pending, active, revoked int64 }

func (s *seqs) of(state binding.State) *int64 {
	switch state {
	case binding.Pending:
		return &s.pending
	case binding.Active:
		return &s.active
	}
	return &s.revoked
}

// ofIMSI reads all of an IMSI in one statement, and so at one moment: from which table a row is, then the columns of
// bindings, in which those of another table have the places that attemptOf and subscriptionIn say.
var ofIMSI = `SELECT 'bindings', ` + strings.Join(bindings.columns, ", ") + `, mac FROM bindings WHERE imsi = $1
	UNION ALL SELECT 'attempts', imsi, id, origin, NULL, NULL, opened, NULL, NULL, NULL, NULL, expires_at, NULL, NULL, NULL, NULL, NULL, seq, mac
		FROM attempts WHERE imsi = $1 AND expires_at > $2
	UNION ALL SELECT 'ledger', subject, event, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, seq, NULL
		FROM ledger WHERE subject = $1`

// ofIMSIToChange reads the head of its chain too. A sum, see head.
var ofIMSIToChange = ofIMSI + `
	UNION ALL SELECT 'head', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, seq, mac
		FROM (SELECT seq, mac FROM ledger WHERE chain = $3 + 0 ORDER BY seq DESC LIMIT 1) AS head`

// attemptOf is a row of attempts, with its MAC, in one of ofIMSI.
func attemptOf(r row) row { return row{r[1], r[2], r[3], r[11], r[6], r[17], r[18]} }

// subscription fails with a *binding.DamagedRow for a row that is not the service's, that is not the last one, or that
// is gone.
func (s *Store) subscription(ctx context.Context, q queryer, imsi kme.IMSI, now time.Time) (*stored, error) {
	sub, _, err := s.subscriptionIn(ctx, q, imsi, now, ofIMSI)
	return sub, err
}

// toChange is subscription for whoever will note an entry about it in the same transaction.
func (s *Store) toChange(ctx context.Context, tx *txn, imsi kme.IMSI, now time.Time) (*stored, error) {
	chain := chainOf(imsi.String())
	if err := s.lock(ctx, tx.Tx, chainLocks[chain]); err != nil {
		return nil, err
	}
	sub, head, err := s.subscriptionIn(ctx, tx, imsi, now, ofIMSIToChange, chain)
	if err != nil {
		return nil, err
	}
	tx.heads[chain] = head
	return sub, nil
}

// subscriptionIn is both, with the head that ofIMSIToChange reads.
func (s *Store) subscriptionIn(ctx context.Context, q queryer, imsi kme.IMSI, now time.Time, text string, chain ...any) (*stored, *binding.Head, error) {
	sub, head, digits := new(stored), new(binding.Head), imsi.String()
	var opened []row // attempts
	err := scan(ctx, q, len(bindings.columns)+2, func(r row) error {
		switch r.text(0) {
		case "bindings":
			if err := s.checkMAC(bindings, r[1:]); err != nil {
				return err
			}
			return sub.take(r[1:], now)
		case "attempts":
			r = attemptOf(r)
			if err := s.checkMAC(attempts, r); err != nil {
				return err
			}
			opened = append(opened, r)
			a := binding.Attempt{ID: r.text(1), IMSI: imsi, Expires: fromMillis(r.int(3)), Opened: r.int(4) == 1}
			err := a.Origin.UnmarshalText([]byte(r.text(2)))
			sub.Attempts = append(sub.Attempts, a)
			return err
		case "ledger":
			sub.last.note(binding.Event(r.text(2)), r.int(17))
		case "head":
			head.Seq, head.MAC = r.int(17), r.bytes(18)
		}
		return nil
	}, text, append([]any{digits, now.UnixMilli()}, chain...)...)
	if err != nil {
		return nil, nil, err
	}
	for _, a := range opened {
		if a.int(5) != sub.last.closed {
			return nil, nil, damaged(attempts, a, "was closed before, and is back")
		}
	}
	return sub, head, sub.fresh(digits)
}

// take takes a row of bindings.
func (sub *stored) take(r row, now time.Time) error {
	b, seq, err := toBinding(r)
	if err != nil {
		return err
	}
	*sub.seq.of(b.State) = seq
	switch {
	case b.State == binding.Active:
		sub.Active = b
	case b.State == binding.Revoked:
		sub.Revoked = b
	case b.Expires.After(now):
		sub.Pending = b
	default:
		sub.expired = b
	}
	return nil
}

// fresh fails unless the bindings are those that the ledger speaks of last.
func (sub *stored) fresh(imsi string) error {
	settled := max(sub.last.activated, sub.last.revoked)
	for _, is := range [...]struct {
		state      binding.State
		have, want int64
	}{{binding.Active, sub.seq.active, sub.last.activated}, {binding.Revoked, sub.seq.revoked, sub.last.revoked}} {
		switch {
		case is.have == 0 && is.want == settled && is.want > 0:
			return damaged(bindings, row{imsi, string(is.state)}, "is gone")
		case is.have != 0 && (is.have != is.want || is.want != settled):
			return damaged(bindings, row{imsi, string(is.state)}, "is an earlier one than the service has written last")
		}
	}
	if have := sub.seq.pending; have != 0 && (have != sub.last.established || have < settled) {
		return damaged(bindings, row{imsi, string(binding.Pending)}, "is an earlier one than the service has written last")
	}
	return nil
}

func (s *Store) Bindings(ctx context.Context, q binding.BindingQuery) (all []*binding.Binding, err error) {
	if err := s.refusal(); err != nil {
		return nil, err
	}
	for len(all) < q.Limit {
		imsis, err := s.bound(ctx, q, q.Limit-len(all))
		if err != nil || len(imsis) == 0 {
			return all, err
		}
		for _, imsi := range imsis {
			sub, err := s.Subscription(ctx, imsi, q.Now)
			if err != nil {
				return nil, err
			}
			if b := sub.Latest(); b != nil && (q.IMEI == (kme.IMEI{}) || b.IMEI == q.IMEI) {
				all = append(all, b)
			}
		}
		q.After = imsis[len(imsis)-1].String()
	}
	return all, nil
}

// bound gives IMSIs that were ever bound, to a device if the query names one. The ledger knows them: a row that is gone,
// or was edited, would not be missed.
func (s *Store) bound(ctx context.Context, q binding.BindingQuery, limit int) (all []kme.IMSI, err error) {
	var args []any
	arg := func(v any) string { args = append(args, v); return fmt.Sprint("$", len(args)) }
	begins := func(prefixes []string) string {
		any := []string{"1 = 0"}
		for _, p := range prefixes { // as numbers of 15 digits: that is so in every collation of a database
			any = append(any, "subject BETWEEN "+arg(p)+" AND "+arg(p+strings.Repeat("9", 15-len(p))))
		}
		return "(" + strings.Join(any, " OR ") + ")"
	}
	where := "WHERE event = '" + string(binding.EventEstablished) + "' AND subject > " + arg(q.After)
	if q.IMEI != (kme.IMEI{}) {
		where += " AND tag IS NOT NULL AND imei = " + arg(q.IMEI.String())
	}
	if q.Within != nil {
		where += " AND " + begins(q.Within)
	}
	where += " AND NOT " + begins(q.Without)
	err = query(ctx, s.read, func(scan func(...any) error) error {
		var imsi kme.IMSI
		var text string
		if err := scan(&text); err != nil {
			return err
		}
		if imsi.UnmarshalText([]byte(text)) != nil {
			return &binding.DamagedRow{Table: ledger.name, Key: text, What: "has no IMSI"}
		}
		all = append(all, imsi)
		return nil
	}, "SELECT DISTINCT subject FROM ledger "+where+" ORDER BY subject LIMIT "+arg(limit), args...)
	return all, err
}

func (s *Store) Prepare(ctx context.Context, q binding.VectorRequest) (d binding.Decision, err error) {
	sub, err := s.Subscription(ctx, q.IMSI, q.Now)
	if err != nil {
		return d, err
	}
	// Nearly every vector is for an active binding: it changes nothing and needs no lock. Nor does a vector for a pending one
	// that the HSM has not made yet.
	_, opened := sub.Opened(q.Origin)
	b := sub.Under(q.Origin.Name)
	told := b != nil && b == sub.Pending && q.Ready != b.AttemptID && len(b.Sent) < q.PendingVectors
	if b != nil && !opened && (b == sub.Active || told) {
		return binding.Decision{Binding: b}, s.unspent(ctx, s.read, q.IMSI, q.RANDs)
	}
	var refused error // what has ended has ended, refused or not
	err = s.change(ctx, q.IMSI.String(), func(ctx context.Context, tx *txn) (err error) {
		d, refused = binding.Decision{}, nil
		sub, err := s.subscription(ctx, tx, q.IMSI, q.Now)
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
		if err := s.unspent(ctx, tx, q.IMSI, q.RANDs); errors.Is(err, binding.ErrSpent) {
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
	return tx.do(ctx, `DELETE FROM bindings WHERE imsi = $1 AND state = 'PENDING'`, imsi.String())
}

// attempt gives the attempt of an origin, in an administrator's if that is open until then, and notes what leaves in
// clear.
func (s *Store) attempt(ctx context.Context, tx *txn, sub *stored, q binding.VectorRequest, until time.Time, d *binding.Decision) error {
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
		if err := s.addAttempt(ctx, tx, *d.Attempt, sub.last.closed); err != nil {
			return err
		}
	}
	imsi := q.IMSI.String()
	for _, r := range q.RANDs {
		if err := tx.do(ctx, spentRANDs.insert+` ON CONFLICT DO NOTHING`, imsi, r[:], s.macs.of(spentRANDs.name, imsi, r[:])); err != nil {
			return err
		}
	}
	return nil
}

// unspent fails with ErrSpent if an IMSI was sent one of these RANDs in clear.
func (s *Store) unspent(ctx context.Context, q queryer, imsi kme.IMSI, rands []hsmkeys.RAND) error {
	for _, r := range rands {
		if spent, err := s.isSpent(ctx, q, imsi, r); err != nil {
			return err
		} else if spent {
			return binding.ErrSpent
		}
	}
	return nil
}

func (s *Store) isSpent(ctx context.Context, q queryer, imsi kme.IMSI, rand hsmkeys.RAND) (spent bool, err error) {
	err = s.rows(ctx, q, spentRANDs, func(row) error { spent = true; return nil }, `WHERE imsi = $1 AND rand = $2`, imsi.String(), rand[:])
	return spent, err
}

func (s *Store) Spent(ctx context.Context, imsi kme.IMSI, rand hsmkeys.RAND) (bool, error) {
	if err := s.refusal(); err != nil {
		return false, err
	}
	return s.isSpent(ctx, s.read, imsi, rand)
}

func (s *Store) addAttempt(ctx context.Context, tx *txn, a binding.Attempt, seq int64) error {
	return s.add(ctx, tx, attempts, a.IMSI.String(), a.ID, a.Origin.String(), a.Expires.UnixMilli(), asInt(a.Opened), seq)
}

func asInt(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

func dropAttempts(ctx context.Context, tx *txn, imsi kme.IMSI) error {
	return tx.do(ctx, `DELETE FROM attempts WHERE imsi = $1`, imsi.String())
}

func (s *Store) OpenAttempt(ctx context.Context, a binding.Attempt) error {
	return s.change(ctx, a.IMSI.String(), func(ctx context.Context, tx *txn) error {
		if err := dropAttempts(ctx, tx, a.IMSI); err != nil {
			return err
		}
		seq, err := s.note(ctx, tx, entry{event: binding.EventOpened, subject: a.IMSI.String(), detail: "until " + a.Expires.UTC().Format(time.RFC3339)})
		if err != nil {
			return err
		}
		return s.addAttempt(ctx, tx, a, seq)
	})
}

func (s *Store) Establish(ctx context.Context, b *binding.Binding, tag []byte, good bool, now time.Time) error {
	return s.change(ctx, b.IMSI.String(), func(ctx context.Context, tx *txn) error {
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
			if err := used(ctx, tx, of); err != nil {
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
		err = s.change(ctx, imsi.String(), func(ctx context.Context, tx *txn) error {
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
		err = tx.do(ctx, `DELETE FROM bindings WHERE imsi = $1`, b.IMSI.String())
	}
	if err != nil {
		return err
	}
	return s.add(ctx, tx, bindings, values(b, seq)...)
}

func (s *Store) Revoke(ctx context.Context, imsi kme.IMSI, now time.Time) (b *binding.Binding, err error) {
	err = s.change(ctx, imsi.String(), func(ctx context.Context, tx *txn) error {
		b = nil
		sub, err := s.toChange(ctx, tx, imsi, now)
		switch {
		case isDamaged(err): // which ends so too
			if b, err = s.lastDevice(ctx, tx, imsi); err == nil {
				err = tx.do(ctx, `DELETE FROM bindings WHERE imsi = $1`, imsi.String())
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
func (s *Store) lastDevice(ctx context.Context, q queryer, imsi kme.IMSI) (b *binding.Binding, err error) {
	err = s.entries(ctx, q, func(e binding.Entry) error {
		b = &binding.Binding{IMSI: imsi, Established: e.Time}
		return b.IMEI.UnmarshalText([]byte(e.IMEI))
	}, `WHERE e.subject = $1 AND e.event = $2 ORDER BY e.seq`, imsi.String(), string(binding.EventEstablished))
	return b, err
}

func (s *Store) Bound(ctx context.Context, manufacturer, lot string, now time.Time) (n int, err error) {
	if err := s.refusal(); err != nil {
		return 0, err
	}
	err = s.read.QueryRowContext(ctx, `SELECT COUNT(*) FROM bindings WHERE manufacturer = $1 AND (lot = $2 OR $2 = '') AND
		(state = 'ACTIVE' OR state = 'PENDING' AND expires_at > $3)`, manufacturer, lot, now.UnixMilli()).Scan(&n)
	return n, err
}

const sealedBelow = `sealed < $1 AND state <> 'REVOKED'`

func (s *Store) CountSealed(ctx context.Context, below []byte) (n int, err error) {
	if err := s.refusal(); err != nil {
		return 0, err
	}
	// Of all rows, not of those that say so: a storage key is destroyed when none is left under it.
	err = s.rows(ctx, s.read, bindings, func(r row) error {
		if r.text(1) != string(binding.Revoked) && bytes.Compare(r.bytes(6), below) < 0 {
			n++
		}
		return nil
	}, "")
	return n, err
}

func (s *Store) Sealed(ctx context.Context, after tokenkeys.Sealed, below []byte, limit int) (all []tokenkeys.Sealed, err error) {
	if err := s.refusal(); err != nil {
		return nil, err
	}
	err = s.rows(ctx, s.read, bindings, func(r row) error {
		b, _, err := toBinding(r)
		all = append(all, tokenkeys.Sealed{IMSI: b.IMSI, State: b.State, KME: b.Sealed})
		return err
	}, `WHERE `+sealedBelow+` AND (imsi, state) > ($2, $3) ORDER BY imsi, state LIMIT $4`, below, after.IMSI.String(), string(after.State), limit)
	return all, err
}

func (s *Store) Reseal(ctx context.Context, all []tokenkeys.Resealed) (changed int, err error) {
	err = s.change(ctx, "reseal", func(ctx context.Context, tx *txn) error {
		changed = 0 // it may be called again
		for _, r := range all {
			// One after the other: whoever changes an IMSI has no other's lock.
			if err := s.lock(ctx, tx.Tx, r.IMSI.String()); err != nil {
				return err
			}
			var again []any
			err := s.rows(ctx, tx, bindings, func(now row) error {
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
			if err := s.put(ctx, tx, bindings, again...); err != nil {
				return err
			}
			changed++
		}
		return nil
	})
	return changed, err
}

func (s *Store) DropExpired(ctx context.Context, now time.Time) error {
	return s.change(ctx, "expired", func(ctx context.Context, tx *txn) error {
		return tx.do(ctx, `DELETE FROM attempts WHERE expires_at <= $1`, now.UnixMilli())
	})
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
