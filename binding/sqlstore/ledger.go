package sqlstore

import (
	"bytes"
	"context"
	"crypto/hmac"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/directory"
)

// chainOf is the chain that a subject's entries are in.
func chainOf(subject string) int64 {
	return int64(crc32.ChecksumIEEE([]byte(subject)) % binding.Chains)
}

// An entry to be added.
type entry struct {
	event   binding.Event
	subject string
	imei    string
	tag     any // []byte, or nil
	detail  string
}

// used fails with ErrUsed if the ledger has the entry's KME.
func used(ctx context.Context, q queryer, e entry) error {
	var there bool
	err := q.QueryRowContext(ctx, `SELECT EXISTS (SELECT 1 FROM ledger WHERE imei = $1 AND tag = $2)`, e.imei, e.tag).Scan(&there)
	if err == nil && there {
		err = binding.ErrUsed
	}
	return err
}

// note adds an entry in a transaction, and gives its number. An entry of a chain follows the last one: until the
// transaction ends, nobody else adds one there. It fails with ErrUsed if the ledger has the entry's KME.
func (s *Store) note(ctx context.Context, tx *txn, e entry) (seq int64, err error) {
	return s.noteIn(ctx, tx, chainOf(e.subject), e)
}

func (s *Store) noteIn(ctx context.Context, tx *txn, chain int64, e entry) (seq int64, err error) {
	before := tx.heads[chain]
	if before == nil {
		if err := s.lock(ctx, tx.Tx, chainLocks[chain]); err != nil {
			return 0, err
		}
		head, err := s.head(ctx, tx, chain)
		if err != nil {
			return 0, err
		}
		before = &head
	}
	seen := s.seenOf(chain)
	if before.Seq < seen.Seq || before.Seq == seen.Seq && !bytes.Equal(before.MAC, seen.MAC) {
		return 0, s.refuse(rolledBack(chain, *before, seen))
	}
	actor, err := s.actor(ctx, tx)
	if err != nil {
		return 0, err
	}
	next := binding.Head{Seq: before.Seq + 1}
	values := []any{chain, next.Seq, time.Now().UnixMilli(), string(e.event), e.subject, e.imei, e.tag, actor, e.detail}
	next.MAC = s.entryMAC(values, before.MAC)
	added, err := tx.ExecContext(ctx, ledger.insert+" ON CONFLICT DO NOTHING", append(values, []byte(next.MAC))...)
	if err != nil {
		return 0, err
	}
	switch n, err := added.RowsAffected(); {
	case err != nil:
		return 0, err
	case n == 0 && e.tag != nil:
		return 0, binding.ErrUsed // also by another IMSI's, meanwhile
	case n == 0:
		return 0, fmt.Errorf("entry %d of chain %d of the ledger is there already", next.Seq, chain)
	}
	tx.heads[chain] = &next
	tx.after = append(tx.after, func() { s.saw(chain, next) })
	return next.Seq, nil
}

// chainLocks are the keys of the chains' locks.
var chainLocks = func() (keys [binding.Chains]string) {
	for i := range keys {
		keys[i] = fmt.Sprint("chain ", i)
	}
	return keys
}()

func (s *Store) entryMAC(values []any, before []byte) []byte {
	return s.macs.of(ledger.name, append(values[:len(values):len(values)], before)...)
}

// head is the last entry of a chain.
func (s *Store) head(ctx context.Context, q queryer, chain int64) (h binding.Head, err error) {
	// A sum, since SQLite compiles a statement anew at each use that orders rows by what follows a parameter in an index.
	err = q.QueryRowContext(ctx, `SELECT seq, mac FROM ledger WHERE chain = $1 + 0 ORDER BY seq DESC LIMIT 1`, chain).Scan(&h.Seq, (*[]byte)(&h.MAC))
	if errors.Is(err, sql.ErrNoRows) {
		err = nil
	}
	return h, err
}

