package p11

import (
	"errors"
	"sync"
	"testing"

	"github.com/kmehsm/kmehsm/internal/softhsmtest"
)

// Several tokens share the load; what one that is away cannot do, another does.
func TestPool(t *testing.T) {
	tokens := []*Token{openToken(t, softhsmtest.Token(t), Options{}), openToken(t, softhsmtest.Token(t), Options{})}
	p := NewPool(tokens...)
	call := func() error {
		_, err := OnAny(p, func(token *Token) (struct{}, error) { return struct{}{}, ping(t.Context(), token) })
		return err
	}
	load := func(n int) {
		t.Helper()
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				for range n {
					if err := call(); err != nil {
						t.Error(err)
					}
				}
			})
		}
		all.Wait()
	}
	used := func() (n [2]int64) { return [2]int64{tokens[0].renewal.uses.Load(), tokens[1].renewal.uses.Load()} }
	before := used()
	load(20)
	after := used()
	if one, two := after[0]-before[0], after[1]-before[1]; one < 60 || two < 60 {
		t.Errorf("the load is shared %d to %d", one, two)
	}
	// One is away: the other does it all, and no call fails.
	for i, away := range tokens {
		away.breaker.open(errors.New("pulled out"))
		before = used()
		load(10)
		if err := call(); err != nil {
			t.Error(err)
		}
		after = used()
		if n := after[1-i] - before[1-i]; n < 80 {
			t.Errorf("with token %d away the other was used %d times", i, n)
		}
		away.breaker.close()
	}
	for _, away := range tokens {
		away.breaker.open(errors.New("pulled out"))
	}
	if err := call(); !errors.Is(err, ErrUnavailable) {
		t.Errorf("with both away: %v", err)
	}
	for _, away := range tokens {
		away.breaker.close()
	}
	load(5)
}

// A key that a token does not have yet, another has; what is wrong with the call itself, no other token is asked.
func TestPoolGoesOn(t *testing.T) {
	p := NewPool(1, 2, 3)
	for _, c := range []struct {
		err   error
		asked int
	}{{nil, 1}, {ErrNoKey, 3}, {ErrUnavailable, 3}, {errors.New("the call is wrong"), 1}} {
		asked := 0
		_, err := OnAny(p, func(int) (struct{}, error) { asked++; return struct{}{}, c.err })
		if !errors.Is(err, c.err) || asked != c.asked {
			t.Errorf("%v: asked %d, want %d", c.err, asked, c.asked)
		}
	}
}
