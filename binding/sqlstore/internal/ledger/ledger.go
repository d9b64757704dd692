package ledger

import (
	"bytes"
	"context"
	"crypto/hmac"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"iter"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
)

// ChainOf is the chain that a subject's entries are in.
func ChainOf(subject string) int64 {
	return int64(crc32.ChecksumIEEE([]byte(subject)) % binding.Chains)
}

// An Entry is one to be added.
type Entry struct {
	Event   binding.Event
	Subject string
	IMEI    string
	Tag     any // []byte, or nil
	Detail  string
}

// Used fails with ErrUsed if the ledger has the entry's KME.
func Used(ctx context.Context, q sqlconn.Conn, e Entry) error {
	var there bool
	_, err := q.One(ctx, []any{&there}, `SELECT EXISTS (SELECT 1 FROM ledger WHERE imei = $1 AND tag = $2)`,
		e.IMEI, e.Tag)
	if err == nil && there {
		err = binding.ErrUsed
	}
	return err
}

// Enter adds an entry in a transaction, and gives its number. An entry of a chain follows the last one: until the
// transaction ends, no other one adds an entry. It fails with ErrUsed if the ledger has the entry's KME.
func (c *Chains) Enter(ctx context.Context, tx *Tx, e Entry) (seq int64, err error) {
	return c.noteIn(ctx, tx, ChainOf(e.Subject), e)
}

func (c *Chains) noteIn(ctx context.Context, tx *Tx, chain int64, e Entry) (seq int64, err error) {
	actor, err := c.actor(ctx, tx)
	if err != nil {
		return 0, err
	}
	if tx.Heads[chain] == nil {
		head, err := c.Head(ctx, tx.Conn, chain)
		if err != nil {
			return 0, err
		}
		tx.Heads.Read(chain, head)
	}
	before := tx.Heads[chain]
	seen := c.seenOf(chain)
	if before.Seq < seen.Seq || before.Seq == seen.Seq && !bytes.Equal(before.MAC, seen.MAC) {
		return 0, c.refuse(rolledBack(chain, *before, seen))
	}
	next := binding.Head{Seq: before.Seq + 1}
	values := []any{chain, next.Seq, time.Now().UnixMilli(), string(e.Event), e.Subject, e.IMEI, e.Tag, actor, e.Detail}
	next.MAC = c.entryMAC(values, before.MAC)
	tx.Heads[chain] = &next // before any other change of the transaction goes on
	switch n, err := tx.Changed(ctx, tables.Ledger.Insert+" ON CONFLICT DO NOTHING", append(values,
		[]byte(next.MAC))...); {
	case err != nil:
		return 0, err
	case n == 0 && e.Tag != nil:
		return 0, binding.ErrUsed // also by another IMSI's, meanwhile
	case n == 0:
		return 0, fmt.Errorf("entry %d of chain %d of the ledger is there already", next.Seq, chain)
	}
	tx.After = append(tx.After, func() { c.saw(chain, next) })
	return next.Seq, nil
}

func (c *Chains) entryMAC(values []any, before []byte) []byte {
	return c.macs.Of(tables.Ledger.Name, append(values[:len(values):len(values)], before)...)
}

// Head is the last entry of a chain.
func (c *Chains) Head(ctx context.Context, q sqlconn.Conn, chain int64) (h binding.Head, err error) {
	// A sum, since SQLite compiles a statement anew at each use that orders rows by what follows a parameter in an
	// index.
	_, err = q.One(ctx, []any{&h.Seq, (*[]byte)(&h.MAC)},
		`SELECT seq, mac FROM ledger WHERE chain = $1 + 0 ORDER BY seq DESC LIMIT 1`, chain)
	return h, err
}

// Heads are the last entries of all chains.
func (c *Chains) Heads(ctx context.Context, q sqlconn.Conn) (all [binding.Chains]binding.Head, err error) {
	for i := range all {
		if all[i], err = c.Head(ctx, q, int64(i)); err != nil {
			return all, err
		}
	}
	return all, nil
}

// actor enters who the context's work is done for, unless that was done.
func (c *Chains) actor(ctx context.Context, tx *Tx) ([]byte, error) {
	actor := binding.ActorOf(ctx)
	if id, ok := c.actors.Load(actor); ok {
		return id.([]byte), nil
	}
	text, err := json.Marshal(actor)
	if err != nil {
		return nil, err
	}
	var id []byte
	for ; ; text = append(text, ' ') { // the same in other bytes, where somebody has changed the row
		var have string
		id = c.macs.Of("actors", string(text))
		added, err := tx.Changed(ctx, `INSERT INTO actors (actor, json) VALUES ($1, $2) ON CONFLICT DO NOTHING`, id,
			string(text))
		if err != nil {
			return nil, err
		}
		found, err := tx.One(ctx, []any{&have}, `SELECT json FROM actors WHERE actor = $1`, id)
		if err != nil {
			return nil, err
		}
		if found && have == string(text) {
			break
		}
		if !found || added > 0 {
			return nil, &binding.DamagedRow{Table: "actors", Key: fmt.Sprintf("%x", id), What: "is not as it was " +
				"entered just now: look for triggers and rules of the database"}
		}
	}
	tx.After = append(tx.After, func() {
		if c.known.Add(1) > maxActors {
			c.known.Store(0)
			c.actors.Clear()
		}
		c.actors.Store(actor, id)
	})
	return id, nil
}

// maxActors bounds the memory for those that are entered.
const maxActors = 10_000

