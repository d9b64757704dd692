package binding

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/kme"
)

// Metrics are what a Service counts and measures, for Prometheus. They may be used concurrently.
type Metrics struct {
	calls    *prometheus.HistogramVec
	refusals *prometheus.CounterVec
	rejected prometheus.Counter
	hsm      *prometheus.HistogramVec
	queue    prometheus.Histogram
	inFlight prometheus.Gauge
	attaches prometheus.Counter
	accepted prometheus.Counter

	equipment       *prometheus.CounterVec
	unauthenticated *prometheus.CounterVec
}

// buckets are from 100 us to 6 s: a cached answer and a raw RSA-4096 decryption in a slow token are in there.
var buckets = prometheus.ExponentialBuckets(0.0001, 2, 17)

// NewMetrics makes and registers them.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{
		calls: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "kme_call_seconds",
			Help: "Calls by method and reason (OK, or that of the refusal).", Buckets: buckets},
			[]string{"method", "reason"}),
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kme_refusals_total",
			Help: "Refused calls, by reason."}, []string{"reason"}),
		// The reason is not among the labels: whoever reads metrics and sends payloads would have an oracle.
		rejected: prometheus.NewCounter(prometheus.CounterOpts{Name: "kme_rejected_payloads_total",
			Help: "Payloads that were rejected; why stands in the log alone."}),
		hsm: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "kme_hsm_operation_seconds", Help: "Operations of the HSM, without the wait for a session.",
			Buckets: buckets,
		}, []string{"operation", "result"}),
		queue: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "kme_hsm_queue_seconds",
			Help: "The wait for a session of the HSM.", Buckets: buckets}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{Name: "kme_calls_in_flight",
			Help: "Calls that are at the HSM, or wait for it."}),
		attaches: prometheus.NewCounter(prometheus.CounterOpts{Name: "kme_attaches_total",
			Help: "Authentications that succeeded, of devices that may be served: ReportAuthentication answered so."}),
		accepted: prometheus.NewCounter(prometheus.CounterOpts{Name: "kme_established_total",
			Help: "KMEs that were accepted; a call that was made again is not counted again."}),
		equipment: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kme_equipment_checks_total",
			Help: "Devices that CheckEquipment was asked about, by status and reason."}, []string{"status", "reason"}),
		unauthenticated: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kme_unauthenticated_total",
			Help: "Callers that were not let in: certificate, it was not verified; " +
				"handshake, TLS failed otherwise, as without a certificate; client and user, the configuration has " +
				"none such; token, N5g-eir had no access token that is good.",
		}, []string{"why"}),
	}
	before := panics.Count()
	broken := prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "kme_panics_total", Help: "Panics, each of which has ended a call or some work.",
	}, func() float64 { return float64(panics.Count() - before) })
	r.MustRegister(m.calls, m.refusals, m.rejected, m.hsm, m.queue, m.inFlight, m.attaches, m.accepted, broken,
		m.equipment, m.unauthenticated)
	// All counters exist from the start, so that the first event is an increase.
	for _, why := range []string{"certificate", "handshake", "client", "user", "token"} {
		m.unauthenticated.WithLabelValues(why)
	}
	for _, reason := range kme.Reasons() {
		m.refusals.WithLabelValues(string(reason))
	}
	for _, a := range answers() {
		m.equipment.WithLabelValues(string(a.Status), string(a.Reason))
	}
	return m
}

// Methods has the calls of these methods that are answered OK, or with an internal error, which an alert is for,
// counted from zero. Other histograms begin with their first value: each has 20 time series.
func (m *Metrics) Methods(names ...string) {
	for _, name := range names {
		m.calls.WithLabelValues(name, "OK")
		m.calls.WithLabelValues(name, "internal")
	}
}

// Totals are the counts since the start that matter over a day: attaches, established KMEs, and refusals by reason.
func (m *Metrics) Totals() map[string]float64 {
	value := func(c prometheus.Counter) float64 {
		var v dto.Metric
		if err := c.Write(&v); err != nil {
			return 0
		}
		return v.GetCounter().GetValue()
	}
	all := map[string]float64{CountAttaches: value(m.attaches), CountEstablished: value(m.accepted)}
	for _, reason := range kme.Reasons() {
		all[string(reason)] = value(m.refusals.WithLabelValues(string(reason)))
	}
	return all
}

// CountAttaches and CountEstablished are among what Totals has.
const (
	CountAttaches    = "attaches"
	CountEstablished = "established"
)

// Waited and Worked make Metrics an hsmkeys.Observer.
func (m *Metrics) Waited(d time.Duration) { m.queue.Observe(d.Seconds()) }

// Worked is described at Waited.
func (m *Metrics) Worked(operation string, took time.Duration, err error) {
	result := "ok"
	if err != nil {
		result = "failed"
	}
	m.hsm.WithLabelValues(operation, result).Observe(took.Seconds())
}

// Called observes a call that has ended: with OK, or the reason that it was refused for.
func (m *Metrics) Called(method, reason string, took time.Duration) {
	m.calls.WithLabelValues(method, reason).Observe(took.Seconds())
}

func (m *Metrics) refused(r *Refusal) {
	m.refusals.WithLabelValues(string(r.Reason)).Inc()
	if r.Reason == kme.KMERejected {
		m.rejected.Inc()
	}
}
