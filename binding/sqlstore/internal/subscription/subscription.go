// Package subscription reads what is stored of a subscription, and whether that is the last that the service has
// written.
package subscription

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/ledger"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/kme"
)

// Stored is what there is of an IMSI, and what of its rows is not in a Subscription.
type Stored struct {
	binding.Subscription
	Expired *binding.Binding // the pending binding that has expired
	Spent   bool             // a RAND that was asked for
	HasRows bool             // there are attempts in rows, also if they have expired
	open    []tables.Row     // of those that have not
	Seq     seqs             // of the bindings
	Last    last             // what the ledger says
}

// seqs has the number of the entry of the ledger that has made a binding what it is; 0 if there is none.
type seqs struct{ Pending, active, revoked int64 }

func (s *seqs) of(state binding.State) *int64 {
	switch state {
	case binding.Pending:
		return &s.Pending
	case binding.Active:
		return &s.active
	}
	return &s.revoked
}

// What a statement that reads all of an IMSI reads too.
type more int

const (
	nothing more = 0
	// the head of its chain
	andHead more = -1
	// and from 1 on: which of so many RANDs are spent
)

// ofIMSI has the statements that read all of an IMSI at one moment: from which table a row is, then the columns of
// bindings, in which those of another table have the places that picked says.
var ofIMSI = func() map[more]string {
	text := picked("bindings", nil, `FROM bindings WHERE imsi = $1`) + ` UNION ALL ` +
		picked("attempts", map[int]string{1: "imsi", 9: "id", 14: "origin", 15: "expires_at"},
			`FROM attempts WHERE imsi = $1`) + ` UNION ALL ` +
		picked("ledger", map[int]string{1: "subject", 2: "event", 18: "NULL"}, `FROM ledger WHERE subject = $1`)
	all := map[more]string{nothing: text,
		andHead: text + ` UNION ALL ` + picked("head", map[int]string{}, // A sum, see head.
			`FROM (SELECT seq, mac FROM ledger WHERE chain = $2 + 0 ORDER BY seq DESC LIMIT 1) AS head`)}
	for n, where := range anySpent {
		all[more(n)] = text + ` UNION ALL ` + picked("spent_rands", map[int]string{1: "imsi", 7: "rand", 17: "NULL"},
			`FROM spent_rands `+where)
	}
	return all
}()

// anySpent are the conditions of rows of so many RANDs of an IMSI.
var anySpent = func() map[int]string {
	all := map[int]string{}
	for _, n := range [...]int{1, 4, binding.MaxRANDs} {
		all[n] = `WHERE imsi = $1 AND rand IN (` + tables.Marks(2, n) + `)`
	}
	return all
}()

// forRANDs gives arguments for as many as there is a statement for: the last of them is there several times.
func forRANDs(rands []hsmkeys.RAND) (n int, args []any) {
	for n = 1; anySpent[n] == "" || n < len(rands); {
		n++
	}
	for i := range n {
		args = append(args, rands[min(i, len(rands)-1)][:])
	}
	return n, args
}

// picked is a SELECT of ofIMSI: the columns that have places, and seq and mac.
func picked(table string, places map[int]string, rest string) string {
	list := []string{"'" + table + "'"}
	for i, column := range append(slices.Clone(tables.Bindings.Columns), "mac") {
		if at, ok := places[i+1]; ok {
			column = at
		} else if places != nil && column != "seq" && column != "mac" {
			column = "NULL"
		}
		list = append(list, column)
	}
	return "SELECT " + strings.Join(list, ", ") + " " + rest
}

// rowOf is a row of a table, with its MAC, in one of ofIMSI.
func rowOf(t *tables.Table, r tables.Row) tables.Row {
	switch t {
	case tables.Attempts:
		return tables.Row{r[1], r[9], r[14], r[15], r[17], r[18]}
	case tables.SpentRANDs:
		return tables.Row{r[1], r[7], r[18]}
	}
	return r[1:]
}