func (l Ledger) LastNote(
	ctx context.Context, event binding.Event, subject string,
) (detail string, found bool, err error) {
	q, err := l.chains.Reading("read the ledger")
	if err != nil {
		return "", false, err
	}
	err = l.chains.Each(ctx, q, about(subject, func(e binding.Entry) { detail, found = e.Detail, true }),
		`WHERE e.subject = $1 AND e.event = $2 AND e.seq = (SELECT MAX(seq) FROM ledger WHERE subject = $1 AND event =
			$2)`, subject, string(event))
	return detail, found, err
}

func (l Ledger) History(ctx context.Context, subject string) (all []binding.Entry, err error) {
	q, err := l.chains.Reading("read the ledger")
	if err != nil {
		return nil, err
	}
	err = l.chains.Each(ctx, q, about(subject, func(e binding.Entry) { all = append(all, e) }),
		`WHERE e.subject = $1 ORDER BY e.seq`, subject)
	return all, err
}

// about takes entries about one subject: the database says what equal means.
func about(subject string, take func(binding.Entry)) func(binding.Entry) error {
	return func(e binding.Entry) error {
		if e.Subject != subject {
			return tables.Damaged(tables.Ledger, tables.Row{int64(e.Chain), e.Seq}, "is about another subject")
		}
		take(e)
		return nil
	}
}

// Each gives entries whose MACs, over the MAC of the one before too, are good; and, as they are, those that were
// accepted: without an Actor, unless it is the one that was entered.
func (c *Chains) Each(
	ctx context.Context, q sqlconn.Conn, each func(binding.Entry) error, where string, args ...any,
) error {
	return c.lines(ctx, q, func(l binding.Line) error { return each(l.Entry) }, where, args...)
}

// lines is Each, with all that their MACs are over.
func (c *Chains) lines(
	ctx context.Context, q sqlconn.Conn, each func(binding.Line) error, where string, args ...any,
) error {
	accepted, err := c.acceptedUpTo(ctx, q)
	if err != nil {
		return err
	}
	n := len(tables.Ledger.Columns)
	// Of each entry also its mac, the mac before, the actor's JSON.
	return tables.Scan(ctx, q, n+3, func(values tables.Row) error {
		// SQLite takes numbers that are not whole. Row.Int has 0 for them, which is no number of an entry, and a chain.
		_, inChain := values[0].(int64)
		asItIs := inChain && values.Int(1) > 0 && values.Int(1) < accepted[values.Int(0)]
		if !asItIs && !hmac.Equal(values.Bytes(n), c.entryMAC(values[:n], values.Bytes(n+1))) {
			return tables.Damaged(tables.Ledger, values, "was changed, or the one before it is gone or was")
		}
		e := binding.Entry{
			Chain: int(values.Int(0)), Seq: values.Int(1), Time: tables.Time(values.Int(2)),
			Event: binding.Event(values.Text(3)), Subject: values.Text(4), IMEI: values.Text(5), Detail: values.Text(8),
		}
		if text := values.Text(n + 2); c.isActor(values, text) {
			if err := json.Unmarshal([]byte(text), &e.Actor); err != nil {
				return err
			}
		} else if !asItIs {
			return tables.Damaged(tables.Ledger, values, otherActor)
		} else {
			e.Actor.Client = unknownActor
		}
		return each(binding.Line{Entry: e, Tag: bytes.Clone(values.Bytes(6)), ActorID: bytes.Clone(values.Bytes(7)),
			MAC: bytes.Clone(values.Bytes(n))})
	}, `SELECT e.`+strings.Join(tables.Ledger.Columns, ", e.")+`, e.mac, p.mac, a.json FROM ledger AS e
		LEFT JOIN ledger AS p ON p.chain = e.chain AND p.seq = e.seq - 1 LEFT JOIN actors AS a ON a.actor = e.actor `+
		where, args...)
}

const otherActor = "has another actor than the service wrote"

// unknownActor is the Client of an entry's actor that is gone.
const unknownActor = "unknown"

// isActor says whether a JSON text is that of an entry's actor.
func (c *Chains) isActor(entry tables.Row, text string) bool {
	return hmac.Equal(entry.Bytes(7), c.macs.Of("actors", text))
}

// Entries gives all entries, chain after chain.
func (l Ledger) Entries(ctx context.Context) iter.Seq2[binding.Entry, error] {
	return func(yield func(binding.Entry, error) bool) {
		stop := errors.New("stop")
		err := l.chains.Each(ctx, l.chains.Reads("read the ledger"), func(e binding.Entry) error {
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

// LastOf gives the number of the last entry about each subject whose name begins so, by the rest of the name. It leaves
// out subjects that were forgotten: nobody misses their rows. So it believes that only of an entry that the service
// wrote.
func (c *Chains) LastOf(ctx context.Context, q sqlconn.Conn, begin string) (map[string]int64, error) {
	all := map[string]int64{}
	err := q.Each(ctx, func(scan func(...any) error) error {
		var subject string
		var seq int64
		err := scan(&subject, &seq)
		all[strings.TrimPrefix(subject, begin)] = seq
		return err
	}, `SELECT subject, MAX(seq) FROM ledger WHERE subject >= $1 AND subject < $2 GROUP BY subject`, begin,
		begin+"\x7f")
	if err != nil {
		return nil, err
	}
	err = c.Each(ctx, q, func(e binding.Entry) error {
		if name := strings.TrimPrefix(e.Subject, begin); all[name] == e.Seq && int64(e.Chain) == ChainOf(e.Subject) {
			delete(all, name)
		}
		return nil
	}, `WHERE e.subject >= $1 AND e.subject < $2 AND e.event = $3`, begin, begin+"\x7f",
		string(binding.EventForgotten))
	return all, err
}
