package binding

import (
	"sync/atomic"
	"time"

	"github.com/maypok86/otter/v2"
	"golang.org/x/time/rate"

	"github.com/kmehsm/kmehsm/kme"
)

// Limits keep the service fast when more comes than it can do. The zero value of each is no limit.
type Limits struct {
	Calls     int     // at the HSM or waiting for it; more are refused at once
	IMEIRate  float64 // EstablishKME a second, of one IMEI
	IMEIBurst int     // so many at once
}

// maxIMEIs bounds the memory for the rates: who has not come for longest is forgotten first.
const maxIMEIs = 100_000

type limits struct {
	Limits
	calls atomic.Int64
	imeis *otter.Cache[kme.IMEI, *rate.Limiter]
}

func newLimits(l Limits) *limits {
	all := &limits{Limits: l}
	if l.IMEIRate > 0 {
		all.imeis = otter.Must(&otter.Options[kme.IMEI, *rate.Limiter]{
			MaximumSize: maxIMEIs, ExpiryCalculator: otter.ExpiryAccessing[kme.IMEI, *rate.Limiter](time.Hour),
		})
	}
	return all
}

// allow says whether an IMEI's rate allows it another payload.
func (l *limits) allow(imei kme.IMEI) bool {
	if l.imeis == nil {
		return true
	}
	r, ok := l.imeis.GetIfPresent(imei)
	if !ok {
		r, _ = l.imeis.SetIfAbsent(imei, rate.NewLimiter(rate.Limit(l.IMEIRate), max(l.IMEIBurst, 1)))
	}
	return r.Allow()
}

func overloaded(message string) *Refusal { return refuse(kme.Overloaded, message, nil) }
