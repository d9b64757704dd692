// Package mark keeps the ledger's high-water mark in the token and a copy of its entries in a folder, and compares the
// ledger with both.
package mark

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/internal/strict"
)

// A Token is an HSM that keeps the ledger's high-water mark, out of reach of whoever controls the database.
type Token interface {
	Marks(ctx context.Context) ([][]byte, error)
	// SetMark sets a mark and removes others. Marks that are not among others stay.
	SetMark(ctx context.Context, mark []byte, others [][]byte) error
}

// Read gives the token's mark; the highest if processes have left several; nil if there is none.
func Read(ctx context.Context, token Token) (*binding.Mark, error) {
	mark, _, err := readMarks(ctx, token)
	return mark, err
}

// readMarks is Read, and gives all marks in the token, too.
func readMarks(ctx context.Context, token Token) (mark *binding.Mark, all [][]byte, err error) {
	if all, err = token.Marks(ctx); err != nil {
		return nil, nil, err
	}
	for _, text := range all {
		m := new(binding.Mark)
		if err := json.Unmarshal(text, m); err != nil {
			return nil, nil, fmt.Errorf("the high-water mark in the token is damaged: %w", err)
		}
		mark = merge(mark, m)
	}
	return mark, all, nil
}

// merge gives the mark with the higher Epoch. If both are the same, it has the higher head of each chain.
func merge(a, b *binding.Mark) *binding.Mark {
	switch {
	case a == nil || b != nil && b.Epoch > a.Epoch:
		return b
	case b == nil || a.Epoch > b.Epoch:
		return a
	}
	both := *a
	for i, h := range b.Heads {
		if h.Seq > both.Heads[i].Seq {
			both.Heads[i] = h
		}
	}
	return &both
}

// ahead says whether a mark is higher than another one that it was merged with.
func ahead(m, of *binding.Mark) bool {
	if of == nil || m.Epoch > of.Epoch {
		return true
	}
	for i, h := range m.Heads {
		if h.Seq > of.Heads[i].Seq {
			return true
		}
	}
	return false
}

// Written says whether a token keeps the mark of a ledger that has entries.
func Written(ctx context.Context, token Token) (bool, error) {
	mark, err := Read(ctx, token)
	return mark != nil && ahead(mark, new(binding.Mark)), err
}

// Check compares the ledger with the token's mark. It fails with ErrRolledBack where the ledger is behind it.
func Check(ctx context.Context, store binding.Ledger, token Token) error {
	mark, err := Read(ctx, token)
	if err != nil {
		return err
	}
	_, err = store.Check(ctx, mark)
	return err
}

// Ensure sets a mark of an empty ledger, unless the token has one.
func Ensure(ctx context.Context, token Token) (created bool, err error) {
	mark, err := Read(ctx, token)
	if err != nil || mark != nil {
		return false, err
	}
	return true, RaiseTo(ctx, token, new(binding.Mark))
}

// Raise raises the token's mark to what this process has seen of the ledger. If it has seen nothing, it sets no mark: a
// ledger with entries needs a token with a mark.
func Raise(ctx context.Context, store binding.Ledger, token Token) error {
	seen := store.Seen()
	if !ahead(seen, new(binding.Mark)) {
		return nil
	}
	return RaiseTo(ctx, token, seen)
}

// RaiseTo raises the token's mark to another one, if that is higher. It removes only marks that it has read: another
// process may have set a higher one meanwhile.
func RaiseTo(ctx context.Context, token Token, to *binding.Mark) error {
	mark, all, err := readMarks(ctx, token)
	if err != nil {
		return err
	}
	if raised := merge(mark, to); raised != nil && ahead(raised, mark) {
		return set(ctx, token, raised, all)
	}
	return nil
}

func set(ctx context.Context, token Token, m *binding.Mark, others [][]byte) error {
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return token.SetMark(ctx, text, others)
}

// AcceptOptions are an administrator's decisions about a ledger that is behind its mark.
type AcceptOptions struct {
	Reason        string
	AuditLogs     []string                     // folders: see KeepAuditLog
	RevokeUnknown bool                         // see binding.Acceptance
	Agreed        func(*binding.Missing) error // is asked only if there is something to accept
}

