package sqlstore

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// What a device's attach asks of the store, by many at once, as a service has it under load.
func BenchmarkAttach(b *testing.B) { onSQLite(b, benchAttach) }

func BenchmarkPostgresAttach(b *testing.B) { onPostgres(b, benchAttach) }

func benchAttach(b *testing.B, s *Store, begins func()) {
	attach := func(i int64) error {
		imsi, err := imsiOf(i)
		if err != nil {
			return err
		}
		o := binding.Origin{Provisioning: binding.Allowed}
		q := binding.VectorRequest{IMSI: imsi, Origin: o, RANDs: []hsmkeys.RAND{{byte(i), byte(i >> 8)}}, Now: t0,
			AttemptTTL: time.Hour, PendingVectors: 3}
		soon := func(f func() error) error {
			done := s.Soon()
			defer done()
			return f()
		}
		prepare := func() (d binding.Decision, err error) {
			err = soon(func() error { d, err = s.Prepare(b.Context(), q); return err })
			return d, err
		}
		first, err := prepare()
		if err != nil {
			return err
		}
		if err := soon(func() error { return bindOf(b, s, i, imsi, first.Attempt.ID) }); err != nil {
			return err
		}
		q.RANDs = []hsmkeys.RAND{{byte(i), byte(i >> 8), 1}}
		if _, err := prepare(); err != nil {
			return err
		}
		q.Ready = first.Attempt.ID
		if _, err := prepare(); err != nil {
			return err
		}
		return soon(func() error {
			sub, err := s.Report(b.Context(), imsi, o.Name, true, t0)
			if err == nil && sub.Active == nil {
				err = errors.New("not active")
			}
			return err
		})
	}
	b.ReportAllocs()
	b.ResetTimer()
	begins()
	defer testproc.ReportCPU(b)()
	forAll(b, attach)
}

// The ledger and the binding, durably, by many at once, as a service has it under load.
func BenchmarkEstablish(b *testing.B) { onSQLite(b, benchEstablish) }

func BenchmarkPostgresEstablish(b *testing.B) { onPostgres(b, benchEstablish) }

func benchEstablish(b *testing.B, s *Store, begins func()) {
	imsis, ids := make([]kme.IMSI, b.N), make([]string, b.N)
	forAll(b, func(i int64) (err error) {
		done := s.Soon()
		defer done()
		if imsis[i], err = imsiOf(i); err != nil {
			return err
		}
		d, err := s.Prepare(b.Context(), binding.VectorRequest{
			IMSI: imsis[i], Origin: binding.Origin{Provisioning: binding.Allowed},
			RANDs: []hsmkeys.RAND{{byte(i), byte(i >> 8)}}, Now: t0, AttemptTTL: time.Hour,
		})
		if err == nil {
			ids[i] = d.Attempt.ID
		}
		return err
	})
	b.ReportAllocs()
	b.ResetTimer()
	begins()
	defer testproc.ReportCPU(b)()
	forAll(b, func(i int64) error {
		done := s.Soon()
		defer done()
		return bindOf(b, s, i, imsis[i], ids[i])
	})
}

// imsiOf is one of a billion, in no order.
func imsiOf(i int64) (kme.IMSI, error) { return kme.ParseIMSI(fmt.Sprintf("00101%010d", i*7919%1e9)) }

// bindOf makes a binding.
func bindOf(b *testing.B, s *Store, i int64, imsi kme.IMSI, attempt string) error {
	imei, err := kme.ParseIMEI("35209900000001")
	if err != nil {
		return err
	}
	tag := sha256.Sum256(fmt.Append(nil, i))
	return s.Establish(b.Context(), &binding.Binding{
		IMSI: imsi, IMEI: imei, Manufacturer: "uogvGY7XcA_OB_9takJbeRvZ4FEM767Bc3xPYsO5e-Q", Lot: "L1",
		State: binding.Pending, Sealed: tag[:], NWSig: tag[:], AttemptID: attempt,
		PayloadSHA256: tag[:], Established: t0, Expires: t0.Add(time.Hour),
	}, tag[:], true, t0)
}

// forAll calls f for each of b.N, 32 at once.
func forAll(b *testing.B, f func(i int64) error) {
	var next atomic.Int64
	var all sync.WaitGroup
	for range 32 {
		all.Go(func() {
			for i := next.Add(1) - 1; i < int64(b.N); i = next.Add(1) - 1 {
				if err := f(i); err != nil {
					b.Error(err)
				}
			}
		})
	}
	all.Wait()
}

// on opens a store for a benchmark.
func on(b *testing.B, name string, bench func(b *testing.B, s *Store, begins func()), begins func()) {
	s, err := Open(b.Context(), name, rowKey)
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	bench(b, s, begins)
}

func onSQLite(b *testing.B, bench func(b *testing.B, s *Store, begins func())) {
	on(b, "sqlite:"+filepath.Join(b.TempDir(), "keysvc.db"), bench, func() {})
}

// onPostgres reports what the server spends besides.
func onPostgres(b *testing.B, bench func(b *testing.B, s *Store, begins func())) {
	server := pgtest.Start(b)
	var before time.Duration
	on(b, server.Database(b), bench, func() { before = server.CPU(b) })
	b.ReportMetric(float64((server.CPU(b)-before).Microseconds())/float64(b.N), "server-us/op")
}