// actor enters who the context's work is done for, unless that was done.
func (s *Store) actor(ctx context.Context, tx *txn) ([]byte, error) {
	actor := binding.ActorOf(ctx)
	if id, ok := s.actors.Load(actor); ok {
		return id.([]byte), nil
	}
	text, err := json.Marshal(actor)
	if err != nil {
		return nil, err
	}
	var id []byte
	for ; ; text = append(text, ' ') { // the same in other bytes, where somebody has changed the row
		var have string
		id = s.macs.of("actors", string(text))
		if err := tx.do(ctx, `INSERT INTO actors (actor, json) VALUES ($1, $2) ON CONFLICT DO NOTHING`, id, string(text)); err != nil {
			return nil, err
		}
		if err := tx.QueryRowContext(ctx, `SELECT json FROM actors WHERE actor = $1`, id).Scan(&have); err != nil {
			return nil, err
		}
		if have == string(text) {
			break
		}
	}
	tx.after = append(tx.after, func() {
		if s.known.Add(1) > maxActors {
			s.known.Store(0)
			s.actors.Clear()
		}
		s.actors.Store(actor, id)
	})
	return id, nil
}

// maxActors bounds the memory for those that are entered.
const maxActors = 10_000

func rolledBack(chain int64, head, seen binding.Head) error {
	if head.Seq < seen.Seq {
		return fmt.Errorf("%w (chain %d of the ledger has %d entries, and had %d)", binding.ErrRolledBack, chain, head.Seq, seen.Seq)
	}
	return fmt.Errorf("%w (entry %d of chain %d of the ledger is another one than it was)", binding.ErrRolledBack, seen.Seq, chain)
}

// saw notes how far a chain has come.
func (s *Store) saw(chain int64, head binding.Head) {
	s.mu.Lock()
	if head.Seq > s.seen[chain].Seq {
		s.seen[chain] = head
	}
	s.mu.Unlock()
	select {
	case s.moved <- struct{}{}:
	default:
	}
}

func (s *Store) Seen() *binding.Mark {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &binding.Mark{Epoch: s.epoch, Heads: s.seen}
}

func (s *Store) seenOf(chain int64) binding.Head {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen[chain]
}

func (s *Store) Moved() <-chan struct{} { return s.moved }

// refuse has every method fail from now on.
func (s *Store) refuse(err error) error {
	s.refused.Store(&err)
	return err
}

// refusal is what every method fails with; nil while the ledger is what it should be.
func (s *Store) refusal() error {
	for _, reason := range []*atomic.Pointer[error]{&s.refused, &s.broken} {
		if err := reason.Load(); err != nil {
			return *err
		}
	}
	return nil
}

// reached refuses a chain that has not, or has no more, the entry that it had come to.
func (s *Store) reached(ctx context.Context, chain int64, head, had binding.Head) error {
	if head.Seq > had.Seq && had.Seq > 0 {
		head.Seq = had.Seq
		err := s.read.QueryRowContext(ctx, `SELECT mac FROM ledger WHERE chain = $1 AND seq = $2`, chain, had.Seq).Scan((*[]byte)(&head.MAC))
		if errors.Is(err, sql.ErrNoRows) {
			head.MAC = nil
		} else if err != nil {
			return err
		}
	}
	if head.Seq < had.Seq || head.Seq == had.Seq && !bytes.Equal(head.MAC, had.MAC) {
		return s.refuse(rolledBack(chain, head, had))
	}
	return nil
}

