package faultmodule_test

import (
	"context"
	"crypto/rsa"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// newOperator opens a new token, with its keys, and says how long the opening took.
func newOperator(t *testing.T) (token *hsmkeys.OperatorToken, tok softhsmtest.Tok, opening time.Duration) {
	t.Helper()
	return newOperatorWith(t, hsmkeys.Options{})
}

// given is how long a token has for a call in a test of hangs, or more if its machine is slow.
const given = 300 * time.Millisecond

// impatient gives a call up if it hangs, and no other: each takes less than the opening of the token.
func impatient(opening time.Duration) hsmkeys.Options {
	return hsmkeys.Options{HangTimeout: max(given, 10*opening)}
}

// newOperatorWith is newOperator with options. If they have a HangTimeout, the token is impatient.
func newOperatorWith(
	t *testing.T, o hsmkeys.Options,
) (token *hsmkeys.OperatorToken, tok softhsmtest.Tok, opening time.Duration) {
	t.Helper()
	tok = softhsmtest.Operator(t)
	start := time.Now()
	made := must[*hsmkeys.OperatorToken](t)(hsmkeys.OpenOperator(t.Context(), faulty.URI(tok.URI), hsmkeys.Options{}))
	if o.HangTimeout > 0 {
		o.HangTimeout = impatient(time.Since(start)).HangTimeout
	}
	must[bool](t)(made.Dedicate(t.Context(), hsmkeys.Dedication{Side: hsmkeys.Operator}))
	must[bool](t)(made.EnsureStorageKey(t.Context()))
	must[bool](t)(made.EnsureLedgerKey(t.Context()))
	if err := made.Close(); err != nil {
		t.Fatal(err)
	}
	start = time.Now()
	token = openOperator(t, tok.URI, o)
	return token, tok, time.Since(start)
}

// newFactory opens a new token, with its signing key and the keys given, each enrolled for who receives it.
func newFactory(t *testing.T, keys map[hsmkeys.Key]*rsa.PublicKey) (*hsmkeys.FactoryToken, softhsmtest.Tok) {
	t.Helper()
	tok := softhsmtest.Token(t)
	token := must[*hsmkeys.FactoryToken](t)(hsmkeys.OpenFactory(t.Context(), faulty.URI(tok.URI), hsmkeys.Options{}))
	must[string](t)(first(factory.Init(t.Context(), token)))
	token.Close()
	for k, to := range keys {
		must[bool](t)(hsmkeys.EnrollKey(t.Context(), faulty.URI(tok.URI), hsmkeys.PIN(tok.SOPIN), k, to))
	}
	return openFactory(t, tok.URI, hsmkeys.Options{}), tok
}

// back waits until the token works again. It tries once a second at least, and then the token may take as long as
// to be opened.
func back(t *testing.T, token *hsmkeys.OperatorToken, tok softhsmtest.Tok, opening time.Duration) {
	t.Helper()
	const pause = 20 * time.Millisecond
	took := time.Duration(0) // by a clock that stands still when this process does
	for end := time.Now().Add(testproc.Patience); token.Ping(t.Context()) != nil; took += pause {
		if time.Now().After(end) {
			t.Fatalf("the token has not come back: %+v", token.Health())
		}
		time.Sleep(pause)
	}
	if took > 2*time.Second+10*opening { // other work may have begun since that was measured
		start := time.Now()
		openOperator(t, tok.URI, hsmkeys.Options{})
		opening = max(opening, time.Since(start))
	}
	if took > 2*time.Second+10*opening {
		t.Errorf("it was back after %s; to open it takes %s", took, opening)
	}
}

// Whatever a token says when it goes, calls are answered at once while it is away, none hangs, and it is back soon
// after its return, without anybody's help.
func TestOutage(t *testing.T) {
	token, tok, opening := newOperator(t)
	away := 1500 * time.Millisecond
	if os.Getenv("KMEHSM_SOAK") != "" {
		away = 10 * time.Second
	}
	for _, c := range []struct{ name, tell string }{
		{"removed", "* removed"},
		{"CKR_DEVICE_ERROR", "C_Sign 0x30"},
		{"CKR_TOKEN_NOT_PRESENT", "C_SignInit 0xe0"},
		{"CKR_SESSION_HANDLE_INVALID", "* 0xb3"},
		{"CKR_USER_NOT_LOGGED_IN", "C_SignInit 0x101"},
		{"CKR_CRYPTOKI_NOT_INITIALIZED", "* 0x190"},
		{"CKR_GENERAL_ERROR", "* 0x5"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var mu sync.Mutex
			var working, refused []time.Duration // guarded by mu; how long the calls take
			var worked atomic.Int64
			ctx, stop := context.WithCancel(t.Context())
			var load sync.WaitGroup
			for range 8 {
				load.Go(func() {
					for ctx.Err() == nil {
						start := time.Now()
						err := token.Ping(context.Background())
						took := time.Since(start)
						mu.Lock()
						if err == nil {
							working = append(working, took)
						} else if errors.Is(err, hsmkeys.ErrUnavailable) {
							refused = append(refused, took)
						}
						mu.Unlock()
						if err == nil {
							worked.Add(1)
						} else {
							time.Sleep(time.Millisecond)
						}
					}
				})
			}
			testproc.Await(t, "the load", func() bool { return worked.Load() > 1000 })
			faulty.Tell(t, c.tell)
			gone := time.Now()
			time.Sleep(away)
			faulty.Tell(t)
			back(t, token, tok, opening)
			outage := time.Since(gone)
			after := worked.Load()
			testproc.Await(t, "the load, after its return", func() bool { return worked.Load() > after })
			stop()
			load.Wait()
			slices.Sort(working)
			slices.Sort(refused)
			if len(refused) == 0 {
				t.Fatal("no call was refused while it was away")
			}
			most, worst, usual := refused[len(refused)*9/10], refused[len(refused)-1], working[len(working)/2]
			t.Logf("%d calls were refused: nine of ten within %s, the slowest after %s; one that works takes %s",
				len(refused), most, worst, usual)
			if most > 5*usual || worst > outage {
				t.Errorf("nine of ten refusals take %s and the slowest %s, a call that works %s; the outage took %s",
					most, worst, usual, outage)
			}
			if h := token.Health(); h.Cause != nil || h.Hung != 0 || h.Reinitialised == 0 {
				t.Errorf("%+v", h)
			}
		})
	}
}

