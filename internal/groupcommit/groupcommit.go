// Package groupcommit lets changes of a database share transactions, and so the syncs of its disk.
package groupcommit

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kmehsm/kmehsm/internal/panics"
)

// A Writer makes changes, in transactions of type T. Changes that wait at the same time share one commit; each of them
// succeeds or fails by itself. It may be used concurrently.
type Writer[T any] struct {
	try     func(batch []*Change[T], apart bool) (results []error, err error)
	changes chan *Change[T]

	tickets atomic.Int64 // that are out: see Soon
	done    func()       // gives one back

	stop    func()        // once
	stopped chan struct{} // closed by stop
	ended   chan struct{} // closed when no change is made any more
}

// A Change is a change that waits to be made.
type Change[T any] struct {
	Key  string // those with the same are made one after the other
	ctx  context.Context
	make func(context.Context, T) error
	done chan error
}

// Gone is the error of a change whose caller does not wait any more; nil if it does.
func (c *Change[T]) Gone() error { return c.ctx.Err() }

// Make makes the change in a transaction. A panic is its error, a *panics.Error.
func (c *Change[T]) Make(tx T) (err error) {
	defer panics.Recover(&err)
	return c.make(context.WithoutCancel(c.ctx), tx)
}

// ErrTogether is try's error if a change has failed and could not be undone alone.
var ErrTogether = errors.New("one of the changes that were not kept apart failed")

// ErrClosed is the error of a change that comes after Close.
var ErrClosed = errors.New("the database is closed")

// New makes a Writer. try makes changes durably in one transaction, and gives the error of each. It makes changes with
// the same key in their order, and leaves out those that are Gone. With apart, it undoes a change that fails alone;
// without, it may undo all, and fail with ErrTogether.
func New[T any](try func(batch []*Change[T], apart bool) (results []error, err error)) *Writer[T] {
	w := &Writer[T]{try: try, changes: make(chan *Change[T]), stopped: make(chan struct{}), ended: make(chan struct{})}
	w.done = func() { w.tickets.Add(-1) }
	w.stop = sync.OnceFunc(func() { close(w.stopped) })
	go w.run()
	return w
}

// maxBatch bounds how long the first of a commit's changes waits for the last.
const maxBatch = 64

// Do makes a change, and returns when it is durable. An error of f leaves everything as it was. A change whose
// context has ended before its turn is not made; one that is under way is finished, since its transaction is
// others' too: f gets a context that does not end. f is called again when another change has failed, and only its
// last call counts. A panic of f is its error, a *panics.Error.
func (w *Writer[T]) Do(ctx context.Context, key string, f func(context.Context, T) error) error {
	c := &Change[T]{Key: key, ctx: ctx, make: f, done: make(chan error, 1)}
	select {
	case w.changes <- c:
		return <-c.done
	case <-w.stopped:
		return ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Close finishes the changes under way; later ones fail with ErrClosed.
func (w *Writer[T]) Close() {
	w.stop()
	<-w.ended
}

// Soon takes a ticket: its holder will soon make a change. done gives it back, once, when the change is made or will
// not be.
//
// A commit costs as much as several changes, mostly for the disk. So it waits for half of the open tickets, but only
// until Pause after the commit before. Without open tickets, no commit waits. Changes that come during a commit are in
// the next one.
func (w *Writer[T]) Soon() (done func()) {
	w.tickets.Add(1)
	return w.done
}

// Pause is how long after a commit the next one waits for changes that are to come.
const Pause = 20 * time.Millisecond

func (w *Writer[T]) run() {
	defer close(w.ended)
	var last time.Time // when a commit began
	for {
		select {
		case c := <-w.changes:
			batch := w.gather(c, last)
			last = time.Now()
			w.commit(batch)
		case <-w.stopped:
			return
		}
	}
}

// gather adds to a change those that share its commit.
func (w *Writer[T]) gather(first *Change[T], last time.Time) []*Change[T] {
	batch := []*Change[T]{first}
	var due <-chan time.Time
	for len(batch) < maxBatch {
		select {
		case c := <-w.changes:
			batch = append(batch, c)
			continue
		default:
		}
		if int64(2*len(batch)) >= w.tickets.Load() {
			break
		}
		if due == nil {
			due = time.After(time.Until(last.Add(Pause)))
		}
		select {
		case c := <-w.changes:
			batch = append(batch, c)
		case <-due:
			return batch
		case <-w.stopped:
			return batch
		}
	}
	return batch
}

func (w *Writer[T]) commit(batch []*Change[T]) {
	// To keep changes apart costs time, and failures are rare.
	results, err := w.tried(batch, false)
	if errors.Is(err, ErrTogether) && len(batch) > 1 {
		results, err = w.tried(batch, true)
	}
	for i, c := range batch {
		if results[i] == nil {
			results[i] = err
		}
		c.done <- results[i]
	}
}

// tried is try with panics as errors: they come from the driver.
func (w *Writer[T]) tried(batch []*Change[T], apart bool) (results []error, err error) {
	results = make([]error, len(batch))
	defer panics.Recover(&err)
	made, err := w.try(batch, apart)
	copy(results, made)
	return results, err
}
