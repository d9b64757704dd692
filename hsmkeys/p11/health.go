package p11

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/kmehsm/kmehsm/internal/panics"
)

// Health is how a token is doing.
type Health struct {
	State         State // of its circuit breaker
	Cause         error // why that is not closed; nil if it is
	Hung          int64 // calls that were given up and have not come back
	Reinitialised int64 // how often it was reinitialised after it was away
	Panics        int64 // calls, and attempts to reinitialise it, that a panic ended
}

// An Observer is told of the operations of a token, by many goroutines at once.
type Observer interface {
	// Waited is told how long an operation waited for a session, whether it got one or not.
	Waited(d time.Duration)
	// Worked is told how long an operation then took in the token, without the wait, and how it ended. It is called
	// twice for an operation that is run again because its session had ended.
	Worked(operation string, took time.Duration, err error)
}

// health counts, and reports changes.
type health struct {
	hung, reinitialised, panics atomic.Int64

	changed func(token string, was, is Health) // may be nil
	telling sync.Mutex
	told    Health // guarded by telling
}

// Health may be asked at any time.
func (t *Token) Health() Health {
	state, _, cause := t.breaker.status()
	return Health{State: state, Cause: cause, Hung: t.health.hung.Load(),
		Reinitialised: t.health.reinitialised.Load(), Panics: t.health.panics.Load()}
}

// tell reports changes one after the other, so the last report is the present state. A panic of who is told ends
// nothing else.
func (t *Token) tell() {
	if t.health.changed == nil {
		return
	}
	defer panics.Recover(nil)
	t.health.telling.Lock()
	defer t.health.telling.Unlock()
	was := t.health.told
	t.health.told = t.Health()
	t.health.changed(t.String(), was, t.health.told)
}
