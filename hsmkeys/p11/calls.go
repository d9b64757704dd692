package p11

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/internal/panics"
)

// noPanic runs f. A panic in it becomes its error, a *panics.Error, and is counted for the token, too.
func noPanic[T any](t *Token, f func() (T, error)) (v T, err error) {
	defer func() {
		if p := recover(); p != nil {
			t.health.panics.Add(1)
			err = panics.Recovered(p, "token", t.String())
			t.tell()
		}
	}()
	return f()
}

// within runs f and returns its result, or gives f up after d. Then f runs on, and its result is dropped, and wiped if
// it is a secret. ended is called when f has ended, and told whether the caller still waited.
func within[T any](t *Token, d time.Duration, f func() (T, error), ended func(bool)) (v T, gaveUp bool, err error) {
	type result struct {
		v   T
		err error
	}
	var over atomic.Bool // f has ended or was given up
	done := make(chan result, 1)
	go func() {
		v, err := noPanic(t, f)
		waited := over.CompareAndSwap(false, true)
		if secret, ok := any(v).(interface{ Wipe() }); ok && !waited {
			secret.Wipe()
		}
		ended(waited)
		if !waited {
			t.health.hung.Add(-1) // only now it has left the module
			t.tell()
			return
		}
		done <- result{v: v, err: err}
	}()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case r := <-done:
		return r.v, false, r.err
	case <-timer.C:
		t.health.hung.Add(1) // before f can see that it was given up, and takes it off again
		if !over.CompareAndSwap(false, true) {
			t.health.hung.Add(-1)
			r := <-done
			return r.v, false, r.err
		}
		t.tell()
		return v, true, fmt.Errorf("%w: it does not answer", ErrUnavailable)
	}
}

// inToken runs f on sessions. It opens those that are nil, and replaces all if f is given up, fails in the token, or
// panics.
func inToken[T any](t *Token, held []*Session, operation string, f func([]*Session) (T, error)) (T, error) {
	login := t.logins.Load()
	v, gaveUp, err := within(t, t.hangAfter, func() (v T, err error) {
		sound := false
		defer func() {
			for i, s := range held {
				if s != nil && !sound {
					held[i] = nil
					s.Close()
				}
			}
		}()
		v, err = f(held)
		// A failed call may leave an operation active in its session; a new session has none.
		sound = !errors.As(err, new(pkcs11.Error)) && panics.Of(err) == nil
		if classify(err) == suspect {
			if fresh, serr := t.OpenSession(); serr == nil {
				fresh.Close()
			} else if !errors.Is(serr, ErrBusy) {
				err = fmt.Errorf("%w, %w", err, errGone)
			}
		}
		return v, err
	}, func(waited bool) {
		for _, s := range held {
			switch {
			case waited:
				t.put(s)
			case s != nil: // another session has its place
				s.Close()
			}
		}
	})
	if gaveUp {
		t.lose(login, fmt.Errorf("a call does not come back (%s)", operation))
		for range held {
			t.idle.give(nil)
		}
	}
	return v, err
}

// opened runs f on the first of the sessions. The others are for Apart.
func opened[T any](t *Token, f func(*Session) (T, error)) func([]*Session) (T, error) {
	return func(held []*Session) (v T, err error) {
		var others []*Session
		for i := range held {
			if held[i] == nil {
				if held[i], err = t.OpenSession(); err != nil && i == 0 {
					return v, err
				}
			}
			if s := held[i]; s != nil && i > 0 { // f works without the others, too
				others = append(others, s)
			}
		}
		s := held[0]
		s.others = others
		defer func() { s.others = nil }()
		return f(s)
	}
}

// Do runs f on a session of the pool, and gives its result. operation is its name for observers. f may run on after Do
// has returned, if it was given up: so it must write to nothing but its result. If the session has ended, f is run once
// more on another one: so before f makes a token object, it must look for it.
func Do[T any](ctx context.Context, t *Token, operation string, f func(*Session) (T, error)) (T, error) {
	return DoApart(ctx, t, operation, 1, f)
}

