package ledger

import (
	"bytes"
	"context"
	"crypto/hmac"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/internal/strict"
)

func rolledBack(chain int64, head, seen binding.Head) error {
	if head.Seq < seen.Seq {
		return fmt.Errorf("%w (chain %d of the ledger has %d entries, and had %d)", binding.ErrRolledBack, chain,
			head.Seq, seen.Seq)
	}
	return fmt.Errorf("%w (entry %d of chain %d of the ledger is another one than it was)", binding.ErrRolledBack,
		seen.Seq, chain)
}

// saw notes how far a chain has come.
func (c *Chains) saw(chain int64, head binding.Head) {
	c.mu.Lock()
	if head.Seq > c.seen[chain].Seq {
		c.seen[chain] = head
	}
	c.mu.Unlock()
	select {
	case c.moved <- struct{}{}:
	default:
	}
}

func (l Ledger) Seen() *binding.Mark {
	l.chains.mu.Lock()
	defer l.chains.mu.Unlock()
	return &binding.Mark{Epoch: l.chains.epoch, Heads: l.chains.seen}
}

func (c *Chains) seenOf(chain int64) binding.Head {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.seen[chain]
}

func (l Ledger) Moved() <-chan struct{} { return l.chains.moved }

// refuse makes every method fail from now on.
func (c *Chains) refuse(err error) error {
	c.refused.Store(&err)
	return err
}

// Refusal is what every method fails with; nil while the ledger is what it should be.
func (c *Chains) Refusal() error {
	for _, reason := range []*atomic.Pointer[error]{&c.refused, &c.broken} {
		if err := reason.Load(); err != nil {
			return *err
		}
	}
	return nil
}

// reached refuses a chain that has not, or has no more, the entry that it had come to.
func (c *Chains) reached(ctx context.Context, q sqlconn.Conn, chain int64, head, had binding.Head) error {
	if head.Seq > had.Seq && had.Seq > 0 {
		head.Seq = had.Seq
		head.MAC = nil
		if _, err := q.One(ctx, []any{(*[]byte)(&head.MAC)}, `SELECT mac FROM ledger WHERE chain = $1 AND seq = $2`,
			chain, had.Seq); err != nil {
			return err
		}
	}
	if head.Seq < had.Seq || head.Seq == had.Seq && !bytes.Equal(head.MAC, had.MAC) {
		return c.refuse(rolledBack(chain, head, had))
	}
	return nil
}

func (l Ledger) Check(ctx context.Context, mark *binding.Mark) (*binding.Mark, error) {
	l.chains.mu.Lock()
	if mark != nil && mark.Epoch > l.chains.epoch { // what was wrong is accepted
		l.chains.epoch, l.chains.seen = mark.Epoch, mark.Heads
		l.chains.broken.Store(nil)
		l.chains.actors.Clear()
	}
	l.chains.mu.Unlock()
	seen := l.Seen()
	now, q := &binding.Mark{Epoch: seen.Epoch}, l.chains.Reads("check the ledger")
	for i := range now.Heads {
		head, err := l.chains.Head(ctx, q, int64(i))
		if err != nil {
			return nil, err
		}
		now.Heads[i] = head
		if mark == nil && head.Seq > 0 && seen.Heads[i].Seq == 0 {
			return nil, l.chains.refuse(fmt.Errorf(
				"%w (the token has no high-water mark, and the ledger is not empty: the "+
					"token is another one than it was)", binding.ErrRolledBack))
		}
		if err := l.chains.reached(ctx, q, int64(i), head, seen.Heads[i]); err != nil {
			return nil, err
		}
		if head.Seq > seen.Heads[i].Seq { // no mark is raised to what somebody has made up
			err := l.chains.Each(ctx, q, func(binding.Entry) error {
				return nil
			}, `WHERE e.chain = $1 AND e.seq = $2`, int64(i), head.Seq)
			if tables.IsDamaged(err) {
				err = l.chains.refuse(fmt.Errorf("%w (%w; or this token is not the one that it was written with)",
					binding.ErrRolledBack, err))
			}
			if err != nil {
				return nil, err
			}
		}
		if mark == nil || mark.Epoch < seen.Epoch {
			continue
		}
		if err := l.chains.reached(ctx, q, int64(i), head, mark.Heads[i]); err != nil {
			return nil, err
		}
	}
	if l.chains.durable(ctx, now, seen, mark) {
		l.chains.mu.Lock()
		for i, h := range now.Heads {
			if h.Seq > l.chains.seen[i].Seq {
				l.chains.seen[i] = h
			}
		}
		l.chains.mu.Unlock()
	}
	l.chains.refused.Store(nil)
	return now, l.chains.Refusal()
}

