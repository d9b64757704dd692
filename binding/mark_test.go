package binding_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/mark"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// A markToken keeps marks as an HSM does.
type markToken struct {
	mu    sync.Mutex
	marks [][]byte
	read  int // how often
}

func (m *markToken) Marks(context.Context) ([][]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.read++
	return m.marks, nil
}

func (m *markToken) reads() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.read
}

func (m *markToken) SetMark(_ context.Context, mark []byte, _ [][]byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.marks = [][]byte{mark}
	return nil
}

// A service that starts with a database of before, or with a token that has no mark, serves nothing, however long it
// runs, until that is accepted.
func TestStartedWithAnEarlierDatabase(t *testing.T) {
	key, err := kme.NewSecret(make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	open := func(path string) *sqlstore.Store {
		s, err := sqlstore.Open(t.Context(), "sqlite:"+path, key)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	}
	note := func(s *sqlstore.Store) error { return s.Note(t.Context(), "TRIED", "s", "") }
	path := func() string { return filepath.Join(t.TempDir(), "keysvc.db") }
	later, token := open(path()), new(markToken)
	for range 2 {
		if err := note(later); err != nil {
			t.Fatal(err)
		}
	}
	if err := mark.Raise(t.Context(), later, token); err != nil {
		t.Fatal(err)
	}
	for name, token := range map[string]*markToken{"an earlier database": token,
		"a token without a mark": new(markToken)} {
		t.Run(name, func(t *testing.T) {
			earlier := path()
			if err := note(open(earlier)); err != nil {
				t.Fatal(err)
			}
			fresh := open(earlier)
			if err := mark.Check(t.Context(), fresh, token); !errors.Is(err, binding.ErrRolledBack) {
				t.Fatalf("at the start: %v", err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			accepted := make(chan struct{}, 1)
			go mark.Keep(ctx, fresh, token, func() { accepted <- struct{}{} }, slog.New(slog.DiscardHandler))
			looked := func() int {
				token.mu.Lock()
				defer token.mu.Unlock()
				return token.read
			}
			for began := looked(); looked() < began+4; time.Sleep(10 * time.Millisecond) { // it looks every second
				if err := note(fresh); !errors.Is(err, binding.ErrRolledBack) {
					t.Fatalf("it serves: %v", err)
				}
			}
			if _, _, err := mark.Accept(t.Context(), open(earlier), token, mark.AcceptOptions{Reason: "tried",
				Agreed: func(*binding.Missing) error { return nil }}); err != nil {
				t.Fatal(err)
			}
			<-accepted
			if err := note(fresh); err != nil {
				t.Errorf("after it was accepted: %v", err)
			}
		})
	}
}

// Of two instances with copies of one database, one refuses soon after the other one has written, also if it writes
// nothing itself: a binding that was revoked in one copy is not served from the other.
func TestForkedDatabase(t *testing.T) {
	ctx, key, token := t.Context(), kme.RandomSecret(), new(markToken)
	dirs := []string{t.TempDir(), filepath.Join(t.TempDir(), "copy")}
	open := func(dir string) *sqlstore.Store {
		return must[*sqlstore.Store](t)(sqlstore.Open(ctx, sqlstore.InFolder(dir), key))
	}
	note := func(s *sqlstore.Store) error { return s.Note(ctx, "TRIED", "s", "") }
	first := open(dirs[0])
	if err := errors.Join(note(first), mark.Raise(ctx, first, token), first.Close()); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(dirs[1], os.DirFS(dirs[0])); err != nil {
		t.Fatal(err)
	}
	stores := []*sqlstore.Store{open(dirs[0]), open(dirs[1])}
	for _, s := range stores {
		defer s.Close()
		if err := mark.Check(ctx, s, token); err != nil {
			t.Fatal(err)
		}
		kept, stop := context.WithCancel(ctx)
		defer stop()
		go mark.Keep(kept, s, token, func() {}, slog.New(slog.DiscardHandler))
	}
	if err := note(stores[0]); err != nil {
		t.Fatal(err)
	}
	testproc.Await(t, "the copy is refused", func() bool {
		_, err := stores[1].Subscription(ctx, newIMSI(), time.Now())
		return errors.Is(err, binding.ErrRolledBack)
	})
	if err := note(stores[0]); err != nil {
		t.Errorf("the database that goes on is refused, too: %v", err)
	}
}

// A service hears that the ledger was accepted, also if it has not seen that it was rolled back: its database was away
// until then.
func TestAcceptedUnseen(t *testing.T) {
	ctx, token := t.Context(), new(markToken)
	s := must[*sqlstore.Store](t)(sqlstore.Open(ctx, sqlstore.InFolder(t.TempDir()), kme.RandomSecret()))
	defer s.Close()
	if err := errors.Join(s.Note(ctx, "TRIED", "s", ""), mark.Raise(ctx, s, token)); err != nil {
		t.Fatal(err)
	}
	var accepted atomic.Int64
	kept, stop := context.WithCancel(ctx)
	defer stop()
	go mark.Keep(kept, s, token, func() { accepted.Add(1) }, slog.New(slog.DiscardHandler))
	testproc.Await(t, "it has begun", func() bool { return token.reads() > 3 })
	if n := accepted.Load(); n != 0 {
		t.Errorf("nothing was accepted, and it was told so %d times", n)
	}
	to := *s.Seen()
	to.Epoch++
	if err := mark.RaiseTo(ctx, token, &to); err != nil {
		t.Fatal(err)
	}
	testproc.Await(t, "the service is told", func() bool { return accepted.Load() > 0 })
	reads := token.reads()
	testproc.Await(t, "it looks again", func() bool { return token.reads() > reads+2 })
	if n := accepted.Load(); n != 1 {
		t.Errorf("it was told %d times", n)
	}
}

// noLedger is a ledger without entries, and brokenToken a token that panics.
type noLedger struct{ binding.Ledger }

func (noLedger) VerifyLedger(context.Context) (int, error) { return 0, nil }

type brokenToken struct{ markToken }

func (*brokenToken) Marks(context.Context) ([][]byte, error) { panic("in the token") }

// Whoever has begun Keep hears of its panic at once, and not only when the context ends.
func TestKeepPanics(t *testing.T) {
	ended := make(chan any, 1)
	go func() {
		defer func() { ended <- recover() }()
		mark.Keep(t.Context(), noLedger{}, new(brokenToken), func() {}, slog.New(slog.DiscardHandler))
	}()
	select {
	case p := <-ended:
		if p != "in the token" {
			t.Errorf("it ended with %v", p)
		}
	case <-time.After(testproc.Patience):
		t.Fatal("a panic is held up")
	}
}
