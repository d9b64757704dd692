package station

import (
	"context"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/time/rate"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/panics"
)

// metrics are a desk's. Like the wall screen, they name stations and lots, but no devices.
type metrics struct {
	handler  http.Handler
	refusals *prometheus.CounterVec
	overdue  *prometheus.CounterVec // by why
	panics   prometheus.CounterFunc
	logged   map[any]*rate.Sometimes // by the code of a refusal, or by what is wrong with a list
}

var (
	devicesDesc = prometheus.NewDesc("kme_station_devices", "devices of a lot, by what became of them; ready: can be "+
		"injected now", []string{"lot", "state"}, nil)
	resultsDesc = prometheus.NewDesc("kme_station_results_total", "how often a station's devices ended in which way",
		[]string{"station", "result"}, nil)
	lastDesc = prometheus.NewDesc("kme_station_last_seconds",
		"when a station last asked for a device or reported one, "+
			"since 1970", nil, nil)
)

// refusalCodes are the status codes with which Handler refuses.
var refusalCodes = []int{http.StatusBadRequest, http.StatusForbidden, http.StatusNotFound, http.StatusConflict,
	http.StatusUnsupportedMediaType, http.StatusInternalServerError, http.StatusServiceUnavailable}

func newMetrics(d *Desk) *metrics {
	before := panics.Count()
	m := &metrics{logged: map[any]*rate.Sometimes{}, refusals: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "kme_station_refusals_total", Help: "requests that were refused, by status code; 0: no TLS connection"},
		[]string{"code"}),
		overdue: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kme_station_revocations_overdue_total",
			Help: "tries to read a list of revoked devices that did not give the last one, by what is wrong with it"},
			[]string{"why"}),
		panics: prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "kme_station_panics_total",
			Help: "panics, each of which has ended some work"},
			func() float64 { return float64(panics.Count() - before) })}
	for _, code := range append(refusalCodes, 0) {
		m.refusals.WithLabelValues(strconv.Itoa(code))
		m.logged[code] = &rate.Sometimes{First: 20, Interval: 5 * time.Second}
	}
	for _, why := range directory.Whys() { // so that the first is an increase
		m.overdue.WithLabelValues(string(why))
		m.logged[why] = &rate.Sometimes{First: 20, Interval: 5 * time.Second}
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(m.refusals, m.overdue, m.panics, collector{d: d})
	m.handler = promhttp.HandlerFor(registry, promhttp.HandlerOpts{})
	return m
}

// refused counts a refusal, and logs it. For each code, 20 are logged at once, and then one every 5 s: too many
// requests cannot fill a disk.
func (d *Desk) refused(code int, args ...any) {
	d.metrics.refusals.WithLabelValues(strconv.Itoa(code)).Inc()
	if often := d.metrics.logged[code]; often != nil {
		often.Do(func() { d.o.Log.Warn("refused", append([]any{"code", code}, args...)...) })
	}
}

// A collector gives the counts of Status as metrics.
type collector struct{ d *Desk }

func (collector) Describe(to chan<- *prometheus.Desc) {
	to <- devicesDesc
	to <- resultsDesc
	to <- lastDesc
}

func (c collector) Collect(to chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	s, err := c.d.Status(ctx)
	if err != nil {
		to <- prometheus.NewInvalidMetric(devicesDesc, err)
		return
	}
	for _, l := range s.Lots {
		counts := map[State]int{Waiting: l.Waiting, Out: l.Out, Injected: l.Injected, Failed: l.Failed,
			Scrapped: l.Scrapped, Overdue: l.Overdue, Revoked: l.Revoked}
		if l.Ready >= 0 {
			counts["ready"] = l.Ready
		}
		for state, n := range counts {
			to <- prometheus.MustNewConstMetric(devicesDesc, prometheus.GaugeValue, float64(n), l.Lot, string(state))
		}
	}
	for _, w := range s.Stations {
		for result, n := range map[State]int{Injected: w.Injected, Failed: w.Failed, Scrapped: w.Scrapped,
			Overdue: w.Overdue} {
			to <- prometheus.MustNewConstMetric(resultsDesc, prometheus.CounterValue, float64(n), w.Station,
				string(result))
		}
	}
	last := 0.0
	if s.Last != nil {
		last = float64(s.Last.UnixMilli()) / 1000
	}
	to <- prometheus.MustNewConstMetric(lastDesc, prometheus.GaugeValue, last)
}
