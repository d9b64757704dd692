package sqlstore

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/mark"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/ledger"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// A commit that no standby has confirmed fails, and can be read all the same. A failover takes it away: nobody was told
// of it, and so nothing is rolled back.
func TestPostgresUnconfirmed(t *testing.T) {
	ctx, first, token := t.Context(), pgtest.Start(t), new(markToken)
	database := first.Database(t)
	second := first.Standby(t)
	s := openPG(t, pgtest.Either(t, database, first, second))
	done(t, s.Note(ctx, "TRIED", "s", "confirmed"))
	second.Kill(t)
	if err := s.Note(ctx, "TRIED", "s", "not confirmed"); err == nil {
		t.Fatal("a commit succeeds that no standby has")
	}
	testproc.Await(t, "what was not confirmed can be read", func() bool {
		detail, _, err := s.LastNote(ctx, "TRIED", "s")
		return err == nil && detail == "not confirmed"
	})
	// As mark.Keep and mark.KeepAuditLog do every second.
	must(s.Check(ctx, new(binding.Mark)))
	done(t, mark.Raise(ctx, s, token))
	if n := must(mark.Read(ctx, token)).Entries(); n != 1 {
		t.Errorf("the mark has %d entries: only one is confirmed", n)
	}
	if lines, err := s.Lines(ctx, new(binding.Mark), 10); err != nil || len(lines) != 1 {
		t.Errorf("%d lines of the audit log, %v: only one is confirmed", len(lines), err)
	}
	first.Kill(t)
	second.Run(t)
	second.Set(t, "synchronous_standby_names", "")
	second.Promote(t)
	testproc.Await(t, "the other server is found", func() bool {
		err := mark.Check(ctx, s, token)
		if errors.Is(err, binding.ErrRolledBack) {
			t.Fatal(err)
		}
		return err == nil
	})
	done(t, s.Note(ctx, "TRIED", "s", "confirmed again"))
}

// Whoever repeats a decision that has failed since no standby has confirmed it is not told that it stands already.
func TestPostgresDecidedAgain(t *testing.T) {
	ctx, server := t.Context(), pgtest.Start(t)
	s := openPG(t, server.Database(t))
	enter(t, s)
	maker := must(s.Manufacturers(ctx))[0].KeyID
	decisions := map[string]func() error{
		"a manufacturer distrusted": func() error {
			_, err := s.Decide(ctx, maker, "", registry.Verdict{Withdrawn: true, Reason: "stolen", Time: time.Now()},
				func([]*registry.Lot) error { return nil })
			return err
		},
		"a device listed": func() error {
			_, err := s.List(ctx, []binding.Listing{{Prefix: "35", Status: binding.Blacklisted, Reason: "x",
				Listed: t0}})
			return err
		},
		"a subscription revoked": func() error {
			_, err := s.Revoke(ctx, imsi(t, "001010000000001"), t0)
			return err
		},
	}
	b := newBinding(t, "001010000000001", "a")
	beginAttempt(t, s, b)
	done(t, s.Establish(ctx, b, []byte("tag"), true, t0))
	server.Set(t, "synchronous_standby_names", "nobody")
	for _, when := range []string{"", " again"} {
		var all sync.WaitGroup
		for what, decide := range decisions {
			all.Go(func() {
				if err := decide(); err == nil {
					t.Errorf("%s%s: it is told, and no standby has it", what, when)
				}
			})
		}
		all.Wait()
	}
	server.Set(t, "synchronous_standby_names", "")
	for what, decide := range decisions {
		if err := decide(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// A failover takes away what was read of the ledger before a commit confirmed it: that counts as not seen, or the next
// check would call the promoted server's ledger rolled back.
func TestPostgresReadBeforeFailover(t *testing.T) {
	ctx, first, token := t.Context(), pgtest.Start(t), new(markToken)
	database := first.Database(t)
	second := first.Standby(t)
	s := openPG(t, pgtest.Either(t, database, first, second))
	settles := 0
	s.chains = ledger.New(s.macs, s.read, func(ctx context.Context) error {
		if settles++; settles == 1 {
			second.Promote(t)
			first.Kill(t)
			testproc.Await(t, "the promoted server is found", func() bool { return s.settle(ctx) == nil })
		}
		return s.settle(ctx)
	})
	s.Ledger = s.chains.Ledger()
	done(t, s.Note(ctx, "TRIED", "s", "confirmed"))
	second.Set(t, "primary_conninfo", "")
	testproc.Await(t, "the standby is away", func() bool {
		return strings.Contains(strings.Join(must(s.Warnings(ctx)), ""), "and 0 of them are")
	})
	if err := s.Note(ctx, "TRIED", "s", "not confirmed"); err == nil {
		t.Fatal("a commit succeeds that no standby has")
	}
	testproc.Await(t, "what was not confirmed can be read", func() bool {
		detail, _, err := s.LastNote(ctx, "TRIED", "s")
		return err == nil && detail == "not confirmed"
	})
	if read := must(s.Check(ctx, new(binding.Mark))); read.Entries() != 2 || settles != 1 {
		t.Fatalf("%d entries were read, and settled %d times: want 2, once", read.Entries(), settles)
	}
	if n := s.Seen().Entries(); n != 1 {
		t.Errorf("%d entries were seen; one is left", n)
	}
	done(t, mark.Check(ctx, s, token))
	done(t, s.Note(ctx, "TRIED", "s", "confirmed again"))
}
