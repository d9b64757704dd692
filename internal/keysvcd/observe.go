package keysvcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"connectrpc.com/otelconnect"
	"github.com/maypok86/otter/v2/stats"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	"go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.37.0"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/version"
)

// weaknesses gives those that were accepted at keysvc init. It logs and counts them, too.
func weaknesses(
	ctx context.Context, tokens []*hsmkeys.OperatorToken, registry prometheus.Registerer, log *slog.Logger,
) (all []string, err error) {
	count := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "kme_hsm_weaknesses", Help: "What the token does not do that the secrecy of keys rests on, accepted " +
			"when it was initialised.",
	}, []string{"token"})
	registry.MustRegister(count)
	for _, token := range tokens {
		weak, err := token.Weak(ctx)
		if err != nil {
			return nil, err
		}
		count.WithLabelValues(token.Serial()).Set(float64(len(weak)))
		for _, what := range weak {
			log.Warn("the token does not keep keys as it should, which was accepted when it was initialised", "token",
				token.String(), "weakness", what)
			all = append(all,
				fmt.Sprintf("%s does not keep keys as it should, which was accepted when it was initialised: %s", token,
					what))
		}
	}
	return all, nil
}

// newOverdue counts the lists of revoked devices that are overdue.
func newOverdue(registry prometheus.Registerer) *prometheus.CounterVec {
	overdue := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "kme_revocations_overdue_total",
		Help: "Tries to read a list of revoked devices that did not give a later one when it was time: the last one " +
			"stands.",
	}, []string{"manufacturer", "why"})
	registry.MustRegister(overdue)
	return overdue
}

// A certificate is the service's own, or one of the CAs that its clients' certificates are verified with.
type certificate struct {
	of string // the setting: server or client_ca
	*x509.Certificate
}

// certificates are those of a configuration whose clients' CAs are in a file.
func certificates(served *tls.Config, clientCA string) (all []certificate, err error) {
	for _, der := range served.Certificates[0].Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("the server's certificate: %w", err)
		}
		all = append(all, certificate{of: "server", Certificate: c})
	}
	cas, err := config.ReadCertificates(clientCA)
	if err != nil {
		return nil, fmt.Errorf("the clients' CA %w", err)
	}
	for _, c := range cas {
		all = append(all, certificate{of: "client_ca", Certificate: c})
	}
	return all, nil
}

// A census has the last count of bindings, by their state.
type census struct {
	last atomic.Pointer[counted]
}

type counted struct {
	bindings map[binding.State]int64
	at       time.Time
}

// keep counts the bindings again and again until ctx ends. Between two counts it waits for a minute, and for a hundred
// times as long as the count took, if that is longer.
func (c *census) keep(ctx context.Context, store *sqlstore.Store, log *slog.Logger) {
	for {
		began := time.Now()
		n, err := store.Count(ctx, began)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			log.Warn("the bindings were not counted; the last count stands", "cause", err.Error())
		default:
			c.last.Store(&counted{bindings: n, at: began})
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(max(time.Minute, 100*time.Since(began))):
		}
	}
}

// A changing collects metrics that a reload changes, and those that are counted from time to time.
type changing struct {
	live  *live
	bound *census
}

var (
	daysLeft = prometheus.NewDesc("kme_certificate_days_left",
		"Days until a certificate ends, below zero after it: one that the service shows (server), or a CA of its "+
			"clients' (client_ca).", []string{"certificate", "subject", "serial"}, nil)
	listAge = prometheus.NewDesc("kme_revocations_age_seconds",
		"Seconds since a lot's list of revoked devices was last read and good; infinite if there is none.",
		[]string{"manufacturer", "lot"}, nil)
	bindings = prometheus.NewDesc("kme_bindings",
		"Bindings in each state when they were last counted; an IMSI may have a pending one beside an active one.",
		[]string{"state"}, nil)
	countedAt = prometheus.NewDesc("kme_bindings_counted_timestamp_seconds",
		"When kme_bindings was counted, in Unix seconds.", nil, nil)
)

func (c *changing) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{daysLeft, listAge, bindings, countedAt} {
		to <- d
	}
}

