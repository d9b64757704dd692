package binding_test

import (
	"sync/atomic"
	"testing"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// EstablishKME without the way to the service: token, ledger, and a durable commit.
func BenchmarkEstablish(b *testing.B) {
	r, _, l := newServed(b)
	softhsmtest.AsServed(b, r.token.Sessions())
	service := r.unrecorded(b, binding.Options{})
	type call struct {
		imsi    kme.IMSI
		attempt string
		d       *device
		payload []byte
	}
	calls := make([]call, b.N)
	for i := range calls {
		c := call{imsi: newIMSI(), d: l.devices[i%len(l.devices)]}
		p, err := service.PrepareVector(b.Context(), c.imsi, newRANDs(1), here)
		if err != nil {
			b.Fatal(err)
		}
		c.attempt = p.AttemptID
		c.payload, _ = c.d.payload(b)
		calls[i] = c
	}
	var next atomic.Int64
	b.SetParallelism(16)
	b.ReportAllocs()
	b.ResetTimer()
	defer testproc.ReportCPU(b)()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			c := &calls[next.Add(1)-1]
			if _, err := service.EstablishKME(b.Context(), binding.EstablishRequest{IMSI: c.imsi, IMEI: c.d.imei,
				AttemptID: c.attempt, Payload: c.payload, Origin: here}); err != nil {
				b.Error(err)
			}
		}
	})
}

// PrepareVector of a bound subscription, without the way to the service.
func BenchmarkPrepareBound(b *testing.B) {
	r, _, l := newServed(b)
	service := r.unrecorded(b, binding.Options{})
	imsi := newIMSI()
	payload, _ := l.devices[0].payload(b)
	if _, err := service.EstablishKME(b.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: l.devices[0].imei,
		AttemptID: r.attempt(b, imsi), Payload: payload, Origin: here}); err != nil {
		b.Fatal(err)
	}
	r.activate(b, imsi)
	b.SetParallelism(16)
	b.ReportAllocs()
	b.ResetTimer()
	defer testproc.ReportCPU(b)()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := service.PrepareVector(b.Context(), imsi, newRANDs(1), here); err != nil {
				b.Error(err)
			}
		}
	})
}
