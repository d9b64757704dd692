package operatorpage

import (
	"cmp"
	"slices"
	"sync"
	"time"
)

// minutes is how much of the past a History has: a day.
const minutes = 24 * 60

// A History has how much was counted in each minute of the last day. It takes differences of counters, which it is
// given once a minute.
type History struct {
	mu    sync.Mutex
	total map[string]float64           // guarded by mu: as it was given last
	ring  map[string]*[minutes]float64 // guarded by mu: by the minute of its day
	last  int64                        // guarded by mu: the minute, since 1970, that was written last
	begun time.Time                    // since when it counts
}

// NewHistory begins a History, with the present values of the counters.
func NewHistory(now time.Time, total map[string]float64) *History {
	return &History{total: total, ring: map[string]*[minutes]float64{}, last: now.Unix() / 60, begun: now}
}

// Add counts what was added to counters since the last call for this minute.
func (h *History) Add(now time.Time, total map[string]float64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	minute := max(now.Unix()/60, h.last) // a clock that was put back does not write over what is there
	for _, series := range h.ring {
		for m := h.last + 1; m <= min(minute, h.last+minutes); m++ {
			series[m%minutes] = 0
		}
	}
	h.last = minute
	for name, n := range total {
		if grown := n - h.total[name]; grown > 0 {
			if h.ring[name] == nil {
				h.ring[name] = new([minutes]float64)
			}
			h.ring[name][minute%minutes] += grown
		}
	}
	h.total = total
}

// A Series has the counts of one thing in the last day, in consecutive steps. The last step is not over.
type Series struct {
	Name  string
	Steps []float64
	Total float64
}

// Day gives each name's series in so many steps, which divide a day evenly, also if nothing was counted.
func (h *History) Day(steps int, names ...string) (all []Series) {
	h.mu.Lock()
	defer h.mu.Unlock()
	each := int64(minutes / steps)
	for _, name := range names {
		s := Series{Name: name, Steps: make([]float64, steps)}
		if series := h.ring[name]; series != nil {
			for i := range int64(minutes) { // i minutes ago
				n := series[(h.last-i+minutes)%minutes]
				s.Steps[int64(steps)-1-i/each] += n
				s.Total += n
			}
		}
		all = append(all, s)
	}
	return all
}

// most sorts series by their total, the largest first, and leaves out those without.
func most(all []Series) []Series {
	all = slices.DeleteFunc(all, func(s Series) bool { return s.Total == 0 })
	slices.SortStableFunc(all, func(a, b Series) int { return cmp.Compare(b.Total, a.Total) })
	return all
}
