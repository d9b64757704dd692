package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/scheduling"
	"github.com/kmehsm/kmehsm/kme"
)

// loadRound is how many payloads are prepared at a time: enough that the pauses between rounds count for little, and few enough that
// their attempts and the memory for them are none.
const loadRound = 4096

// loadConcurrency is how many calls there are at once unless --concurrency says otherwise: as an HSS that many devices attach to has.
const loadConcurrency = 64

// A loadCall is an EstablishKME that has been prepared, but for its attempt.
type loadCall struct {
	imsi    kme.IMSI
	attempt string
	device  *device
	*message
}

// A measure is what one kind of call took.
type measure struct {
	Calls     int            `json:"calls"`
	Rejected  map[string]int `json:"rejected"`
	Seconds   float64        `json:"seconds"`
	PerSecond float64        `json:"per_second"`
	P50       float64        `json:"p50_ms"`
	P99       float64        `json:"p99_ms"`

	times []time.Duration
}

func (m *measure) finish() {
	if m.Seconds > 0 {
		m.PerSecond = float64(len(m.times)) / m.Seconds
	}
	m.P50, m.P99 = percentiles(m.times)
}

type loadResult struct {
	Establish measure `json:"establish"` // of prepared payloads
	Open      measure `json:"open"`      // PrepareVector of subscriptions without a binding: it opens an attempt, durably
	Process   measure `json:"process"`   // PrepareVector of bound ones: the RAND is encrypted in the HSM
}

// A loadRun makes one kind of call after another, each with all that it needs prepared before.
type loadRun struct {
	*attachRun
	concurrency int
	rate        float64 // EstablishKME a second; 0 for as many as there can be
	next        int     // the first IMSI that has not been used
}

func load(c *cli.Context) error {
	if c.Duration("duration") <= 0 || c.Float64("rate") < 0 {
		return cmdline.Usagef("--duration is above zero, and --rate not below")
	}
	imsi, err := firstIMSI(c.String("first-imsi"), false)
	if err != nil {
		return cmdline.Usagef("--first-imsi: %w", err)
	}
	attach, err := newAttachRun(c, imsi)
	if err != nil {
		return err
	}
	if attach.client == nil {
		return cmdline.Usagef("load calls the service itself: --server is https://HOST:PORT or unix:/path")
	}
	concurrency := c.Int("concurrency")
	if !c.IsSet("concurrency") {
		concurrency = loadConcurrency
	}
	run := &loadRun{attachRun: attach, concurrency: concurrency, rate: c.Float64("rate")}
	// What is measured goes first. A kernel that refuses has it measured a little slower than it is.
	_ = scheduling.ForCalls(0)
	result, err := run.all(c.Context, c.Duration("duration"))
	if err != nil {
		return err
	}
	if err := json.NewEncoder(c.App.Writer).Encode(result); err != nil {
		return err
	}
	if n := len(result.Establish.times); result.Establish.Calls < n {
		return fmt.Errorf("%d of %d payloads were rejected: %v", n-result.Establish.Calls, n, result.Establish.Rejected)
	}
	return nil
}

