package sqlstore

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/ledger"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/subscription"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/kme"
)

func (s *Store) Accept(ctx context.Context, mark *binding.Mark, a binding.Acceptance) (*binding.Accepted, error) {
	s.chains.GiveUp()
	now := &binding.Mark{Epoch: 1}
	if mark != nil {
		now.Epoch = mark.Epoch + 1
	}
	accepted := &binding.Accepted{Mark: now}
	err := s.change(ctx, "accept the ledger", everything, func(ctx context.Context, tx *txn) (err error) {
		refused, err := s.chains.PutBack(ctx, &tx.Tx, a.Missing.Lines)
		if err != nil {
			return err
		}
		if err := s.chains.Accept(ctx, &tx.Tx, mark, a.Reason); err != nil {
			return err
		}
		if err := s.followLedger(ctx, tx, a, refused, accepted); err != nil {
			return err
		}
		now.Heads, err = s.chains.Heads(ctx, tx.Conn)
		return err
	})
	if err != nil {
		return nil, err
	}
	s.chains.Accepted(now)
	return accepted, nil
}

// followLedger updates rows after lines were added to the ledger: they become what the last line says, or are revoked.
func (s *Store) followLedger(
	ctx context.Context, tx *txn, a binding.Acceptance, refused map[string]int, done *binding.Accepted,
) (err error) {
	about := map[string][]binding.Line{}
	for _, l := range a.Missing.Lines {
		about[l.Subject] = append(about[l.Subject], l)
	}
	done.Changes, done.Revoked, done.LeftOut = nil, nil, 0 // this may be called again
	for _, n := range refused {
		done.LeftOut += n
	}
	now := time.Now()
	for _, subject := range slices.Sorted(maps.Keys(about)) {
		change, err := s.follow(ctx, tx, about[subject], refused[subject] > 0, now)
		if err != nil {
			return err
		}
		if change != nil {
			done.Changes = append(done.Changes, *change)
		}
	}
	if a.RevokeUnknown {
		done.Revoked, err = s.revokeUnknown(ctx, tx, a.Missing, now)
	}
	return err
}

// follow is followLedger for the lines about one subject, in order.
func (s *Store) follow(
	ctx context.Context, tx *txn, lines []binding.Line, refused bool, now time.Time,
) (*binding.Change, error) {
	subject := lines[0].Subject
	kind, name, _ := strings.Cut(subject, " ")
	switch {
	case kind+" "+name == binding.ManufacturerSubject(name):
		return s.followVerdict(ctx, tx, tables.Manufacturers, 6, "keysvc enroll", lines, name)
	case kind == "lot":
		manufacturer, lot, _ := strings.Cut(name, " ")
		return s.followVerdict(ctx, tx, tables.Lots, 4, "keysvc lot import", lines, manufacturer, lot)
	case kind+" "+name == binding.ListingSubject(name):
		return s.followListing(ctx, tx, lines[len(lines)-1], name)
	}
	imsi, err := kme.ParseIMSI(subject)
	if err != nil {
		return nil, nil // of the store, or of a list of revoked devices: these have no rows
	}
	return s.followSubscription(ctx, tx, imsi, lines, refused, now)
}

// followSubscription keeps a binding that is still what the ledger says, and activates a pending one that has become
// active. Otherwise the ledger's binding is lost, or was revoked: then it revokes what there is. refused says that a
// line is not in the ledger: see putBack.
func (s *Store) followSubscription(
	ctx context.Context, tx *txn, imsi kme.IMSI, lines []binding.Line, refused bool, now time.Time,
) (*binding.Change, error) {
	s.recent.Forget(imsi.String())
	last := lines[len(lines)-1]
	change := &binding.Change{Subject: imsi.String(), IMEI: last.IMEI, Event: last.Event, ToDo: toDo[last.Event]}
	replaced := false // a later KME, which is lost, has replaced it
	for i, l := range lines {
		switch l.Event {
		case binding.EventActivated, binding.EventRevoked:
			last, change.Event = l, l.Event
			replaced = slices.ContainsFunc(lines[:i], func(o binding.Line) bool {
				return o.Event == binding.EventEstablished
			})
		case binding.EventExported:
			continue
		}
		if err := dropAttempts(ctx, tx, imsi); err != nil {
			return nil, err
		}
	}
	sub, err := subscription.Read(ctx, s.macs, tx.Conn, imsi, now)
	if tables.IsDamaged(err) && sub != nil {
		p := sub.Pending
		if p == nil {
			p = sub.Expired
		}
		if p != nil && last.Event == binding.EventActivated && !replaced {
			var shown int64
			if _, err := tx.One(ctx, []any{&shown}, `SELECT COALESCE(MAX(seq), 0) FROM ledger WHERE subject = $1 AND
				event = $2 AND seq < $3`, imsi.String(), string(binding.EventEstablished), last.Seq); err != nil {
				return nil, err
			}
			if shown == sub.Seq.Pending {
				p.State, p.Activated, p.Expires, p.Sent = binding.Active, last.Time, time.Time{}, nil
				change.IMEI, change.Now = p.IMEI.String(), string(binding.Active)
				if err := tx.Do(ctx, `DELETE FROM bindings WHERE imsi = $1`, imsi.String()); err != nil {
					return nil, err
				}
				return change, s.macs.Add(ctx, tx.Conn, tables.Bindings, tables.OfBinding(p, last.Seq)...)
			}
		}
		if sub.Seq.Pending != 0 && sub.Seq.Pending != sub.Last.Established {
			if err := dropPending(ctx, tx, imsi); err != nil {
				return nil, err
			}
			sub, err = subscription.Read(ctx, s.macs, tx.Conn, imsi, now)
		}
	}
	switch {
	case tables.IsDamaged(err):
		b, err := s.revoke(ctx, tx, imsi, now)
		if err == nil && b == nil && refused { // the ledger does not have the line that names its device
			b = &binding.Binding{IMSI: imsi}
			for _, l := range lines {
				if l.Event == binding.EventEstablished && err == nil {
					b.Established, err = l.Time, b.IMEI.UnmarshalText([]byte(l.IMEI))
				}
			}
			if err == nil {
				err = s.endAsRevoked(ctx, tx, b, now)
			}
		}
		if err != nil {
			return nil, err
		}
		if change.Now = string(binding.Revoked); b != nil && b.IMEI != (kme.IMEI{}) {
			change.IMEI = b.IMEI.String()
		}
		switch change.ToDo = ""; {
		case refused:
			change.ToDo = "a row of the ledger that the service has not written has its KME: find out who wrote it " +
				"(keysvc store verify)"
		case change.Event == binding.EventActivated:
			change.ToDo = "its KME is lost: the device has to be bound again"
		}
		return change, nil
	case err != nil:
		return nil, err
	}
	change.Now = "NOT BOUND"
	if b := sub.Standing(); b != nil {
		change.Now = string(b.State) + " as before, in " + b.IMEI.String()
	}
	return change, nil
}

