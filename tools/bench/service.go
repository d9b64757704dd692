package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/mesim"
	"github.com/kmehsm/kmehsm/tools/bench/measure"
)

// A sample is the result of one run of a load.
type sample struct {
	PerSecond float64 `json:"per_second"`
	P50       float64 `json:"p50_ms"`
	P99       float64 `json:"p99_ms"`
	ClientCPU float64 `json:"client_cpu_us"`
	Calls     int     `json:"calls"`
	cpu       float64 // of keysvc for each call, in us
}

// measured compares a service with the bare token, at full load and at half load.
type measured struct {
	measure.Ratio
	TokenCPU  float64 `json:"token_cpu_us"`     // of a bare private-key operation
	CPU       float64 `json:"cpu_us,omitempty"` // of keysvc, each; not for EstablishKME: keysvc has other calls, too
	ClientCPU float64 `json:"client_cpu_us"`
	P50       float64 `json:"p50_ms"` // at full load
	P99       float64 `json:"p99_ms"`
	HalfRate  float64 `json:"half_rate"` // calls a second
	HalfP50   float64 `json:"half_p50_ms"`
	HalfP99   float64 `json:"half_p99_ms"`
}

// bare measures how many private-key operations with the lot's key this process makes in a second. It uses so many
// sessions; with 0, as many as make the token fastest.
type bare func(sessions int, d time.Duration) (float64, error)

// A run makes a load for the time d: rate calls a second, or, with 0, as many as possible.
type run func(d time.Duration, rate float64) (sample, error)

// besideToken measures the token and ours in turn. Each share is relative to the token's rate just before.
func (b *bench) besideToken(name string, m *measured, pairs int, token bare, ours run) error {
	if _, err := ours(time.Second, 0); err != nil { // to warm up
		return err
	}
	var all []sample
	var tokenCPU []float64
	for i := range pairs {
		before := mesim.CPUTime()
		t, err := token(0, b.each)
		if err != nil {
			return err
		}
		tokenCPU = append(tokenCPU, float64((mesim.CPUTime()-before).Microseconds())/(t*b.each.Seconds()))
		s, err := ours(b.each, 0)
		if err != nil {
			return err
		}
		all = append(all, s)
		m.Add(t, s.PerSecond)
		b.progress("%s, %d of %d: token %.0f a second, ours %.0f, %.3f", name, i+1, pairs, t, s.PerSecond,
			s.PerSecond/t)
	}
	m.Finish()
	m.TokenCPU = measure.Round(measure.Median(tokenCPU), 0)
	m.CPU = measure.Round(medianOf(all, func(s sample) float64 { return s.cpu }), 0)
	m.ClientCPU = measure.Round(medianOf(all, func(s sample) float64 { return s.ClientCPU }), 0)
	m.P50 = medianOf(all, func(s sample) float64 { return s.P50 })
	m.P99 = medianOf(all, func(s sample) float64 { return s.P99 })
	return nil
}

// half measures response times at half of the rate that besideToken has found.
func (b *bench) half(name string, m *measured, ours run) error {
	m.HalfRate = measure.Round(m.Service/2, 0)
	var all []sample
	for range b.fewer() {
		s, err := ours(b.each, m.HalfRate)
		if err != nil {
			return err
		}
		all = append(all, s)
	}
	m.HalfP50 = medianOf(all, func(s sample) float64 { return s.P50 })
	m.HalfP99 = medianOf(all, func(s sample) float64 { return s.P99 })
	b.progress("%s, at half load: p50 %.2f ms, p99 %.2f ms", name, m.HalfP50, m.HalfP99)
	return nil
}

func medianOf[T any](all []T, f func(T) float64) float64 {
	v := make([]float64, len(all))
	for i, s := range all {
		v[i] = f(s)
	}
	return measure.Median(v)
}

// eachLot calls measure for the lots of some bits, with a keysvc that runs with a configuration, and with its bare
// token. This process opens the token, too: its URI is in a variable of the environment.
func (b *bench) eachLot(
	config, variable string, bits []string, measure func(bits string, s *server, token bare) error,
) error {
	token, err := hsmkeys.OpenOperator(b.ctx, os.Getenv(variable), hsmkeys.Options{})
	if err != nil {
		return err
	}
	defer token.Close()
	for _, bits := range bits {
		m, err := b.lot(bits)
		if err != nil {
			return err
		}
		s, err := b.serve(config)
		if err != nil {
			return err
		}
		key := hsmkeys.Key{Role: hsmkeys.RoleLot, Manufacturer: b.manufacturer, Name: m.Lot}
		err = measure(bits, s, func(sessions int, d time.Duration) (float64, error) {
			return token.BareDecryptions(b.ctx, key, m.PublicKey(), sessions, d)
		})
		if err := errors.Join(err, s.stop()); err != nil {
			return err
		}
	}
	return nil
}

