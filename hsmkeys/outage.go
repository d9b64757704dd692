package hsmkeys

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/internal/panics"
)

// ErrUnavailable: the token is away. It is opened again as soon as it can be.
var ErrUnavailable = errors.New("the token is not available")

// errGone goes with an error that may mean anything: the token opens no session any more.
var errGone = errors.New("and no session can be opened")

// A class says what an error of the token means for the next call.
type class int

const (
	classPermanent class = iota // the call is wrong, or the token cannot do it: the next one may be right
	classTransient              // the token is short of something: the same call may work later
	classSession                // the session has ended: the same call on another one may work now
	classSuspect                // something is wrong, maybe with the token
	classDevice                 // the token has gone, or forgotten who we are: nothing works until it is opened again
)

func classify(err error) class {
	switch {
	case err == nil, errors.Is(err, ErrUnavailable):
		return classPermanent
	case errors.Is(err, errGone):
		return classDevice
	case isCKR(err, pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED):
		return classSession
	case isCKR(err, pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_TOKEN_NOT_RECOGNIZED,
		pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED, pkcs11.CKR_SLOT_ID_INVALID,
		// What a token says that was away, and has come back: the login is gone, and with it all handles.
		pkcs11.CKR_USER_NOT_LOGGED_IN, pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_OBJECT_HANDLE_INVALID,
		pkcs11.CKR_WRAPPING_KEY_HANDLE_INVALID, pkcs11.CKR_UNWRAPPING_KEY_HANDLE_INVALID):
		return classDevice
	case isCKR(err, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED): // SoftHSM says the first of a damaged wrapped key, others when they are gone
		return classSuspect
	case isCKR(err, pkcs11.CKR_HOST_MEMORY, pkcs11.CKR_DEVICE_MEMORY, pkcs11.CKR_SESSION_COUNT, pkcs11.CKR_FUNCTION_CANCELED):
		return classTransient
	}
	return classPermanent
}

// hangTimeout is after how long a call is given up. The slowest of ours makes an RSA-4096 key pair.
const hangTimeout = 2 * time.Minute

// Backoff of opening a token again. Coming back is noticed within the larger one.
const (
	firstPause = 50 * time.Millisecond
	lastPause  = time.Second
)

// A latch says at once that the token is away, to those who wait for a session too.
type latch struct {
	mu     sync.Mutex
	cause  error         // nil while the token is there; guarded by mu
	closed chan struct{} // closed while it is not; another one each time; guarded by mu
}

func newLatch() *latch { return &latch{closed: make(chan struct{})} }

// state gives the channel that tells when there is an error to answer, and that error if there is one.
func (l *latch) state() (<-chan struct{}, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closed, l.cause
}

// close says whether it was open.
func (l *latch) close(cause error) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	was := l.cause == nil
	l.cause = fmt.Errorf("%w: %v", ErrUnavailable, cause)
	if was {
		close(l.closed)
	}
	return was
}

func (l *latch) open() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cause, l.closed = nil, make(chan struct{})
}

// Health is how a token is doing.
type Health struct {
	Cause    error // why it is away; nil if it is not
	Hung     int64 // calls that were given up and have not come back
	Reopened int64 // how often it was opened again
	Panics   int64 // calls, and attempts to open it again, that a panic ended
}

// Health may be asked at any time.
func (t *Token) Health() Health {
	_, cause := t.latch.state()
	return Health{cause, t.hung.Load(), t.reopened.Load(), t.panics.Load()}
}

// SetHangTimeout changes after how long a call is given up, for who makes no keys. It is for the time before the first call.
func (t *Token) SetHangTimeout(d time.Duration) { t.hangAfter = d }

// An Observer is told of the operations of a token, by many goroutines at once.
type Observer interface {
	// Waited is told how long an operation waited for a session, whether it got one or not.
	Waited(d time.Duration)
	// Worked is told how long an operation then took in the token, without the wait, and how it ended. One that is done
	// again, since its session had ended, is told of twice.
	Worked(operation string, took time.Duration, err error)
}

// Observe has operations reported. It is for the time before the first call.
func (t *Token) Observe(o Observer) { t.observer = o }

// noPanic runs f. A panic in it becomes its error, a *panics.Error, is counted, and is logged here, since an error
// may have nobody to go to.
func noPanic[T any](t *Token, f func() (T, error)) (v T, err error) {
	defer func() {
		if p := recover(); p != nil {
			t.panics.Add(1)
			stack := debug.Stack()
			slog.Error("panic", "token", t.String(), "cause", fmt.Sprint(p), "stack", string(stack))
			err = &panics.Error{Value: p, Stack: stack}
		}
	}()
	return f()
}