// toDo is what an administrator must do if the last decision about a subscription is lost.
var toDo = map[binding.Event]string{
	binding.EventOpened: "keysvc binding open, if it is still to be bound to another device",
	binding.EventEstablished: "its last KME is lost, before the device had shown it: the device has to send another " +
		"one",
}

// followVerdict gives the row of a manufacturer or a lot its last verdict, whose columns begin at a place. One without
// a row is forgotten.
func (s *Store) followVerdict(
	ctx context.Context, tx *txn, t *tables.Table, verdictAt int, again string, lines []binding.Line, key ...any,
) (*binding.Change, error) {
	last := lines[len(lines)-1]
	change := &binding.Change{Subject: last.Subject, Event: last.Event, Now: string(last.Event)}
	var where []string
	for i := range key {
		where = append(where, fmt.Sprintf("%s = $%d", t.Columns[i], i+1))
	}
	var own tables.Row
	err := s.macs.Each(ctx, tx.Conn, t, func(r tables.Row) error {
		own = slices.Clone(r)
		return nil
	}, "WHERE "+strings.Join(where, " AND "), key...)
	switch {
	case tables.IsDamaged(err), own != nil && !slices.Equal([]any(own[:len(key)]), key): // so nothing is made of it
		change.Now = "DAMAGED"
		change.ToDo = "its row was changed by somebody else: bring back a backup of the store in which it is whole"
		return change, nil
	case err != nil:
		return nil, err
	}
	if own == nil {
		change.Now, change.ToDo = string(binding.EventForgotten), again
		_, err := s.chains.Enter(ctx, &tx.Tx, ledger.Entry{Event: binding.EventForgotten, Subject: last.Subject})
		return change, err
	}
	for _, l := range lines {
		withdrawn := l.Event == binding.EventDistrusted || l.Event == binding.EventRetired
		switch l.Event {
		case binding.EventEnrolled: // its directory or TACs may be others since
			change.ToDo = again
		case binding.EventDistrusted, binding.EventTrusted, binding.EventRetired, binding.EventReinstated:
			copy(own[verdictAt:], verdictValues(registry.Verdict{Withdrawn: withdrawn,
				By: cmp.Or(l.Actor.User, l.Actor.Client), Reason: l.Detail, Time: l.Time}))
		}
	}
	own[len(own)-1] = last.Seq
	return change, s.macs.Put(ctx, tx.Conn, t, own...)
}

// followListing makes an entry of the operator's list what the ledger says.
func (s *Store) followListing(
	ctx context.Context, tx *txn, last binding.Line, prefix string,
) (*binding.Change, error) {
	change := &binding.Change{Subject: last.Subject, Event: last.Event, Now: string(last.Event)}
	status, reason := "", last.Detail
	if last.Event == binding.EventListed {
		status, reason, _ = strings.Cut(last.Detail, ": ")
	}
	var before int64
	if _, err := tx.One(ctx, []any{&before}, `SELECT COALESCE(MAX(change), 0) FROM equipment`); err != nil {
		return nil, err
	}
	return change, s.macs.Put(ctx, tx.Conn, tables.Equipment, prefix, status, reason, tables.Millis(last.Time),
		before+1, last.Seq)
}

// revokeUnknown revokes the bindings of chains with unknown entries.
func (s *Store) revokeUnknown(
	ctx context.Context, tx *txn, m *binding.Missing, now time.Time,
) (revoked []string, err error) {
	for after := ""; ; {
		var page []string
		err := tx.Each(ctx, func(scan func(...any) error) error {
			page = append(page, "")
			return scan(&page[len(page)-1])
		}, `SELECT DISTINCT imsi FROM bindings WHERE imsi > $1 AND state <> 'REVOKED' ORDER BY imsi LIMIT 1000`, after)
		// SQLite sorts a BLOB, which the service did not write, behind all texts, and would return it for ever.
		if err != nil || len(page) == 0 || page[len(page)-1] <= after {
			return revoked, err
		}
		for _, text := range page {
			after = text
			imsi, err := kme.ParseIMSI(text)
			if err != nil || m.Unknown[ledger.ChainOf(text)] == 0 {
				continue // if it is no IMSI, the service did not write the row
			}
			s.recent.Forget(text)
			if _, err := s.revoke(ctx, tx, imsi, now); err != nil {
				return nil, err
			}
			revoked = append(revoked, text)
		}
	}
}
