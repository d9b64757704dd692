package limits

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// strangersEvery is how often a line about callers who were not let in may come, after strangersBurst at
// once, for each why. While more come all the time, that line is how many were left out.
const (
	strangersEvery = 5 * time.Second
	strangersBurst = 20
)

// Strangers keep the log from being filled by whoever can reach the service. Each why has a limit of its own: refusals
// of callers without a certificate do not hide those of callers with one.
type Strangers struct {
	mu  sync.Mutex
	all map[string]*someStrangers // guarded by mu: by why
}

type someStrangers struct {
	limit *rate.Limiter
	left  int // guarded by Strangers' mu: lines that were left out, and are to be told of
}

// NewStrangers makes Strangers of whom none has come.
func NewStrangers() *Strangers { return &Strangers{all: map[string]*someStrangers{}} }

// Tell says whether there may be a line. Otherwise it calls later, once, with the number of those that were left out.
func (s *Strangers) Tell(why string, later func(left int)) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	some := s.all[why]
	if some == nil {
		some = &someStrangers{limit: rate.NewLimiter(rate.Every(strangersEvery), strangersBurst)}
		s.all[why] = some
	}
	if some.limit.Allow() {
		return true
	}
	if some.left++; some.left == 1 {
		time.AfterFunc(some.limit.Reserve().Delay(), func() {
			s.mu.Lock()
			left := some.left
			some.left = 0
			s.mu.Unlock()
			later(left)
		})
	}
	return false
}