// durable says whether heads that were read can be believed to stay, which are not behind those that were seen, nor
// behind the mark: a failover may take away what nobody was told.
func (c *Chains) durable(ctx context.Context, now, seen, mark *binding.Mark) bool {
	return now.Entries() == seen.Entries() ||
		mark != nil && mark.Epoch >= seen.Epoch && now.Entries() == mark.Entries() ||
		c.settle(ctx) == nil && c.still(ctx, now)
}

// still says whether the last entries that were read are in the ledger: a failover may have been since.
func (c *Chains) still(ctx context.Context, read *binding.Mark) bool {
	for chain, head := range read.Heads {
		if has, err := c.Has(ctx, int64(chain), head); err != nil || !has {
			return false
		}
	}
	return true
}

// An acceptance is the detail of an EventAccepted.
type acceptance struct {
	Reason string        `json:"reason"`
	Had    int64         `json:"had"`    // entries, by the mark
	Digest strict.Base64 `json:"digest"` // of the chain's entries before it, see verifyChain
}

// GiveUp forgets what was seen of the chains, and all that is wrong: they are about to be accepted as they are.
func (c *Chains) GiveUp() {
	c.mu.Lock()
	c.seen = [binding.Chains]binding.Head{}
	c.mu.Unlock()
	c.refused.Store(nil)
	c.broken.Store(nil)
	c.actors.Clear()
}

// Accept notes in each chain that it is accepted as it is, whatever the mark had.
func (c *Chains) Accept(ctx context.Context, tx *Tx, mark *binding.Mark, reason string) error {
	for chain := range int64(binding.Chains) {
		if err := c.acceptChain(ctx, tx, mark, chain, reason); err != nil {
			return err
		}
	}
	return nil
}

// Accepted notes how far the chains have come, when an Accept is durable.
func (c *Chains) Accepted(now *binding.Mark) {
	c.mu.Lock()
	c.epoch, c.seen = now.Epoch, now.Heads
	c.mu.Unlock()
}

// acceptChain notes in a chain that it is accepted as it is.
func (c *Chains) acceptChain(ctx context.Context, tx *Tx, mark *binding.Mark, chain int64, reason string) error {
	a := acceptance{Reason: reason}
	if mark != nil {
		a.Had = mark.Heads[chain].Seq
	}
	var err error
	if _, a.Digest, err = c.Verify(ctx, tx.Conn, chain, ignore, nil); err != nil && !tables.IsDamaged(err) {
		return err
	}
	detail, err := json.Marshal(a)
	if err != nil {
		return err
	}
	_, err = c.noteIn(ctx, tx, chain, Entry{Event: binding.EventAccepted, Subject: binding.StoreSubject,
		Detail: string(detail)})
	return err
}

// acceptedUpTo gives, for each chain that was accepted although it was not whole, the number of the last entry that
// says so. A chain that was changed since then is left out.
func (c *Chains) acceptedUpTo(ctx context.Context, q sqlconn.Conn) (map[int64]int64, error) {
	last := map[int64]int64{}
	err := q.Each(ctx, func(scan func(...any) error) error {
		var chain, seq int64
		err := scan(&chain, &seq)
		last[chain] = seq
		return err
	}, `SELECT chain, MAX(seq) FROM ledger WHERE subject = $1 AND event = $2 GROUP BY chain`, binding.StoreSubject,
		string(binding.EventAccepted))
	if err != nil {
		return nil, err
	}
	for chain, seq := range last {
		if known, ok := c.accepted.Load(chain); ok && known == seq {
			continue
		}
		_, _, err := c.verifyChain(ctx, q, chain, seq, ignore, nil)
		if tables.IsDamaged(err) {
			delete(last, chain)
		} else if err != nil {
			return nil, err
		} else {
			c.accepted.Store(chain, seq)
		}
	}
	return last, nil
}

func (l Ledger) VerifyLedger(ctx context.Context) (n int, err error) {
	epoch := l.Seen().Epoch
	for chain := range int64(binding.Chains) {
		m, _, err := l.chains.Verify(ctx, l.chains.Reads("verify the ledger"), chain, ignore, l.atRest)
		n += m
		if tables.IsDamaged(err) {
			err = fmt.Errorf("%w (%w)", binding.ErrRolledBack, err)
			if l.Seen().Epoch == epoch { // else it was accepted meanwhile, and is read again
				l.chains.broken.Store(&err)
			}
		}
		if err != nil {
			return n, err
		}
	}
	l.chains.broken.Store(nil)
	return n, nil
}

// chainPage is how many entries are read at a time: some milliseconds.
const chainPage = 1000

func ignore(tables.Row) error { return nil }

// A rest is made between the pages of a chain, after what a page took.
type rest func(ctx context.Context, took time.Duration) error

