// Command bench measures what docs/performance.md says, beside the bare token and in one run with it. scripts/bench.sh
// makes what it needs and starts it; it writes bench.json.
//
// Each figure is the median of pairs: the bare token for some seconds, then ours for as long, so that whatever else
// the machine does meets both.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/cmdline"
)

// A report is bench.json. Shares are medians of the pairs' shares.
type report struct {
	Establish map[string]*establishment `json:"establish"` // by the bits of the lot
	Provision provisioning              `json:"provision"`
	Lookup    lookup                    `json:"lookup"`
	HSMCalls  map[string]int            `json:"hsm_calls"` // C_* calls an operation
	Latency   []latency                 `json:"latency"`
	Machine   string                    `json:"machine"`
}

// A ratio is ours beside the bare token.
type ratio struct {
	Token   float64 `json:"token_per_second"`
	Service float64 `json:"service_per_second"`
	Share   float64 `json:"share"`
	Low     float64 `json:"share_min"`
	High    float64 `json:"share_max"`

	tokens, services []float64
}

func (r *ratio) add(token, service float64) {
	r.tokens, r.services = append(r.tokens, token), append(r.services, service)
}

func (r *ratio) finish() {
	shares := make([]float64, len(r.tokens))
	for i := range shares {
		shares[i] = r.services[i] / r.tokens[i]
	}
	r.Token, r.Service = round(median(r.tokens), 1), round(median(r.services), 1)
	r.Share, r.Low, r.High = round(median(shares), 3), round(slices.Min(shares), 3), round(slices.Max(shares), 3)
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	v = slices.Sorted(slices.Values(v))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

func round(v float64, digits int) float64 {
	p := math.Pow10(digits)
	return math.Round(v*p) / p
}

// A bench is one run of it.
type bench struct {
	ctx          context.Context
	dir          string
	pairs        int
	each         time.Duration
	bits         []string
	manufacturer string
}

func main() {
	dir := flag.String("dir", "var/bench", "what scripts/bench.sh has made")
	pairs := flag.Int("pairs", 5, "alternating measurements of the bare token and ours")
	seconds := flag.Int("seconds", 5, "how long each takes")
	child := flag.String("child", "", "measure one thing in this process, and print it")
	only := flag.String("only", "", "one of the report's parts: establish, provision, lookup, hsm_calls")
	bits := flag.String("bits", "2048,3072", "the lots to establish KMEs with")
	version := flag.Bool("version", false, "print tag, commit and Go's version")
	flag.Parse()
	if *version {
		fmt.Println("bench version", cmdline.Version())
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	absolute, err := filepath.Abs(*dir) // as a module-path is
	b := &bench{ctx: ctx, dir: absolute, bits: strings.Split(*bits, ","), pairs: *pairs,
		each: time.Duration(*seconds) * time.Second}
	if err == nil {
		err = b.identify()
	}
	if err == nil && *child != "" {
		err = b.child(*child)
	} else if err == nil {
		err = b.run(*only)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// identify reads whose lots they are.
func (b *bench) identify() error {
	pem, err := os.ReadFile(filepath.Join(b.dir, "factory", "manufacturer.pem"))
	if err != nil {
		return err
	}
	verifier, err := directory.ParseVerifier(pem)
	if err != nil {
		return err
	}
	b.manufacturer = verifier.KeyID()
	return nil
}

func (b *bench) run(only string) error {
	r := &report{Establish: map[string]*establishment{}, HSMCalls: map[string]int{},
		Machine: fmt.Sprintf("%d cores, %s", runtime.NumCPU(), runtime.Version())}
	for _, part := range []struct {
		name string
		do   func(*report) error
	}{{"establish", b.establish}, {"provision", b.provision}, {"lookup", b.lookup}, {"hsm_calls", b.hsmCalls}} {
		if only != "" && only != part.name {
			continue
		}
		if err := part.do(r); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	path := filepath.Join(b.dir, "bench.json")
	if err := os.WriteFile(path, append(data, '\n'), 0o644); err != nil {
		return err
	}
	r.print(path)
	return nil
}

func (r *report) print(path string) {
	fmt.Printf("\n%-26s %14s %14s %7s %15s %9s %9s\n", "", "bare token /s", "ours /s", "share", "of the pairs",
		"p50 ms", "p99 ms")
	row := func(name string, q ratio, p50, p99 string) {
		fmt.Printf("%-26s %14.0f %14.0f %7.3f  %.3f to %.3f %9s %9s\n", name, q.Token, q.Service, q.Share, q.Low,
			q.High, p50, p99)
	}
	for _, bits := range []string{"2048", "3072"} {
		if e := r.Establish[bits]; e != nil {
			row("EstablishKME, "+bits+" bits", e.ratio, ms(e.P50), ms(e.P99))
			fmt.Printf("%-26s %14s %14.0f %7s %15s %9s %9s\n", "  at half of it", "", e.HalfRate, "", "", ms(e.HalfP50),
				ms(e.HalfP99))
			fmt.Printf("%-26s %14s %14.0f\n", "  PrepareVector, opening", "", e.Open)
			fmt.Printf("%-26s %14s %14.0f\n", "  PrepareVector, bound", "", e.Process)
		}
	}
	if r.Provision.Token > 0 {
		row("device keys, to Vault", r.Provision.ratio, "", "")
		fmt.Printf("%-26s %.0f MB\n", "  memory at most", r.Provision.PeakRSS)
	}
	if r.Lookup.Cached > 0 {
		fmt.Printf("%-26s %.0f a second cached, %.0f MB with %d devices in %d lots, %.2f reads a cold one\n", "lookup",
			r.Lookup.Cached, r.Lookup.RSS, r.Lookup.Devices, r.Lookup.Lots, r.Lookup.ReadsACold)
	}
	for _, l := range r.Latency {
		fmt.Printf("%-26s %d sessions: %.0f a second, %.2f of sessions / (%d calls x %.2f ms)\n",
			fmt.Sprintf("calls of %.0f ms", l.CallMs), l.Sessions, l.PerSecond, l.Share, l.Calls, l.CallMs)
	}
	var calls []string
	for name, n := range r.HSMCalls {
		calls = append(calls, fmt.Sprintf("%s %d", name, n))
	}
	slices.Sort(calls)
	fmt.Printf("%-26s %s\n", "HSM calls an operation", strings.Join(calls, ", "))
	fmt.Println(path)
}

func ms(v float64) string { return fmt.Sprintf("%.2f", v) }