// within runs f, and returns its result, or gives it up after d: then f goes on, and its result goes to nobody; a
// secret is wiped. ended is called when f has, and told whether anybody waited for it.
func within[T any](t *Token, d time.Duration, f func() (T, error), ended func(bool)) (v T, gaveUp bool, err error) {
	type result struct {
		v   T
		err error
	}
	var over atomic.Bool // f has ended, or was given up: whichever was first
	done := make(chan result, 1)
	t.onWorker(func() {
		v, err := noPanic(t, f)
		waited := over.CompareAndSwap(false, true)
		if secret, ok := any(v).(interface{ Wipe() }); ok && !waited {
			secret.Wipe()
		}
		ended(waited)
		if !waited {
			t.hung.Add(-1) // only now is nothing of it in the module any more
			return
		}
		done <- result{v, err}
	})
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case r := <-done:
		return r.v, false, r.err
	case <-timer.C:
		t.hung.Add(1) // before f can see that it was given up: it takes this one off, and no other's
		if !over.CompareAndSwap(false, true) {
			t.hung.Add(-1)
			r := <-done
			return r.v, false, r.err
		}
		return v, true, fmt.Errorf("%w: it does not answer", ErrUnavailable)
	}
}

// onWorker runs f on a goroutine that has run another before, if one is free: its stack is as large already as calls of the token need it, and
// growing it takes as long as some of them.
func (t *Token) onWorker(f func()) {
	select {
	case t.work <- f:
	default:
		go func() {
			for {
				f()
				select {
				case f = <-t.work:
				case <-t.closing:
					return
				}
			}
		}()
	}
}

// inToken runs f on s, or on a new session. When it gives f up, or f fails in the token or by a panic, the session is
// replaced.
func inToken[T any](t *Token, s *session, operation string, f func(*session) (T, error)) (T, error) {
	v, gaveUp, err := within(t, t.hangAfter, func() (v T, err error) {
		sound := false
		defer func() {
			if old := s; old != nil && !sound {
				s = nil
				old.CloseSession(old.h)
			}
		}()
		if s == nil {
			s, err = t.openSession()
		}
		if err == nil {
			v, err = f(s)
			// A failed call may leave an operation active in the session; a fresh one cannot have that.
			sound = !errors.As(err, new(pkcs11.Error))
		}
		if classify(err) == classSuspect {
			if fresh, serr := t.openSession(); serr != nil {
				err = fmt.Errorf("%w, %w", err, errGone)
			} else {
				fresh.CloseSession(fresh.h)
			}
		}
		return v, err
	}, func(waited bool) {
		switch {
		case waited:
			t.idle <- s
		case s != nil: // its place was given to another
			s.CloseSession(s.h)
		}
	})
	if gaveUp {
		t.lose(fmt.Errorf("a call does not come back (%s)", operation))
		t.idle <- nil
	}
	return v, err
}

// lose closes the latch, and begins to open the token again.
func (t *Token) lose(cause error) {
	if t.latch.close(cause) {
		t.recovering.Go(t.recover)
	}
}

// recover opens the token again, as often as it takes. It gives up when the PIN is refused: a second wrong one may lock the token.
func (t *Token) recover() {
	pause := firstPause
	if time.Since(t.lastReopened) < 5*time.Second { // what brings it down again at once does not keep it busy
		pause = lastPause
	}
	for {
		select {
		case <-t.closing:
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, lastPause)
		pin, err := ReadPIN(t.pin)
		if err == nil {
			t.reopening.Lock()
			err = t.reopen(pin)
			t.reopening.Unlock()
		}
		if err == nil {
			t.lastReopened = time.Now()
			t.reopened.Add(1)
			t.latch.open()
			return
		}
		t.latch.close(err)
		if isCKR(err, pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE, pkcs11.CKR_PIN_LOCKED, pkcs11.CKR_PIN_EXPIRED) {
			return
		}
	}
}

// reopen takes the module through C_Finalize and C_Initialize, and logs in again; when that fails, the token is
// lost. Calls wait for it; none is under way, since it holds all entries of idle. The caller holds reopening: two
// at once would each hold half of the entries and wait for the other's.
func (t *Token) reopen(pin PIN) error {
	taken := 0
	defer func() {
		for range taken {
			t.idle <- nil
		}
	}()
	_, err := noPanic(t, func() (struct{}, error) {
		for taken < cap(t.idle) {
			s := <-t.idle
			taken++
			if s != nil {
				s.CloseSession(s.h)
			}
		}
		return struct{}{}, t.initializeAgain(pin)
	})
	if err != nil {
		t.lose(err) // before anybody gets a session
	}
	return err
}