// DoApart is Do for an operation that runs up to so many steps at once, by [Token.Apart]. If calls take long, it gets a
// session for each step, as far as some are free.
func DoApart[T any](
	ctx context.Context, t *Token, operation string, steps int, f func(*Session) (T, error),
) (T, error) {
	v, login, err := run(ctx, t, operation, steps, f)
	switch {
	case ck.IsCKR(err, pkcs11.CKR_DEVICE_MEMORY):
		t.dropAll() // session objects that are left over may fill the token
		fallthrough
	case classify(err) == sessionLost:
		v, login, err = run(ctx, t, operation, steps, f)
	}
	if c := classify(err); c == sessionLost || c == deviceLost {
		t.lose(login, err)
	}
	t.renew()
	return v, err
}

// Apart runs steps that do not depend on one another: each on a session of its own, if the operation has enough, else
// one after the other. If one fails, the others are run all the same. It returns when all have ended.
func (t *Token) Apart(s *Session, steps ...func(*Session) error) (err error) {
	if len(s.others) == 0 {
		for _, step := range steps {
			if serr := step(s); serr != nil {
				err = errors.Join(err, serr)
			}
		}
		return err
	}
	// The first step has its session for itself.
	others := s.others[:min(len(s.others), len(steps)-1)]
	errs := make([]error, 1+len(others))
	var all sync.WaitGroup
	for at, other := range others {
		all.Go(func() {
			for i := 1 + at; i < len(steps); i += len(others) {
				errs[1+at] = errors.Join(errs[1+at], t.attempt(steps[i], other))
			}
		})
	}
	errs[0] = t.attempt(steps[0], s)
	all.Wait()
	return errors.Join(errs...)
}

func (t *Token) attempt(step func(*Session) error, s *Session) error {
	_, err := noPanic(t, func() (none struct{}, err error) { return none, step(s) })
	return err
}

// With is Do for what has no result.
func (t *Token) With(ctx context.Context, operation string, f func(*Session) error) error {
	_, err := Do(ctx, t, operation, func(s *Session) (struct{}, error) { return struct{}{}, f(s) })
	return err
}

// Once is With for what must not be done twice. f itself says what a failure means.
func (t *Token) Once(ctx context.Context, operation string, f func(*Session) error) error {
	_, _, err := run(ctx, t, operation, 1, func(s *Session) (struct{}, error) { return struct{}{}, f(s) })
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

// run also gives the login under which it has run f.
func run[T any](
	ctx context.Context, t *Token, operation string, steps int, f func(*Session) (T, error),
) (v T, login int64, err error) {
	held, err := t.take(ctx, steps)
	if err != nil {
		return v, 0, err
	}
	login = t.logins.Load()
	if t.observer != nil {
		defer func(start time.Time) { t.observer.Worked(operation, time.Since(start), err) }(time.Now())
	}
	v, err = inToken(t, held, operation, opened(t, f))
	return v, login, err
}

// take waits for one place of idle. If the token is far, it takes more, up to so many, as far as they are free: it
// never waits for a place while it has another one.
func (t *Token) take(ctx context.Context, most int) (held []*Session, err error) {
	_, lost, cause := t.breaker.status()
	if cause != nil {
		return nil, cause
	}
	if t.observer != nil {
		defer func(start time.Time) { t.observer.Waited(time.Since(start)) }(time.Now())
	}
	select {
	case <-t.idle.places:
	case <-lost:
		_, _, cause := t.breaker.status()
		if cause == nil { // the token is back already
			cause = ErrUnavailable
		}
		return nil, cause
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	// Select picks at random. So look again: a caller or a token may be gone.
	if _, _, cause := t.breaker.status(); cause != nil || ctx.Err() != nil {
		t.idle.places <- struct{}{}
		return nil, errors.Join(cause, ctx.Err())
	}
	places := 1
	if most > 1 && t.distance.far() {
		places += t.idle.more(most - 1)
	}
	held = make([]*Session, places)
	for i := range held {
		held[i] = t.idle.session()
	}
	return held, nil
}
