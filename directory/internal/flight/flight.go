// Package flight bounds what waits for a store that is slow or silent.
package flight

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/kmehsm/kmehsm/internal/panics"
)

// A Group is the reads from one store. Its exported fields are set before the first call.
type Group struct {
	Timeout     time.Duration // of a read, and of a caller that waits
	Most        int           // callers that wait at a time, and reads that have not ended
	Unavailable error         // is wrapped by the error of whatever a limit ends

	flights singleflight.Group
	waiting atomic.Int64
	reading atomic.Int64
}

// Wait admits a caller, until it calls done. The context that it gets ends after Timeout.
func (g *Group) Wait(ctx context.Context) (short context.Context, done func(), err error) {
	if n := g.waiting.Add(1); n > int64(g.Most) {
		g.waiting.Add(-1)
		return nil, nil, fmt.Errorf("%w: %d lookups wait for it already", g.Unavailable, n-1)
	}
	short, cancel := context.WithTimeout(ctx, g.Timeout)
	return short, func() { cancel(); g.waiting.Add(-1) }, nil
}

// Read admits a read, until it calls done. Some stores, a file system over a network, cannot be told to give one up: it
// stays, and those who waited for it do not.
func (g *Group) Read() (done func(), err error) {
	done = func() { g.reading.Add(-1) }
	if n := g.reading.Add(1); n > int64(g.Most) {
		done()
		return nil, fmt.Errorf("%w: it has not answered %d reads", g.Unavailable, n-1)
	}
	return done, nil
}

// Do runs f once for all who ask for key at a time, for Timeout at most if f heeds its context. A caller whose context
// ends stops waiting, and the others do not suffer.
func Do[T any](ctx context.Context, g *Group, key string, f func(context.Context) (T, error)) (T, error) {
	result := g.flights.DoChan(key, func() (got any, err error) {
		defer panics.Recover(&err) // the group's goroutine has it end the process
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), g.Timeout)
		defer cancel()
		return f(ctx)
	})
	var none T
	var err error
	select {
	case <-ctx.Done():
		err = ctx.Err()
	case got := <-result:
		if err = got.Err; err == nil {
			return got.Val.(T), nil
		}
	}
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("%w: it has not answered in time: %w", g.Unavailable, err)
	}
	return none, err
}
