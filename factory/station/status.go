package station

import (
	"context"
	"errors"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/internal/sqlite"
	"github.com/kmehsm/kmehsm/kme"
)

// A Status is what a wall screen shows.
type Status struct {
	Time        time.Time `json:"time"`
	Lots        []Counts  `json:"lots"`
	Stations    []Work    `json:"stations"`
	Hour        []Minute  `json:"hour"`         // the last 60 minutes, the oldest first
	PerHour     float64   `json:"per_hour"`     // injected, by the last quarter of an hour
	SecondsLeft float64   `json:"seconds_left"` // until all that wait are injected, at that rate; 0 if nobody can say
}

// Counts are a lot's devices. They add up to Devices, but for those of lot reissue, which count once for each key.
type Counts struct {
	Lot      string `json:"lot"`
	Devices  int    `json:"devices"`
	Waiting  int    `json:"waiting"`
	Out      int    `json:"out"`
	Injected int    `json:"injected"`
	Failed   int    `json:"failed"`
	Scrapped int    `json:"scrapped"`
	Overdue  int    `json:"overdue"`
	Revoked  int    `json:"revoked"`
}

// Work is what a station did: how often, not how many devices.
type Work struct {
	Station  string `json:"station"`
	Holds    string `json:"holds,omitempty"` // the IMEI that it has
	Injected int    `json:"injected"`
	Failed   int    `json:"failed"`
	Scrapped int    `json:"scrapped"`
	Overdue  int    `json:"overdue"`
}

// A Minute is one of the plot's.
type Minute struct {
	Start    time.Time `json:"start"`
	Injected int       `json:"injected"`
	Failed   int       `json:"failed"` // or scrapped, or overdue
}

