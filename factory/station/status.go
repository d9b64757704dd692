package station

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/internal/sqlite"
	"github.com/kmehsm/kmehsm/kme"
)

// A Status is what a wall screen shows.
type Status struct {
	Time        time.Time  `json:"time"`
	Line        string     `json:"line"`
	State       LineState  `json:"state"`
	Last        *time.Time `json:"last"` // when a station last asked for a device or reported one; nil: never
	Lots        []Counts   `json:"lots"`
	Stations    []Work     `json:"stations"`     // those with the most failures in the last hour come first
	Hour        []Minute   `json:"hour"`         // the last 60 minutes, the oldest first
	PerHour     float64    `json:"per_hour"`     // injected, by the last quarter of an hour
	SecondsLeft float64    `json:"seconds_left"` // until all that are ready are injected, at that rate; 0: not known
	Warnings    []string   `json:"warnings,omitempty"`
}

// A LineState says what the line does.
type LineState string

const (
	Running LineState = "running" // in the last minute a station asked for a device or reported one
	Stopped LineState = "stopped" // none did
	Empty   LineState = "empty"   // there is no lot
)

// Counts are a lot's devices. Waiting, Out and what follows add up to Devices, but for those of lot reissue, which
// count once for each key.
type Counts struct {
	Lot     string `json:"lot"`
	Devices int    `json:"devices"`
	Ready   int    `json:"ready"` // of those that wait, those that can be injected now; -1: not known
	Waiting int    `json:"waiting"`
	Out     int    `json:"out"`
	Results
	Revoked int `json:"revoked"`
}

func (c *Counts) add(state State, n int) {
	switch state {
	case Out:
		c.Out += n
	case Revoked:
		c.Revoked += n
	default:
		c.Results.add(state, n)
	}
}

// Work is what a station did: how often, not how many devices.
type Work struct {
	Station string     `json:"station"`
	Holds   string     `json:"holds,omitempty"` // the IMEI that it has
	Last    *time.Time `json:"last"`            // when it last asked or reported, in the last hour; else nil
	Hour    Results    `json:"hour"`            // of the last hour
	Results
}

// Results are how often devices ended in which way.
type Results struct {
	Injected int `json:"injected"`
	Failed   int `json:"failed"`
	Scrapped int `json:"scrapped"`
	Overdue  int `json:"overdue"`
}

func (r *Results) add(state State, n int) {
	switch state {
	case Injected:
		r.Injected += n
	case Failed:
		r.Failed += n
	case Scrapped:
		r.Scrapped += n
	case Overdue:
		r.Overdue += n
	}
}

func (r Results) bad() int { return r.Failed + r.Scrapped + r.Overdue }

// A Minute is one of those in the plot.
type Minute struct {
	Start time.Time `json:"start"`
	Results
}

// Status is at most a second old, however many ask.
func (d *Desk) Status(ctx context.Context) (*Status, error) {
	d.mu.Lock()
	last := d.status
	d.mu.Unlock()
	if last != nil && time.Since(last.Time) < time.Second {
		return last, nil
	}
	s := &Status{Time: time.Now(), Line: d.o.Line, Lots: []Counts{}, Stations: []Work{},
		Warnings: d.warnings()}
	if err := errors.Join(d.countLots(ctx, s), d.lastHour(ctx, s), d.countWork(ctx, s),
		d.lineState(ctx, s)); err != nil {
		return nil, err
	}
	ready := 0
	for _, l := range s.Lots {
		ready += max(l.Ready, 0)
	}
	if s.PerHour > 0 {
		s.SecondsLeft = float64(ready) / s.PerHour * 3600
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
		if l, err := d.lot(e.Name()); err == nil { // other folders do not matter
			at[l.Lot] = len(s.Lots)
			s.Lots = append(s.Lots, Counts{Lot: l.Lot, Devices: l.Devices(), Ready: -1, Waiting: l.Devices()})
		}
	}
	err = d.to(counting).Each(ctx, func(scan func(...any) error) error {
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
		c.add(state, n)
		return nil
	}, "SELECT lot, again, state, n FROM now")
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range s.Lots {
		if can, ok := d.supply[s.Lots[i].Lot]; ok {
			c := &s.Lots[i]
			c.Ready = min(max(can-(c.Devices-c.Waiting), 0), c.Waiting)
		}
	}
	return err
}