// lot is the manifest of the lot of some bits.
func (b *bench) lot(bits string) (*directory.Manifest, error) {
	out, err := output(b.ctx, "bin/keysvc", "lot", "list", "--state", filepath.Join(b.dir, "keysvc"), "--json")
	if err != nil {
		return nil, err
	}
	var all struct{ Lots []*directory.Manifest }
	if err := json.Unmarshal(out, &all); err != nil {
		return nil, err
	}
	for _, m := range all.Lots {
		if m.Lot == "L"+bits {
			return m, nil
		}
	}
	return nil, fmt.Errorf("lot L%s was not imported", bits)
}

// fleet has the devices of the lot of 2048 bits.
func (b *bench) fleet() (*mesim.Fleet, error) {
	return mesim.OpenFleet(filepath.Join(b.dir, "injection-2048"), filepath.Join(b.dir, "fixture.key"),
		[]string{filepath.Join(b.dir, "fixture-enrolment.json")})
}

type establishment struct {
	measured
	Open    float64 `json:"prepare_opening_per_second"` // PrepareVector of a subscription without a binding
	Process float64 `json:"prepare_pending_per_second"` // and of one whose device has yet to show its KME
}

// establish measures EstablishKME alone.
func (b *bench) establish(r *report) error {
	return b.eachLot("keysvc", "OPERATOR_TOKEN", b.bits, func(bits string, s *server, token bare) error {
		e := new(establishment)
		r.Establish[bits] = e
		var open, process []float64
		load := func(d time.Duration, rate float64) (sample, error) {
			var l struct{ Establish, Open, Process sample }
			err := b.load(&l, s.address, bits, d, rate)
			open, process = append(open, l.Open.PerSecond), append(process, l.Process.PerSecond)
			return l.Establish, err
		}
		name := "EstablishKME, " + bits + " bits"
		if err := b.besideToken(name, &e.measured, b.pairs, token, load); err != nil {
			return err
		}
		e.Open, e.Process = measure.Round(measure.Median(open), 1), measure.Round(measure.Median(process), 1)
		return b.half(name, &e.measured, load)
	})
}

type attachment struct {
	measured
	Socket measured `json:"socket"` // over the Unix socket; not at half load
	Alone  alone    `json:"alone"`
}

// attach measures the whole way of a device: PrepareVector, EstablishKME, PrepareVector, ReportAuthentication.
func (b *bench) attach(r *report) error {
	return b.eachLot("keysvc", "OPERATOR_TOKEN", b.bits, func(bits string, s *server, token bare) error {
		a := new(attachment)
		r.Attach[bits] = a
		name := "attach, " + bits + " bits"
		if err := b.besideToken(name, &a.measured, b.pairs, token, b.attaches(s.address, bits, s)); err != nil {
			return err
		}
		if err := b.half(name, &a.measured, b.attaches(s.address, bits, s)); err != nil {
			return err
		}
		name += ", Unix socket"
		if err := b.besideToken(name, &a.Socket, b.fewer(), token, b.attaches(s.socket, bits, s)); err != nil {
			return err
		}
		return b.alone(&a.Alone, s, bits, token)
	})
}

// attaches is a load of whole attaches at an address. Its samples have the CPU time of the servers.
func (b *bench) attaches(address, bits string, servers ...*server) run {
	return func(d time.Duration, rate float64) (sample, error) {
		before, err := cpuOf(servers)
		if err != nil {
			return sample{}, err
		}
		var l struct{ Attach sample }
		if err := b.load(&l, address, bits, d, rate, "--whole"); err != nil {
			return sample{}, err
		}
		after, err := cpuOf(servers)
		l.Attach.cpu = float64((after - before).Microseconds()) / float64(l.Attach.Calls)
		return l.Attach, err
	}
}

// alone has the times of an attach, of a private-key operation and of a sync of the disk, each measured one at a time.
type alone struct {
	Attach     float64 `json:"attach_ms"`
	PrivateKey float64 `json:"private_key_ms"`
	Sync       float64 `json:"sync_ms"`
	// the rest of an attach without three syncs, in private-key operations; the median of the pairs
	Operations float64 `json:"private_keys_besides_3_syncs"`
}

