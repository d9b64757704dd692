package api

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"
)

const (
	readyFor  = time.Second     // how long an answer is reused
	readyWait = 5 * time.Second // how long a check may take
)

// readiness checks at most once in readyFor whether the service is ready, however many ask.
type readiness struct {
	leaving func() bool                                          // nil: never
	find    func(context.Context) (warnings []string, err error) // does not panic
	flight  singleflight.Group
	last    atomic.Pointer[readyAnswer]
}

var errLeaving = errors.New("the service ends soon")

type readyAnswer struct {
	warnings []string
	err      error
	found    time.Time
}

// ask gives the last answer, or waits for the next one. If the service is about to end, it says so at once, and also at
// the end of a check that began before.
func (r *readiness) ask(ctx context.Context) ([]string, error) {
	if r.leaving != nil && r.leaving() {
		return nil, errLeaving
	}
	flight := r.flight.DoChan("", func() (any, error) {
		if last := r.last.Load(); last != nil && time.Since(last.found) < readyFor {
			return last, nil
		}
		ctx, cancel := context.WithTimeout(context.Background(), readyWait) // all who ask share it
		defer cancel()
		a := new(readyAnswer)
		a.warnings, a.err = r.find(ctx)
		a.found = time.Now()
		r.last.Store(a)
		return a, nil
	})
	select {
	case got := <-flight:
		a := got.Val.(*readyAnswer)
		if r.leaving != nil && r.leaving() { // meanwhile: a balancer would believe the answer until it asks again
			return nil, errLeaving
		}
		return a.warnings, a.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
