package proof

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/must"
)

// soakResult is what a run has found, as JSON.
type soakResult struct {
	Store            string                 `json:"store"`
	Machine          string                 `json:"machine"`
	Seed             uint64                 `json:"seed"`
	Bindings         int                    `json:"bindings"` // before the load
	FillSeconds      float64                `json:"fill_seconds,omitempty"`
	Seconds          float64                `json:"load_seconds"`
	Attached         int                    `json:"attached"`
	Replays          int64                  `json:"replays_refused"`
	Well             latency                `json:"attach_while_all_is_well"`
	All              latency                `json:"attach_with_outages"`
	Events           map[string]*soakEvents `json:"events"`
	Growth           map[string][2]float64  `json:"growth"` // medians of the two last thirds of the last process's life
	BytesBefore      int64                  `json:"bytes_before"`
	BytesABinding    float64                `json:"bytes_a_binding"` // by the load
	Shares           soakShares             `json:"shares"`
	VerifySeconds    float64                `json:"verify_seconds"`
	VerifyRows       int                    `json:"verify_rows"`
	VerifyPeakMiB    float64                `json:"verify_peak_mib"`
	BindingsInTheEnd int                    `json:"told_and_there"`
}

type soakEvents struct {
	Times int     `json:"times"`
	Held  float64 `json:"held_seconds_max"`
	Back  float64 `json:"back_seconds_median"` // after its end, until a device has attached that began after it
	Worst float64 `json:"back_seconds_max"`
	backs []float64
}

type latency struct {
	P50 float64 `json:"p50_ms"`
	P99 float64 `json:"p99_ms"`
	Max float64 `json:"max_ms"`
}

// soakShares compares full load on both databases, in alternation with the bare token.
type soakShares struct {
	Pairs      int        `json:"pairs"`
	Token      float64    `json:"token_per_second"`
	Grown      float64    `json:"grown_per_second"`
	Empty      float64    `json:"empty_per_second"`
	ShareGrown float64    `json:"share_grown"`
	ShareEmpty float64    `json:"share_empty"`
	Ratio      float64    `json:"grown_of_empty"` // the median of the pairs
	RatioMin   float64    `json:"grown_of_empty_min"`
	RatioMax   float64    `json:"grown_of_empty_max"`
	CPU        [2]float64 `json:"cpu_us"` // of keysvc and the database, an attach: grown, empty
	HalfGrown  latency    `json:"half_load_grown"`
	HalfEmpty  latency    `json:"half_load_empty"`
}

func (r *soakResult) note(name string, held, back time.Duration) {
	e := r.Events[name]
	if e == nil {
		e = new(soakEvents)
		r.Events[name] = e
	}
	e.Times++
	e.backs = append(e.backs, back.Seconds())
	e.Held, e.Back, e.Worst = max(e.Held, held.Seconds()), median(e.backs), slices.Max(e.backs)
}

// A series is what the process of an instance takes, over its life.
type series struct {
	mu     sync.Mutex
	values map[string][]float64
}

func (x *series) restart() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.values = nil
}

// watched are metrics of the process; beside them there is its memory without what is of files.
var watched = []string{"go_goroutines", "process_open_fds", "go_memstats_next_gc_bytes"}

func (x *series) sample(i *instance) {
	r, err := i.http.Get("http://keysvc/metrics")
	if err != nil {
		return // it is away
	}
	defer r.Body.Close()
	var text bytes.Buffer
	text.ReadFrom(r.Body)
	found := map[string]float64{}
	for line := range strings.Lines(text.String()) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if slices.Contains(watched, name) {
			found[name], _ = strconv.ParseFloat(value, 64)
		}
	}
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", i.process.Load().Cmd.Process.Pid))
	for line := range strings.Lines(string(status)) {
		if kib, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			found["rss_mib"], _ = strconv.ParseFloat(strings.Fields(kib)[0], 64)
			found["rss_mib"] /= 1024
		}
	}
	found["go_heap_mib"] = found["go_memstats_next_gc_bytes"] / 2 / (1 << 20) // what the last collection has left
	delete(found, "go_memstats_next_gc_bytes")
	if len(found) != 1+len(watched) {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.values == nil {
		x.values = map[string][]float64{}
	}
	for name, v := range found {
		x.values[name] = append(x.values[name], v)
	}
}

