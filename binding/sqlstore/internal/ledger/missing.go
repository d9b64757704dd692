package ledger

import (
	"bytes"
	"context"
	"crypto/hmac"
	"encoding/json"
	"errors"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
)

func (l Ledger) Heads(ctx context.Context) (*binding.Mark, error) {
	heads, err := l.chains.Heads(ctx, l.chains.Reads("read the ledger"))
	if err != nil {
		return nil, err
	}
	return &binding.Mark{Epoch: l.Seen().Epoch, Heads: heads}, nil
}

func (l Ledger) Lines(ctx context.Context, behind *binding.Mark, most int) (all []binding.Line, err error) {
	q, err := l.chains.Reading("read the ledger")
	if err != nil {
		return nil, err
	}
	seen := l.Seen() // and no further: a failover may take away what nobody was told
	for i, had := range behind.Heads {
		if seen.Heads[i].Seq == had.Seq && bytes.Equal(seen.Heads[i].MAC, had.MAC) {
			continue
		}
		from := had.Seq
		if same, err := l.chains.Has(ctx, int64(i), had); err != nil {
			return nil, err
		} else if !same {
			if _, err := q.One(ctx, []any{&from}, `SELECT COALESCE(MAX(seq), 1) - 1 FROM ledger WHERE subject = $1 AND
				event = $2 AND chain = $3`, binding.StoreSubject, string(binding.EventAccepted), int64(i)); err != nil {
				return nil, err
			}
		}
		err := l.chains.lines(ctx, q, func(line binding.Line) error {
			all = append(all, line)
			return nil
		}, `WHERE e.chain = $1 AND e.seq > $2 AND e.seq <= $3 ORDER BY e.seq`, int64(i), from,
			min(from+int64(most), seen.Heads[i].Seq))
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

// Has says whether the database has an entry; it has the one before the first.
func (c *Chains) Has(ctx context.Context, chain int64, entry binding.Head) (bool, error) {
	if entry.Seq == 0 {
		return true, nil
	}
	var mac []byte
	_, err := c.Reads("read the ledger").One(ctx, []any{&mac}, `SELECT mac FROM ledger WHERE chain = $1 AND seq = $2`,
		chain, entry.Seq)
	return bytes.Equal(mac, entry.MAC), err
}

func (l Ledger) Missing(
	ctx context.Context, mark *binding.Mark, copied func(chain int, seq int64) []binding.Line,
) (*binding.Missing, error) {
	now, err := l.Heads(ctx)
	if err != nil {
		return nil, err
	}
	m := new(binding.Missing)
	for chain, at := range now.Heads {
		var had binding.Head
		whole := false // of a token without a mark nobody knows
		if mark != nil {
			had = mark.Heads[chain]
			if whole, err = l.chains.Has(ctx, int64(chain), had); err != nil {
				return nil, err
			}
		}
		first := at.Seq
		for {
			var next *binding.Line // several follow where the chain was accepted without the first: the last one counts
			for _, line := range copied(chain, at.Seq+1) {
				if l.chains.follows(line, at) && (next == nil || !line.Time.Before(next.Time)) {
					next = &line
				}
			}
			if next == nil {
				break
			}
			if _, own := l.chains.actorText(*next); !own {
				next.Actor = binding.Actor{Client: unknownActor}
			}
			m.Lines = append(m.Lines, *next)
			at = binding.Head{Seq: at.Seq + 1, MAC: next.MAC}
			whole = whole || at.Seq == had.Seq && bytes.Equal(at.MAC, had.MAC)
		}
		m.Lost += max(had.Seq, at.Seq) - first
		if !whole {
			m.Unknown[chain] = max(had.Seq-at.Seq, 1)
		}
	}
	return m, nil
}

// follows says whether a line is an entry of the ledger that came after another one.
func (c *Chains) follows(l binding.Line, before binding.Head) bool {
	return l.Seq == before.Seq+1 && hmac.Equal(l.MAC, c.entryMAC(lineValues(l), before.MAC))
}

// lineValues is a line as the ledger has it.
func lineValues(l binding.Line) []any {
	var tag any
	if len(l.Tag) > 0 {
		tag = []byte(l.Tag)
	}
	return []any{int64(l.Chain), l.Seq, l.Time.UnixMilli(), string(l.Event), l.Subject, l.IMEI, tag, []byte(l.ActorID),
		l.Detail}
}

// PutBack adds missing lines to the ledger, each behind the one before it. It leaves out a line if a row that the
// service has not written has its KME. refused says how many lines of each subject were left out.
func (c *Chains) PutBack(ctx context.Context, tx *Tx, lines []binding.Line) (refused map[string]int, err error) {
	refused = map[string]int{}
	at := map[int64]binding.Head{}
	for _, l := range lines {
		chain := int64(l.Chain)
		before, ok := at[chain]
		if !ok {
			if before, err = c.Head(ctx, tx.Conn, chain); err != nil {
				return nil, err
			}
		}
		if !c.follows(l, before) {
			return nil, errors.New("the ledger has changed meanwhile: run this again")
		}
		if err := c.putActor(ctx, tx, l); err != nil {
			return nil, err
		}
		n, err := tx.Changed(ctx, tables.Ledger.Insert+" ON CONFLICT DO NOTHING", append(lineValues(l),
			[]byte(l.MAC))...)
		if err != nil {
			return nil, err
		}
		at[chain] = binding.Head{Seq: l.Seq, MAC: l.MAC}
		if n == 0 {
			refused[l.Subject]++
			continue
		}
		tx.Heads[chain] = &binding.Head{Seq: l.Seq, MAC: l.MAC}
	}
	return refused, nil
}

// putActor enters a line's actor again. One that is not the entry's is left out: the entry has none then.
func (c *Chains) putActor(ctx context.Context, tx *Tx, l binding.Line) error {
	text, own := c.actorText(l)
	if !own {
		return nil
	}
	return tx.Do(ctx, `INSERT INTO actors (actor, json) VALUES ($1, $2) ON CONFLICT DO NOTHING`, []byte(l.ActorID),
		text)
}

// actorText is the JSON of a line's actor. own says whether that is the entry's.
func (c *Chains) actorText(l binding.Line) (text string, own bool) {
	b, err := json.Marshal(l.Actor)
	return string(b), err == nil && hmac.Equal(l.ActorID, c.macs.Of("actors", string(b)))
}
