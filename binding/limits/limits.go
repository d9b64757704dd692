// Package limits keeps a service fast under overload, and its log readable if many unknown callers come.
package limits

import (
	"sync"
	"time"

	"github.com/maypok86/otter/v2"
	"golang.org/x/time/rate"

	"github.com/kmehsm/kmehsm/internal/cache"
	"github.com/kmehsm/kmehsm/kme"
)

// Limits keep the service fast under overload. Zero values are no limits.
type Limits struct {
	Calls     int     // at the HSM or waiting for it; more are refused at once, but see Gate.Take
	IMEIRate  float64 // payloads a second of one IMSI, good or bad; and accepted ones of one IMEI
	IMEIBurst int     // so many at once
}

// maxRates bounds the memory for the rates of IMSIs and of IMEIs. The least recently used is forgotten first.
const maxRates = 100_000

// A Gate enforces Limits. It may be used concurrently.
type Gate struct {
	Limits
	mu    sync.Mutex
	total int            // guarded by mu: calls that have a place
	calls map[string]int // guarded by mu: those by client; a client without calls is not in it
	imsis *rates[kme.IMSI]
	imeis *rates[kme.IMEI]
}

// NewGate makes a Gate without calls.
func NewGate(l Limits) *Gate {
	return &Gate{Limits: l, calls: map[string]int{}, imsis: newRates[kme.IMSI](l), imeis: newRates[kme.IMEI](l)}
}

// Take gives a client's call a place, which Leave gives back. A single client may have all places. If several clients
// have calls, each may have its share, at least one, even while others hold more than theirs: then there are more than
// Calls, until those finish. With n clients these are Calls*(1 + 1/2 + ... + 1/n) at most, and n more.
func (l *Gate) Take(client string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.Calls > 0 && l.total >= l.Calls {
		active := len(l.calls)
		if l.calls[client] == 0 {
			active++
		}
		if l.calls[client] >= max(l.Calls/active, 1) {
			return false
		}
	}
	l.total++
	l.calls[client]++
	return true
}

// Leave is described at Take.
func (l *Gate) Leave(client string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total--
	if l.calls[client]--; l.calls[client] == 0 {
		delete(l.calls, client)
	}
}

// Allow says whether another payload of an IMSI for an IMEI may go to the HSM, and counts it for the IMSI. Only
// Established counts it for the IMEI: anybody with an attempt can name an IMEI, and send garbage or a used (KME,
// KME_SIG).
func (l *Gate) Allow(imsi kme.IMSI, imei kme.IMEI) bool {
	return l.IMEIRate <= 0 || l.imeis.of(imei).Tokens() >= 1 && l.imsis.of(imsi).Allow()
}

// Established counts an accepted payload for an IMEI. Calls that passed Allow at the same time may take its rate below
// zero for some time.
func (l *Gate) Established(imei kme.IMEI) {
	if l.IMEIRate > 0 {
		l.imeis.of(imei).Reserve()
	}
}

type rates[K comparable] struct {
	cache cache.Cache[K, *rate.Limiter]
	rate  rate.Limit
	burst int
}

func newRates[K comparable](l Limits) *rates[K] {
	return &rates[K]{cache: cache.New(&otter.Options[K, *rate.Limiter]{
		MaximumSize: maxRates, ExpiryCalculator: otter.ExpiryAccessing[K, *rate.Limiter](time.Hour),
	}), rate: rate.Limit(l.IMEIRate), burst: max(l.IMEIBurst, 1)}
}

func (r *rates[K]) of(key K) *rate.Limiter {
	l, ok := r.cache.GetIfPresent(key)
	if !ok {
		l, _ = r.cache.SetIfAbsent(key, rate.NewLimiter(r.rate, r.burst))
	}
	return l
}
