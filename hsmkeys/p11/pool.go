package p11

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"
)

// A Pool is one token, or several with the same keys. They share the load; if one is away, the others do its work. T is
// a token type of the layer above. All methods may be called concurrently.
type Pool[T member] struct{ tokens []T }

// NewPool makes a pool of one token at least.
func NewPool[T member](tokens ...T) *Pool[T] { return &Pool[T]{tokens: tokens} }

// Tokens are those of the pool.
func (p *Pool[T]) Tokens() []T { return p.tokens }

// OnAny tries an operation on one token after the other, until one is there and has the key: during a rotation, the
// newest generation is in one token only at first. Their order is random: by turns, a load in step would have one token
// open payloads only, and another one unwrap KMEs. The operation may be done twice. If no token has the key, and one is
// SoftHSM, it tries again for some 0.6 s: while one thread of SoftHSM 2.6.1 reads what another process has just made,
// other threads do not see it.
func OnAny[T member, R any](ctx context.Context, p *Pool[T], f func(T) (R, error)) (out R, err error) {
	order := rand.Perm(len(p.tokens))
	for pause := 10 * time.Millisecond; ; pause *= 2 {
		again := false
		for _, i := range order {
			t := p.tokens[i]
			out, err = f(t)
			c, noKey := classify(err), errors.Is(err, ErrNoKey)
			if !errors.Is(err, ErrUnavailable) && !noKey && c != deviceLost && c != sessionLost && c != suspect {
				return out, err
			}
			again = again || noKey && t.SeesLate()
		}
		if !again || pause > time.Second/2 {
			return out, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return out, err
		}
	}
}

type member interface {
	// SeesLate says whether the token may not see at once what another process has made in it.
	SeesLate() bool
}