// Read fails with a *binding.DamagedRow for a row that is not the service's, that is not the last one, or that
// is gone. Stored.Spent says whether one of the RANDs is.
func Read(
	ctx context.Context, macs tables.Key, q sqlconn.Conn, imsi kme.IMSI, now time.Time, rands ...hsmkeys.RAND,
) (*Stored, error) {
	what := nothing
	var args []any
	if len(rands) > 0 {
		var n int
		n, args = forRANDs(rands)
		what = more(n)
	}
	sub, _, err := readAnd(ctx, macs, q, imsi, now, what, args...)
	return sub, err
}

// readAnd is Read, with what else is read, for which args are.
func readAnd(
	ctx context.Context, macs tables.Key, q sqlconn.Conn, imsi kme.IMSI, now time.Time, what more, args ...any,
) (*Stored, *binding.Head, error) {
	sub, head, digits := new(Stored), new(binding.Head), imsi.String()
	err := tables.Scan(ctx, q, len(tables.Bindings.Columns)+2, func(r tables.Row) error {
		if r.Text(0) == "head" {
			head.Seq, head.MAC = r.Int(17), r.Bytes(18)
			return nil
		}
		// A row's MAC says whose it is. The database says what equal means.
		if r.Text(1) != digits {
			return tables.Damaged(tables.Bindings, tables.Row{digits, r.Text(0)}, "is of another subscription")
		}
		return sub.takeAny(macs, r, now)
	}, ofIMSI[what], append([]any{digits}, args...)...)
	if err != nil {
		return nil, nil, err
	}
	return sub, head, sub.fresh(digits)
}

// takeAny takes a row of ofIMSI that is about the IMSI, if it is the service's.
func (sub *Stored) takeAny(macs tables.Key, r tables.Row, now time.Time) error {
	switch r.Text(0) {
	case "bindings":
		if err := macs.Check(tables.Bindings, rowOf(tables.Bindings, r)); err != nil {
			return err
		}
		return sub.take(rowOf(tables.Bindings, r), now)
	case "attempts":
		r = rowOf(tables.Attempts, r)
		if err := macs.Check(tables.Attempts, r); err != nil {
			return err
		}
		if sub.HasRows = true; r.Int(3) <= now.UnixMilli() {
			return nil
		}
		sub.open = append(sub.open, r)
		a := binding.Attempt{ID: r.Text(1), Expires: tables.Time(r.Int(3)), Opened: true}
		err := errors.Join(a.IMSI.UnmarshalText([]byte(r.Text(0))), a.Origin.UnmarshalText([]byte(r.Text(2))))
		sub.Attempts = append(sub.Attempts, a)
		return err
	case "ledger":
		sub.Last.Note(binding.Event(r.Text(2)), r.Int(17))
	case "spent_rands":
		sub.Spent = true
		return macs.Check(tables.SpentRANDs, rowOf(tables.SpentRANDs, r))
	}
	return nil
}

// take takes a row of bindings.
func (sub *Stored) take(r tables.Row, now time.Time) error {
	b, seq, err := tables.Binding(r)
	if err != nil {
		return err
	}
	*sub.Seq.of(b.State) = seq
	switch {
	case b.State == binding.Active:
		sub.Active = b
	case b.State == binding.Revoked:
		sub.Revoked = b
	case b.Expires.After(now):
		sub.Pending = b
	default:
		sub.Expired = b
	}
	return nil
}

// fresh fails unless the bindings are those that the ledger speaks of last, and the attempts were not closed since.
func (sub *Stored) fresh(imsi string) error {
	for _, a := range sub.open {
		if a.Int(4) != sub.Last.Closed {
			return tables.Damaged(tables.Attempts, a, "was closed before, and is back")
		}
	}
	settled := max(sub.Last.activated, sub.Last.revoked)
	for _, is := range [...]struct {
		state      binding.State
		have, want int64
	}{
		{state: binding.Active, have: sub.Seq.active, want: sub.Last.activated},
		{state: binding.Revoked, have: sub.Seq.revoked, want: sub.Last.revoked},
	} {
		switch {
		case is.have == 0 && is.want == settled && is.want > 0:
			return tables.Damaged(tables.Bindings, tables.Row{imsi, string(is.state)}, "is gone")
		case is.have != 0 && (is.have != is.want || is.want != settled):
			return tables.Damaged(tables.Bindings, tables.Row{imsi, string(is.state)},
				"is an earlier one than the service has written last")
		}
	}
	if have := sub.Seq.Pending; have != 0 && (have != sub.Last.Established || have < settled) {
		return tables.Damaged(tables.Bindings, tables.Row{imsi, string(binding.Pending)},
			"is an earlier one than the service has written last")
	}
	return nil
}