func (x *series) now() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	var all []string
	for _, name := range slices.Sorted(maps.Keys(x.values)) {
		v := x.values[name]
		all = append(all, fmt.Sprintf("%s %.0f", name, v[len(v)-1]))
	}
	return strings.Join(all, ", ")
}

// flat compares the last two thirds of the process's life: nothing grows any more.
func (x *series) flat(s *soak) {
	long := s.duration >= 30*time.Minute
	few := s.t.Logf
	if long {
		few = s.t.Errorf
	}
	if len(x.values) == 0 {
		few("nobody has watched the process")
	}
	for name, v := range x.values {
		n := len(v) / 3
		if n < 3 {
			few("%s: only %d samples", name, len(v))
			continue
		}
		earlier, later := median(v[n:2*n]), median(v[2*n:])
		s.result.Growth[name] = [2]float64{earlier, later}
		// The caches that are bounded are full by then: 200,000 subscriptions were seen.
		if long && later > 1.1*earlier+10 {
			s.t.Errorf("%s has grown from %.0f to %.0f", name, earlier, later)
		}
	}
}

// shares measures full load on the grown and on the empty database, in alternation, each after the bare token.
func (s *soak) shares() {
	pairs, each := 2, 100*time.Millisecond
	if s.long {
		pairs, each = 16, 4*time.Second
	}
	s.serveBy(s.grown, nil)
	s.serveBy(s.empty, nil)
	token := s.bareToken()
	both := []*instance{s.grown, s.empty}
	var bare []float64
	var rates, cpu [2][]float64
	var ratios, sg, se []float64
	for pair := range pairs + 1 {
		var rate, spent [2]float64
		b := token(each)
		for k := range both {
			i := (k + pair) % 2
			times, us := s.full(both[i], each, 0)
			rate[i], spent[i] = float64(len(times))/each.Seconds(), us
		}
		if pair == 0 { // it warms the caches
			continue
		}
		bare = append(bare, b)
		for i := range both {
			rates[i], cpu[i] = append(rates[i], rate[i]), append(cpu[i], spent[i])
		}
		ratios, sg, se = append(ratios, rate[0]/rate[1]), append(sg, rate[0]/b), append(se, rate[1]/b)
		s.t.Logf("token %.0f a second, grown %.0f, empty %.0f; CPU %.0f and %.0f us", b, rate[0], rate[1], spent[0],
			spent[1])
	}
	r := &s.result.Shares
	r.Pairs, r.Token, r.Grown, r.Empty = pairs, median(bare), median(rates[0]), median(rates[1])
	r.ShareGrown, r.ShareEmpty = median(sg), median(se)
	r.Ratio, r.RatioMin, r.RatioMax = median(ratios), slices.Min(ratios), slices.Max(ratios)
	r.CPU = [2]float64{median(cpu[0]), median(cpu[1])}
	var half [2][]time.Duration
	for pair := range pairs {
		for k := range both {
			i := (k + pair) % 2
			times, _ := s.full(both[i], each, r.Empty/2)
			half[i] = append(half[i], times...)
		}
	}
	r.HalfGrown, r.HalfEmpty = latencyOf(half[0]), latencyOf(half[1])
	must.Do(s.t, s.empty.stop())
	// Pairs of one run spread by a tenth and more: three of four are below only if the median is too.
	slices.Sort(ratios)
	if s.long && ratios[len(ratios)*3/4] < 0.95 {
		s.t.Errorf("a grown database has %.2f of the attaches of an empty one (median of pairs), and not 0.95",
			r.Ratio)
	}
}

