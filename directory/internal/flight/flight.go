// Package flight limits how many callers wait for a slow or silent store, and for how long.
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

// A Group has the reads from one store. Its exported fields are set before the first call.
type Group struct {
	Timeout     time.Duration // of a read, and of a caller that waits
	Most        int           // callers that wait at a time, and reads that have not ended
	Unavailable error         // is wrapped by the errors of the limits

	flights singleflight.Group
	waiting atomic.Int64
	reading atomic.Int64
}

// Wait admits a caller until done is called. Its context ends after Timeout.
func (g *Group) Wait(ctx context.Context) (short context.Context, done func(), err error) {
	if n := g.waiting.Add(1); n > int64(g.Most) {
		g.waiting.Add(-1)
		return nil, nil, fmt.Errorf("%w: %d lookups wait for it already", g.Unavailable, n-1)
	}
	short, cancel := context.WithTimeout(ctx, g.Timeout)
	return short, func() { cancel(); g.waiting.Add(-1) }, nil
}

// Read admits a read until done is called. Some stores, such as a network file system, cannot interrupt a read: then
// the read stays, and its callers give up.
func (g *Group) Read() (done func(), err error) {
	done = func() { g.reading.Add(-1) }
	if n := g.reading.Add(1); n > int64(g.Most) {
		done()
		return nil, fmt.Errorf("%w: it has not answered %d reads", g.Unavailable, n-1)
	}
	return done, nil
}

// Do runs f once for all callers that ask for the same key at the same time, for Timeout at most if f respects its
// context. A caller whose context ends stops waiting; the others go on.
func Do[T any](ctx context.Context, g *Group, key string, f func(context.Context) (T, error)) (T, error) {
	result := g.flights.DoChan(key, func() (got any, err error) {
		defer panics.Recover(&err) // on singleflight's goroutine, it would end the process
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
