package sqlstore

import (
	"crypto/sha256"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// The ledger and the binding, durably, by many at once, as a service has it under load.
func BenchmarkEstablish(b *testing.B) {
	s, err := Open(b.Context(), "sqlite:"+filepath.Join(b.TempDir(), "keysvc.db"), rowKey)
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	imei, err := kme.ParseIMEI("35209900000001")
	if err != nil {
		b.Fatal(err)
	}
	const atOnce = 32
	imsis := make([]kme.IMSI, b.N)
	forAll := func(f func(i int64) error) {
		var next atomic.Int64
		var all sync.WaitGroup
		for range atOnce {
			all.Go(func() {
				done := s.Soon()
				defer done()
				for i := next.Add(1) - 1; i < int64(b.N); i = next.Add(1) - 1 {
					if err := f(i); err != nil {
						b.Error(err)
					}
				}
			})
		}
		all.Wait()
	}
	forAll(func(i int64) (err error) {
		if imsis[i], err = kme.ParseIMSI(fmt.Sprintf("00101%010d", i*7919%1e9)); err != nil {
			return err
		}
		_, err = s.Prepare(b.Context(), binding.VectorRequest{
			IMSI: imsis[i], Origin: binding.Origin{Provisioning: binding.Allowed},
			RANDs: []hsmkeys.RAND{{byte(i), byte(i >> 8)}}, Now: t0, AttemptID: "AAECAwQFBgcICQoLDA0ODw",
			AttemptTTL: time.Hour,
		})
		return err
	})
	b.ReportAllocs()
	b.ResetTimer()
	defer testproc.ReportCPU(b)()
	forAll(func(i int64) error {
		tag := sha256.Sum256(fmt.Append(nil, i))
		return s.Establish(b.Context(), &binding.Binding{
			IMSI: imsis[i], IMEI: imei, Manufacturer: "uogvGY7XcA_OB_9takJbeRvZ4FEM767Bc3xPYsO5e-Q", Lot: "L1",
			State: binding.Pending, Sealed: tag[:], NWSig: tag[:], AttemptID: "AAECAwQFBgcICQoLDA0ODw",
			PayloadSHA256: tag[:], Established: t0, Expires: t0.Add(time.Hour),
		}, tag[:], true, t0)
	})
}
