package binding_test

import (
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// Every operation of the HSM is measured by its name, the decryption for kme-export too, and each has its wait for
// a session.
func TestMeasured(t *testing.T) {
	r, _, l := newServed(t)
	registry := prometheus.NewRegistry()
	metrics := binding.NewMetrics(registry)
	r.service = r.newService(binding.Options{Lots: r.lots(t), Metrics: metrics})
	r.observed.to.Store(metrics)
	imsi, d := newIMSI(), l.devices[0]
	payload, _ := d.payload(t)
	must[*binding.Established](t)(r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
		AttemptID: r.attempt(t, imsi), Payload: payload, Origin: here, Export: true}))
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
				var key strings.Builder
				for _, l := range m.GetLabel() {
					key.WriteString(l.GetValue() + " ")
				}
				operations[key.String()] = m.GetHistogram().GetSampleCount()
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

// No metric says why a payload was rejected: whoever may read metrics, and sends payloads, would have an oracle.
func TestMetricsAreNoOracle(t *testing.T) {
	r, devices := newKnown(t)
	registry := prometheus.NewRegistry()
	r.service = r.newService(binding.Options{Lots: r.lots(t), Metrics: binding.NewMetrics(registry)})
	send := func(v *vector) error {
		imsi := newIMSI()
		_, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: devices[v].imei,
			AttemptID: r.attempt(t, imsi), Payload: v.Payload, Origin: here})
		return err
	}
	series := map[string]string{} // of all metrics, after a payload of each kind
	for _, v := range vectors(t).Vectors {
		why := v.Why
		if v.Expect == "accept" {
			why = "used"
		}
		if series[why] != "" || why == "length" {
			continue
		}
		if why == "used" {
			must[any](t)(nil, send(v))
		}
		checkRefused(t, v.Name, send(v), kme.KMERejected, "")
		var text strings.Builder
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, family := range families {
			for _, m := range family.GetMetric() {
				text.WriteString(family.GetName() + fmt.Sprint(m.GetLabel()) + "\n")
			}
		}
		series[why] = text.String()
	}
	if len(series) != 4 {
		t.Errorf("%d kinds were tried", len(series))
	}
	for why, text := range series {
		if text != series["used"] || !strings.Contains(text, "kme_rejected_payloads_total[]") {
			t.Errorf("%s: %s", why, text)
		}
	}
}
