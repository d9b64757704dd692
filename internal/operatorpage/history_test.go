package operatorpage

import (
	"slices"
	"testing"
	"time"
)

// What is counted goes where its minute is, and is gone a day later; a clock that is put back loses nothing.
func TestHistory(t *testing.T) {
	begun := time.Unix(1_800_000_000, 0).UTC()
	at := func(minutes int) time.Time { return begun.Add(time.Duration(minutes) * time.Minute) }
	total := map[string]float64{"a": 5}
	h := NewHistory(begun, map[string]float64{"a": 5})
	add := func(minute int, n float64) {
		total = map[string]float64{"a": total["a"] + n}
		h.Add(at(minute), total)
	}
	check := func(when string, total float64, byHour map[int]float64) {
		t.Helper()
		s := h.Day(24, "a", "b")
		want := make([]float64, 24)
		for hour, n := range byHour {
			want[23-hour] = n
		}
		if s[0].Total != total || !slices.Equal(s[0].Steps, want) || s[1].Total != 0 {
			t.Errorf("%s: %v, want %v in all, %v", when, s, total, want)
		}
	}
	check("at first", 0, nil) // what was counted before is not of interest
	add(0, 3)
	add(0, 4)
	check("in the first minute", 7, map[int]float64{0: 7})
	add(59, 1)
	check("within the hour", 8, map[int]float64{0: 8})
	add(61, 2)
	check("an hour later", 10, map[int]float64{0: 3, 1: 7})
	add(30, 10)
	check("a clock that was put back", 20, map[int]float64{0: 13, 1: 7})
	add(minutes-1, 0)
	check("nearly a day later", 20, map[int]float64{22: 12, 23: 8})
	add(minutes, 0)
	check("a day later", 13, map[int]float64{22: 12, 23: 1})
	add(10*minutes, 1)
	check("many days later", 1, map[int]float64{0: 1})
	h.Add(at(10*minutes+1), map[string]float64{}) // counters that begin anew
	h.Add(at(10*minutes+1), map[string]float64{"a": 2})
	check("counters that begin anew", 3, map[int]float64{0: 3})
}

func TestRoundUp(t *testing.T) {
	for n, want := range map[float64]float64{0: 1, .5: 1, 1: 1, 2: 2, 3: 5, 6: 10, 11: 20, 999: 1000, 1001: 2000} {
		if got := roundUp(n); got != want {
			t.Errorf("%v: %v, want %v", n, got, want)
		}
	}
}
