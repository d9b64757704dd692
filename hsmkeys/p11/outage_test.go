package p11

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// eventually waits until something holds, however slow the machine.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// checkWhole says whether a token works as before: no place of its pool is lost, none is doubled, and nothing hangs.
func checkWhole(t *testing.T, token *Token) {
	t.Helper()
	eventually(t, "the token works", func() bool { return ping(t.Context(), token) == nil })
	eventually(t, "every session is back in the pool", func() bool { return token.idle.free() == token.idle.size() })
	if h := token.Health(); h.Hung != 0 || h.Cause != nil {
		t.Errorf("%+v", h)
	}
	var all sync.WaitGroup // all sessions at once
	for range 2 * token.Sessions() {
		all.Go(func() {
			if n, err := find(t.Context(), token, "never made"); n != 0 || err != nil {
				t.Error(n, err)
			}
		})
	}
	all.Wait()
}

// A panic on a goroutine of ours ends its call and nothing else.
func TestPanic(t *testing.T) {
	token := openToken(t, softhsmtest.Operator(t), Options{})
	var unmade map[string]bool
	check := func(t *testing.T, err error) {
		t.Helper()
		if p := panics.Of(err); p == nil {
			t.Errorf("%v", err)
		}
	}
	t.Run("in calls", func(t *testing.T) {
		log, before := testproc.Logged(t), token.Health().Panics
		var mu sync.Mutex
		var used []pkcs11.SessionHandle
		var all sync.WaitGroup
		n := 3 * token.Sessions()
		for range n {
			all.Go(func() {
				check(t, token.With(t.Context(), "test", func(s *Session) error {
					mu.Lock()
					used = append(used, s.ID)
					mu.Unlock()
					if err := s.Ctx.FindObjectsInit(s.ID, nil); err != nil { // it would be active in the session
						return err
					}
					unmade["x"] = true
					return nil
				}))
			})
		}
		all.Wait()
		for _, h := range used {
			if _, err := token.module.GetSessionInfo(h); !ck.IsCKR(err, pkcs11.CKR_SESSION_HANDLE_INVALID) {
				t.Errorf("the session of a panic was not closed: %v", err)
			}
		}
		checkWhole(t, token)
		if got := token.Health().Panics - before; got != int64(n) {
			t.Errorf("%d panics counted of %d", got, n)
		}
		if strings.Count(log.String(), "nil map") < n || !strings.Contains(log.String(), "outage_test.go") {
			t.Errorf("logged: %s", log)
		}
	})
	t.Run("in a call that was given up", func(t *testing.T) {
		log, before := testproc.Logged(t), token.Health()
		release := giveUp(t, token, func() error { unmade["x"] = true; return nil })
		close(release)
		eventually(t, "nothing hangs", func() bool { return token.Health().Hung == 0 })
		checkWhole(t, token)
		if h := token.Health(); h.Panics != before.Panics+1 || !strings.Contains(log.String(), "nil map") {
			t.Errorf("%+v, before %+v; logged: %s", h, before, log)
		}
	})
	for name, begin := range map[string]func(){
		"while it is reinitialised": func() { token.lose(token.logins.Load(), errors.New("pulled out")) },
		"while it is renewed": func() {
			token.renewal.after.Store(token.renewal.uses.Load() + 1)
			ping(t.Context(), token)
			token.renewal.after.Store(0)
		},
	} {
		t.Run(name, func(t *testing.T) {
			testproc.Logged(t)
			before := token.Health()
			token.reinitialising.Lock()
			uri := token.uri
			token.uri = nil // to initialise the module takes it
			token.reinitialising.Unlock()
			begin()
			eventually(t, "a panic is why it is away", func() bool {
				h := token.Health()
				return h.Panics >= before.Panics+2 && h.Cause != nil && strings.Contains(h.Cause.Error(), "nil pointer")
			})
			if err := ping(t.Context(), token); !errors.Is(err, ErrUnavailable) {
				t.Error(err)
			}
			token.reinitialising.Lock()
			token.uri = uri
			token.reinitialising.Unlock()
			checkWhole(t, token)
			if h := token.Health(); h.Reinitialised != before.Reinitialised+1 {
				t.Errorf("%+v, before %+v", h, before)
			}
		})
	}
}