// bareToken gives the rate of the lot's bare private-key operations, in this process.
func (s *soak) bareToken() func(time.Duration) float64 {
	s.t.Setenv("SOFTHSM2_CONF", s.path("softhsm/softhsm2.conf"))
	token := must.Get[*hsmkeys.OperatorToken](s.t)(hsmkeys.OpenOperator(s.t.Context(), s.grown.tok.URI,
		hsmkeys.Options{}))
	s.t.Cleanup(func() { token.Close() })
	var all struct{ Lots []*directory.Manifest }
	must.Do(s.t, json.Unmarshal([]byte(s.keysvc(s.grown, "lot", "list", "--json")), &all))
	at := slices.IndexFunc(all.Lots, func(m *directory.Manifest) bool { return m.Lot == "L1" })
	lot := all.Lots[at]
	return func(d time.Duration) float64 {
		return must.Get[float64](s.t)(token.BareDecryptions(s.t.Context(), hsmkeys.Key{Role: hsmkeys.RoleLot,
			Manufacturer: lot.Manufacturer, Name: lot.Lot}, lot.PublicKey(), 0, d))
	}
}

// full has 64 devices at once attach to an instance for so long, and until one has; with a rate, each when it is due,
// and timed from then on. It gives what each took, and what keysvc and the database spent on it.
func (s *soak) full(i *instance, d time.Duration, rate float64) (times []time.Duration, cpu float64) {
	var all sync.WaitGroup
	var mu sync.Mutex
	var next atomic.Int64
	var some atomic.Bool
	start, before := time.Now(), s.cpu(i)
	for range 64 {
		all.Go(func() {
			for {
				n, due := next.Add(1)-1, time.Now()
				if rate > 0 {
					due = start.Add(time.Duration(float64(n) / rate * float64(time.Second)))
					time.Sleep(time.Until(due))
				}
				if due.Sub(start) >= d && (rate > 0 || some.Load()) {
					return
				}
				err := s.attach(s.t.Context(), i.hss, s.devices[int(n)%len(s.devices)], false, func(b told) {
					if i == s.grown {
						mu.Lock()
						s.told = append(s.told, b)
						mu.Unlock()
					}
				})
				if errors.Is(err, errBoundBefore) {
					continue
				} else if err != nil {
					s.t.Error(err)
					return
				}
				mu.Lock()
				times = append(times, time.Since(due))
				mu.Unlock()
				some.Store(true)
			}
		})
	}
	all.Wait()
	return times, float64((s.cpu(i) - before).Microseconds()) / float64(max(1, len(times)))
}

// cpu is what an instance and the database have spent so far.
func (s *soak) cpu(i *instance) (sum time.Duration) {
	s.t.Helper()
	stat := must.Get[[]byte](s.t)(os.ReadFile(fmt.Sprintf("/proc/%d/stat", i.process.Load().Cmd.Process.Pid)))
	var user, system int64
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	must.Get[int](s.t)(fmt.Sscan(fields[11]+" "+fields[12], &user, &system))
	if s.postgres != nil {
		sum = s.postgres.CPU(s.t)
	}
	return sum + time.Duration(user+system)*10*time.Millisecond // proc(5), for every program on Linux
}

// verify runs keysvc store verify.
func (s *soak) verify() {
	cmd := s.command(s.grown.tok, "keysvc", "store", "verify", "--json")
	cmd.Env = append(cmd.Env, "KMEHSM_STATE="+s.grown.name, "KMEHSM_STORE="+s.grown.store)
	cmd.Stderr = os.Stderr
	start := time.Now()
	out, err := cmd.Output()
	var found struct {
		OK   bool
		Rows int
	}
	if jerr := json.Unmarshal(out, &found); err != nil || jerr != nil || !found.OK || found.Rows < 4*s.bindings {
		s.t.Errorf("keysvc store verify: %v\n%s", errors.Join(err, jerr), out)
	}
	r := &s.result
	r.VerifySeconds, r.VerifyRows = time.Since(start).Seconds(), found.Rows
	r.VerifyPeakMiB = float64(cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss) / 1024
}

