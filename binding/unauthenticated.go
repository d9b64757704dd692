package binding

import (
	"context"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// unauthenticatedEvery is how often a line about callers who were not let in may come, after unauthenticatedBurst at
// once.
const (
	unauthenticatedEvery = 5 * time.Second
	unauthenticatedBurst = 20
)

// strangers keep the log from being filled by whoever can reach the service.
type strangers struct {
	limit *rate.Limiter
	mu    sync.Mutex
	left  int // guarded by mu: lines that were left out, and are to be told of
}

func newStrangers(every time.Duration, burst int) *strangers {
	return &strangers{limit: rate.NewLimiter(rate.Every(every), burst)}
}

// Unauthenticated logs and counts a caller that was not let in, because nobody knows who it is. why is a word for the
// metric. Of many, some lines are left out; how many, another line says.
func (s *Service) Unauthenticated(ctx context.Context, why string, attrs ...any) {
	s.metrics.unauthenticated.WithLabelValues(why).Inc()
	if s.unknown.limit.Allow() {
		s.log.WarnContext(ctx, "client authentication failed", append([]any{"why", why}, attrs...)...)
		return
	}
	s.unknown.mu.Lock()
	defer s.unknown.mu.Unlock()
	if s.unknown.left++; s.unknown.left == 1 {
		time.AfterFunc(s.unknown.limit.Reserve().Delay(), s.tellOfStrangers)
	}
}

func (s *Service) tellOfStrangers() {
	s.unknown.mu.Lock()
	left := s.unknown.left
	s.unknown.left = 0
	s.unknown.mu.Unlock()
	s.log.Warn("client authentication failed; lines were left out", "left_out", left)
}