// giveUp has a call given up, which does after when the channel is closed.
func giveUp(t *testing.T, token *Token, after func() error) (release chan struct{}) {
	t.Helper()
	release = make(chan struct{})
	hangAfter := token.hangAfter
	token.hangAfter = time.Second // for the login, too, that is tried beside it
	defer func() { token.hangAfter = hangAfter }()
	err := token.With(t.Context(), "test", func(*Session) error { <-release; return after() })
	if !errors.Is(err, ErrUnavailable) {
		t.Fatal(err)
	}
	if n := token.Health().Hung; n != 1 {
		t.Fatalf("%d calls hang", n)
	}
	eventually(t, "the token is opened beside it", func() bool { return token.Health().Cause == nil })
	return release
}

// What a call that was given up brings in the end is wiped if it is a secret; one that somebody waits for is not.
func TestGivenUpSecret(t *testing.T) {
	token := openToken(t, softhsmtest.Operator(t), Options{})
	wiped := func(s kme.Secret) bool { return len(bytes.Trim(s.Bytes(), "\x00")) == 0 }
	random := func(*Session) (kme.Secret, error) { return kme.RandomSecret(), nil }
	if s, err := Do(t.Context(), token, "test", random); err != nil || wiped(s) {
		t.Errorf("a result was wiped: %v", err)
	}
	secret, release := kme.RandomSecret(), make(chan struct{})
	token.hangAfter = 10 * time.Millisecond
	late := func(*Session) (kme.Secret, error) { <-release; return secret, nil }
	got, err := Do(t.Context(), token, "test", late)
	if !errors.Is(err, ErrUnavailable) || got.Bytes() != nil {
		t.Errorf("%v, %v", got.Bytes() != nil, err)
	}
	close(release)
	// A login beside it may be given up, too, until it is opened again.
	eventually(t, "nothing hangs", func() bool { h := token.Health(); return h.Hung == 0 && h.Cause == nil })
	if !wiped(secret) {
		t.Error("the secret that nobody gets is still there")
	}
}

// An observed records what an Observer is told.
type observed struct {
	mu     sync.Mutex
	waits  []time.Duration
	worked map[string][]time.Duration
	failed map[string]int
}

func (o *observed) Waited(d time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.waits = append(o.waits, d)
}

func (o *observed) Worked(operation string, took time.Duration, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.worked[operation] = append(o.worked[operation], took)
	if err != nil {
		o.failed[operation]++
	}
}

// The wait for a session, and the time in the token, are two: an operation that waits long and works shortly has a long
// wait and a short work. One that never got a session has waited, and not worked.
func TestWaitAndWorkApart(t *testing.T) {
	o := &observed{worked: map[string][]time.Duration{}, failed: map[string]int{}}
	token := openToken(t, softhsmtest.Operator(t), Options{Observer: o})
	free := holdAll(token)
	const hold = 2 * time.Second
	ctx, cancel := context.WithTimeout(t.Context(), hold/2)
	defer cancel()
	if _, err := find(ctx, token, "anything"); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	var pinged sync.WaitGroup
	pinged.Go(func() {
		if err := ping(context.Background(), token); err != nil {
			t.Error(err)
		}
	})
	eventually(t, "the ping waits", func() bool { return token.idle.free() == 0 })
	time.Sleep(hold)
	free()
	pinged.Wait()
	slices.Sort(o.waits)
	// The time of the one in vain has begun before its wait.
	if n := token.Sessions() + 2; len(o.waits) != n || o.waits[n-1] < hold/2 || o.waits[n-2] < hold/4 {
		t.Errorf("waits: %v", o.waits)
	}
	if w := o.worked["ping"]; len(w) != 1 || w[0] >= o.waits[len(o.waits)-1] {
		t.Errorf("a ping that waited %v worked %v", o.waits[len(o.waits)-1], w)
	}
	if w := o.worked["hold"]; len(w) != token.Sessions() || slices.Min(w) < hold/2 {
		t.Errorf("work is not measured: %v", w)
	}
	if w := o.worked["look for a key"]; len(w) != 0 {
		t.Errorf("what never got a session worked %v", w)
	}
	err := token.With(t.Context(), "fail", func(*Session) error { return errors.New("no") })
	if err == nil || o.failed["fail"] != 1 || o.failed["ping"] != 0 {
		t.Errorf("failed: %v", o.failed)
	}
}

