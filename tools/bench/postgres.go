package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kmehsm/kmehsm/tools/bench/measure"
)

// onPostgres has the figures of EstablishKME and of whole attaches with the store on PostgreSQL, on the same cores.
type onPostgres struct {
	measured
	Attach      measured     `json:"attach"`
	DatabaseCPU float64      `json:"database_cpu_us"` // of an attach
	Two         twoInstances `json:"two_instances"`
}

// twoInstances compares two instances on one database and one token, each with its own client, with one of them.
type twoInstances struct {
	One         float64 `json:"one_per_second"`
	PerSecond   float64 `json:"two_per_second"`
	Times       float64 `json:"times"`  // median of the pairs
	CPU         float64 `json:"cpu_us"` // of both keysvcs, an attach
	DatabaseCPU float64 `json:"database_cpu_us"`
	ClientCPU   float64 `json:"client_cpu_us"`
}

// postgres measures with the lot of 2048 bits.
func (b *bench) postgres(r *report) error {
	const bits = "2048"
	if _, err := os.Stat(filepath.Join(b.dir, "keysvc-postgres.yaml")); errors.Is(err, fs.ErrNotExist) {
		return leftOut("PostgreSQL is not installed")
	}
	only := []string{bits}
	return b.eachLot("keysvc-postgres", "POSTGRES_TOKEN", only, func(_ string, s *server, token bare) error {
		p := new(onPostgres)
		r.Postgres = map[string]*onPostgres{bits: p}
		establish := func(d time.Duration, rate float64) (sample, error) {
			var l struct{ Establish sample }
			err := b.load(&l, s.address, bits, d, rate)
			return l.Establish, err
		}
		if err := b.besideToken("PostgreSQL, EstablishKME", &p.measured, b.fewer(), token, establish); err != nil {
			return err
		}
		var database []float64
		one := b.attaches(s.address, bits, s)
		attach := func(d time.Duration, rate float64) (sample, error) {
			before, err := b.databaseCPU()
			if err != nil {
				return sample{}, err
			}
			l, err := one(d, rate)
			if err != nil {
				return sample{}, err
			}
			after, err := b.databaseCPU()
			database = append(database, float64((after-before).Microseconds())/float64(l.Calls))
			return l, err
		}
		if err := b.besideToken("PostgreSQL, attach", &p.Attach, b.fewer(), token, attach); err != nil {
			return err
		}
		p.DatabaseCPU = measure.Round(measure.Median(database), 0)
		other, err := b.serve("keysvc-postgres-2")
		if err != nil {
			return err
		}
		return errors.Join(b.two(&p.Two, bits, s, other), other.stop())
	})
}

func (b *bench) two(result *twoInstances, bits string, servers ...*server) error {
	var single, both []sample
	var times, database []float64
	for i := range b.fewer() {
		one, err := b.attaches(servers[0].address, bits, servers[0])(b.each, 0)
		if err != nil {
			return err
		}
		before, err := b.databaseCPU()
		if err != nil {
			return err
		}
		var halves [2]sample
		var loads errgroup.Group
		for i, s := range servers {
			loads.Go(func() (err error) {
				halves[i], err = b.attaches(s.address, bits, s)(b.each, 0)
				return err
			})
		}
		if err := loads.Wait(); err != nil {
			return err
		}
		after, err := b.databaseCPU()
		if err != nil {
			return err
		}
		calls := float64(halves[0].Calls + halves[1].Calls)
		each := func(f func(sample) float64) float64 {
			return (f(halves[0])*float64(halves[0].Calls) + f(halves[1])*float64(halves[1].Calls)) / calls
		}
		sum := sample{PerSecond: halves[0].PerSecond + halves[1].PerSecond,
			cpu:       each(func(s sample) float64 { return s.cpu }),
			ClientCPU: each(func(s sample) float64 { return s.ClientCPU })}
		single, both = append(single, one), append(both, sum)
		times = append(times, sum.PerSecond/one.PerSecond)
		database = append(database, float64((after-before).Microseconds())/calls)
		b.progress("PostgreSQL, two instances, %d of %d: one %.0f a second, two %.0f, %.2f times", i+1, b.fewer(),
			one.PerSecond, sum.PerSecond, sum.PerSecond/one.PerSecond)
	}
	of := func(all []sample, f func(sample) float64, digits int) float64 {
		return measure.Round(medianOf(all, f), digits)
	}
	perSecond := func(s sample) float64 { return s.PerSecond }
	*result = twoInstances{One: of(single, perSecond, 1), PerSecond: of(both, perSecond, 1),
		Times: measure.Round(measure.Median(times), 2), CPU: of(both, func(s sample) float64 { return s.cpu }, 0),
		DatabaseCPU: measure.Round(measure.Median(database), 0),
		ClientCPU:   of(both, func(s sample) float64 { return s.ClientCPU }, 0)}
	return nil
}

// databaseCPU is the CPU time of all processes of PostgreSQL, also of those that have ended.
func (b *bench) databaseCPU() (sum time.Duration, err error) {
	data, err := os.ReadFile(filepath.Join(b.dir, "postgres.pid"))
	if err != nil {
		return 0, err
	}
	postmaster := strings.TrimSpace(string(data))
	pid, err := strconv.Atoi(postmaster)
	if err != nil {
		return 0, err
	}
	if sum, err = measure.ProcessCPU(pid); err != nil {
		return 0, err
	}
	children, err := os.ReadFile("/proc/" + postmaster + "/task/" + postmaster + "/children")
	if err != nil {
		return 0, err
	}
	for child := range strings.FieldsSeq(string(children)) {
		if pid, err = strconv.Atoi(child); err != nil {
			return 0, err
		}
		cpu, err := measure.ProcessCPU(pid)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // it has ended since
			return 0, err
		}
		sum += cpu
	}
	return sum, nil
}