func (b *bench) alone(a *alone, s *server, bits string, token bare) error {
	var attach, key, disk, operations []float64
	for range b.fewer() {
		perSecond, err := token(1, b.each/3)
		if err != nil {
			return err
		}
		sync, err := syncTime(filepath.Join(b.dir, "keysvc"), b.each/6)
		if err != nil {
			return err
		}
		var l struct{ Attach sample }
		if err := b.load(&l, s.address, bits, b.each/2, 0, "--whole", "--concurrency", "1"); err != nil {
			return err
		}
		attach, key, disk = append(attach, l.Attach.P50), append(key, 1000/perSecond), append(disk, sync)
		operations = append(operations, (l.Attach.P50-3*sync)*perSecond/1000)
	}
	of := func(v []float64, digits int) float64 { return measure.Round(measure.Median(v), digits) }
	*a = alone{Attach: of(attach, 3), PrivateKey: of(key, 3), Sync: of(disk, 3), Operations: of(operations, 2)}
	b.progress("one device at a time, %s bits: %.2f ms, %.2f private-key operations of %.2f ms and 3 syncs of %.2f ms",
		bits, a.Attach, a.Operations, a.PrivateKey, a.Sync)
	return nil
}

// syncTime is the median time, in ms, to append a page to a file in a folder and to sync it to the disk.
func syncTime(folder string, d time.Duration) (float64, error) {
	f, err := os.CreateTemp(folder, "sync-")
	if err != nil {
		return 0, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	var times []float64
	for start := time.Now(); len(times) == 0 || time.Since(start) < d; {
		began := time.Now()
		if _, err := f.Write(make([]byte, 4096)); err != nil {
			return 0, err
		}
		if err := f.Sync(); err != nil {
			return 0, err
		}
		times = append(times, float64(time.Since(began).Microseconds())/1000)
	}
	return measure.Median(times), nil
}

// A server is a keysvc.
type server struct {
	cmd             *exec.Cmd
	address, socket string // for mesim
	ended           chan error
}

// serve starts keysvc with one of the configurations that scripts/bench.sh has written.
func (b *bench) serve(config string) (*server, error) {
	path := filepath.Join(b.dir, config)
	log, err := os.Create(path + ".log")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	s := &server{cmd: exec.Command("bin/keysvc", "serve", "--config", path+".yaml"), socket: "unix:" + path + ".sock",
		ended: make(chan error, 1)}
	s.cmd.Stderr, s.cmd.Env = log, append(os.Environ(), "KMEHSM_TOKEN=") // it would override the configuration
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { s.ended <- s.cmd.Wait() }()
	for range 600 {
		select {
		case err := <-s.ended:
			return nil, fmt.Errorf("keysvc does not serve: %w: see %s", err, log.Name())
		case <-time.After(100 * time.Millisecond):
		}
		lines, err := os.ReadFile(log.Name())
		if err != nil {
			return nil, errors.Join(err, s.stop())
		}
		for line := range strings.Lines(string(lines)) {
			var serving struct {
				Msg       string   `json:"msg"`
				Addresses []string `json:"addresses"`
			}
			if json.Unmarshal([]byte(line), &serving) == nil && serving.Msg == "serving" {
				s.address = "https://" + serving.Addresses[0]
				return s, nil
			}
		}
	}
	return nil, errors.Join(fmt.Errorf("keysvc does not serve: see %s", log.Name()), s.stop())
}

func (s *server) stop() error {
	s.cmd.Process.Signal(syscall.SIGTERM)
	return <-s.ended
}

func cpuOf(servers []*server) (sum time.Duration, err error) {
	for _, s := range servers {
		cpu, err := measure.ProcessCPU(s.cmd.Process.Pid)
		if err != nil {
			return 0, err
		}
		sum += cpu
	}
	return sum, nil
}

// clientFiles are the certificate and the key of the simulated HSS, and the CA of keysvc.
func (b *bench) clientFiles() (certificate, key, ca string) {
	tls := filepath.Join(b.dir, "tls")
	return filepath.Join(tls, "hss.pem"), filepath.Join(tls, "hss.key"), filepath.Join(tls, "ca.pem")
}

// load runs mesim load with devices of the lot of some bits, and parses its output.
func (b *bench) load(result any, address, bits string, d time.Duration, rate float64, more ...string) error {
	certificate, key, ca := b.clientFiles()
	out, err := output(b.ctx, "bin/mesim", append([]string{"load", "--server", address, "--ca", ca, "--cert",
		certificate, "--key", key, "--injection", filepath.Join(b.dir, "injection-"+bits),
		"--fixture-key", filepath.Join(b.dir, "fixture.key"),
		"--fixture-enrolment", filepath.Join(b.dir, "fixture-enrolment.json"), "--duration", d.String(), "--rate",
		fmt.Sprint(rate)}, more...)...)
	if err != nil {
		return err
	}
	return json.Unmarshal(out, result)
}

// output runs a program, and gives its standard output.
func output(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", filepath.Base(name), args[0], err, errs.String())
	}
	return out, nil
}