// last has the numbers of the last entries about a subscription; 0 if there was none.
type last struct {
	Established, activated, revoked int64
	Closed                          int64 // of the one that has closed the attempts before it
}

func (l *last) Note(e binding.Event, seq int64) {
	switch e {
	case binding.EventEstablished:
		l.Established = max(l.Established, seq)
	case binding.EventActivated:
		l.activated = max(l.activated, seq)
		return
	case binding.EventRevoked:
		l.revoked = max(l.revoked, seq)
	case binding.EventOpened, binding.EventClosed:
	default:
		return
	}
	l.Closed = max(l.Closed, seq)
}

// ToChange is Read for whoever will note an entry about it in the same transaction. So attempts are closed by that
// entry: it fails if what has closed them last is said to be behind the end of the chain.
func ToChange(
	ctx context.Context, macs tables.Key, tx *ledger.Tx, imsi kme.IMSI, now time.Time,
) (sub *Stored, err error) {
	chain := ledger.ChainOf(imsi.String())
	head := tx.Heads[chain]
	if head != nil {
		sub, err = Read(ctx, macs, tx.Conn, imsi, now)
	} else {
		sub, head, err = readAnd(ctx, macs, tx.Conn, imsi, now, andHead, chain)
	}
	if err != nil {
		return nil, err
	}
	if sub.Last.Closed > head.Seq {
		return nil, tables.Damaged(tables.Ledger, tables.Row{chain, sub.Last.Closed}, "is behind the chain's end")
	}
	tx.Heads.Read(chain, *head)
	return sub, nil
}

// inRange reads what ofIMSI reads, of all IMSIs behind $1 up to $2, at one moment.
var inRange = strings.NewReplacer("imsi = $1", "imsi > $1 AND imsi <= $2", "subject = $1",
	"subject > $1 AND subject <= $2").Replace(ofIMSI[nothing])

// Range reads all of the IMSIs behind one text up to another one. row is called for each of their bindings and
// attempts: with a *binding.DamagedRow, or nil if it is the service's. wrong has the IMSIs whose rows are all the
// service's, but are not what it wrote last.
func Range(
	ctx context.Context, macs tables.Key, q sqlconn.Conn, after, upTo string, now time.Time, row func(error) error,
) (wrong []kme.IMSI, err error) {
	subs := map[string]*Stored{}
	damaged := map[string]bool{}
	err = tables.Scan(ctx, q, len(tables.Bindings.Columns)+2, func(r tables.Row) error {
		digits := r.Text(1)
		if subs[digits] == nil {
			subs[digits] = new(Stored)
		}
		err := subs[digits].takeAny(macs, r, now)
		if tables.IsDamaged(err) {
			damaged[digits] = true
		} else if err != nil {
			return err
		}
		if r.Text(0) == tables.Ledger.Name {
			return nil
		}
		return row(err)
	}, inRange, after, upTo)
	for digits, sub := range subs {
		// A text that is no IMSI is of a row that is damaged.
		if imsi, perr := kme.ParseIMSI(digits); perr == nil && !damaged[digits] && sub.fresh(digits) != nil {
			wrong = append(wrong, imsi)
		}
	}
	return wrong, err
}

// Spent says whether an IMSI was sent one of some RANDs in clear.
func Spent(
	ctx context.Context, macs tables.Key, q sqlconn.Conn, imsi kme.IMSI, rands ...hsmkeys.RAND,
) (spent bool, err error) {
	n, all := forRANDs(rands)
	err = macs.Each(ctx, q, tables.SpentRANDs, func(tables.Row) error {
		spent = true
		return nil
	}, anySpent[n], append([]any{imsi.String()}, all...)...)
	return spent, err
}