func (s *Store) Check(ctx context.Context, mark *binding.Mark) (*binding.Mark, error) {
	s.mu.Lock()
	if mark != nil && mark.Epoch > s.epoch { // what was wrong is accepted
		s.epoch, s.seen = mark.Epoch, mark.Heads
		s.broken.Store(nil)
		s.actors.Clear()
	}
	s.mu.Unlock()
	seen := s.Seen()
	now := &binding.Mark{Epoch: seen.Epoch}
	for i := range now.Heads {
		head, err := s.head(ctx, s.read, int64(i))
		if err != nil {
			return nil, err
		}
		now.Heads[i] = head
		if mark == nil && head.Seq > 0 && seen.Heads[i].Seq == 0 {
			return nil, s.refuse(fmt.Errorf("%w (the token has no high-water mark, and the ledger is not empty: the token is another one than it was)", binding.ErrRolledBack))
		}
		if err := s.reached(ctx, int64(i), head, seen.Heads[i]); err != nil {
			return nil, err
		}
		if head.Seq > seen.Heads[i].Seq { // no mark is raised to what somebody has made up
			err := s.entries(ctx, s.read, func(binding.Entry) error { return nil }, `WHERE e.chain = $1 AND e.seq = $2`, int64(i), head.Seq)
			if isDamaged(err) {
				err = s.refuse(fmt.Errorf("%w (%w; or this token is not the one that it was written with)", binding.ErrRolledBack, err))
			}
			if err != nil {
				return nil, err
			}
		}
		if mark == nil || mark.Epoch < seen.Epoch {
			continue
		}
		if err := s.reached(ctx, int64(i), head, mark.Heads[i]); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	for i, h := range now.Heads {
		if h.Seq > s.seen[i].Seq {
			s.seen[i] = h
		}
	}
	s.mu.Unlock()
	s.refused.Store(nil)
	return now, s.refusal()
}

// An acceptance is the detail of an EventAccepted.
type acceptance struct {
	Reason string           `json:"reason"`
	Had    int64            `json:"had"`    // entries, by the mark
	Digest directory.Base64 `json:"digest"` // of the chain's entries before it, see verifyChain
}

func (s *Store) Accept(ctx context.Context, mark *binding.Mark, reason string) (*binding.Mark, error) {
	s.mu.Lock()
	s.seen = [binding.Chains]binding.Head{} // what was seen is what is given up
	s.mu.Unlock()
	s.refused.Store(nil)
	s.broken.Store(nil)
	s.actors.Clear()
	accepted := &binding.Mark{Epoch: 1}
	if mark != nil {
		accepted.Epoch = mark.Epoch + 1
	}
	err := s.change(ctx, "accept", func(ctx context.Context, tx *txn) error {
		for i := range accepted.Heads {
			chain, a := int64(i), acceptance{Reason: reason}
			if mark != nil {
				a.Had = mark.Heads[i].Seq
			}
			if err := s.lock(ctx, tx.Tx, chainLocks[chain]); err != nil {
				return err
			}
			var err error
			if _, a.Digest, err = s.verifyToHead(ctx, tx, chain, ignore); err != nil && !isDamaged(err) {
				return err
			}
			detail, err := json.Marshal(a)
			if err != nil {
				return err
			}
			if _, err := s.noteIn(ctx, tx, chain, entry{event: binding.EventAccepted, subject: binding.StoreSubject, detail: string(detail)}); err != nil {
				return err
			}
			if accepted.Heads[i], err = s.head(ctx, tx, chain); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.epoch, s.seen = accepted.Epoch, accepted.Heads
	s.mu.Unlock()
	return accepted, nil
}

func (s *Store) Note(ctx context.Context, event binding.Event, subject, detail string) error {
	return s.change(ctx, subject, func(ctx context.Context, tx *txn) error {
		_, err := s.note(ctx, tx, entry{event: event, subject: subject, detail: detail})
		return err
	})
}

func (s *Store) LastNote(ctx context.Context, event binding.Event, subject string) (detail string, found bool, err error) {
	if err := s.refusal(); err != nil {
		return "", false, err
	}
	err = s.entries(ctx, s.read, func(e binding.Entry) error { detail, found = e.Detail, true; return nil },
		`WHERE e.subject = $1 AND e.event = $2 AND e.seq = (SELECT MAX(seq) FROM ledger WHERE subject = $1 AND event = $2)`, subject, string(event))
	return detail, found, err
}

func (s *Store) History(ctx context.Context, subject string) (all []binding.Entry, err error) {
	if err := s.refusal(); err != nil {
		return nil, err
	}
	err = s.entries(ctx, s.read, func(e binding.Entry) error { all = append(all, e); return nil }, `WHERE e.subject = $1 ORDER BY e.seq`, subject)
	return all, err
}

// entries gives entries whose MACs, over the MAC of the one before too, are good; and, as they are, those that were
// accepted: without an Actor, unless it is the one that was entered.
func (s *Store) entries(ctx context.Context, q queryer, each func(binding.Entry) error, where string, args ...any) error {
	accepted, err := s.acceptedUpTo(ctx, q)
	if err != nil {
		return err
	}
	n := len(ledger.columns)
	values, pointers := make(row, n+3), make([]any, n+3) // and its mac, the mac before, the actor's JSON
	for i := range values {
		pointers[i] = &values[i]
	}
	return query(ctx, q, func(scan func(...any) error) error {
		if err := scan(pointers...); err != nil {
			return err
		}
		asItIs := values.int(1) < accepted[values.int(0)]
		if !asItIs && !hmac.Equal(values.bytes(n), s.entryMAC(values[:n], values.bytes(n+1))) {
			return damaged(ledger, values, "was changed, or the one before it is gone or was")
		}
		e := binding.Entry{
			Chain: int(values.int(0)), Seq: values.int(1), Time: fromMillis(values.int(2)), Event: binding.Event(values.text(3)),
			Subject: values.text(4), IMEI: values.text(5), Detail: values.text(8),
		}
		if text := values.text(n + 2); s.isActor(values, text) {
			if err := json.Unmarshal([]byte(text), &e.Actor); err != nil {
				return err
			}
		} else if !asItIs {
			return damaged(ledger, values, otherActor)
		} else {
			e.Actor.Client = "unknown"
		}
		return each(e)
	}, `SELECT e.`+strings.Join(ledger.columns, ", e.")+`, e.mac, p.mac, a.json FROM ledger AS e
		LEFT JOIN ledger AS p ON p.chain = e.chain AND p.seq = e.seq - 1 LEFT JOIN actors AS a ON a.actor = e.actor `+where, args...)
}

const otherActor = "has another actor than the service wrote"

// isActor says whether a JSON text is that of an entry's actor.
func (s *Store) isActor(entry row, text string) bool {
	return hmac.Equal(entry.bytes(7), s.macs.of("actors", text))
}

// acceptedUpTo has, of each chain that was accepted although it was not whole, the number of the entry that says so; that
// is missing where the chain is another one than then.
func (s *Store) acceptedUpTo(ctx context.Context, q queryer) (map[int64]int64, error) {
	last := map[int64]int64{}
	err := query(ctx, q, func(scan func(...any) error) error {
		var chain, seq int64
		err := scan(&chain, &seq)
		last[chain] = seq
		return err
	}, `SELECT chain, MAX(seq) FROM ledger WHERE subject = $1 AND event = $2 GROUP BY chain`, binding.StoreSubject, string(binding.EventAccepted))
	if err != nil {
		return nil, err
	}
	for chain, seq := range last {
		if known, ok := s.accepted.Load(chain); ok && known == seq {
			continue
		}
		_, _, err := s.verifyChain(ctx, q, chain, seq, ignore)
		if isDamaged(err) {
			delete(last, chain)
		} else if err != nil {
			return nil, err
		} else {
			s.accepted.Store(chain, seq)
		}
	}
	return last, nil
}

// Entries gives all entries, chain after chain.
func (s *Store) Entries(ctx context.Context) binding.Entries {
	return func(yield func(binding.Entry, error) bool) {
		stop := errors.New("stop")
		err := s.entries(ctx, s.read, func(e binding.Entry) error {
			if !yield(e, nil) {
				return stop
			}
			return nil
		}, `ORDER BY e.chain, e.seq`)
		if err != nil && !errors.Is(err, stop) {
			yield(binding.Entry{}, err)
		}
	}
}

func (s *Store) VerifyLedger(ctx context.Context) (n int, err error) {
	for chain := range int64(binding.Chains) {
		m, _, err := s.verifyToHead(ctx, s.read, chain, ignore)
		n += m
		if isDamaged(err) {
			err = fmt.Errorf("%w (%w)", binding.ErrRolledBack, err)
			s.broken.Store(&err)
		}
		if err != nil {
			return n, err
		}
	}
	s.broken.Store(nil)
	return n, nil
}

func ignore(row) error { return nil }

// verifyToHead is verifyChain as far as the chain goes when this begins: what is added meanwhile is looked at next time.
func (s *Store) verifyToHead(ctx context.Context, q queryer, chain int64, each func(row) error) (n int, digest []byte, err error) {
	head, err := s.head(ctx, q, chain)
	if err != nil {
		return 0, nil, err
	}
	return s.verifyChain(ctx, q, chain, head.Seq, each)
}

// verifyChain reads a chain up to an entry. It fails with a *binding.DamagedRow for the first entry that is gone, was
// changed, has another actor or does not follow the one before it, unless that was accepted since, as it is now. digest
// is over all entries that it has read, without who their actors are: one that is gone is entered again.
func (s *Store) verifyChain(ctx context.Context, q queryer, chain, upTo int64, each func(row) error) (n int, digest []byte, err error) {
	var wrong error
	found := func(seq int64, what string) {
		if wrong == nil {
			wrong = damaged(ledger, row{chain, seq}, what)
		}
	}
	var last int64
	var before []byte
	columns := len(ledger.columns)
	values, pointers := make(row, columns+2), make([]any, columns+2) // and its mac, the actor's JSON
	for i := range values {
		pointers[i] = &values[i]
	}
	err = query(ctx, q, func(scan func(...any) error) error {
		if err := scan(pointers...); err != nil {
			return err
		}
		if values.int(1) != last+1 {
			found(last+1, "is gone")
		}
		mac := values.bytes(columns)
		whole := hmac.Equal(mac, s.entryMAC(values[:columns], before))
		if !whole {
			found(values.int(1), "was changed, or does not follow the one before it")
		}
		if !s.isActor(values, values.text(columns+1)) {
			found(values.int(1), otherActor)
			whole = false
		}
		var a acceptance
		if whole && values.text(3) == string(binding.EventAccepted) && json.Unmarshal([]byte(values.text(8)), &a) == nil && hmac.Equal(a.Digest, digest) {
			wrong = nil
		}
		n++
		last, before, digest = values.int(1), bytes.Clone(mac), s.macs.of("ledger so far", append(slices.Clone(values[:columns+1]), digest)...)
		return each(values[:columns+1])
	}, `SELECT e.`+strings.Join(ledger.columns, ", e.")+`, e.mac, a.json FROM ledger AS e LEFT JOIN actors AS a ON a.actor = e.actor
		WHERE e.chain = $1 AND e.seq <= $2 ORDER BY e.seq`, chain, upTo)
	if err == nil && last < upTo {
		found(upTo, "is gone")
	}
	return n, digest, errors.Join(err, wrong)
}

// last has the numbers of the last entries about a subscription; 0 if there was none.
type last struct {
	established, activated, revoked int64
	closed                          int64 // of the one that has closed the attempts before it
}

func (l *last) note(e binding.Event, seq int64) {
	switch e {
	case binding.EventEstablished:
		l.established = max(l.established, seq)
	case binding.EventActivated:
		l.activated = max(l.activated, seq)
		return
	case binding.EventRevoked:
		l.revoked = max(l.revoked, seq)
	case binding.EventOpened, binding.EventClosed:
	default:
		return
	}
	l.closed = max(l.closed, seq)
}

// lastOfAll has the number of the last entry about each of the subjects whose names begin alike; what follows is its name there.
func lastOfAll(ctx context.Context, q queryer, begin string) (map[string]int64, error) {
	all := map[string]int64{}
	err := query(ctx, q, func(scan func(...any) error) error {
		var subject string
		var seq int64
		err := scan(&subject, &seq)
		all[strings.TrimPrefix(subject, begin)] = seq
		return err
	}, `SELECT subject, MAX(seq) FROM ledger WHERE subject >= $1 AND subject < $2 GROUP BY subject`, begin, begin+"\x7f")
	return all, err
}