// A late is an Observer that holds up the callers of one operation when that has ended.
type late struct{ ended, release chan struct{} }

func (l *late) Waited(time.Duration) {}

func (l *late) Worked(operation string, _ time.Duration, _ error) {
	if operation == "late" {
		close(l.ended)
		<-l.release
	}
}

// A call that says late that the token was lost does not take it away again when it is back.
func TestLateLoss(t *testing.T) {
	l := &late{ended: make(chan struct{}), release: make(chan struct{})}
	token := openToken(t, softhsmtest.Operator(t), Options{Observer: l})
	gone := func(*Session) error { return pkcs11.Error(pkcs11.CKR_DEVICE_REMOVED) }
	var all sync.WaitGroup
	all.Go(func() { token.With(t.Context(), "late", gone) })
	<-l.ended
	token.With(t.Context(), "in time", gone)
	eventually(t, "it is back", func() bool { return token.Health().Cause == nil })
	close(l.release)
	all.Wait()
	if h := token.Health(); h.Cause != nil || h.Reinitialised != 1 {
		t.Errorf("%+v", h)
	}
}

// A token is opened again although who is told of that panics.
func TestPanicOfWhoIsTold(t *testing.T) {
	testproc.Logged(t)
	var broken atomic.Bool
	token := openToken(t, softhsmtest.Operator(t), Options{Changed: func(string, Health, Health) {
		if broken.Load() {
			panic("who is told")
		}
	}})
	before := panics.Count()
	broken.Store(true)
	token.lose(token.logins.Load(), errors.New("pulled out"))
	eventually(t, "all are counted", func() bool { return panics.Count() >= before+3 }) // open, half open, closed
	checkWhole(t, token)
}

// What changes of a token's health is told, in its order, and the last that is told is how it is.
func TestChangesAreTold(t *testing.T) {
	var mu sync.Mutex
	var states []State
	var hung []int64
	var last Health
	token := openToken(t, softhsmtest.Operator(t), Options{Changed: func(name string, was, is Health) {
		mu.Lock()
		defer mu.Unlock()
		if !strings.HasPrefix(name, "token ") || was != last {
			t.Errorf("%s was %+v, told before %+v", name, was, last)
		}
		if is.State != was.State {
			states = append(states, is.State)
		}
		if is.Hung != was.Hung {
			hung = append(hung, is.Hung)
		}
		last = is
	}})
	told := func(holds func() bool) func() bool {
		return func() bool {
			mu.Lock()
			defer mu.Unlock()
			return holds()
		}
	}
	release := giveUp(t, token, func() error { return nil })
	close(release)
	eventually(t, "the end of the call that hung is told", told(func() bool {
		return last.Hung == 0 && last.State == Closed
	}))
	mu.Lock()
	defer mu.Unlock()
	if n := len(states); states[0] != Open || states[1] != HalfOpen || states[n-1] != Closed ||
		last.Reinitialised != 1 {
		t.Errorf("states %v, and last %+v", states, last)
	}
	// More than one: a login beside it took longer than a second.
	if hung[0] != 1 || hung[len(hung)-1] != 0 || last != token.Health() {
		t.Errorf("hung %v, and last %+v", hung, last)
	}
}
