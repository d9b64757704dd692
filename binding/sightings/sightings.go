// Package sightings notes with which devices subscriptions are seen, and reports subscriptions that change their
// device. Calls do not wait: a History writes in the background. If the store fails, sightings are dropped and counted;
// they are noted the next time that they are seen.
package sightings

import (
	"context"
	"log/slog"
	"time"

	"github.com/maypok86/otter/v2"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kmehsm/kmehsm/internal/cache"
	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/kme"
)

// Evidence is what says that a subscription was used in a device.
type Evidence string

const (
	Asserted Evidence = "ASSERTED" // the network named it: the device itself has shown nothing
	Shown    Evidence = "PROVEN"   // a binding became active: the device has shown that it has the KME
)

// A Sighting is a subscription that was seen with a device.
type Sighting struct {
	IMSI     kme.IMSI  `json:"imsi"`
	IMEI     kme.IMEI  `json:"imei"`
	Evidence Evidence  `json:"evidence"`
	First    time.Time `json:"first"`
	Last     time.Time `json:"last"` // to within the resolution of History
}

// A Move is a subscription that was seen with another device than before.
type Move struct {
	Sighting
	Before Sighting `json:"before"` // the last one with another device
}

// MaxDevices bounds the sightings of an IMSI. The oldest are forgotten.
const MaxDevices = 32

// A Store keeps with which devices subscriptions were seen.
type Store interface {
	// See notes sightings, whose First is their Last, and gives those that are moves. A row that was changed by
	// somebody else is replaced.
	See(ctx context.Context, all []Sighting) ([]Move, error)
	// Sightings gives those of an IMSI and of a device; the zero values stand for none.
	Sightings(ctx context.Context, imsi kme.IMSI, imei kme.IMEI) ([]Sighting, error)
	// Forget removes sightings whose Last is before a time, and the oldest if there are more than most.
	Forget(ctx context.Context, before time.Time, most int) (forgotten int, err error)
}

// Options are a History's.
type Options struct {
	Store    Store
	Keep     time.Duration         // for how long after its Last a sighting is kept
	Most     int                   // sightings that are kept
	Moved    func(Move)            // is called for each move; must not wait
	Now      func() time.Time      // time.Now, but for tests
	Log      *slog.Logger          // of failures, and of moves
	Registry prometheus.Registerer // of what is counted
}

const (
	// resolution is how often a subscription that stays in its device is written again.
	resolution = time.Hour
	// maxRecent bounds the memory for sightings that were written lately. Others are written again.
	maxRecent = 200_000
	// maxUnseen bounds the sightings that wait to be written. More are dropped, and counted.
	maxUnseen = 10_000
	// maxSeen sightings are written in one change, for which other changes wait.
	maxSeen = 64
	// gathering is for how long sightings are gathered, so that they are written together.
	gathering = 100 * time.Millisecond
)

// A History notes with which devices subscriptions are seen. No call waits for it.
type History struct {
	o       Options
	recent  cache.Cache[kme.IMSI, lately]
	queue   chan Sighting
	moves   *prometheus.CounterVec
	dropped prometheus.Counter
}

// A lately is the device that a subscription was last seen with, and when that was last written.
type lately struct {
	imei            kme.IMEI
	asserted, shown time.Time
}

func (l *lately) at(e Evidence) *time.Time {
	if e == Shown {
		return &l.shown
	}
	return &l.asserted
}

// New makes a History, which writes while Run does.
func New(o Options) *History {
	h := &History{
		o: o, queue: make(chan Sighting, maxUnseen),
		recent: cache.New(&otter.Options[kme.IMSI, lately]{MaximumSize: maxRecent}),
		moves: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kme_equipment_moves_total",
			Help: "Subscriptions that were seen with another device than before, by evidence."}, []string{"evidence"}),
		dropped: prometheus.NewCounter(prometheus.CounterOpts{Name: "kme_sightings_dropped_total",
			Help: "Sightings of a subscription with a device that were not written: too many waited, or the store " +
				"failed."}),
	}
	o.Registry.MustRegister(h.moves, h.dropped)
	for _, e := range []Evidence{Asserted, Shown} { // so that the first is an increase
		h.moves.WithLabelValues(string(e))
	}
	return h
}

// Saw notes that a subscription was seen with a device. It does not wait. A nil History notes nothing.
func (h *History) Saw(imsi kme.IMSI, imei kme.IMEI, e Evidence) {
	if h == nil || imsi == (kme.IMSI{}) {
		return
	}
	now := h.o.Now().UTC().Truncate(time.Millisecond)
	l, _ := h.recent.GetIfPresent(imsi)
	if l.imei != imei {
		l = lately{imei: imei}
	} else if now.Sub(*l.at(e)) < resolution {
		return
	}
	*l.at(e) = now
	select {
	case h.queue <- Sighting{IMSI: imsi, IMEI: imei, Evidence: e, First: now, Last: now}:
		h.recent.Set(imsi, l)
	default:
		h.dropped.Inc()
	}
}

// Run writes until ctx ends, and then the rest. Once an hour it forgets old sightings.
func (h *History) Run(ctx context.Context) {
	hourly := time.NewTicker(time.Hour)
	defer hourly.Stop()
	h.forget(ctx)
	for {
		select {
		case first := <-h.queue:
			if len(h.queue) < maxSeen-1 {
				select {
				case <-time.After(gathering):
				case <-ctx.Done():
				}
			}
			h.write(context.WithoutCancel(ctx), first)
		case <-hourly.C:
			h.forget(ctx)
		case <-ctx.Done():
			for len(h.queue) > 0 {
				h.write(context.WithoutCancel(ctx), <-h.queue)
			}
			return
		}
	}
}

func (h *History) see(ctx context.Context, all []Sighting) (moves []Move, err error) {
	defer panics.Recover(&err)
	return h.o.Store.See(ctx, all)
}

// write writes a sighting, and all that wait.
func (h *History) write(ctx context.Context, first Sighting) {
	all := []Sighting{first}
	for len(h.queue) > 0 && len(all) < maxSeen {
		all = append(all, <-h.queue)
	}
	short, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	moves, err := h.see(short, all)
	if err != nil {
		h.dropped.Add(float64(len(all)))
		for _, s := range all { // they will be written the next time
			h.recent.Invalidate(s.IMSI)
		}
		h.o.Log.Error("sightings of subscriptions with devices were not written", "sightings", len(all),
			"cause", err.Error())
		return
	}
	for _, m := range moves {
		h.moves.WithLabelValues(string(m.Evidence)).Inc()
		h.o.Log.Warn("a subscription is in another device", "imsi", m.IMSI, "imei", m.IMEI, "evidence", m.Evidence,
			slog.Group("before", "imei", m.Before.IMEI, "evidence", m.Before.Evidence, "last", m.Before.Last))
		if h.o.Moved != nil {
			h.o.Moved(m)
		}
	}
}

func (h *History) forget(ctx context.Context) {
	n, err := func() (n int, err error) {
		defer panics.Recover(&err)
		return h.o.Store.Forget(ctx, h.o.Now().Add(-h.o.Keep), h.o.Most)
	}()
	if err != nil && ctx.Err() == nil {
		h.o.Log.Error("old sightings of subscriptions with devices were not removed", "cause", err.Error())
	} else if n > 0 {
		h.o.Log.Info("old sightings of subscriptions with devices were removed", "sightings", n)
	}
}
