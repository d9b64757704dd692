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
)

type establishment struct {
	ratio
	P50      float64 `json:"p50_ms"` // at full load
	P99      float64 `json:"p99_ms"`
	HalfRate float64 `json:"half_rate"` // EstablishKME a second
	HalfP50  float64 `json:"half_p50_ms"`
	HalfP99  float64 `json:"half_p99_ms"`
	Open     float64 `json:"prepare_opening_per_second"` // PrepareVector of a subscription without a binding
	Process  float64 `json:"prepare_bound_per_second"`   // and of a bound one
}

// establish measures keysvc, as it is without any setting, from mesim, on the same cores as the bare token.
func (b *bench) establish(r *report) error {
	token, err := hsmkeys.OpenOperator(b.ctx, os.Getenv("OPERATOR_TOKEN"), hsmkeys.Options{})
	if err != nil {
		return err
	}
	defer token.Close()
	lots, err := b.lots()
	if err != nil {
		return err
	}
	for _, bits := range b.bits {
		m := lots["L"+bits]
		if m == nil {
			return fmt.Errorf("lot L%s was not imported", bits)
		}
		server, err := b.serve()
		if err != nil {
			return err
		}
		e := new(establishment)
		r.Establish[bits] = e
		key := hsmkeys.Key{Role: hsmkeys.RoleLot, Manufacturer: b.manufacturer, Name: m.Lot}
		err = b.measure(e, server, bits, func(d time.Duration) (float64, error) {
			return token.BareDecryptions(b.ctx, key, m.PublicKey(), d)
		})
		if err := errors.Join(err, server.stop()); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) lots() (map[string]*directory.Manifest, error) {
	out, err := output(b.ctx, "bin/keysvc", "lot", "list", "--state", filepath.Join(b.dir, "keysvc"), "--json")
	if err != nil {
		return nil, err
	}
	var all struct{ Lots []*directory.Manifest }
	err = json.Unmarshal(out, &all)
	byName := map[string]*directory.Manifest{}
	for _, m := range all.Lots {
		byName[m.Lot] = m
	}
	return byName, err
}

func (b *bench) measure(
	e *establishment, server *server, bits string, bare func(time.Duration) (float64, error),
) error {
	if _, err := server.load(b, bits, time.Second, 0); err != nil { // to warm up
		return err
	}
	var p50, p99, open, process []float64
	for i := range b.pairs {
		token, err := bare(b.each)
		if err != nil {
			return err
		}
		l, err := server.load(b, bits, b.each, 0)
		if err != nil {
			return err
		}
		e.add(token, l.Establish.PerSecond)
		p50, p99, open, process = append(p50, l.Establish.P50), append(p99, l.Establish.P99), append(open,
			l.Open.PerSecond), append(process, l.Process.PerSecond)
		fmt.Fprintf(os.Stderr, "%s bits, %d of %d: token %.0f a second, EstablishKME %.0f, %.3f\n", bits, i+1, b.pairs,
			token, l.Establish.PerSecond, l.Establish.PerSecond/token)
	}
	e.finish()
	e.P50, e.P99, e.Open, e.Process = median(p50), median(p99), round(median(open), 1), round(median(process), 1)
	p50, p99 = nil, nil
	e.HalfRate = round(e.Service/2, 0)
	for range 3 {
		l, err := server.load(b, bits, b.each, e.HalfRate)
		if err != nil {
			return err
		}
		p50, p99 = append(p50, l.Establish.P50), append(p99, l.Establish.P99)
	}
	e.HalfP50, e.HalfP99 = median(p50), median(p99)
	return nil
}

// A server is a keysvc.
type server struct {
	cmd *exec.Cmd
	url string
}

func (b *bench) serve() (*server, error) {
	log, err := os.Create(filepath.Join(b.dir, "keysvc.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	s := &server{cmd: exec.Command("bin/keysvc", "serve", "--config", filepath.Join(b.dir, "keysvc.yaml"))}
	s.cmd.Stderr = log
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	for range 100 {
		time.Sleep(100 * time.Millisecond)
		lines, err := os.ReadFile(log.Name())
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(lines)) {
			var serving struct {
				Msg       string   `json:"msg"`
				Addresses []string `json:"addresses"`
			}
			if json.Unmarshal([]byte(line), &serving) == nil && serving.Msg == "serving" {
				s.url = "https://" + serving.Addresses[0]
				return s, nil
			}
		}
	}
	return nil, errors.Join(fmt.Errorf("keysvc does not serve: see %s", log.Name()), s.stop())
}

func (s *server) stop() error {
	s.cmd.Process.Signal(syscall.SIGTERM)
	return s.cmd.Wait()
}

// A load is what mesim load prints.
type load struct {
	Establish, Open, Process struct {
		PerSecond float64 `json:"per_second"`
		P50       float64 `json:"p50_ms"`
		P99       float64 `json:"p99_ms"`
	}
}

func (s *server) load(b *bench, bits string, d time.Duration, rate float64) (*load, error) {
	tls := filepath.Join(b.dir, "tls")
	out, err := output(b.ctx, "bin/mesim", "load", "--server", s.url, "--ca", filepath.Join(tls, "ca.pem"), "--cert",
		filepath.Join(tls, "hss.pem"), "--key", filepath.Join(tls, "hss.key"),
		"--injection", filepath.Join(b.dir, "injection-"+bits), "--fixture-key", filepath.Join(b.dir, "fixture.key"),
		"--fixture-enrolment", filepath.Join(b.dir, "fixture-enrolment.json"), "--duration", d.String(), "--rate",
		fmt.Sprint(rate))
	if err != nil {
		return nil, err
	}
	l := new(load)
	return l, json.Unmarshal(out, l)
}

// output runs a program of ours.
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