// report writes the results beside the folder of the run, and says them.
func (s *soak) report() {
	text := must.Get[[]byte](s.t)(json.MarshalIndent(s.result, "", "  "))
	base := filepath.Join(filepath.Dir(s.dir), s.store)
	table := s.result.table()
	must.Do(s.t, os.WriteFile(base+".json", append(text, '\n'), 0o644))
	must.Do(s.t, os.WriteFile(base+".md", []byte(table), 0o644))
	s.t.Logf("%s.json\n%s", base, table)
}

// table is the result in Markdown.
func (r *soakResult) table() string {
	var b strings.Builder
	row := func(name, format string, args ...any) { fmt.Fprintf(&b, "| "+name+" | "+format+" |\n", args...) }
	fmt.Fprintf(&b, "| %s, %s | |\n|---|---|\n", r.Store, r.Machine)
	row("bindings before the load, and entries of the ledger", "%d, %d", r.Bindings, 2*r.Bindings)
	row("filled in", "%.0f s", r.FillSeconds)
	row("load, seed", "%.0f s, %d", r.Seconds, r.Seed)
	row("attached; KMEs refused a second time", "%d; %d", r.Attached, r.Replays)
	row("whole attach, 8 at once, while all is well: p50 / p99, ms", "%.1f / %.1f", r.Well.P50, r.Well.P99)
	row("and with outages: p50 / p99 / max, ms", "%.1f / %.1f / %.0f", r.All.P50, r.All.P99, r.All.Max)
	for _, name := range slices.Sorted(maps.Keys(r.Events)) {
		e := r.Events[name]
		row(name+": times; back after, median / max, s", "%d; %.2f / %.2f", e.Times, e.Back, e.Worst)
	}
	for _, name := range slices.Sorted(maps.Keys(r.Growth)) {
		row(name+", second and last third", "%.0f, %.0f", r.Growth[name][0], r.Growth[name][1])
	}
	row("database before the load; more a binding", "%.2f GB; %.2f kB", float64(r.BytesBefore)/1e9, r.BytesABinding/1e3)
	h := r.Shares
	row("full load, grown and empty: of the token's rate", "%.3f, %.3f", h.ShareGrown, h.ShareEmpty)
	row("grown of empty (median of pairs, min to max)", "**%.3f** (%.3f to %.3f, %d pairs)", h.Ratio, h.RatioMin,
		h.RatioMax, h.Pairs)
	row("CPU of keysvc and the database, grown and empty, ms", "%.2f, %.2f", h.CPU[0]/1e3, h.CPU[1]/1e3)
	row("at half load, grown: p50 / p99, ms", "%.1f / %.1f", h.HalfGrown.P50, h.HalfGrown.P99)
	row("at half load, empty: p50 / p99, ms", "%.1f / %.1f", h.HalfEmpty.P50, h.HalfEmpty.P99)
	row("keysvc store verify: rows, time, memory", "%d, %.0f s, %.0f MiB", r.VerifyRows, r.VerifySeconds,
		r.VerifyPeakMiB)
	return b.String()
}

func latencyOf(times []time.Duration) (l latency) {
	if len(times) == 0 {
		return l
	}
	slices.Sort(times)
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	return latency{ms(times[len(times)/2]), ms(times[len(times)*99/100]), ms(times[len(times)-1])}
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

// machine says what it was measured on.
func machine() string {
	data, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(data)) {
		if name, value, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "model name" {
			return fmt.Sprintf("%d cores, %s", runtime.NumCPU(), strings.TrimSpace(value))
		}
	}
	return fmt.Sprintf("%d cores", runtime.NumCPU())
}
