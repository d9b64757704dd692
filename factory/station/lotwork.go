package station

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/internal/sqlite"
)

// LotWork counts a lot's devices, and those that each station has or had last; nil if no station ever worked in this
// folder. The desk may be open in another process.
func LotWork(ctx context.Context, state string, m *directory.Manifest) (counts *Counts, stations []Work, err error) {
	path := filepath.Join(state, "station", "station.db")
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	read, write, err := sqlite.Open(ctx, path, sqlconn.First(schema))
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, read.Close(), write.Close()) }()
	db := sqlconn.Conn{Operation: "count a lot's devices", DB: sqlconn.SQL{DB: read}}
	counts = &Counts{Lot: m.Lot, Devices: m.Devices(), Waiting: m.Devices()}
	err = db.Each(ctx, func(scan func(...any) error) error {
		var name string
		var first, state, n = false, State(""), 0
		if err := scan(&name, &first, &state, &n); err != nil {
			return err
		}
		if first {
			counts.Waiting -= n
		}
		if last := len(stations) - 1; last < 0 || stations[last].Station != name {
			stations = append(stations, Work{Station: name})
		}
		counts.add(state, n)
		stations[len(stations)-1].add(state, n)
		return nil
	}, "SELECT station, again = 0, state, count(*) FROM device WHERE lot = ? GROUP BY 1, 2, 3 ORDER BY 1", m.Lot)
	return counts, stations, err
}
