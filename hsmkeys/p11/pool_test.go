package p11

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/kmehsm/kmehsm/internal/softhsmtest"
)

// Several tokens share the load; what one that is away cannot do, another does.
func TestPool(t *testing.T) {
	tokens := []*Token{openToken(t, softhsmtest.Token(t), Options{}), openToken(t, softhsmtest.Token(t), Options{})}
	p := NewPool(tokens...)
	call := func() error {
		_, err := OnAny(t.Context(), p, func(token *Token) (struct{}, error) {
			return struct{}{}, ping(t.Context(), token)
		})
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
	load(100)
	after := used()
	if one, two := after[0]-before[0], after[1]-before[1]; one < 300 || two < 300 {
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

type number int

// 3 is SoftHSM.
func (n number) SeesLate() bool { return n == 3 }

// A key that a token does not have yet, another has, and is asked at once; what is wrong with the call itself, no other
// token is asked. One that sees late is asked again, after all others.
func TestPoolGoesOn(t *testing.T) {
	away, wrong := fmt.Errorf("x: %w", ErrUnavailable), errors.New("the call is wrong")
	none := []error{ErrNoKey}
	for _, c := range []struct {
		says  [3][]error // what 1, 2 and 3 say, one after the other; then nothing is wrong
		want  error
		asked []number
	}{
		{[3][]error{}, nil, []number{2}},
		{[3][]error{none, none, nil}, nil, []number{2, 3}},
		{[3][]error{nil, none, none}, nil, []number{2, 3, 1}},
		{[3][]error{none, none, none}, nil, []number{2, 3, 1, 2}},
		{[3][]error{{away}, {away}, {away}}, ErrUnavailable, []number{2, 3, 1}},
		{[3][]error{none, none, {away}}, ErrNoKey, []number{2, 3, 1}},
		{[3][]error{nil, {wrong}, nil}, wrong, []number{2}},
	} {
		var asked []number
		var err error
		for range 1000 { // until it tries them in this order
			says := c.says
			asked = nil
			_, err = OnAny(t.Context(), NewPool[number](1, 2, 3), func(n number) (none struct{}, err error) {
				asked = append(asked, n)
				if queue := says[n-1]; len(queue) > 0 {
					says[n-1], err = queue[1:], queue[0]
				}
				return none, err
			})
			if slices.Equal(asked[:min(3, len(asked))], c.asked[:min(3, len(c.asked))]) {
				break
			}
		}
		if !errors.Is(err, c.want) || !slices.Equal(asked, c.asked) {
			t.Errorf("%v: %v, asked %v, want %v", c.says, err, asked, c.asked)
		}
	}
}

// Whatever a load in step does, each token gets its share of each kind.
func TestPoolInStep(t *testing.T) {
	p := NewPool[number](1, 2)
	var got [2]map[number]int
	for kind := range got {
		got[kind] = map[number]int{}
	}
	for range 200 {
		for kind := range got {
			OnAny(t.Context(), p, func(n number) (none struct{}, err error) {
				got[kind][n]++
				return none, nil
			})
		}
	}
	for kind, by := range got {
		if by[1] < 50 || by[2] < 50 {
			t.Errorf("kind %d: %v", kind, by)
		}
	}
}