func (c *changing) Collect(to chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	now, state := time.Now(), c.live.Load()
	ends := map[[3]string]time.Time{} // of those that are there twice, or renewed with the same serial, the earliest
	for _, cert := range state.certificates {
		labels := [3]string{cert.of, cert.Subject.String(), fmt.Sprintf("%x", cert.SerialNumber)}
		if end, twice := ends[labels]; !twice || cert.NotAfter.Before(end) {
			ends[labels] = cert.NotAfter
		}
	}
	for labels, end := range ends {
		gauge(daysLeft, end.Sub(now).Hours()/24, labels[:]...)
	}
	for manufacturer, lists := range state.lots.Lists() {
		for _, l := range lists {
			age := math.Inf(1)
			if !l.Read.IsZero() {
				age = now.Sub(l.Read).Seconds()
			}
			gauge(listAge, age, manufacturer, l.Lot)
		}
	}
	if n := c.bound.last.Load(); n != nil {
		gauge(countedAt, float64(n.at.Unix()))
		for state, count := range n.bindings {
			gauge(bindings, float64(count), string(state))
		}
	}
}

// observe registers metrics of tokens, store, cache and the process itself.
func observe(
	registry prometheus.Registerer, tokens []*hsmkeys.OperatorToken, store *sqlstore.Store, cache *stats.Counter,
) {
	var labels prometheus.Labels
	gauge := func(name, help string, f func() float64) {
		registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: labels},
			f))
	}
	counter := func(name, help string, f func() float64) {
		registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help,
			ConstLabels: labels}, f))
	}
	for _, token := range tokens {
		labels = prometheus.Labels{"token": token.Serial()}
		gauge("kme_hsm_up", "1 while the token is there, 0 while it is not asked.",
			func() float64 { return oneIf(token.Health().Cause == nil) })
		gauge("kme_hsm_hung_calls", "Calls that were given up in the HSM's module and have not come back.",
			func() float64 { return float64(token.Health().Hung) })
		gauge("kme_hsm_sessions", "Sessions of the pool.", func() float64 { return float64(token.Sessions()) })
		counter("kme_hsm_reopened_total", "How often the token was opened again after it was away.",
			func() float64 { return float64(token.Health().Reinitialised) })
		counter("kme_hsm_panics_total", "Panics that ended work at the token; the log says where.",
			func() float64 { return float64(token.Health().Panics) })
	}
	labels = nil
	gauge("kme_store_up", "1 while the store can be reached, and, in SQLite, takes changes.", func() float64 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		return oneIf(store.Ping(ctx) == nil)
	})
	gauge("kme_store_warnings", "What is wrong with the store that calls can live with, as on /readyz; NaN while that "+
		"cannot be asked.", func() float64 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		warnings, err := store.Warnings(ctx)
		if err != nil {
			return math.NaN()
		}
		return float64(len(warnings))
	})
	gauge("kme_ledger_entries", "Entries of the ledger, as far as this instance has seen it. It never falls, but when "+
		"an earlier database is accepted.", func() float64 { return float64(store.Seen().Entries()) })
	number, commit, goVersion := version.Parts()
	labels = prometheus.Labels{"version": number, "commit": commit, "go": goVersion}
	gauge("kme_build_info", "Always 1: its labels say what this program was built from.",
		func() float64 { return 1 })
	labels = nil
	counter("kme_directory_cache_hits_total", "Looked-up devices whose shard was in the cache.",
		func() float64 { return float64(cache.Snapshot().Hits) })
	counter("kme_directory_cache_misses_total", "Looked-up devices whose shard was not.",
		func() float64 { return float64(cache.Snapshot().Misses) })
	registry.MustRegister(collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
}

func oneIf(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}

// tracing sends a span for each call to an OpenTelemetry collector, by OTLP over HTTP. A span has the method, the times
// and the outcome: no IMSI, no IMEI, no payload. A caller's trace goes on in it.
func tracing(
	ctx context.Context, endpoint string,
) (interceptors []connect.Interceptor, stop func(context.Context) error, err error) {
	if endpoint == "" {
		return nil, func(context.Context) error { return nil }, nil
	}
	exporter, err := otlptracehttp.New(ctx,
		otlptracehttp.WithEndpointURL(strings.TrimSuffix(endpoint, "/")+"/v1/traces"))
	if err != nil {
		return nil, nil, fmt.Errorf("the collector of traces: %w", err)
	}
	provider := trace.NewTracerProvider(trace.WithBatcher(exporter),
		trace.WithResource(resource.NewSchemaless(semconv.ServiceName("keysvc"))))
	interceptor, err := otelconnect.NewInterceptor(otelconnect.WithTracerProvider(provider),
		otelconnect.WithPropagator(propagation.TraceContext{}),
		otelconnect.WithTrustRemote(), otelconnect.WithoutMetrics())
	if err != nil {
		return nil, nil, err
	}
	return []connect.Interceptor{interceptor}, provider.Shutdown, nil
}