func (r *loadRun) all(ctx context.Context, d time.Duration) (*loadResult, error) {
	result := &loadResult{Establish: measure{Rejected: map[string]int{}}, Open: measure{Rejected: map[string]int{}}, Process: measure{Rejected: map[string]int{}}}
	total := int(r.rate * d.Seconds())
	more := func() bool {
		if r.rate > 0 {
			return len(result.Establish.times) < max(total, 1)
		}
		return result.Establish.Seconds < d.Seconds()
	}
	for more() {
		round := loadRound
		if r.rate > 0 {
			round = max(1, min(round, total-len(result.Establish.times)))
		}
		calls, err := r.prepare(ctx, round)
		if err != nil {
			return nil, err
		}
		clear, random := newRAND(), newRAND() // what left in clear is not taken again
		for _, step := range []struct {
			of   *measure
			rate float64
			call func(context.Context, *loadCall) error
		}{
			{&result.Open, 0, func(ctx context.Context, c *loadCall) error {
				v, err := r.client.PrepareVector(ctx, c.imsi, r.origin, clear)
				if c.attempt = v.AttemptID; err == nil && c.attempt == "" {
					err = boundAlready(c.imsi)
				}
				return err
			}},
			{&result.Establish, r.rate, func(ctx context.Context, c *loadCall) error {
				e, err := r.client.EstablishKME(ctx, c.imsi, r.origin, c.device.imei, c.attempt, c.payload)
				if err == nil {
					err = c.check(e.NWSig)
				}
				return err
			}},
			{&result.Process, 0, func(ctx context.Context, c *loadCall) error {
				v, err := r.client.PrepareVector(ctx, c.imsi, r.origin, random)
				if err == nil {
					err = c.decrypts(v, random)
				}
				return err
			}},
		} {
			if err := r.each(ctx, step.of, calls, step.rate, step.call); err != nil {
				return nil, err
			}
		}
	}
	for _, m := range []*measure{&result.Establish, &result.Open, &result.Process} {
		m.finish()
	}
	return result, nil
}

// prepare makes payloads of the devices in turn, each with a KME and for a subscription of its own.
func (r *loadRun) prepare(ctx context.Context, n int) ([]*loadCall, error) {
	calls := make([]*loadCall, n)
	return calls, r.workers(ctx, func(ctx context.Context, i int) (bool, error) {
		if i >= n {
			return false, nil
		}
		c := &loadCall{device: r.devices[(r.next+i)%len(r.devices)]}
		var err error
		if c.imsi, err = imsiPlus(r.firstIMSI, r.next+i); err == nil {
			c.message, err = c.device.message(c.imsi)
		}
		calls[i] = c
		return true, err
	}, func() { r.next += n })
}

// workers calls f with 0, 1, 2 and so on, on all workers, until it says that there is no more; then done.
func (r *loadRun) workers(ctx context.Context, f func(context.Context, int) (more bool, err error), done func()) error {
	var next atomic.Int64
	var failed atomic.Pointer[error]
	var group sync.WaitGroup
	for range r.concurrency {
		group.Go(func() {
			for ctx.Err() == nil && failed.Load() == nil {
				more, err := f(ctx, int(next.Add(1))-1)
				if err != nil {
					failed.CompareAndSwap(nil, &err)
				}
				if !more {
					return
				}
			}
		})
	}
	group.Wait()
	done()
	if err := failed.Load(); err != nil {
		return *err
	}
	return ctx.Err()
}

// each makes a call of all; with a rate, each when it is due, and timed from then on: who waits because an earlier one is slow waits too.
func (r *loadRun) each(ctx context.Context, m *measure, calls []*loadCall, rate float64, call func(context.Context, *loadCall) error) error {
	times := make([]time.Duration, len(calls))
	reasons := make([]string, len(calls))
	start := time.Now()
	err := r.workers(ctx, func(ctx context.Context, i int) (bool, error) {
		if i >= len(calls) {
			return false, nil
		}
		began := time.Now()
		if rate > 0 {
			began = start.Add(time.Duration(float64(i) / rate * float64(time.Second)))
			time.Sleep(time.Until(began))
		}
		err := call(ctx, calls[i])
		times[i] = time.Since(began)
		if reasons[i] = reasonOf(err); reasons[i] != "" {
			err = nil
		}
		return true, err
	}, func() {})
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

// percentiles sorts times, and gives the median and the 99th percentile in milliseconds; zeros of none.
func percentiles(times []time.Duration) (p50, p99 float64) {
	slices.Sort(times)
	if n := len(times); n > 0 {
		p50, p99 = milliseconds(times[n/2]), milliseconds(times[n*99/100])
	}
	return p50, p99
}