// Status is at most a second old, however many ask.
func (d *Desk) Status(ctx context.Context) (*Status, error) {
	d.mu.Lock()
	last := d.status
	d.mu.Unlock()
	if last != nil && time.Since(last.Time) < time.Second {
		return last, nil
	}
	s := &Status{Time: time.Now(), Lots: []Counts{}, Stations: []Work{}}
	if err := errors.Join(d.countLots(ctx, s), d.countWork(ctx, s), d.lastHour(ctx, s)); err != nil {
		return nil, err
	}
	waiting := 0
	for _, l := range s.Lots {
		waiting += l.Waiting
	}
	if s.PerHour > 0 {
		s.SecondsLeft = float64(waiting) / s.PerHour * 3600
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.status = s
	return s, nil
}

const counting = "count what became of the devices"

func (d *Desk) countLots(ctx context.Context, s *Status) error {
	entries, err := os.ReadDir(d.o.Injection)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	at := map[string]int{}
	for _, e := range entries {
		if l, err := d.lot(e.Name()); err == nil { // what is no lot of ours is none of ours
			at[l.Lot] = len(s.Lots)
			s.Lots = append(s.Lots, Counts{Lot: l.Lot, Devices: l.Devices(), Waiting: l.Devices()})
		}
	}
	return d.to(counting).Each(ctx, func(scan func(...any) error) error {
		var name string
		var again, n int
		var state State
		if err := scan(&name, &again, &state, &n); err != nil {
			return err
		}
		i, ok := at[name]
		if !ok {
			return nil
		}
		c := &s.Lots[i]
		if again == 0 {
			c.Waiting -= n
		}
		*map[State]*int{Out: &c.Out, Injected: &c.Injected, Failed: &c.Failed, Scrapped: &c.Scrapped,
			Overdue: &c.Overdue, Revoked: &c.Revoked}[state] += n
		return nil
	}, "SELECT lot, again, state, n FROM now")
}

func (d *Desk) countWork(ctx context.Context, s *Status) error {
	holds := map[string]string{}
	err := d.to(counting).Each(ctx, func(scan func(...any) error) error {
		var k device
		var station string
		if err := scan(&k.lot, &k.position, &station); err != nil {
			return err
		}
		holds[station] = d.imei(k)
		return nil
	}, "SELECT lot, position, station FROM device WHERE state = 'out'")
	if err != nil {
		return err
	}
	return d.to(counting).Each(ctx, func(scan func(...any) error) error {
		var w Work
		var state State
		var n int
		if err := scan(&w.Station, &state, &n); err != nil {
			return err
		}
		if last := len(s.Stations) - 1; last < 0 || s.Stations[last].Station != w.Station {
			w.Holds = holds[w.Station]
			s.Stations = append(s.Stations, w)
		}
		c := &s.Stations[len(s.Stations)-1]
		if to, ok := map[State]*int{Injected: &c.Injected, Failed: &c.Failed, Scrapped: &c.Scrapped,
			Overdue: &c.Overdue}[state]; ok {
			*to = n
		}
		return nil
	}, "SELECT station, state, n FROM work ORDER BY station")
}

func (d *Desk) lastHour(ctx context.Context, s *Status) error {
	const quarter = 15
	first := s.Time.Truncate(time.Minute).Add(-59 * time.Minute)
	for i := range 60 {
		s.Hour = append(s.Hour, Minute{Start: first.Add(time.Duration(i) * time.Minute)})
	}
	begun := 60
	err := d.to(counting).Each(ctx, func(scan func(...any) error) error {
		var i, n int
		var state State
		if err := scan(&i, &state, &n); err != nil {
			return err
		}
		i = min(max(i, 0), 59) // a clock that was set back has left steps of the future
		begun = min(begun, i)
		switch state {
		case Injected:
			s.Hour[i].Injected += n
		case Failed, Scrapped, Overdue:
			s.Hour[i].Failed += n
		}
		return nil
	}, "SELECT (at - ?1) / 60000, state, count(*) FROM event WHERE at >= ?1 GROUP BY 1, 2", first.UnixMilli())
	injected := 0
	for _, m := range s.Hour[60-quarter:] {
		injected += m.Injected
	}
	span := s.Time.Sub(s.Hour[max(min(begun, 59), 60-quarter)].Start)
	s.PerHour = float64(injected) / max(span.Hours(), 1.0/60)
	return err
}

// A Line is a device's in the report of a lot.
type Line struct {
	IMEI     kme.IMEI   `json:"imei"`
	Issue    int        `json:"issue"` // 0: its first key; else its n-th new one
	State    State      `json:"state"`
	Station  string     `json:"station"`
	Handed   *time.Time `json:"handed"`
	Reported *time.Time `json:"reported"`
	Tries    int        `json:"tries"` // how often it was handed out
	Note     string     `json:"note"`
}

// Report gives every device of a lot, in the order of their IMEIs, once for each key that it was handed out with. The
// desk may be open in another process.
func Report(ctx context.Context, state string, m *directory.Manifest) iter.Seq2[Line, error] {
	return func(yield func(Line, error) bool) {
		path := filepath.Join(state, "station", "station.db")
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			waiting(m, 0, m.Devices(), yield)
			return
		}
		read, write, err := sqlite.Open(ctx, path, schema)
		if err != nil {
			yield(Line{}, err)
			return
		}
		defer write.Close()
		defer read.Close()
		next := 0
		db := sqlconn.Conn{Operation: "report a lot's devices", DB: sqlconn.SQL{DB: read}}
		err = db.Each(ctx, func(scan func(...any) error) error {
			var at int
			var l Line
			var handed, reported int64
			err := scan(&at, &l.Issue, &l.State, &l.Station, &handed, &reported, &l.Tries, &l.Note)
			if err != nil {
				return err
			}
			if !waiting(m, next, at, yield) {
				return errEnough
			}
			next, l.IMEI, l.Handed, l.Reported = at+1, m.IMEI(at), when(handed), when(reported)
			if !yield(l, nil) {
				return errEnough
			}
			return nil
		}, "SELECT position, issue, state, station, handed, reported, tries, note FROM device WHERE lot = ? "+
			"ORDER BY position, issue", m.Lot)
		switch {
		case err == nil:
			waiting(m, next, m.Devices(), yield)
		case !errors.Is(err, errEnough):
			yield(Line{}, err)
		}
	}
}

// errEnough: nobody asks for more lines.
var errEnough = errors.New("enough")

func waiting(m *directory.Manifest, from, to int, yield func(Line, error) bool) bool {
	for ; from < to; from++ {
		if !yield(Line{IMEI: m.IMEI(from), State: Waiting}, nil) {
			return false
		}
	}
	return true
}

func when(ms int64) *time.Time {
	if ms == 0 {
		return nil
	}
	t := time.UnixMilli(ms).UTC()
	return &t
}
