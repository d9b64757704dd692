// Command bench measures the figures of docs/performance.md, together with their baselines. scripts/bench.sh prepares
// everything and starts it; it writes bench.json.
//
// Each figure is the median of pairs: the bare token for some seconds, then ours for as long, so that other work of the
// machine affects both.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/version"
)

// A report is bench.json. It has only what was measured. Each share is the median of the pairs' shares.
type report struct {
	Establish  map[string]*establishment `json:"establish,omitempty"` // by the bits of the lot
	Attach     map[string]*attachment    `json:"attach,omitempty"`
	RPC        rpc                       `json:"rpc,omitempty"`
	Postgres   map[string]*onPostgres    `json:"postgres,omitempty"`
	S6a        *overS6a                  `json:"s6a,omitempty"`
	Provision  *provisioning             `json:"provision,omitempty"`
	Lookup     *lookup                   `json:"lookup,omitempty"`
	HSMCalls   map[string]int            `json:"hsm_calls,omitempty"` // C_* calls of each operation
	HSMDepth   map[string]int            `json:"hsm_depth,omitempty"` // those that come one after the other
	NetworkHSM []networkHSM              `json:"network_hsm,omitempty"`
	Machine    string                    `json:"machine"`
	Version    string                    `json:"version"`
}

// A bench is one run of it.
type bench struct {
	ctx          context.Context
	dir          string
	pairs        int
	each         time.Duration
	bits         []string
	manufacturer string

	// of a child that calls keysvc
	server string
	pid    int
}

// fewer is the number of pairs for a figure that only explains another one.
func (b *bench) fewer() int { return (b.pairs + 1) / 2 }

// progress tells on stderr what has been measured.
func (b *bench) progress(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

// leftOut says why a part is not measured: this machine lacks something.
type leftOut string

func (l leftOut) Error() string { return string(l) }

// A part of the report takes seconds on 2 idle cores, and in addition the time of so many runs.
type part struct {
	name    string
	do      func(*report) error
	seconds float64
	runs    int
}

func (b *bench) parts() []part {
	sizes, pairs, fewer := len(b.bits), b.pairs, b.fewer()
	each := func(seconds float64, runs int) float64 { return seconds * float64(runs) }
	return []part{
		{name: "establish", do: b.establish, seconds: each(1.6, sizes*(pairs+fewer)), runs: sizes * (2*pairs + fewer)},
		{name: "attach", do: b.attach, seconds: each(1.1, sizes*(pairs+2*fewer)), runs: sizes * (2*pairs + 4*fewer)},
		{name: "rpc", do: b.rpc, seconds: 5, runs: 4 * fewer},
		{name: "postgres", do: b.postgres, seconds: 10 + each(1.1, 3*fewer), runs: 6 * fewer},
		{name: "s6a", do: b.s6a, seconds: 15, runs: 5 * fewer},
		{name: "provision", do: b.provision, seconds: each(4, fewer), runs: fewer},
		{name: "lookup", do: b.lookup, seconds: 5, runs: 1},
		{name: "hsm_calls", do: b.hsmCalls, seconds: 20, runs: 4},
	}
}

func main() {
	b := new(bench)
	flag.StringVar(&b.dir, "dir", "var/bench", "what scripts/bench.sh has made")
	flag.IntVar(&b.pairs, "pairs", 6, "alternating measurements of the bare token and ours")
	seconds := flag.Int("seconds", 2, "how long each takes")
	child := flag.String("child", "", "measure one thing in this process, and print it")
	flag.StringVar(&b.server, "server", "", "for -child rpc: the address of keysvc")
	flag.IntVar(&b.pid, "pid", 0, "for -child rpc: the process of keysvc")
	only := flag.String("only", "", "measure these parts of the report, NAME,NAME, and keep the others of the last "+
		"run: establish, attach, rpc, postgres, s6a, provision, lookup, hsm_calls")
	bits := flag.String("bits", "2048,3072", "the lots to establish KMEs with")
	table := flag.String("print", "", "print a table of reports, FILE,FILE: a column for each")
	ask := flag.Bool("version", false, "print tag, commit and Go's version")
	flag.Parse()
	if *ask {
		fmt.Println("bench version", version.Text())
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	b.ctx, b.bits, b.each = ctx, strings.Split(*bits, ","), time.Duration(*seconds)*time.Second
	err := b.main(*child, *only, *table)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func (b *bench) main(child, only, table string) (err error) {
	if table != "" {
		return printReports(strings.Split(table, ","))
	}
	if b.pairs < 1 || b.each < time.Second {
		return errors.New("-pairs and -seconds are above zero")
	}
	if b.dir, err = filepath.Abs(b.dir); err != nil { // as a module-path is
		return err
	}
	if err := b.identify(); err != nil {
		return err
	}
	if child != "" {
		return b.child(child)
	}
	return b.run(b.parts(), only)
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

// run measures the parts that only names; all of them if it is empty. If one fails, it measures the others all the
// same.
func (b *bench) run(parts []part, only string) error {
	path := filepath.Join(b.dir, "bench.json")
	r := new(report)
	if only != "" {
		var chosen []part
		for name := range strings.SplitSeq(only, ",") {
			i := slices.IndexFunc(parts, func(p part) bool { return p.name == name })
			if i < 0 {
				return fmt.Errorf("-only: there is no part %q", name)
			}
			chosen = append(chosen, parts[i])
		}
		parts = chosen
		if last, err := readReport(path); err == nil {
			r = last
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if r.Establish == nil {
		r.Establish = map[string]*establishment{}
	}
	if r.Attach == nil {
		r.Attach = map[string]*attachment{}
	}
	r.Machine, r.Version = machine(), version.Text()
	var errs []error
	start := time.Now()
	for i, p := range parts {
		var left float64
		for _, p := range parts[i:] {
			left += p.seconds + float64(p.runs)*b.each.Seconds()
		}
		b.progress("%s, part %d of %d; %.0f s so far, some %.0f s to go", p.name, i+1, len(parts),
			time.Since(start).Seconds(), left)
		var missing leftOut
		if err := p.do(r); errors.As(err, &missing) {
			b.progress("%s is left out: %v", p.name, missing)
		} else if err != nil {
			err = fmt.Errorf("%s: %w", p.name, err)
			b.progress("%v", err)
			errs = append(errs, err)
		}
		if err := r.write(path); err != nil {
			return errors.Join(append(errs, err)...)
		}
		if b.ctx.Err() != nil {
			break
		}
	}
	printTable([]*report{r}, []string{"measured"})
	fmt.Println(path)
	return errors.Join(errs...)
}

// machine says what it was measured on.
func machine() string {
	model := runtime.GOARCH
	data, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(data)) {
		if name, value, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "model name" {
			model = strings.TrimSpace(value)
			break
		}
	}
	return fmt.Sprintf("%d cores, %s, %s", runtime.NumCPU(), model, runtime.Version())
}

func readReport(path string) (*report, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := new(report)
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

func (r *report) write(path string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(data, '\n'), 0o644)
}