// initializeAgain is the part of reopen in the module. While a call hangs there, C_Finalize must not be: then it
// tries whether a new session works.
func (t *Token) initializeAgain(pin PIN) error {
	t.forget() // handles end with the login
	if t.hung.Load() > 0 {
		return t.tryBeside(pin)
	}
	t.release() // ends what is left of the sessions, and the module, unless another Token of the process uses it
	if err := t.acquire(); err != nil {
		return fmt.Errorf("the PKCS #11 module cannot be initialised again: %w", err)
	}
	slot, info, err := t.findSlot(t.uri)
	if err != nil {
		return err
	}
	if info.SerialNumber != t.info.SerialNumber {
		return fmt.Errorf("another token has come in the place of %s", t)
	}
	t.slot = slot
	return explainIf("log in again to "+t.String(), t.login(pkcs11.CKU_USER, pin))
}

// tryBeside says whether the token answers beside the calls that hang in it. As many as there are sessions may; then it does not try, until one
// comes back.
func (t *Token) tryBeside(pin PIN) error {
	if t.hung.Load() >= int64(cap(t.idle)) {
		return fmt.Errorf("%d calls do not come back", t.hung.Load())
	}
	login := func() (*session, error) { return t.logIn(pkcs11.CKU_USER, pin) }
	s, _, err := within(t, min(t.hangAfter, time.Second), login, func(bool) {})
	if err != nil {
		return explain("log in again to "+t.String(), err)
	}
	if t.held != nil {
		t.held.CloseSession(t.held.h)
	}
	t.held = s
	return nil
}

// do runs f on a session of the pool, and gives its result. operation says to observers what f is. f may go on
// after do has returned, when it was given up: nothing comes out of it but its result. A session that has ended is
// replaced, and f run once more: whatever f makes for good, it first looks for. So it is, a few times, where a key is
// missing in SoftHSM: while one thread reads what another process has just made, the others do not see it yet (2.6.1).
func do[T any](ctx context.Context, t *Token, operation string, f func(*session) (T, error)) (T, error) {
	v, err := run(ctx, t, operation, f)
	if classify(err) == classSession {
		v, err = run(ctx, t, operation, f)
	}
	for pause := 10 * time.Millisecond; errors.Is(err, ErrNoKey) && t.isSoftHSM() && pause < time.Second/2; pause *= 2 {
		select {
		case <-time.After(pause):
			v, err = run(ctx, t, operation, f)
		case <-ctx.Done():
			return v, err
		}
	}
	if c := classify(err); c == classSession || c == classDevice {
		t.lose(err)
	}
	t.renew()
	return v, err
}

// with is do for what has no result.
func (t *Token) with(ctx context.Context, operation string, f func(*session) error) error {
	_, err := do(ctx, t, operation, func(s *session) (struct{}, error) { return struct{}{}, f(s) })
	return err
}

// renew initialises the module anew when that is due. Calls wait for it, but not the one that began it, whose work is
// done.
func (t *Token) renew() {
	if after := t.renewAfter.Load(); after == 0 || t.uses.Add(1)%after != 0 || !t.reopening.TryLock() {
		return
	}
	t.recovering.Go(func() {
		defer t.reopening.Unlock()
		// A PIN that cannot be read any more is no reason to stop.
		if pin, err := ReadPIN(t.pin); err == nil {
			t.reopen(pin) // it says itself that the token is lost
		}
	})
}

func run[T any](ctx context.Context, t *Token, operation string, f func(*session) (T, error)) (v T, err error) {
	s, err := t.take(ctx)
	if err != nil {
		return v, err
	}
	if t.observer != nil {
		defer func(start time.Time) { t.observer.Worked(operation, time.Since(start), err) }(time.Now())
	}
	return inToken(t, s, operation, f)
}

// take waits for an entry of idle.
func (t *Token) take(ctx context.Context) (s *session, err error) {
	lost, cause := t.latch.state()
	if cause != nil {
		return nil, cause
	}
	if t.observer != nil {
		defer func(start time.Time) { t.observer.Waited(time.Since(start)) }(time.Now())
	}
	select {
	case s = <-t.idle:
	case <-lost:
		_, cause := t.latch.state()
		if cause == nil { // it is back already
			cause = ErrUnavailable
		}
		return nil, cause
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	// Select picks at random: nothing is spent on a caller that has gone, or on a token that has.
	if _, cause := t.latch.state(); cause != nil || ctx.Err() != nil {
		t.idle <- s
		return nil, errors.Join(cause, ctx.Err())
	}
	return s, nil
}
