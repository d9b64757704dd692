package p11

import (
	"slices"
	"sync"
	"time"
)

// A token is far if a call that does no work takes this long, as with an HSM behind a network.
const away = 200 * time.Microsecond

// measured is how many calls measure the distance of a token. The fastest counts: the others may have waited for a core
// of this machine.
const measured = 5

// distance is how long calls take that do no work in the token.
type distance struct {
	mu    sync.Mutex
	calls [measured]time.Duration // the last ones; guarded by mu
	next  int                     // guarded by mu
	at    time.Time               // of the last one; guarded by mu
}

// measureAgain is measure, now and then.
func (d *distance) measureAgain(s *Session) {
	d.mu.Lock()
	due := time.Since(d.at) > time.Second
	d.mu.Unlock()
	if due {
		d.measure(s)
	}
}

// measure makes one such call. A token without random numbers counts as near.
func (d *distance) measure(s *Session) {
	start := time.Now()
	_, err := s.Ctx.GenerateRandom(s.ID, 1)
	took := time.Since(start)
	if err != nil {
		took = 0
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls[d.next%measured] = took
	d.next++
	d.at = start
}

func (d *distance) far() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Min(d.calls[:]) >= away
}
