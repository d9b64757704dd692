package p11

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/internal/panics"
)

// noPanic runs f. A panic in it becomes its error, a *panics.Error, is counted, and is logged here, since an error
// may have nobody to go to.
func noPanic[T any](t *Token, f func() (T, error)) (v T, err error) {
	defer func() {
		if p := recover(); p != nil {
			t.health.panics.Add(1)
			stack := debug.Stack()
			slog.Error("panic", "token", t.String(), "cause", fmt.Sprint(p), "stack", string(stack))
			err = &panics.Error{Value: p, Stack: stack}
			t.tell()
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
	t.workers.run(t.closing, func() {
		v, err := noPanic(t, f)
		waited := over.CompareAndSwap(false, true)
		if secret, ok := any(v).(interface{ Wipe() }); ok && !waited {
			secret.Wipe()
		}
		ended(waited)
		if !waited {
			t.health.hung.Add(-1) // only now is nothing of it in the module any more
			t.tell()
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
		t.health.hung.Add(1) // before f can see that it was given up: it takes this one off, and no other's
		if !over.CompareAndSwap(false, true) {
			t.health.hung.Add(-1)
			r := <-done
			return r.v, false, r.err
		}
		t.tell()
		return v, true, fmt.Errorf("%w: it does not answer", ErrUnavailable)
	}
}

// workers give work to those goroutines that wait for more.
type workers chan func()

// run runs f on a goroutine that has run another before, if one is free: its stack is as large already as calls of the
// token need it, and growing it takes as long as some of them. The goroutines end with closing.
func (w workers) run(closing <-chan struct{}, f func()) {
	select {
	case w <- f:
	default:
		go func() {
			for {
				f()
				select {
				case f = <-w:
				case <-closing:
					return
				}
			}
		}()
	}
}

// inToken runs f on s, or on a new session. When it gives f up, or f fails in the token or by a panic, the session is
// replaced.
func inToken[T any](t *Token, s *Session, operation string, f func(*Session) (T, error)) (T, error) {
	v, gaveUp, err := within(t, t.hangAfter, func() (v T, err error) {
		sound := false
		defer func() {
			if old := s; old != nil && !sound {
				s = nil
				old.Close()
			}
		}()
		if s == nil {
			s, err = t.OpenSession()
		}
		if err == nil {
			v, err = f(s)
			// A failed call may leave an operation active in the session; a fresh one cannot have that.
			sound = !errors.As(err, new(pkcs11.Error))
		}
		if classify(err) == suspect {
			if fresh, serr := t.OpenSession(); serr != nil {
				err = fmt.Errorf("%w, %w", err, errGone)
			} else {
				fresh.Close()
			}
		}
		return v, err
	}, func(waited bool) {
		switch {
		case waited:
			t.idle <- s
		case s != nil: // its place was given to another
			s.Close()
		}
	})
	if gaveUp {
		t.lose(fmt.Errorf("a call does not come back (%s)", operation))
		t.idle <- nil
	}
	return v, err
}

// Do runs f on a session of the pool, and gives its result. operation says to observers what f is. f may go on after Do
// has returned, when it was given up: nothing comes out of it but its result. A session that has ended is replaced, and
// f run once more: whatever f makes for good, it first looks for.
func Do[T any](ctx context.Context, t *Token, operation string, f func(*Session) (T, error)) (T, error) {
	v, err := run(ctx, t, operation, f)
	if classify(err) == sessionLost {
		v, err = run(ctx, t, operation, f)
	}
	if c := classify(err); c == sessionLost || c == deviceLost {
		t.lose(err)
	}
	t.renew()
	return v, err
}

// DoWithKey is Do for a key that must be there. Where it is missing in SoftHSM it is looked for again, for some 0.6 s:
// while one thread reads what another process has just made, the others do not see it yet (2.6.1).
func DoWithKey[T any](ctx context.Context, t *Token, operation string, f func(*Session) (T, error)) (v T, err error) {
	for pause := 10 * time.Millisecond; ; pause *= 2 {
		v, err = Do(ctx, t, operation, f)
		if !errors.Is(err, ErrNoKey) || !t.isSoftHSM() || pause > time.Second/2 {
			return v, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return v, err
		}
	}
}

// With is Do for what has no result.
func (t *Token) With(ctx context.Context, operation string, f func(*Session) error) error {
	_, err := Do(ctx, t, operation, func(s *Session) (struct{}, error) { return struct{}{}, f(s) })
	return err
}

// Once is With for what must not be done twice, and which says itself what a failure means.
func (t *Token) Once(ctx context.Context, operation string, f func(*Session) error) error {
	_, err := run(ctx, t, operation, func(s *Session) (struct{}, error) { return struct{}{}, f(s) })
	return err
}

// Beside runs f on a session of its own, beside the pool's. A panic in it becomes its error.
func (t *Token) Beside(f func(*Session) error) error {
	_, err := noPanic(t, func() (none struct{}, err error) {
		s, err := t.OpenSession()
		if err != nil {
			return none, err
		}
		defer s.Close()
		return none, f(s)
	})
	return err
}

func run[T any](ctx context.Context, t *Token, operation string, f func(*Session) (T, error)) (v T, err error) {
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
func (t *Token) take(ctx context.Context) (s *Session, err error) {
	lost, cause := t.breaker.check()
	if cause != nil {
		return nil, cause
	}
	if t.observer != nil {
		defer func(start time.Time) { t.observer.Waited(time.Since(start)) }(time.Now())
	}
	select {
	case s = <-t.idle:
	case <-lost:
		_, cause := t.breaker.check()
		if cause == nil { // it is back already
			cause = ErrUnavailable
		}
		return nil, cause
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	// Select picks at random: nothing is spent on a caller that has gone, or on a token that has.
	if _, cause := t.breaker.check(); cause != nil || ctx.Err() != nil {
		t.idle <- s
		return nil, errors.Join(cause, ctx.Err())
	}
	return s, nil
}
