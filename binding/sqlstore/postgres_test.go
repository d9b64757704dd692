package sqlstore

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/storetest"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/kme"
)

func TestPostgresContract(t *testing.T) {
	server := pgtest.Start(t)
	storetest.Run(t, func(t *testing.T) storetest.Store { return openPG(t, server.Database(t)) })
}

func openPG(t *testing.T, url string) *Store {
	t.Helper()
	s, err := Open(t.Context(), url, rowKey)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// What pg_dump and pg_restore bring to another database is whole, and serves by the role of the service.
func TestPostgresDumped(t *testing.T) {
	ctx, server := t.Context(), pgtest.Start(t)
	server.Exec(t, "CREATE ROLE service LOGIN")
	owner := server.Database(t)
	done(t, Upgrade(ctx, owner, "service"))
	h := &history{t: t, s: openPG(t, server.As(t, owner, "service"))}
	h.bind(stays, stays)
	had := must(h.s.Heads(ctx))
	owner = server.Dumped(t, owner)
	done(t, Upgrade(ctx, owner, "service"))
	h.s = openPG(t, server.As(t, owner, "service"))
	must(h.s.Check(ctx, had))
	for _, d := range must(h.s.Verify(ctx, func(int, int) {})).Damaged {
		t.Errorf("damaged: %v", d)
	}
	if b := must(h.s.Subscription(ctx, imsiNo(t, stays), t0)).Standing(); b == nil || b.State != binding.Active {
		t.Errorf("what was bound is %+v", b)
	}
	if warnings := must(h.s.Warnings(ctx)); len(warnings) > 0 {
		t.Errorf("%q", warnings)
	}
	h.bind(later, later)
}

// Several instances on one PostgreSQL: what is allowed once is allowed to one of them.
func TestPostgresInstances(t *testing.T) {
	server := pgtest.Start(t)
	url := server.Database(t)
	var stores []*Store
	for range 3 {
		stores = append(stores, openPG(t, url))
	}
	for round := range 20 {
		one, two := newBinding(t, fmt.Sprintf("0010100000%05d", round), fmt.Sprint("a", round)), newBinding(t,
			fmt.Sprintf("0010100001%05d", round), fmt.Sprint("b", round))
		beginAttempt(t, stores[0], one)
		beginAttempt(t, stores[1], two)
		var all sync.WaitGroup
		var won, lost atomic.Int64
		for i := range 12 {
			b := []*binding.Binding{one, two}[i/3%2]
			all.Go(func() {
				// The same KME of the same device, by two subscriptions and three instances.
				switch err := stores[i%3].Establish(t.Context(), b, []byte{byte(round)}, true, t0); {
				case err == nil:
					won.Add(1)
				case err == binding.ErrUsed || err == binding.ErrNoAttempt: // as they are, not as the database's
					lost.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		all.Wait()
		if won.Load() != 1 || lost.Load() != 11 {
			t.Fatalf("round %d: %d won, %d lost", round, won.Load(), lost.Load())
		}
	}
	if n, err := stores[0].VerifyLedger(t.Context()); err != nil || n != 20 {
		t.Errorf("the ledger has %d entries, want 20: %v", n, err)
	}
}

// What was confirmed is there after PostgreSQL was killed, and a store that was open goes on.
func TestPostgresKilled(t *testing.T) {
	server := pgtest.Start(t)
	s := openPG(t, server.Database(t))
	var confirmed []*binding.Binding
	for round := range 3 {
		stop := make(chan struct{})
		var all sync.WaitGroup
		var mu sync.Mutex
		for i := range 8 {
			all.Go(func() {
				for n := 0; ; n++ {
					select {
					case <-stop:
						return
					default:
					}
					b := newBinding(t, fmt.Sprintf("00101%d%d%08d", round, i, n),
						fmt.Sprint("a", round, "-", i, "-", n))
					tag := []byte(b.AttemptID)
					d, err := s.Prepare(t.Context(), request(b))
					if err == nil {
						b.AttemptID = d.Attempt.ID
						err = s.Establish(t.Context(), b, tag, true, t0)
					}
					if err != nil { // it is away
						time.Sleep(time.Millisecond)
						continue
					}
					mu.Lock()
					confirmed = append(confirmed, b)
					mu.Unlock()
				}
			})
		}
		enough := func() bool {
			mu.Lock()
			defer mu.Unlock()
			return len(confirmed) >= 40*(round+1)
		}
		for !enough() {
			time.Sleep(time.Millisecond)
		}
		server.Kill(t)
		close(stop)
		all.Wait()
		server.Run(t)
		for range 64 { // each connection that was open says once that it is not any more
			if _, err := s.Subscription(t.Context(), imsi(t, "001010000000001"), t0); err == nil {
				time.Sleep(time.Millisecond)
			}
		}
		for _, b := range confirmed {
			checkBinding(t, s, b)
		}
	}
}

// Everything moves from one kind of store to the other and back.
func TestPostgresCopy(t *testing.T) {
	server := pgtest.Start(t)
	from, through, back := open(t, path(t)), openPG(t, server.Database(t)), open(t, path(t))
	var all []*binding.Binding
	for n := range 50 {
		b := newBinding(t, fmt.Sprintf("0010100000%05d", n), fmt.Sprint("a", n))
		beginAttempt(t, from, b)
		if err := from.Establish(t.Context(), b, []byte{byte(n), 0, 0xff}, true, t0); err != nil {
			t.Fatal(err)
		}
		all = append(all, b)
	}
	waiting := newBinding(t, "001019999999999", "waits")
	beginAttempt(t, from, waiting)
	if err := from.OpenAttempt(t.Context(), binding.Attempt{ID: "opened", IMSI: all[0].IMSI, Expires: t0.Add(time.Hour),
		Opened: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := from.Revoke(t.Context(), all[1].IMSI, t0); err != nil {
		t.Fatal(err)
	}
	none := func(int) {}
	for i, step := range []struct{ from, to *Store }{{from, through}, {through, back}} {
		// The first copy has an entry of its own in its ledger.
		if rows, err := step.from.Copy(t.Context(), step.to, none); err != nil || rows != 154+i {
			t.Fatal(rows, err)
		}
		if _, err := step.from.Copy(t.Context(), step.to, none); !errors.Is(err, ErrNotEmpty) {
			t.Errorf("copied over what is there: %v", err)
		}
	}
	for n, b := range all[2:] {
		checkBinding(t, back, b)
		if n+2 < 10 {
			checkUsed(t, back, b, []byte{byte(n + 2), 0, 0xff})
		}
	}
	nobody := kme.Origin{}
	if sub, err := back.Subscription(t.Context(), all[1].IMSI, t0); err != nil ||
		sub.Latest().State != binding.Revoked {
		t.Errorf("%+v, %v", sub, err)
	}
	if sub, err := back.Subscription(t.Context(), all[0].IMSI, t0); err != nil ||
		sub.Attempt("opened", nobody) == nil ||
		!sub.Attempts[0].Opened {
		t.Errorf("%+v, %v", sub, err)
	}
	if _, err := back.Attempt(t.Context(), waiting.IMSI, nobody, waiting.AttemptID, t0); err != nil {
		t.Error(err)
	}
	if spent, err := back.Spent(t.Context(), all[0].IMSI, hsmkeys.RAND{}); err != nil || !spent {
		t.Errorf("a RAND that was sent in clear is not spent any more: %v", err)
	}
}

// checkUsed tries to establish the KME of a binding for somebody else.
func checkUsed(t *testing.T, s *Store, b *binding.Binding, tag []byte) {
	t.Helper()
	other := *b
	other.IMSI = imsi(t, "999999999999999")
	beginAttempt(t, s, &other)
	if err := s.Establish(t.Context(), &other, tag, true, t0); !errors.Is(err, binding.ErrUsed) {
		t.Errorf("the ledger has forgotten %s: %v", b.AttemptID, err)
	}
}

// A server that forgets what it has confirmed is not used, and no error has the password.
func TestPostgresRefused(t *testing.T) {
	server := pgtest.Start(t)
	url := server.Database(t)
	if _, err := Open(t.Context(), url+"&synchronous_commit=off", rowKey); err == nil ||
		!strings.Contains(err.Error(), "synchronous_commit") {
		t.Errorf("opened without synchronous commits: %v", err)
	}
	for _, name := range []string{"", "sqlite:", "mysql://x", "postgres://u:hunter2@127.0.0.1:1/x?connect_timeout=1",
		"postgres://u:hunter2@127.0.0.1:x/y"} {
		if s, err := Open(t.Context(), name, rowKey); err == nil {
			s.Close()
			t.Errorf("%q was opened", name)
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("the password is in %q", err)
		}
	}
}