// lineState says whether the stations work. A device that becomes overdue is no work of a station.
func (d *Desk) lineState(ctx context.Context, s *Status) error {
	var at int64
	found, err := d.to(counting).One(ctx, []any{&at},
		"SELECT at FROM event WHERE state != 'overdue' ORDER BY at DESC LIMIT 1")
	if found {
		s.Last = when(at)
	}
	switch {
	case len(s.Lots) == 0:
		s.State = Empty
	case found && s.Time.Sub(*s.Last) < time.Minute:
		s.State = Running
	default:
		s.State = Stopped
	}
	return err
}

// look finds how many devices of each lot are published and not revoked, but for those that were handed out and revoked
// later. The directory may be slow. Nobody waits for it; until it answers, the last counts stand.
func (d *Desk) look(ctx context.Context) {
	entries, err := os.ReadDir(d.o.Injection)
	if err != nil {
		return // Status says what is wrong with it
	}
	there := map[string]bool{}
	for _, e := range entries {
		there[e.Name()] = true
	}
	d.mu.Lock()
	d.there = there
	d.mu.Unlock()
	for _, e := range entries {
		safely(func() { // one lot's panic takes no count from the others
			l, err := d.lot(e.Name())
			if err != nil {
				return
			}
			n, err := d.published(ctx, l)
			if err != nil {
				d.o.Log.Warn("nobody can say how many devices are ready", "lot", l.Lot, "error", err)
				return
			}
			d.mu.Lock()
			defer d.mu.Unlock()
			d.supply[l.Lot] = n
		})
	}
}

// published counts a lot's devices that are in the directory and were handed out, or are not revoked.
func (d *Desk) published(ctx context.Context, l *lot) (n int, err error) {
	list, err := d.reader.Revocations(ctx, l.Manifest) // first: List may hang, and the list is then overdue
	if err != nil {
		return 0, err
	}
	names, err := d.o.Store.List(ctx, directory.ShardsPath(l.Lot))
	if err != nil {
		return 0, err
	}
	handed := map[int]bool{}
	revoked := list.Whole != nil || len(list.Parts) > 0
	if revoked {
		err := d.to(counting).Each(ctx, func(scan func(...any) error) error {
			var at int
			err := scan(&at)
			handed[at] = true
			return err
		}, "SELECT position FROM device WHERE lot = ? AND again = 0", l.Lot)
		if err != nil {
			return 0, err
		}
	}
	for _, name := range names {
		shard, err := strconv.Atoi(name)
		if err != nil || shard < 0 || shard >= l.Shards() {
			continue
		}
		first, count := l.ShardRange(shard)
		if !revoked {
			n += count
			continue
		}
		for at := first; at < first+count; at++ {
			if handed[at] || list.Whole == nil && !list.Revokes(at) {
				n++
			}
		}
	}
	return n, nil
}

func (d *Desk) countWork(ctx context.Context, s *Status) error {
	holds := map[string]string{}
	at := map[string]*Work{}
	work := func(station string) *Work {
		if at[station] == nil {
			at[station] = &Work{Station: station, Holds: holds[station]}
		}
		return at[station]
	}
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
	for _, name := range d.o.Stations {
		work(name)
	}
	err = d.to(counting).Each(ctx, func(scan func(...any) error) error {
		var station string
		var state State
		var n int
		if err := scan(&station, &state, &n); err != nil {
			return err
		}
		work(station).add(state, n)
		return nil
	}, "SELECT station, state, n FROM work")
	if err != nil {
		return err
	}
	err = d.to(counting).Each(ctx, func(scan func(...any) error) error {
		var station string
		var state State
		var n int
		var last int64
		if err := scan(&station, &state, &n, &last); err != nil {
			return err
		}
		w := work(station)
		w.Hour.add(state, n)
		if t := when(last); state != Overdue && (w.Last == nil || t.After(*w.Last)) {
			w.Last = t
		}
		return nil
	}, "SELECT station, state, count(*), max(at) FROM event WHERE at >= ? GROUP BY 1, 2", s.Hour[0].Start.UnixMilli())
	for _, w := range at {
		s.Stations = append(s.Stations, *w)
	}
	slices.SortFunc(s.Stations, func(a, b Work) int {
		return cmp.Or(b.Hour.bad()-a.Hour.bad(), b.bad()-a.bad(), strings.Compare(a.Station, b.Station))
	})
	return err
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
		i = min(max(i, 0), 59) // if the clock was set back, there are steps in the future
		begun = min(begun, i)
		s.Hour[i].add(state, n)
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

// A Line is a device's line in the report of a lot.
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
		read, write, err := sqlite.Open(ctx, path, sqlconn.First(schema))
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

// errEnough: the caller wants no more lines.
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
