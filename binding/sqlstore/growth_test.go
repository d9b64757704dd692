package sqlstore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/subscription"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/kme"
)

// step is one of those that a whole attach makes of the store, by the device at a place of the database that is free.
type step struct {
	name string
	make func(ctx context.Context, s *Store, d device) error
}

type device struct {
	imsi  kme.IMSI
	bound kme.IMSI // one that is filled in
	imei  kme.IMEI
	sum   [sha256.Size]byte // of its own
	at    time.Time
}

// devices are so many from place number first on of a walk that falls on every place between the bindings once.
func devices(first, n, bindings int, at time.Time) []device {
	const far = 1_000_000_007 // a prime
	places := bindings * (room - 1)
	all := make([]device, n)
	for k := range all {
		d, place := &all[k], (first+k)%places*far%places
		d.imsi = parsed(&d.imsi, fmt.Sprintf("00101%010d", place/(room-1)*room+1+place%(room-1)))
		d.bound, d.imei, d.at = filledIMSI(rand.IntN(bindings)), filledIMEI(rand.IntN(bindings)), at
		d.sum = sha256.Sum256([]byte("device " + d.imsi.String()))
	}
	return all
}

func (d device) request() binding.VectorRequest {
	return binding.VectorRequest{
		IMSI: d.imsi, Origin: binding.Origin{Provisioning: binding.Allowed}, RANDs: []hsmkeys.RAND{[16]byte(d.sum[:])},
		Now: d.at, AttemptTTL: time.Hour, PendingVectors: 3,
	}
}

// attempt is what request opens.
func (d device) attempt(s *Store) string { return s.issue(new(subscription.Stored), d.request()).ID }

var steps = []step{
	{"bound", func(ctx context.Context, s *Store, d device) error {
		q := d.request()
		q.IMSI = d.bound
		_, err := s.Prepare(ctx, q)
		return err
	}},
	{"prepare", func(ctx context.Context, s *Store, d device) error {
		_, err := s.Prepare(ctx, d.request())
		return err
	}},
	{"establish", func(ctx context.Context, s *Store, d device) error {
		return s.Establish(ctx, &binding.Binding{
			IMSI: d.imsi, IMEI: d.imei, Manufacturer: "uogvGY7XcA_OB_9takJbeRvZ4FEM767Bc3xPYsO5e-Q", Lot: "L1",
			State: binding.Pending, Sealed: d.sum[:], NWSig: d.sum[:], AttemptID: d.attempt(s),
			PayloadSHA256: d.sum[:], Established: d.at, Expires: d.at.Add(time.Hour),
		}, d.sum[:], true, d.at)
	}},
	{"vector", func(ctx context.Context, s *Store, d device) error {
		q := d.request()
		q.RANDs, q.Ready = []hsmkeys.RAND{[16]byte(d.sum[16:])}, d.attempt(s)
		_, err := s.Prepare(ctx, q)
		return err
	}},
	{"report", func(ctx context.Context, s *Store, d device) error {
		sub, err := s.Report(ctx, d.imsi, kme.Origin{}, true, d.at)
		if err == nil && (sub.Active == nil || sub.Active.IMSI != d.imsi) {
			err = fmt.Errorf("%s is not active", d.imsi)
		}
		return err
	}},
}

// cost is what a step takes of all cores, in microseconds, and writes to files, in KiB.
type cost struct{ cpu, written float64 }

// by32 has 32 at a time make a step of all devices, and gives what each took.
func (st step) by32(ctx context.Context, s *Store, devices []device) (c cost, err error) {
	const atOnce = 32
	spent, wrote := cpu(), written()
	var all sync.WaitGroup
	errs := make([]error, atOnce)
	for w := range atOnce {
		all.Go(func() {
			done := s.Soon()
			defer done()
			for i := w; i < len(devices) && errs[w] == nil; i += atOnce {
				errs[w] = st.make(ctx, s, devices[i])
			}
		})
	}
	all.Wait()
	for _, e := range errs {
		if e != nil {
			return c, fmt.Errorf("%s: %w", st.name, e)
		}
	}
	n := float64(len(devices))
	return cost{(cpu() - spent) / n, (written() - wrote) / n}, nil
}

