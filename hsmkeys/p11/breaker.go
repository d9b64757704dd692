package p11

import (
	"fmt"
	"sync"
)

// A State is that of a token's circuit breaker.
type State int

const (
	Closed   State = iota // calls pass
	Open                  // calls are refused at once, with ErrUnavailable
	HalfOpen              // calls are still refused; the token is being reinitialised
)

func (s State) String() string { return [...]string{"closed", "open", "half-open"}[s] }

// A breaker is a circuit breaker: it refuses calls at once while the token is away, also those that wait for a session.
type breaker struct {
	mu     sync.Mutex
	state  State         // guarded by mu
	cause  error         // why it is not closed; guarded by mu
	opened chan struct{} // closed when the breaker opens; another one after each time; guarded by mu
}

func newBreaker() *breaker { return &breaker{opened: make(chan struct{})} }

// status is the breaker's state, and the error that calls are refused with; nil if they pass. opened is closed when the
// breaker opens.
func (b *breaker) status() (state State, opened <-chan struct{}, cause error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.state, b.opened, b.cause
}

// open opens it, and says whether it was closed.
func (b *breaker) open(cause error) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	was := b.state == Closed
	b.state, b.cause = Open, fmt.Errorf("%w: %v", ErrUnavailable, cause)
	if was {
		close(b.opened)
	}
	return was
}

// halfOpen says that the token is being reinitialised.
func (b *breaker) halfOpen() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.state == Open {
		b.state = HalfOpen
	}
}

func (b *breaker) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.state, b.cause, b.opened = Closed, nil, make(chan struct{})
}