// atRest limits a reading to a fiftieth of a core, however long the ledger is: the service works meanwhile.
func (l Ledger) atRest(ctx context.Context, took time.Duration) error {
	if l.chains.Refusal() != nil { // nobody is served, and all wait for this
		return ctx.Err()
	}
	select {
	case <-time.After(min(49*took, time.Second)):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Verify is verifyChain as far as the chain goes when this begins: what is added meanwhile is looked at next time.
func (c *Chains) Verify(
	ctx context.Context, q sqlconn.Conn, chain int64, each func(tables.Row) error, pause rest,
) (n int, digest []byte, err error) {
	head, err := c.Head(ctx, q, chain)
	if err != nil {
		return 0, nil, err
	}
	return c.verifyChain(ctx, q, chain, head.Seq, each, pause)
}

// verifyChain reads a chain up to an entry. It fails with a *binding.DamagedRow for the first entry that is gone, was
// changed, has another actor or does not follow the one before it, unless that was accepted since, as it is now. digest
// is over all entries that it has read, without who their actors are: one that is gone is entered again.
//
// It reads page by page: SQLite cannot begin its WAL anew while somebody reads, and PostgreSQL removes no dead rows.
func (c *Chains) verifyChain(
	ctx context.Context, q sqlconn.Conn, chain, upTo int64, each func(tables.Row) error, pause rest,
) (n int, digest []byte, err error) {
	var wrong error
	found := func(seq int64, what string) {
		if wrong == nil {
			wrong = tables.Damaged(tables.Ledger, tables.Row{chain, seq}, what)
		}
	}
	var last int64
	// It begins before 1, to see what somebody has put there. It has the type of the row: SQLite stores 999.5, too.
	var after any = int64(math.MinInt64)
	var before []byte
	columns := len(tables.Ledger.Columns)
	check := func(values tables.Row) error { // and its mac, the actor's JSON
		if values.Int(1) != last+1 {
			found(last+1, "is gone")
		}
		mac := values.Bytes(columns)
		whole := hmac.Equal(mac, c.entryMAC(values[:columns], before))
		if !whole {
			found(values.Int(1), "was changed, or does not follow the one before it")
		}
		if !c.isActor(values, values.Text(columns+1)) {
			found(values.Int(1), otherActor)
			whole = false
		}
		var a acceptance
		if whole && values.Text(3) == string(binding.EventAccepted) &&
			json.Unmarshal([]byte(values.Text(8)), &a) == nil && hmac.Equal(a.Digest, digest) {
			wrong = nil
		}
		n++
		last, after, before, digest = values.Int(1), values[1], bytes.Clone(mac), c.macs.Of("ledger so far",
			append(slices.Clone(values[:columns+1]), digest)...)
		return each(values[:columns+1])
	}
	for more := true; more && err == nil; {
		began, had := time.Now(), n
		err = tables.Scan(ctx, q, columns+2, check, `SELECT e.`+strings.Join(tables.Ledger.Columns, ", e.")+
			`, e.mac, a.json FROM ledger AS e LEFT JOIN actors AS a ON a.actor = e.actor
			WHERE e.chain = $1 AND e.seq > $2 AND e.seq <= $3 ORDER BY e.seq LIMIT $4`, chain, after, upTo, chainPage)
		if more = n-had == chainPage; more && err == nil && pause != nil {
			err = pause(ctx, time.Since(began))
		}
	}
	if err != nil { // what is wrong may have been accepted by an entry that was not read
		return n, digest, err
	}
	if last < upTo {
		found(upTo, "is gone")
	}
	return n, digest, wrong
}

// Strays gives the rows of the ledger that are in none of its chains. It names all numbers that none has, so that an
// index has these rows: SQLite takes 3.5 too.
func Strays(ctx context.Context, q sqlconn.Conn, each func(error) error) error {
	where := []string{"chain < 0"}
	for chain := range binding.Chains - 1 {
		where = append(where, fmt.Sprintf("chain > %d AND chain < %d", chain, chain+1))
	}
	where = append(where, fmt.Sprintf("chain > %d", binding.Chains-1))
	return tables.Scan(ctx, q, 2, func(r tables.Row) error {
		return each(tables.Damaged(tables.Ledger, r, "is in no chain: somebody else has made it up"))
	}, `SELECT chain, seq FROM ledger WHERE `+strings.Join(where, " OR "))
}

// CopyActors copies all actors to a store that has none of them.
func CopyActors(ctx context.Context, from, to sqlconn.Conn) error {
	return from.Each(ctx, func(scan func(...any) error) error {
		var id []byte
		var text string
		if err := scan(&id, &text); err != nil {
			return err
		}
		return to.Do(ctx, `INSERT INTO actors (actor, json) VALUES ($1, $2)`, id, text)
	}, `SELECT actor, json FROM actors`)
}
