package p11

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kmehsm/kmehsm/internal/panics"
)

// LeftFor is how long a session object stays in the token at most when it is not needed any more, a KME for example.
// The operation that then uses its session, and C_CloseSession, come on top of that.
const LeftFor = time.Second

// How many of them a session holds at most, if the token has the room. If calls take long it may be more, since there
// are fewer calls. SoftHSM gets slower with every object. A few objects are destroyed one by one.
const (
	leftAway = 64
	leftNear = 16
	leftFew  = 2
)

// left has the session objects that are not needed any more. They cost only memory of the token. A session with many of
// them is closed, which destroys them all in one call, and replaced, while the pool works on.
type left struct {
	most atomic.Int64 // of one session

	mu    sync.Mutex
	look  *time.Timer                // when it fires, idle sessions are looked at; guarded by mu
	at    time.Time                  // when that is; guarded by mu
	drops map[chan struct{}]struct{} // those under way; each is closed at its end; guarded by mu
}

// put gives a place back, with its session. If too much is left in that, it is destroyed first.
func (t *Token) put(s *Session) {
	if s == nil || len(s.left) == 0 {
		t.idle.give(s)
		return
	}
	since := s.leftSince
	switch most := t.left.most.Load(); {
	case most == 1: // before, the token has no room for other objects
		<-t.drop(s)
		return
	case int64(len(s.left)) >= most, time.Since(since) >= LeftFor:
		t.drop(s)
		return
	}
	t.idle.give(s)
	t.lookAt(since.Add(LeftFor))
}

// lookAt sets when idle sessions are looked at for objects that were left too long ago.
func (t *Token) lookAt(at time.Time) {
	t.left.mu.Lock()
	defer t.left.mu.Unlock()
	if t.left.look != nil {
		if !at.Before(t.left.at) {
			return
		}
		t.left.look.Stop()
	}
	t.left.at = at
	t.left.look = time.AfterFunc(time.Until(at), func() {
		defer panics.Recover(nil)
		t.left.mu.Lock()
		t.left.look = nil
		t.left.mu.Unlock()
		s, next := t.idle.due(time.Now().Add(-LeftFor))
		for ; s != nil; s, next = t.idle.due(time.Now().Add(-LeftFor)) {
			t.drop(s)
		}
		if !next.IsZero() {
			t.lookAt(next.Add(LeftFor))
		}
	})
}

// dropAll destroys what is left in all idle sessions, and waits until other goroutines have done so, too. It is called
// when the token is full; from then on, less is left in it.
func (t *Token) dropAll() {
	t.left.most.Store(max(1, t.left.most.Load()/2))
	for s, _ := t.idle.due(time.Now()); s != nil; s, _ = t.idle.due(time.Now()) {
		t.drop(s)
	}
	t.left.mu.Lock()
	drops := slices.Collect(maps.Keys(t.left.drops))
	t.left.mu.Unlock()
	for _, done := range drops {
		<-done
	}
}

// drop destroys what is left in a session, gives the session's place back, which the caller has taken, and closes done.
func (t *Token) drop(s *Session) (done chan struct{}) {
	done = make(chan struct{})
	t.left.mu.Lock()
	if t.left.drops == nil {
		t.left.drops = map[chan struct{}]struct{}{}
	}
	t.left.drops[done] = struct{}{}
	t.left.mu.Unlock()
	go func() {
		t.empty(s)
		t.left.mu.Lock()
		delete(t.left.drops, done)
		t.left.mu.Unlock()
		close(done)
	}()
	return done
}

func (t *Token) empty(s *Session) {
	login := t.logins.Load()
	_, err := inToken(t, []*Session{s}, "drop objects", func(held []*Session) (none struct{}, err error) {
		if len(s.left) <= leftFew {
			for _, h := range s.left {
				if err := s.Destroy(h); err != nil {
					return none, err // which closes the session
				}
			}
			s.left = s.left[:0]
			return none, nil
		}
		held[0] = nil
		if err := s.Close(); err != nil && classify(err) != sessionLost {
			return none, err
		}
		if held[0], err = t.OpenSession(); err == nil {
			t.distance.measureAgain(held[0])
		}
		return none, err
	})
	if classify(err) == deviceLost {
		t.lose(login, err)
	}
}
