package p11

import (
	"slices"
	"sync"
	"time"
)

// idle has the free places of a pool. A place stands for one session, open or not: whoever takes it gets its session.
type idle struct {
	places chan struct{} // one for each free place

	mu   sync.Mutex
	open []*Session // their sessions; the last is used first; guarded by mu
}

func newIdle(size int) *idle {
	i := &idle{places: make(chan struct{}, size)}
	for range size {
		i.places <- struct{}{}
	}
	return i
}

func (i *idle) size() int { return cap(i.places) }

// free is how many places are free.
func (i *idle) free() int { return len(i.places) }

// session gives the session of a place that was just taken; nil if it must be opened. It is the one that was used last,
// so no more sessions are open than are needed.
func (i *idle) session() *Session {
	i.mu.Lock()
	defer i.mu.Unlock()
	last := len(i.open) - 1
	if last < 0 {
		return nil
	}
	s := i.open[last]
	i.open = i.open[:last]
	return s
}

// give gives a place back, with its session; nil if that has ended.
func (i *idle) give(s *Session) {
	if s != nil {
		i.mu.Lock()
		i.open = append(i.open, s)
		i.mu.Unlock()
	}
	i.places <- struct{}{}
}

// more takes up to n more places, without waiting, as long as half of all places stay free: if sessions are scarce,
// several payloads at once matter more than one fast payload.
func (i *idle) more(n int) int {
	for took := range n {
		if i.free() <= i.size()/2 {
			return took
		}
		select {
		case <-i.places:
		default:
			return took
		}
	}
	return n
}

// due takes a place whose session holds objects from before then; nil if there is none. next is when the next session
// is due; zero if none holds objects.
func (i *idle) due(then time.Time) (due *Session, next time.Time) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for n, s := range i.open {
		if len(s.left) == 0 {
			continue
		}
		if s.leftSince.After(then) {
			if next.IsZero() || s.leftSince.Before(next) {
				next = s.leftSince
			}
			continue
		}
		select {
		case <-i.places:
			i.open = slices.Delete(i.open, n, n+1)
			return s, time.Time{}
		default: // another goroutine has taken the place, and will take a session or give the place back
			if soon := then.Add(10 * time.Millisecond); next.IsZero() || soon.Before(next) {
				next = soon
			}
		}
	}
	return nil, next
}
