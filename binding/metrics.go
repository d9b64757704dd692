package binding

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// Metrics are what a Service counts and measures, for Prometheus. They may be used concurrently.
type Metrics struct {
	calls    *prometheus.HistogramVec
	refusals *prometheus.CounterVec
	rejected *prometheus.CounterVec
	hsm      *prometheus.HistogramVec
	queue    prometheus.Histogram
	inFlight prometheus.Gauge
}

// buckets are from 100 us to 6 s: a cached answer and a raw RSA-4096 decryption in a slow token are in there.
var buckets = prometheus.ExponentialBuckets(0.0001, 2, 17)

// NewMetrics makes and registers them.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{
		calls:    prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "kme_call_seconds", Help: "Calls by method and reason (OK, or that of the refusal).", Buckets: buckets}, []string{"method", "reason"}),
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kme_refusals_total", Help: "Refused calls, by reason."}, []string{"reason"}),
		rejected: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kme_rejected_payloads_total", Help: "Payloads that were rejected, by what was wrong; callers do not learn it."}, []string{"fault"}),
		hsm:      prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "kme_hsm_operation_seconds", Help: "Operations of the HSM, with the wait for a session.", Buckets: buckets}, []string{"operation", "result"}),
		queue:    prometheus.NewHistogram(prometheus.HistogramOpts{Name: "kme_hsm_queue_seconds", Help: "The wait for a session of the HSM.", Buckets: buckets}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{Name: "kme_calls_in_flight", Help: "Calls that are at the HSM, or wait for it."}),
	}
	r.MustRegister(m.calls, m.refusals, m.rejected, m.hsm, m.queue, m.inFlight)
	return m
}

// Queued observes a wait for a session.
func (m *Metrics) Queued(d time.Duration) { m.queue.Observe(d.Seconds()) }

// Called observes a call that has ended: with OK, or the reason that it was refused for.
func (m *Metrics) Called(method, reason string, took time.Duration) {
	m.calls.WithLabelValues(method, reason).Observe(took.Seconds())
}

func (m *Metrics) refused(r *Refusal) {
	m.refusals.WithLabelValues(string(r.Reason)).Inc()
	if r.Reason == kme.KMERejected {
		fault := "other"
		switch {
		case errors.Is(r.Cause, ErrUsed):
			fault = "used"
		case r.Cause != nil:
			fault = r.Cause.Error()
		}
		m.rejected.WithLabelValues(fault).Inc()
	}
}

// measured is a Token whose operations are measured.
type measured struct {
	Token
	hsm *prometheus.HistogramVec
}

func (t measured) observe(operation string, start time.Time, err error) {
	result := "ok"
	if err != nil {
		result = "failed"
	}
	t.hsm.WithLabelValues(operation, result).Observe(time.Since(start).Seconds())
}

func (t measured) OpenPayload(ctx context.Context, p hsmkeys.Payload) (o *hsmkeys.Opened, err error) {
	defer func(start time.Time) { t.observe("open payload", start, err) }(time.Now())
	return t.Token.OpenPayload(ctx, p)
}

func (t measured) EncryptRANDs(ctx context.Context, sealed []byte, rands []hsmkeys.RAND) (out []hsmkeys.RAND, err error) {
	defer func(start time.Time) { t.observe("encrypt RANDs", start, err) }(time.Now())
	return t.Token.EncryptRANDs(ctx, sealed, rands)
}

func (t measured) DecryptRAND(ctx context.Context, sealed []byte, rand hsmkeys.RAND) (out hsmkeys.RAND, err error) {
	defer func(start time.Time) { t.observe("decrypt RAND", start, err) }(time.Now())
	return t.Token.DecryptRAND(ctx, sealed, rand)
}