// A call that hangs in the module is given up, and the process goes on; when it comes back, nothing is left of it.
func TestHang(t *testing.T) {
	token, tok, opening := newOperatorWith(t, hsmkeys.Options{HangTimeout: given})
	faulty.Tell(t, "C_Sign hang")
	var all sync.WaitGroup
	for range 2 * token.Sessions() {
		all.Go(func() {
			if err := token.Ping(t.Context()); !errors.Is(err, hsmkeys.ErrUnavailable) {
				t.Errorf("%v", err)
			}
		})
	}
	all.Wait()
	// Those that waited for a session are answered with the first that is given up.
	if h := token.Health(); h.Hung == 0 || h.Hung > int64(token.Sessions()) || h.Cause == nil {
		t.Errorf("%+v", h)
	}
	fastest := time.Hour // of some: other work meets one or another
	for range 10 {
		start := time.Now()
		if err := token.Ping(t.Context()); !errors.Is(err, hsmkeys.ErrUnavailable) {
			t.Errorf("%v", err)
		}
		fastest = min(fastest, time.Since(start))
	}
	if fastest >= given {
		t.Errorf("an answer takes %s while the token is away", fastest)
	}
	faulty.Tell(t)
	back(t, token, tok, opening)
	testproc.Await(t, "the end of the calls that hung", func() bool { return token.Health().Hung == 0 })
}

// One call that hangs takes its session with it, and nothing else.
func TestHangOfOne(t *testing.T) {
	token, tok, opening := newOperatorWith(t, hsmkeys.Options{HangTimeout: given})
	faulty.Tell(t, "C_Sign hang-once 1")
	if err := token.Ping(t.Context()); !errors.Is(err, hsmkeys.ErrUnavailable) {
		t.Errorf("%v", err)
	}
	back(t, token, tok, opening)
	if h := token.Health(); h.Hung != 1 {
		t.Errorf("%+v", h)
	}
	allWork(t, token)
	faulty.Tell(t)
	testproc.Await(t, "the end of the call that hung", func() bool { return token.Health().Hung == 0 })
}

// A login beside a call that hangs may hang, too: of that, no session is left, and the pool has all of its own.
func TestHangOfLogins(t *testing.T) {
	limits := "limits 8 65536"
	defer faulty.Tell(t)
	faulty.Tell(t, limits)
	token, tok, opening := newOperatorWith(t, hsmkeys.Options{HangTimeout: given})
	faulty.Tell(t, limits, "C_Sign hang-once 3", "C_Login hang")
	if err := token.Ping(t.Context()); !errors.Is(err, hsmkeys.ErrUnavailable) {
		t.Errorf("%v", err)
	}
	testproc.Await(t, "as many calls as there are sessions", func() bool {
		return token.Health().Hung == int64(token.Sessions())
	})
	faulty.Tell(t, limits)
	back(t, token, tok, opening)
	testproc.Await(t, "the end of the calls that hung", func() bool { return token.Health().Hung == 0 })
	// So that all sessions are needed at once.
	faulty.Tell(t, limits, "* delay 10000")
	allWork(t, token)
}

// allWork waits until calls work that come at once, more than there are sessions. On a busy machine, one may be given
// up that is slow.
func allWork(t *testing.T, token *hsmkeys.OperatorToken) {
	t.Helper()
	testproc.Await(t, "calls on all sessions", func() bool {
		var failed atomic.Bool
		var all sync.WaitGroup
		for range 2 * token.Sessions() {
			all.Go(func() {
				if token.Ping(t.Context()) != nil {
					failed.Store(true)
				}
			})
		}
		all.Wait()
		return !failed.Load()
	})
}

// A PIN that the token refuses is tried once, and never again: the token would lock. The token is back once its file
// has the right one.
func TestRefusedPIN(t *testing.T) {
	token, tok, _ := newOperator(t)
	good := must[[]byte](t)(os.ReadFile(tok.PINFile))
	if err := os.WriteFile(tok.PINFile, []byte("87654321"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := faulty.Counts()["C_Login"]
	faulty.Tell(t, "* removed")
	token.Ping(t.Context())
	faulty.Tell(t)
	testproc.Await(t, "C_Login", func() bool { return faulty.Counts()["C_Login"] > before })
	time.Sleep(3 * time.Second)
	if n := faulty.Counts()["C_Login"] - before; n != 1 {
		t.Errorf("C_Login was called %d times", n)
	}
	if err := token.Ping(t.Context()); !errors.Is(err, hsmkeys.ErrUnavailable) ||
		!strings.Contains(err.Error(), "PIN") {
		t.Errorf("%v", err)
	}
	if err := os.WriteFile(tok.PINFile, good, 0o600); err != nil {
		t.Fatal(err)
	}
	testproc.Await(t, "the right PIN", func() bool { return token.Ping(t.Context()) == nil })
	if n := faulty.Counts()["C_Login"] - before; n != 2 {
		t.Errorf("C_Login was called %d times", n)
	}
}
