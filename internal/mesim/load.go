package mesim

import (
	"context"
	"fmt"
	"time"

	"github.com/kmehsm/kmehsm/internal/scheduling"
	"github.com/kmehsm/kmehsm/kme"
)

// loadRound is how many payloads are prepared at a time: enough that the pauses between rounds count for little, and
// few enough that their attempts and the memory for them are none.
const loadRound = 4096

// A Measure is what one kind of call took.
type Measure struct {
	Calls     int            `json:"calls"`
	Rejected  map[string]int `json:"rejected"`
	Seconds   float64        `json:"seconds"`
	PerSecond float64        `json:"per_second"`
	P50       float64        `json:"p50_ms"`
	P99       float64        `json:"p99_ms"`

	times []time.Duration
}

func (m *Measure) finish() {
	if m.Seconds > 0 {
		m.PerSecond = float64(len(m.times)) / m.Seconds
	}
	m.P50, m.P99 = percentiles(m.times)
}

// LoadResult has a Measure of each kind of call.
type LoadResult struct {
	Establish Measure `json:"establish"` // of prepared payloads
	// PrepareVector of subscriptions without a binding: it opens an attempt, durably
	Open    Measure `json:"open"`
	Process Measure `json:"process"` // PrepareVector of bound ones: the RAND is encrypted in the HSM
}

// A loadCall is an EstablishKME that has been prepared, but for its attempt.
type loadCall struct {
	imsi    kme.IMSI
	attempt string
	device  *Device
	*Message
}

// A loading is a Run that makes one kind of call after another, each with all that it needs prepared before.
type loading struct {
	Run
	next int // the first IMSI that has not been used
}

// Load measures the service until EstablishKME has been measured for d: rate calls a second, or with 0 as many as there
// can be. With an error there is a result where payloads were rejected, and only there.
func (r Run) Load(ctx context.Context, d time.Duration, rate float64) (*LoadResult, error) {
	// What is measured goes first. A kernel that refuses has it measured a little slower than it is.
	_ = scheduling.ForCalls(0)
	l := &loading{Run: r}
	none := func() Measure { return Measure{Rejected: map[string]int{}} }
	result := &LoadResult{Establish: none(), Open: none(), Process: none()}
	total := max(1, int(rate*d.Seconds()))
	for {
		round, done := loadRound, len(result.Establish.times)
		if rate > 0 {
			round = min(round, total-done)
		}
		if rate > 0 && round == 0 || rate == 0 && result.Establish.Seconds >= d.Seconds() {
			break
		}
		if err := l.round(ctx, result, round, rate); err != nil {
			return nil, err
		}
	}
	for _, m := range []*Measure{&result.Establish, &result.Open, &result.Process} {
		m.finish()
	}
	if n := len(result.Establish.times); result.Establish.Calls < n {
		return result, fmt.Errorf("%d of %d payloads were rejected: %v", n-result.Establish.Calls, n,
			result.Establish.Rejected)
	}
	return result, nil
}

// round makes n calls of each kind.
func (l *loading) round(ctx context.Context, result *LoadResult, n int, rate float64) error {
	calls, err := l.prepare(ctx, n)
	if err != nil {
		return err
	}
	clear, random := newRAND(), newRAND() // what left in clear is not taken again
	err = l.each(ctx, &result.Open, calls, 0, func(c *loadCall) error {
		v, err := l.Client.PrepareVector(ctx, c.imsi, l.Origin, clear)
		if c.attempt = v.AttemptID; err == nil && c.attempt == "" {
			err = boundAlready(c.imsi)
		}
		return err
	})
	if err != nil {
		return err
	}
	err = l.each(ctx, &result.Establish, calls, rate, func(c *loadCall) error {
		e, err := l.Client.EstablishKME(ctx, c.imsi, l.Origin, c.device.IMEI, c.attempt, c.Payload)
		if err == nil {
			err = c.check(e.NWSig)
		}
		return err
	})
	if err != nil {
		return err
	}
	return l.each(ctx, &result.Process, calls, 0, func(c *loadCall) error {
		v, err := l.Client.PrepareVector(ctx, c.imsi, l.Origin, random)
		if err == nil {
			err = c.decrypts(v, random)
		}
		return err
	})
}

// prepare makes payloads of the devices in turn, each with a KME and for a subscription of its own.
func (l *loading) prepare(ctx context.Context, n int) ([]*loadCall, error) {
	calls, first := make([]*loadCall, n), l.next
	l.next += n
	return calls, each(ctx, l.Concurrency, n, func(i int) (err error) {
		c := &loadCall{device: l.Devices[(first+i)%len(l.Devices)]}
		if c.imsi, err = imsiPlus(l.FirstIMSI, first+i); err == nil {
			c.Message, err = c.device.Message(c.imsi)
		}
		calls[i] = c
		return err
	})
}

// each makes a call of all; with a rate, each when it is due, and timed from then on: a call that waits because an
// earlier one is slow waits too.
func (l *loading) each(
	ctx context.Context, m *Measure, calls []*loadCall, rate float64, call func(*loadCall) error,
) error {
	times := make([]time.Duration, len(calls))
	reasons := make([]string, len(calls))
	start := time.Now()
	err := each(ctx, l.Concurrency, len(calls), func(i int) error {
		began := time.Now()
		if rate > 0 {
			began = start.Add(time.Duration(float64(i) / rate * float64(time.Second)))
			time.Sleep(time.Until(began))
		}
		err := call(calls[i])
		times[i] = time.Since(began)
		if reasons[i] = reasonOf(err); reasons[i] != "" {
			err = nil
		}
		return err
	})
	m.Seconds += time.Since(start).Seconds()
	m.times = append(m.times, times...)
	for _, reason := range reasons {
		if reason == "" {
			m.Calls++
		} else {
			m.Rejected[reason]++
		}
	}
	return err
}