// cpu is what the process has spent so far.
func cpu() (us float64) {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e3
}

// written is what the process has written to files and elsewhere so far (proc(5), /proc/pid/io).
func written() (kib float64) {
	text, err := os.ReadFile("/proc/self/io")
	if err != nil {
		panic(err)
	}
	_, text, _ = bytes.Cut(text, []byte("wchar: "))
	line, _, _ := bytes.Cut(text, []byte("\n"))
	n, err := strconv.ParseFloat(string(line), 64)
	if err != nil {
		panic(err)
	}
	return n / 1024
}

// grow compares databases with few and many bindings, in alternation: what each step of a whole attach, and a vector
// for a bound device, costs in them, medians of so many rounds. The large one is in a folder.
func grow(t testing.TB, dir string, few, many, rounds, each int) (costs map[string][2]cost) {
	t.Helper()
	sizes := [2]int{few, many}
	stores := [2]*Store{filled(t, t.TempDir(), few), filled(t, dir, many)}
	all := map[string][2][]cost{}
	first, at := rand.IntN(1<<30), time.Now()
	for round := range rounds + 1 {
		for i, s := range stores {
			of := devices(first, each, sizes[i], at)
			for _, st := range steps {
				c, err := st.by32(t.Context(), s, of)
				if err != nil {
					t.Fatal(err)
				}
				if round > 0 { // the first one warms the caches
					both := all[st.name]
					both[i] = append(both[i], c)
					all[st.name] = both
				}
			}
		}
		first += each
	}
	costs = map[string][2]cost{}
	for name, both := range all {
		costs[name] = [2]cost{medians(both[0]), medians(both[1])}
	}
	return costs
}

func medians(all []cost) cost {
	median := func(of func(cost) float64) float64 {
		values := make([]float64, len(all))
		for i, c := range all {
			values[i] = of(c)
		}
		slices.Sort(values)
		return values[len(values)/2]
	}
	return cost{median(func(c cost) float64 { return c.cpu }), median(func(c cost) float64 { return c.written })}
}

// No step looks at more rows where there are more: one that scans a table takes many times as long in the larger
// database.
func TestGrowth(t *testing.T) {
	const few, many = 200, 10_000
	for name, c := range grow(t, t.TempDir(), few, many, 3, 64) {
		t.Logf("%-9s %4.0f us with %d bindings, %4.0f us with %d", name, c[0].cpu, few, c[1].cpu, many)
		if c[1].cpu > 6*c[0].cpu {
			t.Errorf("%s: %.0f us with %d bindings, %.0f us with %d", name, c[0].cpu, few, c[1].cpu, many)
		}
	}
}

// BenchmarkGrowth compares a database of KMEHSM_ROWS bindings with one of 10,000, see grow, in b.N rounds.
// KMEHSM_FILLED names a folder for the large one, to use it again.
func BenchmarkGrowth(b *testing.B) {
	dir, many := large(b, 100_000)
	const few = 10_000
	for name, c := range grow(b, dir, few, many, b.N, 512) {
		for i, size := range [2]int{few, many} {
			b.ReportMetric(c[i].cpu, fmt.Sprintf("%s-us/%d", name, size))
			b.ReportMetric(c[i].written, fmt.Sprintf("%s-KiB/%d", name, size))
		}
	}
}

