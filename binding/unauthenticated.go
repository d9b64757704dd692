package binding

import (
	"context"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// unauthenticatedEvery is how often a line about callers who were not let in may come, after unauthenticatedBurst at
// once, for each why. While more come all the time, that line is how many were left out.
const (
	unauthenticatedEvery = 5 * time.Second
	unauthenticatedBurst = 20
)

// strangers keep the log from being filled by whoever can reach the service. Each why has lines of its own: who fails
// without a certificate cannot hide who has one.
type strangers struct {
	mu  sync.Mutex
	all map[string]*someStrangers // guarded by mu: by why
}

type someStrangers struct {
	limit *rate.Limiter
	left  int // guarded by strangers' mu: lines that were left out, and are to be told of
}

func newStrangers() *strangers { return &strangers{all: map[string]*someStrangers{}} }

// tell says whether there may be a line. Otherwise it calls later, once, with the number of those that were left out.
func (s *strangers) tell(why string, later func(left int)) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	some := s.all[why]
	if some == nil {
		some = &someStrangers{limit: rate.NewLimiter(rate.Every(unauthenticatedEvery), unauthenticatedBurst)}
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

// Unauthenticated logs and counts a caller that was not let in, because nobody knows who it is. why is a word for the
// metric. Of many, some lines are left out; how many, another line says.
func (s *Service) Unauthenticated(ctx context.Context, why string, attrs ...any) {
	s.metrics.unauthenticated.WithLabelValues(why).Inc()
	if s.unknown.tell(why, func(left int) {
		s.log.Warn("client authentication failed; lines were left out", "why", why, "left_out", left)
	}) {
		s.log.WarnContext(ctx, "client authentication failed", append([]any{"why", why}, attrs...)...)
	}
}
