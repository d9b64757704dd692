package hsmkeys

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThalesGroup/crypto11"
	"github.com/miekg/pkcs11"
)

// ErrUnavailable: the token is away. It is opened again as soon as it can be.
var ErrUnavailable = errors.New("the token is not available")

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
}

// Health may be asked at any time.
func (t *Token) Health() Health {
	_, cause := t.latch.state()
	return Health{cause, t.hung.Load(), t.reopened.Load()}
}

// SetHangTimeout changes after how long a call is given up, for who makes no keys. It is for the time before the first call.
func (t *Token) SetHangTimeout(d time.Duration) { t.hangAfter = d }

// ObserveQueue has the wait of each call for a session reported. It is for the time before the first call.
func (t *Token) ObserveQueue(f func(time.Duration)) { t.queued = f }

// within runs f, and returns when it has, or after d: then f goes on, and nobody reads what it writes. ended is called when f has, and told whether
// anybody waited for it.
func (t *Token) within(d time.Duration, f func() error, ended func(waited bool)) (gaveUp bool, err error) {
	var over atomic.Bool // f has ended, or was given up: whichever was first
	done := make(chan error, 1)
	t.onWorker(func() {
		err := f()
		waited := over.CompareAndSwap(false, true)
		ended(waited)
		if !waited {
			t.hung.Add(-1) // only now is nothing of it in the module any more
		}
		done <- err
	})
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case err := <-done:
		return false, err
	case <-timer.C:
		if !over.CompareAndSwap(false, true) {
			return false, <-done
		}
		t.hung.Add(1)
		return true, fmt.Errorf("%w: it does not answer", ErrUnavailable)
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

// inToken runs f on s, or on a new session. When it gives f up, the session is replaced.
func (t *Token) inToken(s *session, f func(*session) error) error {
	gaveUp, err := t.within(t.hangAfter, func() (err error) {
		if s == nil {
			s, err = t.openSession()
		}
		if err == nil {
			err = f(s)
		}
		if s != nil && errors.As(err, new(pkcs11.Error)) {
			// A failed call may leave an operation active in the session; a fresh one cannot have that.
			s.CloseSession(s.h)
			s = nil
		}
		return err
	}, func(waited bool) {
		switch {
		case waited:
			t.idle <- s
		case s != nil: // its place was given to another
			s.CloseSession(s.h)
		}
	})
	if gaveUp {
		t.lose(errors.New("a call does not come back"))
		t.idle <- nil
	}
	return err
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
		pin, err := readPIN(t.pin)
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

// reopen takes the module through C_Finalize and C_Initialize, and logs in again. Calls wait for it; none is under way, since it
// holds all entries of idle. While a call hangs in the module, that must not be: then it tries whether a new session works. The caller holds
// reopening: two at once would each hold half of the entries and wait for the other's.
func (t *Token) reopen(pin string) error {
	for range cap(t.idle) {
		if s := <-t.idle; s != nil {
			s.CloseSession(s.h)
		}
	}
	defer func() {
		for range cap(t.idle) {
			t.idle <- nil
		}
	}()
	t.mu.Lock()
	clear(t.handles) // they end with the login
	t.mu.Unlock()
	if t.hung.Load() > 0 {
		return t.tryBeside(pin)
	}
	t.finalize()
	if t.signers != nil {
		t.signers.Close() // ends what is left of the sessions, and the module, unless another Token of the process uses it
		t.signers = nil
	}
	var err error
	if t.signers, err = crypto11.Configure(t.config); err != nil {
		t.signers = nil
		return fmt.Errorf("the PKCS #11 module cannot be initialised again: %w", err)
	}
	if err := t.initialize(); err != nil {
		return err
	}
	slot, info, err := t.findSlot(t.uri)
	if err != nil {
		return err
	}
	if info.SerialNumber != t.info.SerialNumber {
		return fmt.Errorf("another token has come in the place of %s", t)
	}
	t.slot = slot
	return t.loginAgain(pin)
}

func (t *Token) loginAgain(pin string) error {
	if err := t.login(pkcs11.CKU_USER, pin); err != nil && !isCKR(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN) {
		return explain("log in again to "+t.String(), err)
	}
	return nil
}

// tryBeside says whether the token answers beside the calls that hang in it. As many as there are sessions may; then it does not try, until one
// comes back.
func (t *Token) tryBeside(pin string) error {
	if t.hung.Load() >= int64(cap(t.idle)) {
		return fmt.Errorf("%d calls do not come back", t.hung.Load())
	}
	_, err := t.within(min(t.hangAfter, time.Second), func() error { return t.loginAgain(pin) }, func(bool) {})
	return err
}

// with runs f on a session of the pool. A session that has ended is replaced, and f run once more: whatever f makes for good, it first looks for.
func (t *Token) with(ctx context.Context, f func(*session) error) error {
	err := t.run(ctx, f)
	if classify(err) == classSession {
		err = t.run(ctx, f)
	}
	switch classify(err) {
	case classSession, classDevice:
		t.lose(err)
	case classSuspect:
		if s, serr := t.openSession(); serr != nil {
			t.lose(err)
		} else {
			s.CloseSession(s.h)
		}
	}
	if after := t.renewAfter.Load(); after > 0 && t.uses.Add(1)%after == 0 && t.reopening.TryLock() {
		// A PIN that cannot be read any more is no reason to stop.
		if pin, err := readPIN(t.pin); err == nil {
			if err := t.reopen(pin); err != nil {
				t.lose(err)
			}
		}
		t.reopening.Unlock()
	}
	return err
}

func (t *Token) run(ctx context.Context, f func(*session) error) error {
	lost, cause := t.latch.state()
	if cause != nil {
		return cause
	}
	var s *session
	start := time.Now()
	select {
	case s = <-t.idle:
		if t.queued != nil {
			t.queued(time.Since(start))
		}
	case <-lost:
		_, cause := t.latch.state()
		if cause == nil { // it is back already
			cause = ErrUnavailable
		}
		return cause
	case <-ctx.Done():
		return ctx.Err()
	}
	// Select picks at random: nothing is spent on a caller that has gone, or on a token that has.
	if _, cause := t.latch.state(); cause != nil || ctx.Err() != nil {
		t.idle <- s
		return errors.Join(cause, ctx.Err())
	}
	return t.inToken(s, f)
}