// A service reads its ledger all the time that it runs. It does so page by page, and rests for most of the time.
func TestReadingRests(t *testing.T) {
	const n = 16_000
	s, ctx := filled(t, t.TempDir(), n), t.Context()
	least, rests := time.Hour, 0
	for range 3 {
		began, entries := time.Now(), 0
		rests = 0
		for chain := range int64(binding.Chains) {
			m, _, err := s.chains.Verify(ctx, s.chains.Reads("verify"), chain, func(tables.Row) error { return nil },
				func(context.Context, time.Duration) error { rests++; return nil })
			if err != nil {
				t.Fatal(err)
			}
			entries += m
		}
		if entries != 2*n || rests < binding.Chains {
			t.Fatalf("%d entries, want %d, with %d rests between them", entries, 2*n, rests)
		}
		least = min(least, time.Since(began))
	}
	began := time.Now()
	if m, err := s.VerifyLedger(ctx); err != nil || m != 2*n {
		t.Fatalf("%d entries, %v", m, err)
	}
	// A rest ends after a second: where a page takes long, it is no longer than that.
	if took := time.Since(began); took < min(3*least, time.Duration(rests)*time.Second/10) {
		t.Errorf("a reading took %s, with %d rests; one without a rest takes %s", took, rests, least)
	}
}

// PostgreSQL looks up a device and all that was ever bound to it by indexes. A statement for which it knows no other
// way but to read a whole table does so also where that is made expensive.
func TestPostgresEquipmentByIndexes(t *testing.T) {
	ctx, database := t.Context(), pgtest.Start(t).Database(t)
	s, err := Open(ctx, database, rowKey)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	plan := explained(t, s, "SET LOCAL enable_seqscan = off",
		strings.NewReplacer("$1", "'001010000000001'", "$2", "'35209900000001'").Replace(subscription.OfDevice))
	if strings.Contains(plan, "Seq Scan") || strings.Contains(plan, "SubPlan") {
		t.Error(plan)
	}
}

// PostgreSQL finds the end of a page by an index, also while it has no statistics, as after a restore.
func TestPostgresPagesByIndexes(t *testing.T) {
	s := filledAs(t, pgtest.Start(t).Database(t), 3000)
	plan := explained(t, s, "SET LOCAL work_mem = '64MB'", strings.ReplaceAll(nextPage, "$1", "'001010000000001'"))
	if strings.Contains(plan, "Seq Scan on ledger") || strings.Contains(plan, "Seq Scan on bindings") ||
		strings.Contains(plan, "HashAggregate") {
		t.Error(plan)
	}
}

// explained is PostgreSQL's plan of a statement with a setting.
func explained(t *testing.T, s *Store, setting, text string) string {
	t.Helper()
	ctx := t.Context()
	tx, err := s.read.BeginTx(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.ExecContext(ctx, setting); err != nil {
		t.Fatal(err)
	}
	rows, err := tx.QueryContext(ctx, "EXPLAIN "+text)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	var plan strings.Builder
	for rows.Next() {
		var line string
		if err := rows.Scan(&line); err != nil {
			t.Fatal(err)
		}
		plan.WriteString(line + "\n")
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return plan.String()
}

// SQLite compiles the statement of CheckEquipment once: a use costs that of some subscriptions.
func TestEquipmentIsCompiledOnce(t *testing.T) {
	s := open(t, path(t))
	imsi, err := imsiOf(1)
	if err != nil {
		t.Fatal(err)
	}
	imei, err := kme.ParseIMEI("35209900000001")
	if err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread() // SQLite runs in the caller's thread
	defer runtime.UnlockOSThread()
	cost := func(f func() error) time.Duration {
		var before, after unix.Timespec
		err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &before)
		for range 200 {
			err = errors.Join(err, f())
		}
		if err := errors.Join(err, unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &after)); err != nil {
			t.Fatal(err)
		}
		return time.Duration(after.Nano() - before.Nano())
	}
	least := func(f func() error) time.Duration {
		cost(f) // it warms up
		return min(cost(f), cost(f), cost(f))
	}
	subscription := least(func() error {
		_, err := s.Subscription(t.Context(), imsi, t0)
		return err
	})
	equipment := least(func() error {
		_, _, err := s.Equipment(t.Context(), imei, imsi, t0)
		return err
	})
	t.Logf("200 subscriptions cost %s, 200 checks %s", subscription, equipment)
	if equipment > 12*subscription {
		t.Errorf("a check of equipment costs %s, a subscription %s", equipment/200, subscription/200)
	}
}
