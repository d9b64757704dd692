package binding_test

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sightings"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// A slowSightings notes what is written, and waits for gate first, if there is one; it fails with err.
type slowSightings struct {
	*sqlstore.Store
	gate chan struct{}

	mu      sync.Mutex
	err     error // guarded by mu
	written int   // guarded by mu
}

func (s *slowSightings) See(ctx context.Context, all []sightings.Sighting) ([]sightings.Move, error) {
	if s.gate != nil {
		<-s.gate
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, s.err
	}
	s.written += len(all)
	return s.Store.See(ctx, all)
}

func (s *slowSightings) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.written
}

// A clock is one that tests set.
type clock struct {
	mu  sync.Mutex
	now time.Time // guarded by mu
}

func (c *clock) Now() time.Time { c.mu.Lock(); defer c.mu.Unlock(); return c.now }
func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// A watched is a service with a history, and the moves that it has told of.
type watched struct {
	*harness
	clock    clock
	store    *slowSightings
	registry *prometheus.Registry
	stop     func()

	mu    sync.Mutex
	moves []sightings.Move // guarded by mu
}

func newWatched(t *testing.T, r *harness, gate chan struct{}) *watched {
	t.Helper()
	w := &watched{harness: r, store: &slowSightings{Store: r.store, gate: gate}, registry: prometheus.NewRegistry()}
	w.clock.now = time.Now()
	h := sightings.New(sightings.Options{Store: w.store, Keep: 10 * time.Hour, Most: 1000, Now: w.clock.Now,
		Log: slog.New(slog.NewJSONHandler(r.log, nil)), Registry: w.registry, Moved: func(m sightings.Move) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.moves = append(w.moves, m)
		}})
	r.service = r.newService(binding.Options{History: h}).WithLots(r.lots(t))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); h.Run(ctx) }()
	w.stop = func() { cancel(); <-ended }
	return w
}

// gathered is the sum of a counter.
func (w *watched) gathered(t *testing.T, name string) (sum float64) {
	t.Helper()
	families, err := w.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() == name {
			for _, m := range family.Metric {
				sum += m.Counter.GetValue()
			}
		}
	}
	return sum
}

// What is asserted and what is proven is noted apart, once an hour while nothing changes; a SIM in another device is a
// move.
func TestHistory(t *testing.T) {
	r, _, l := newServed(t)
	w := newWatched(t, r, nil)
	one, two := l.devices[0], l.devices[1]
	imsi := r.prove(t, one) // proven
	check := func(d *device) {
		t.Helper()
		must[binding.Equipment](t)(r.service.CheckEquipment(t.Context(), d.imei, imsi))
	}
	written := func(n int) {
		t.Helper()
		testproc.Await(t, "sightings are written", func() bool { return w.store.count() >= n })
	}
	written(1)
	for range 100 {
		check(one)
		must[binding.Equipment](t)(r.service.CheckEquipment(t.Context(), one.imei, kme.IMSI{})) // of nobody
	}
	written(2)
	w.clock.pass(59 * time.Minute)
	check(one)
	w.clock.pass(time.Minute)
	check(one) // an hour after the first
	written(3)
	w.clock.pass(time.Minute)
	check(two)
	written(4)
	w.clock.pass(time.Minute)
	check(one) // and back, whatever the hour
	written(5)
	w.clock.pass(time.Minute)
	payload, _ := l.devices[2].payload(t) // refused: another device has the IMSI
	if _, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: l.devices[2].imei,
		AttemptID: "x", Payload: payload, Origin: here}); err == nil {
		t.Error("established")
	}
	written(6)
	w.stop()
	if n := w.store.count(); n != 6 {
		t.Errorf("%d were written, want 6", n)
	}
	type seen struct {
		imei     kme.IMEI
		evidence sightings.Evidence
		minutes  float64 // from first to last
	}
	var got []seen
	for _, s := range must[[]sightings.Sighting](t)(r.store.Sightings(t.Context(), imsi, kme.IMEI{})) {
		got = append(got, seen{s.IMEI, s.Evidence, s.Last.Sub(s.First).Minutes()})
	}
	want := []seen{{one.imei, sightings.Shown, 0}, {two.imei, sightings.Asserted, 0},
		{one.imei, sightings.Asserted, 62}, {l.devices[2].imei, sightings.Asserted, 0}}
	if !slices.Equal(got, want) {
		t.Errorf("seen\n%+v, want\n%+v", got, want)
	}
	var moves []kme.IMEI
	for _, m := range w.moves {
		moves = append(moves, m.Before.IMEI, m.IMEI)
	}
	if wanted := []kme.IMEI{one.imei, two.imei, two.imei, one.imei, one.imei, l.devices[2].imei}; !slices.Equal(moves,
		wanted) || w.gathered(t, "kme_equipment_moves_total") != 3 {
		t.Errorf("moves %v, want %v", moves, wanted)
	}
}

// Nobody waits for a store that is slow: what is too much is dropped, and counted, and what it refuses is written when
// it is seen again.
func TestHistoryStalls(t *testing.T) {
	r, _, l := newServed(t)
	gate := make(chan struct{})
	w := newWatched(t, r, gate)
	imei := l.devices[0].imei
	const calls = 10_500 // more than wait
	for range calls {
		must[binding.Equipment](t)(r.service.CheckEquipment(t.Context(), imei, newIMSI()))
	}
	dropped := w.gathered(t, "kme_sightings_dropped_total")
	if dropped == 0 {
		t.Error("none was dropped")
	}
	w.store.err = errors.New("the store is away") // nobody has it yet: all wait
	gate <- struct{}{}
	testproc.Await(t, "some were not written", func() bool {
		return w.gathered(t, "kme_sightings_dropped_total") > dropped
	})
	w.store.mu.Lock()
	w.store.err = nil
	w.store.mu.Unlock()
	close(gate)
	w.stop() // writes what waits
	if n := float64(w.store.count()) + w.gathered(t, "kme_sightings_dropped_total"); n != calls {
		t.Errorf("%d were written, and %v dropped, of %d", w.store.count(),
			w.gathered(t, "kme_sightings_dropped_total"), calls)
	}
}
