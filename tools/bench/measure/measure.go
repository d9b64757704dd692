// Package measure has the tools of all parts of the benchmark: medians, shares of pairs, the CPU time of processes, and
// calls from many goroutines. It does not know what is measured.
package measure

import (
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A Ratio compares our rate with that of the bare token, in pairs. Its fields are set by Finish.
type Ratio struct {
	Token   float64 `json:"token_per_second"`
	Service float64 `json:"service_per_second"`
	Share   float64 `json:"share"`
	Low     float64 `json:"share_min"`
	High    float64 `json:"share_max"`

	tokens, services []float64
}

// Add adds a pair.
func (r *Ratio) Add(token, service float64) {
	r.tokens, r.services = append(r.tokens, token), append(r.services, service)
}

// Finish computes the fields. It needs at least one pair.
func (r *Ratio) Finish() {
	shares := make([]float64, len(r.tokens))
	for i := range shares {
		shares[i] = r.services[i] / r.tokens[i]
	}
	r.Token, r.Service = Round(Median(r.tokens), 1), Round(Median(r.services), 1)
	r.Share, r.Low, r.High = Round(Median(shares), 3), Round(slices.Min(shares), 3), Round(slices.Max(shares), 3)
}

func (r *Ratio) String() string {
	return fmt.Sprintf("**%.3f** (%.3f to %.3f): %.0f of %.0f", r.Share, r.Low, r.High, r.Service, r.Token)
}

// Median of no values is 0.
func Median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// Round rounds to a number of digits after the point.
func Round(v float64, digits int) float64 {
	p := math.Pow10(digits)
	return math.Round(v*p) / p
}

// ProcessCPU is the CPU time of a process and of its children that have ended (proc_pid_stat(5)).
func ProcessCPU(pid int) (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	_, fields, _ := strings.Cut(string(data), ") ") // after the name, which may have spaces in it
	var ticks [4]time.Duration
	values := strings.Fields(fields)
	if len(values) < 15 {
		return 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(values))
	}
	if _, err := fmt.Sscan(strings.Join(values[11:15], " "), &ticks[0], &ticks[1], &ticks[2], &ticks[3]); err != nil {
		return 0, err
	}
	const tick = 10 * time.Millisecond // USER_HZ is 100 on all of Go's architectures
	return (ticks[0] + ticks[1] + ticks[2] + ticks[3]) * tick, nil
}

// Parallel calls f with 0, 1, 2 and so on from each core, until it says that there is no more.
func Parallel(f func(int) (more bool, err error)) error { return ParallelOn(runtime.NumCPU(), f) }

// ParallelOn is Parallel with a given number of goroutines.
func ParallelOn(workers int, f func(int) (more bool, err error)) error {
	var next atomic.Int64
	var all sync.WaitGroup
	errs := make([]error, workers)
	for w := range errs {
		all.Go(func() {
			for more := true; more && errs[w] == nil; {
				more, errs[w] = f(int(next.Add(1)) - 1)
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}
