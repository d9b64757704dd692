package p11

import (
	"errors"
	"sync/atomic"
)

// A Pool is one token, or several with the same keys: they share the load, and what one of them cannot do because it is
// away, another does. T is a token of the layer above. All methods may be called concurrently.
type Pool[T any] struct {
	tokens []T
	next   atomic.Uint64
}

// NewPool makes a pool of one token at least.
func NewPool[T any](tokens ...T) *Pool[T] { return &Pool[T]{tokens: tokens} }

// Tokens are those of the pool.
func (p *Pool[T]) Tokens() []T { return p.tokens }

// OnAny does an operation on one token after the other, beginning with another one each time, until one is there and
// has the key: of a key that is being rotated, the newest generation is in one token first. The operation must be one
// that can be done twice.
func OnAny[T, R any](p *Pool[T], f func(T) (R, error)) (out R, err error) {
	first := int(p.next.Add(1) % uint64(len(p.tokens)))
	for i := range p.tokens {
		out, err = f(p.tokens[(first+i)%len(p.tokens)])
		c := classify(err)
		if !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrNoKey) &&
			c != deviceLost && c != sessionLost && c != suspect {
			return out, err
		}
	}
	return out, err
}
