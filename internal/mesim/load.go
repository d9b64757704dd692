package mesim

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"syscall"
	"time"

	"github.com/kmehsm/kmehsm/internal/scheduling"
	"github.com/kmehsm/kmehsm/kme"
)

// loadRound is how many payloads are prepared at a time: so many that the pauses between rounds count for little, and
// so few that their attempts do not expire, and need little memory.
const loadRound = 4096

// A Measure is what one kind of call took.
type Measure struct {
	Calls     int            `json:"calls"`
	Rejected  map[string]int `json:"rejected"`
	Seconds   float64        `json:"seconds"`
	PerSecond float64        `json:"per_second"`
	P50       float64        `json:"p50_ms"`
	P99       float64        `json:"p99_ms"`
	ClientCPU float64        `json:"client_cpu_us"` // of this process, a call

	times []time.Duration
	cpu   time.Duration
}

func (m *Measure) finish() {
	if len(m.times) > 0 {
		m.PerSecond = float64(len(m.times)) / m.Seconds
		m.ClientCPU = float64(m.cpu.Microseconds()) / float64(len(m.times))
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
	bound   bool // it was accepted
	device  *Device
	*Message
}

// A loading is a Run that makes one kind of call after the other, with everything prepared before.
type loading struct {
	Run
	next int // the first IMSI that has not been used
}

// Load measures the service until EstablishKME has been measured for d: rate calls a second, or with 0 as many as there
// can be. With an error there is a result where payloads were rejected, and only there.
func (r Run) Load(ctx context.Context, d time.Duration, rate float64) (*LoadResult, error) {
	none := func() Measure { return Measure{Rejected: map[string]int{}} }
	result := &LoadResult{Establish: none(), Open: none(), Process: none()}
	err := r.rounds(ctx, &result.Establish, d, rate, func(l *loading, calls []*loadCall, limit time.Duration) error {
		return l.round(ctx, result, calls, rate, limit)
	})
	if err != nil {
		return nil, err
	}
	result.Open.finish()
	result.Process.finish()
	return result, result.Establish.complete()
}

// LoadAttaches measures whole attaches, from PrepareVector to ReportAuthentication, as Load measures the calls.
func (r Run) LoadAttaches(ctx context.Context, d time.Duration, rate float64) (*Measure, error) {
	m, a := &Measure{Rejected: map[string]int{}}, &attaching{Run: r}
	err := r.rounds(ctx, m, d, rate, func(l *loading, calls []*loadCall, limit time.Duration) error {
		_, err := l.each(ctx, m, calls, rate, limit, func(c *loadCall) error {
			return a.play(ctx, c.imsi, c.device.IMEI, c.Message)
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	return m, m.complete()
}

// complete finishes a measurement, which fails if anything was rejected.
func (m *Measure) complete() error {
	m.finish()
	if n := len(m.times); m.Calls < n {
		return fmt.Errorf("%d of %d payloads were rejected: %v", n-m.Calls, n, m.Rejected)
	}
	return nil
}

// rounds makes rounds of prepared calls until m has rate calls a second for the time d; with 0, until they took d. Each
// round has a limit.
func (r Run) rounds(ctx context.Context, m *Measure, d time.Duration, rate float64,
	round func(l *loading, calls []*loadCall, limit time.Duration) error) error {
	// The measured service gets the cores first. If the kernel refuses that, it is measured a little slower than it is.
	_ = scheduling.ForCalls(0)
	l := &loading{Run: r}
	for {
		n, left := loadRound, d-time.Duration(m.Seconds*float64(time.Second))
		if rate > 0 {
			n, left = min(n, max(1, int(rate*d.Seconds()))-len(m.times)), math.MaxInt64
		}
		if n == 0 || left <= 0 {
			return nil
		}
		calls, err := l.prepare(ctx, n)
		if err == nil {
			err = round(l, calls, left)
		}
		if err != nil {
			return err
		}
	}
}

// round makes all calls of each kind; EstablishKME, and what follows it, only within the limit.
func (l *loading) round(
	ctx context.Context, result *LoadResult, calls []*loadCall, rate float64, limit time.Duration,
) error {
	clear, random := newRAND(), newRAND() // what left in clear is not taken again
	_, err := l.each(ctx, &result.Open, calls, 0, math.MaxInt64, func(c *loadCall) error {
		v, err := l.Client.PrepareVector(ctx, c.imsi, l.Origin, clear)
		if c.attempt = v.AttemptID; err == nil && c.attempt == "" {
			err = boundAlready(c.imsi)
		}
		return err
	})
	if err != nil {
		return err
	}
	calls, err = l.each(ctx, &result.Establish, calls, rate, limit, func(c *loadCall) error {
		e, err := l.Client.EstablishKME(ctx, c.imsi, l.Origin, c.device.IMEI, c.attempt, c.Payload)
		if err == nil {
			err = c.check(e.NWSig)
		}
		c.bound = err == nil
		return err
	})
	if err != nil {
		return err
	}
	calls = slices.DeleteFunc(calls, func(c *loadCall) bool { return !c.bound })
	_, err = l.each(ctx, &result.Process, calls, 0, math.MaxInt64, func(c *loadCall) error {
		v, err := l.Client.PrepareVector(ctx, c.imsi, l.Origin, random)
		if err == nil {
			err = c.Decrypts(v, random)
		}
		return err
	})
	return err
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

// each makes all calls, or the first and those that can begin within the limit, and gives these. With a rate, a call is
// made when it is due, and timed from then on: so its time includes a wait for an earlier, slow one.
func (l *loading) each(ctx context.Context, m *Measure, calls []*loadCall, rate float64, limit time.Duration,
	call func(*loadCall) error) (made []*loadCall, err error) {
	times := make([]time.Duration, len(calls))
	reasons := make([]string, len(calls))
	start, cpu := time.Now(), CPUTime()
	err = each(ctx, l.Concurrency, len(calls), func(i int) error {
		began := time.Now()
		if i > 0 && began.Sub(start) >= limit {
			return nil
		}
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
	m.cpu += CPUTime() - cpu
	for i, took := range times {
		if took == 0 {
			continue
		}
		made, m.times = append(made, calls[i]), append(m.times, took)
		if reasons[i] == "" {
			m.Calls++
		} else {
			m.Rejected[reasons[i]]++
		}
	}
	return made, err
}

// CPUTime is what this process has spent.
func CPUTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// FirstIMSI is the IMSI given. Without one it is the first of the test network 001 01, or, unless the lowest is asked
// for, one that most likely had no binding before.
func FirstIMSI(given string, lowest bool) (kme.IMSI, error) {
	if given == "" && lowest {
		given = "001010000000000"
	} else if given == "" {
		given = fmt.Sprintf("00101%010d", 1_000_000_000+rand.Int64N(8_000_000_000))
	}
	return kme.ParseIMSI(given)
}
