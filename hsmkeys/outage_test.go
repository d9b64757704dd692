package hsmkeys

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/internal/panics"
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
	eventually(t, "the token works", func() bool { return token.Ping(t.Context()) == nil })
	eventually(t, "every session is back in the pool", func() bool { return len(token.idle) == cap(token.idle) })
	if h := token.Health(); h.Hung != 0 || h.Cause != nil {
		t.Errorf("%+v", h)
	}
	var all sync.WaitGroup // all sessions at once
	for range 2 * token.Sessions() {
		all.Go(func() {
			if has, err := token.Has(t.Context(), Key{Role: RoleLot, Name: "never made"}); has || err != nil {
				t.Error(has, err)
			}
		})
	}
	all.Wait()
}

// logged has what this process logs in a buffer, for the rest of the test.
func logged(t *testing.T) *bytes.Buffer {
	t.Helper()
	b, old := new(bytes.Buffer), slog.Default()
	slog.SetDefault(slog.New(slog.NewJSONHandler(b, nil)))
	t.Cleanup(func() { slog.SetDefault(old) })
	return b
}

// A panic on a goroutine of ours ends its call and nothing else.
func TestPanic(t *testing.T) {
	token := newOperator(t)
	var unmade map[string]bool
	check := func(t *testing.T, err error) {
		t.Helper()
		if p := panics.Of(err); p == nil || !bytes.Contains(p.Stack, []byte("hsmkeys.")) {
			t.Errorf("%v", err)
		}
	}
	t.Run("in calls", func(t *testing.T) {
		log, before := logged(t), token.Health().Panics
		var mu sync.Mutex
		var used []pkcs11.SessionHandle
		var all sync.WaitGroup
		n := 3 * token.Sessions()
		for range n {
			all.Go(func() {
				check(t, token.with(t.Context(), "test", func(s *session) error {
					mu.Lock()
					used = append(used, s.h)
					mu.Unlock()
					if err := s.FindObjectsInit(s.h, nil); err != nil { // it would be active in the session
						return err
					}
					unmade["x"] = true
					return nil
				}))
			})
		}
		all.Wait()
		for _, h := range used {
			if _, err := token.module.GetSessionInfo(h); !isCKR(err, pkcs11.CKR_SESSION_HANDLE_INVALID) {
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
	t.Run("in the code of a method", func(t *testing.T) {
		importLot(t, token, testLot, must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048)))
		check(t, token.ProveLotKey(t.Context(), testLot, nil))
		checkWhole(t, token)
	})
	t.Run("in a call that was given up", func(t *testing.T) {
		log, before := logged(t), token.Health()
		release := giveUp(t, token, func() error { unmade["x"] = true; return nil })
		close(release)
		eventually(t, "nothing hangs", func() bool { return token.Health().Hung == 0 })
		checkWhole(t, token)
		if h := token.Health(); h.Panics != before.Panics+1 || !strings.Contains(log.String(), "nil map") {
			t.Errorf("%+v, before %+v; logged: %s", h, before, log)
		}
	})
	for name, begin := range map[string]func(){
		"while it is opened again": func() { token.lose(errors.New("pulled out")) },
		"while it is renewed": func() {
			token.renewAfter.Store(token.uses.Load() + 1)
			token.Ping(t.Context())
			token.renewAfter.Store(0)
		},
	} {
		t.Run(name, func(t *testing.T) {
			logged(t)
			before := token.Health()
			token.reopening.Lock()
			uri := token.uri
			token.uri = nil // to initialise the module takes it
			token.reopening.Unlock()
			begin()
			eventually(t, "a panic is why it is away", func() bool {
				h := token.Health()
				return h.Panics >= before.Panics+2 && h.Cause != nil && strings.Contains(h.Cause.Error(), "nil pointer")
			})
			if err := token.Ping(t.Context()); !errors.Is(err, ErrUnavailable) {
				t.Error(err)
			}
			token.reopening.Lock()
			token.uri = uri
			token.reopening.Unlock()
			checkWhole(t, token)
			if h := token.Health(); h.Reopened != before.Reopened+1 {
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
	token.SetHangTimeout(10 * time.Millisecond)
	defer token.SetHangTimeout(hangAfter)
	err := token.with(t.Context(), "test", func(*session) error { <-release; return after() })
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
	token := newOperator(t)
	wiped := func(s kme.Secret) bool { return len(bytes.Trim(s.Bytes(), "\x00")) == 0 }
	random := func(*session) (kme.Secret, error) { return kme.RandomSecret(), nil }
	if s, err := do(t.Context(), token, "test", random); err != nil || wiped(s) {
		t.Errorf("a result was wiped: %v", err)
	}
	secret, release := kme.RandomSecret(), make(chan struct{})
	token.SetHangTimeout(10 * time.Millisecond)
	late := func(*session) (kme.Secret, error) { <-release; return secret, nil }
	got, err := do(t.Context(), token, "test", late)
	if !errors.Is(err, ErrUnavailable) || got.Bytes() != nil {
		t.Errorf("%v, %v", got.Bytes() != nil, err)
	}
	close(release)
	eventually(t, "nothing hangs", func() bool { return token.Health().Hung == 0 })
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
	token := newOperator(t)
	o := &observed{worked: map[string][]time.Duration{}, failed: map[string]int{}}
	token.Observe(o)
	free := make(chan struct{})
	var taken, done sync.WaitGroup
	for range token.Sessions() {
		taken.Add(1)
		done.Go(func() {
			token.with(context.Background(), "hold", func(*session) error { taken.Done(); <-free; return nil })
		})
	}
	taken.Wait()
	const hold = time.Second
	ctx, cancel := context.WithTimeout(t.Context(), hold/2)
	defer cancel()
	if _, err := token.Has(ctx, storageKey); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	done.Go(func() {
		if err := token.Ping(context.Background()); err != nil {
			t.Error(err)
		}
	})
	eventually(t, "the ping waits", func() bool { return len(token.idle) == 0 })
	time.Sleep(hold)
	close(free)
	done.Wait()
	slices.Sort(o.waits)
	if n := token.Sessions() + 2; len(o.waits) != n || o.waits[n-1] < hold/2 || o.waits[n-2] < hold/2 {
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
	err := token.with(t.Context(), "fail", func(*session) error { return errors.New("no") })
	if err == nil || o.failed["fail"] != 1 || o.failed["ping"] != 0 {
		t.Errorf("failed: %v", o.failed)
	}
}

// A template with more attributes than C has room for is refused: cut short, it would make a key without the attributes
// that protect it.
func TestTemplateRoom(t *testing.T) {
	token := newOperator(t)
	_, sealed, err := token.sample(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	storage := token.mustFind(t, pkcs11.CKO_SECRET_KEY, storageKey)
	// fill repeats one attribute of a template until there are n.
	fill := func(a attributes, n int) attributes {
		for a = slices.Clone(a); len(a) < n; {
			a = append(a, a[len(a)-1])
		}
		return a
	}
	value := &pkcs11.Attribute{Type: pkcs11.CKA_VALUE, Value: make([]byte, 32)}
	for name, take := range map[string]func(*session, int) (pkcs11.ObjectHandle, error){
		"create": func(s *session, n int) (pkcs11.ObjectHandle, error) {
			return s.create(append(fill(sealable, n-1), value))
		},
		"unwrap": func(s *session, n int) (pkcs11.ObjectHandle, error) {
			return s.unwrap(pkcs11.CKM_AES_KEY_WRAP, storage, sealed[1:], fill(usable, n))
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, n := range []int{28, 32, 33, 1000} {
				before := countObjects(t, token, nil)
				err := token.with(t.Context(), "test", func(s *session) error {
					h, err := take(s, n)
					if err == nil {
						err = s.DestroyObject(s.h, h)
					} else if strings.Contains(err.Error(), "there is room for 32") {
						err = errRoom
					}
					return err
				})
				if (n > 32) != (err == errRoom) || n == 28 && err != nil { // of 32, SoftHSM wants some itself
					t.Errorf("%d attributes: %v", n, err)
				}
				if objects := countObjects(t, token, nil); objects != before {
					t.Errorf("%d attributes: %d objects, before %d", n, objects, before)
				}
			}
		})
	}
}

var errRoom = errors.New("refused for want of room")

// Whatever length a token says that a result has, it is taken, or refused.
func TestWritten(t *testing.T) {
	room := make([]byte, 32)
	for _, size := range []uint{0, 1, 32} {
		if b, err := written(room, size); err != nil || len(b) != int(size) {
			t.Errorf("%d: %d bytes, %v", size, len(b), err)
		}
	}
	for _, size := range []uint{33, 1 << 31, 1 << 63, pkcs11.CK_UNAVAILABLE_INFORMATION} {
		if b, err := written(room, size); err == nil {
			t.Errorf("%d: %d bytes", size, len(b))
		}
	}
}
