package keysvcd

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
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

	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/hsmkeys"
)

// weaknesses are what was accepted of the tokens at their keysvc init. They are said in the log, and counted, too.
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

// observe has the health of tokens, store, cache and the process itself in the metrics.
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
	gauge("kme_store_up", "1 while the store can be reached.", func() float64 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		return oneIf(store.Ping(ctx) == nil)
	})
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
