package binding_test

import (
	"maps"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/hsmkeys"
)

// Every operation of the HSM is measured by its name, the decryption for kme-export too, and each has its wait for
// a session.
func TestMeasured(t *testing.T) {
	r, _, l := newServed(t)
	registry := prometheus.NewRegistry()
	metrics := binding.NewMetrics(registry)
	r.service.Observe(metrics)
	r.token.Observe(metrics)
	imsi, d := newIMSI(), l.devices[0]
	payload, _ := d.payload(t)
	must[*binding.Established](t)(r.service.EstablishKME(t.Context(), imsi, d.imei.String(), r.attempt(t, imsi), payload, here, true))
	must[*binding.Prepared](t)(r.service.PrepareVector(t.Context(), imsi, newRANDs(2), here))
	must[hsmkeys.RAND](t)(r.service.RestoreRAND(t.Context(), imsi, make([]byte, 16), here))

	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	operations, waits := map[string]uint64{}, uint64(0)
	for _, family := range families {
		for _, m := range family.GetMetric() {
			switch family.GetName() {
			case "kme_hsm_operation_seconds":
				key := ""
				for _, l := range m.GetLabel() {
					key += l.GetValue() + " "
				}
				operations[key] = m.GetHistogram().GetSampleCount()
			case "kme_hsm_queue_seconds":
				waits = m.GetHistogram().GetSampleCount()
			}
		}
	}
	want := map[string]uint64{"open payload ok ": 1, "export KME ok ": 1, "encrypt RANDs ok ": 1, "decrypt RAND ok ": 1}
	if !maps.Equal(operations, want) || waits != 4 {
		t.Errorf("operations %v and %d waits", operations, waits)
	}
}
