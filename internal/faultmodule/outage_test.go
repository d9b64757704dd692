package faultmodule_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
)

func newOperator(t *testing.T) (*hsmkeys.Token, softhsmtest.Tok) {
	t.Helper()
	tok := softhsmtest.Token(t)
	token := open(t, tok.URI)
	must[bool](t)(token.EnsureStorageKey(t.Context()))
	must[bool](t)(token.EnsureLedgerKey(t.Context()))
	return token, tok
}

// back waits until the token works again, and says how long that took.
func back(t *testing.T, token *hsmkeys.Token) time.Duration {
	t.Helper()
	start := time.Now()
	for token.Ping(t.Context()) != nil {
		if time.Since(start) > 10*time.Second {
			t.Fatalf("the token does not come back: %v", token.Health().Cause)
		}
		time.Sleep(time.Millisecond)
	}
	return time.Since(start)
}

// Whatever a token says when it goes, calls are answered at once while it is away, none hangs, and it is back within two seconds of its
// return, without anybody's help.
func TestOutage(t *testing.T) {
	token, _ := newOperator(t)
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
			var worst, slow, answered, worked atomic.Int64
			ctx, stop := context.WithCancel(t.Context())
			var load sync.WaitGroup
			for range 8 {
				load.Go(func() {
					for ctx.Err() == nil {
						start := time.Now()
						err := token.Ping(context.Background())
						if took := int64(time.Since(start)); errors.Is(err, hsmkeys.ErrUnavailable) {
							answered.Add(1)
							if took > int64(50*time.Millisecond) {
								slow.Add(1)
							}
							for old := worst.Load(); took > old && !worst.CompareAndSwap(old, took); old = worst.Load() {
							}
							time.Sleep(time.Millisecond)
						} else if err == nil {
							worked.Add(1)
						}
					}
				})
			}
			time.Sleep(100 * time.Millisecond)
			before := worked.Load()
			faulty.Tell(t, c.tell)
			time.Sleep(away)
			faulty.Tell(t)
			took := back(t, token)
			after := worked.Load()
			time.Sleep(100 * time.Millisecond)
			stop()
			load.Wait()
			if before == 0 || answered.Load() == 0 || worked.Load() == after {
				t.Errorf("worked %d times before, %d answers while it was away, %d after", before, answered.Load(), worked.Load()-after)
			}
			if 1000*slow.Load() > answered.Load() { // the machine is not ours alone
				t.Errorf("%d of %d answers took more than 50 ms, the slowest %s", slow.Load(), answered.Load(), time.Duration(worst.Load()))
			}
			if took > 2*time.Second {
				t.Errorf("it was back after %s", took)
			}
			if h := token.Health(); h.Cause != nil || h.Hung != 0 || h.Reopened == 0 {
				t.Errorf("%+v", h)
			}
			t.Logf("%d answers while it was away, the slowest after %s; back after %s", answered.Load(), time.Duration(worst.Load()).Round(time.Microsecond), took.Round(time.Millisecond))
		})
	}
}

// A call that hangs in the module is given up, and the process goes on; when it comes back, nothing is left of it.
func TestHang(t *testing.T) {
	token, _ := newOperator(t)
	token.SetHangTimeout(300 * time.Millisecond)
	faulty.Tell(t, "C_Sign hang")
	start := time.Now()
	var all sync.WaitGroup
	for range 2 * token.Sessions() {
		all.Go(func() {
			if err := token.Ping(t.Context()); !errors.Is(err, hsmkeys.ErrUnavailable) {
				t.Errorf("%v", err)
			}
		})
	}
	all.Wait()
	if took := time.Since(start); took > time.Second {
		t.Errorf("given up after %s", took)
	}
	if h := token.Health(); h.Hung == 0 || h.Cause == nil {
		t.Errorf("%+v", h)
	}
	start = time.Now()
	if err := token.Ping(t.Context()); !errors.Is(err, hsmkeys.ErrUnavailable) || time.Since(start) > 50*time.Millisecond {
		t.Errorf("%v after %s", err, time.Since(start))
	}
	faulty.Tell(t)
	if took := back(t, token); took > 2*time.Second {
		t.Errorf("back after %s", took)
	}
	for range 100 {
		if token.Health().Hung == 0 {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if h := token.Health(); h.Hung != 0 {
		t.Errorf("%+v", h)
	}
}

// One call that hangs takes its session with it, and nothing else.
func TestHangOfOne(t *testing.T) {
	token, _ := newOperator(t)
	token.SetHangTimeout(300 * time.Millisecond)
	faulty.Tell(t, "C_Sign hang-once 1")
	if err := token.Ping(t.Context()); !errors.Is(err, hsmkeys.ErrUnavailable) {
		t.Errorf("%v", err)
	}
	back(t, token)
	if h := token.Health(); h.Hung != 1 {
		t.Errorf("%+v", h)
	}
	var all sync.WaitGroup
	for range 2 * token.Sessions() {
		all.Go(func() {
			if err := token.Ping(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	faulty.Tell(t)
	for range 100 {
		if token.Health().Hung == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("%+v", token.Health())
}

// A PIN that the token refuses is tried once, and never again: the token would lock.
func TestRefusedPIN(t *testing.T) {
	token, tok := newOperator(t)
	good := must[[]byte](t)(os.ReadFile(tok.PINFile))
	if err := os.WriteFile(tok.PINFile, []byte("87654321"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := faulty.Counts()["C_Login"]
	faulty.Tell(t, "* removed")
	token.Ping(t.Context())
	faulty.Tell(t)
	time.Sleep(3 * time.Second)
	if n := faulty.Counts()["C_Login"] - before; n != 1 {
		t.Errorf("C_Login was called %d times", n)
	}
	if err := token.Ping(t.Context()); !errors.Is(err, hsmkeys.ErrUnavailable) || !strings.Contains(err.Error(), "PIN") {
		t.Errorf("%v", err)
	}
	if err := os.WriteFile(tok.PINFile, good, 0o600); err != nil {
		t.Fatal(err)
	}
}
