package limits

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// strangersEvery is how often a line about unknown callers is logged for each why, after strangersBurst lines at once.
// If there are more callers, the line says how many were left out.
const (
	strangersEvery = 5 * time.Second
	strangersBurst = 20
)

// Strangers prevents that unknown callers fill the log. Each why has a limit of its own: refusals of callers without a
// certificate do not hide those of callers with one.
type Strangers struct {
	mu  sync.Mutex
	all map[string]*someStrangers // guarded by mu: by why
}

type someStrangers struct {
	limit *rate.Limiter
	left  int // guarded by Strangers' mu: lines that were left out, and are to be told of
}

// NewStrangers makes Strangers without callers.
func NewStrangers() *Strangers { return &Strangers{all: map[string]*someStrangers{}} }

// Tell says whether to log a line. If not, it will call later once, with the number of lines that were left out.
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