// Accept accepts the ledger. It adds missing entries from audit logs, and notes the reason. Meanwhile, only processes
// that know of the rollback may use the store.
func Accept(
	ctx context.Context, store binding.Ledger, token Token, o AcceptOptions,
) (*binding.Missing, *binding.Accepted, error) {
	reason, err := strict.Reason(o.Reason)
	if err != nil {
		return nil, nil, err
	}
	mark, all, err := readMarks(ctx, token)
	if err != nil {
		return nil, nil, err
	}
	_, behind := store.Check(ctx, mark)
	if behind != nil && !errors.Is(behind, binding.ErrRolledBack) {
		return nil, nil, behind
	}
	_, damaged := store.VerifyLedger(ctx)
	if damaged != nil && !errors.Is(damaged, binding.ErrRolledBack) {
		return nil, nil, damaged
	}
	heads, err := store.Heads(ctx)
	if err != nil {
		return nil, nil, err
	}
	copied, err := readAuditLogs(o.AuditLogs, heads)
	if err != nil {
		return nil, nil, err
	}
	missing, err := store.Missing(ctx, mark, copied)
	// The mark of a token that was in a safe is old: then only the audit log shows that the ledger is behind.
	if err == nil && behind == nil && damaged == nil && len(missing.Lines) == 0 {
		err = errors.New("the ledger is whole, and neither behind its mark nor behind an audit log: there is nothing " +
			"to accept")
	}
	if err == nil {
		err = o.Agreed(missing)
	}
	if err != nil {
		return nil, nil, err
	}
	accepted, err := store.Accept(ctx, mark, binding.Acceptance{Reason: reason, Missing: missing,
		RevokeUnknown: o.RevokeUnknown})
	if err == nil {
		err = set(ctx, token, accepted.Mark, all)
	}
	return missing, accepted, err
}

// How often a service compares the ledger with its mark, sets the mark at most, and reads the whole ledger.
const (
	lookEvery = time.Second
	markEvery = time.Second
	readEvery = 10 * time.Minute
)

// Keep is for a service: until the context ends it raises the mark soon after the ledger has grown, compares the heads
// of its chains every second, and reads all of its entries again and again. Errors are logged. While the ledger is
// rolled back, the Store itself refuses; accepted is called when that is over, and whenever a ledger was accepted.
func Keep(ctx context.Context, store binding.Ledger, token Token, accepted func(), log *slog.Logger) {
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	say := sayer(ctx, log)
	read := make(chan struct{}, 1)
	var reading sync.WaitGroup
	defer reading.Wait()
	reads, stop := context.WithCancel(ctx)
	defer stop() // a panic does not wait for the next reading
	reading.Go(func() { keepReading(reads, store, read, log) })
	// behind stays true until the ledger was compared with the token's mark again: this process may have seen no later
	// entry itself.
	behind := Check(ctx, store, token) != nil
	moved, failed := store.Moved(), false
	var rested <-chan time.Time
	raise := func() {
		err := Raise(ctx, store, token)
		say("raising the high-water mark", err)
		moved, failed, rested = nil, err != nil, time.After(markEvery)
	}
	for {
		select {
		case <-ctx.Done():
			// The last entries must not wait for the next start.
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			if err := Raise(last, store, token); err != nil {
				log.Warn("the high-water mark was not raised at the end", "cause", err.Error())
			}
			return
		case <-look.C:
			var err error
			if !behind {
				// The mark also has what other instances have seen: this one may have been given a copy of their
				// database. Without it, what this process has seen is left to compare with.
				mark, _ := Read(ctx, token)
				mark = cmp.Or(mark, new(binding.Mark))
				// A ledger may be accepted before this process has seen that it was rolled back.
				if behind = mark.Epoch > store.Seen().Epoch; !behind {
					_, err = store.Check(ctx, mark)
					behind = errors.Is(err, binding.ErrRolledBack)
				}
			}
			if behind { // by now it may be accepted, or the right database is back
				say("raising the high-water mark", Raise(ctx, store, token))
				if err = Check(ctx, store, token); err == nil {
					behind = false
					select {
					case read <- struct{}{}:
					default:
					}
					accepted()
				}
			}
			say("comparing the ledger with its high-water mark", err)
		case <-moved:
			raise()
		case <-rested:
			if moved, rested = store.Moved(), nil; failed {
				raise()
			}
		}
	}
}

// keepReading reads the ledger at once, whenever it is told to, and ten minutes after each reading. That takes long if
// there are many entries, and nothing waits for it.
func keepReading(ctx context.Context, store binding.Ledger, read <-chan struct{}, log *slog.Logger) {
	say := sayer(ctx, log)
	for {
		err := func() (err error) {
			defer panics.Recover(&err)
			_, err = store.VerifyLedger(ctx)
			return err
		}()
		say("reading the ledger", err)
		select {
		case <-ctx.Done():
			return
		case <-read:
		case <-time.After(readEvery):
		}
	}
}

// sayer logs the result of a repeated operation whenever it differs from the last one.
func sayer(ctx context.Context, log *slog.Logger) func(what string, err error) {
	said := map[string]string{}
	return func(what string, err error) {
		now := ""
		if err != nil {
			now = err.Error()
		}
		switch {
		case now == said[what] || ctx.Err() != nil:
		case err != nil:
			log.ErrorContext(ctx, what+" failed", "cause", now)
		default:
			log.InfoContext(ctx, what+" succeeded again")
		}
		said[what] = now
	}
}
