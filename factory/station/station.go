// Package station hands out devices to the stations of the line that inject their keys, and
// remembers what became of each.
//
// It needs no token: private keys are wrapped for the fixture. A device is handed out only if the directory has exactly
// this key of it.
package station

import (
	"context"
	"database/sql"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/mattn/go-sqlite3"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory/memory"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/internal/sqlite"
	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/kme"
)

//go:embed station.sql
var schema string

// A State says what became of a device.
type State string

const (
	Waiting  State = "waiting"  // never handed out
	Out      State = "out"      // a station has it
	Injected State = "injected" // it has its key
	Failed   State = "failed"   // it has no key; it may be handed out again, by its IMEI
	Scrapped State = "scrapped" // it will never have one
	Overdue  State = "overdue"  // it was handed out, and was not reported in time
	Revoked  State = "revoked"  // its key was revoked before its turn came
)

// A RefusedError says what a station may not do, and why.
type RefusedError struct{ Reason string }

func (e *RefusedError) Error() string { return e.Reason }

func refuse(format string, args ...any) error {
	return &RefusedError{Reason: fmt.Sprintf(format, args...)}
}

// ErrNoneLeft: every device of the lot was handed out.
var ErrNoneLeft = errors.New("every device of the lot was handed out: failed and overdue ones may be asked for by IMEI")

// ErrNotReady: the device's key is not published yet.
var ErrNotReady = errors.New("its key is not published yet: factory lot provision does that")

// Options are a Desk's.
type Options struct {
	State     string // the line's own folder; the desk has a folder in it, and one process at a time
	Injection string // the folder of the injection packages
	Store     directory.Store
	Verifier  *directory.Verifier
	Timeout   time.Duration // after which a device that nobody reported is overdue
	Line      string        // its name, for the wall screen
	Stations  []string      // by the common names of their certificates; Handler hands devices to no others
	Log       *slog.Logger
}

// A Desk hands devices out. All methods may be called concurrently. A station has one device at a time; if it asks
// again, it gets the same one.
type Desk struct {
	o        Options
	reader   *directory.Reader
	read     *sql.DB
	write    *sqlite.Writer
	unlock   func()
	cancel   context.CancelFunc
	watching sync.WaitGroup

	mu     sync.Mutex
	lots   map[string]*lot       // guarded by mu; a manifest never changes
	out    map[device]*handedOut // guarded by mu: what the stations have, as far as it is not yet overdue
	status *Status               // guarded by mu
	supply map[string]int        // guarded by mu: of a lot, what published last said
	there  map[string]bool       // guarded by mu: lots that look has last found; nil before

	metrics *metrics
}

type lot struct {
	*directory.Manifest
	jws string

	mu     sync.Mutex
	cursor int // no device before it is waiting; guarded by mu
	shard  int // whose package is read; guarded by mu
	lines  []handover.InjectionLine
}

type device struct {
	lot             string
	position, issue int
}

// handedOut measures time by the monotonic clock, which is never set back.
type handedOut struct {
	tries int
	since time.Time
}

// Open opens the desk of a line. Stations keep the devices that they had when the last process ended, and their time
// starts again.
func Open(ctx context.Context, o Options) (*Desk, error) {
	dir := filepath.Join(o.State, "station")
	if err := durable.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	unlock, err := durable.Lock(dir)
	if err != nil {
		return nil, err
	}
	read, write, err := sqlite.Open(ctx, filepath.Join(dir, "station.db"), sqlconn.First(schema))
	if err != nil {
		unlock()
		return nil, err
	}
	d := &Desk{o: o, read: read, write: write, unlock: unlock, lots: map[string]*lot{}, out: map[device]*handedOut{},
		supply: map[string]int{}}
	d.metrics = newMetrics(d)
	d.reader = directory.NewReader(memory.NewReadingGuard(o.Store, o.State, dir, o.Verifier), o.Verifier,
		directory.ReaderOptions{Cache: directory.NewCache(8<<20, nil), RevocationTTL: time.Second,
			NegativeTTL: time.Second, Strict: true, Overdue: d.overdue})
	if err := d.resume(ctx); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	ctx, d.cancel = context.WithCancel(context.WithoutCancel(ctx))
	d.watching.Go(func() { d.beside(ctx, min(o.Timeout/4, 5*time.Second), d.watch) })
	d.watching.Go(func() { d.beside(ctx, 5*time.Second, d.look) })
	return d, nil
}

// Close may be called when no other call is under way.
func (d *Desk) Close() error {
	if d.cancel != nil {
		d.cancel()
		d.watching.Wait()
	}
	defer d.unlock()
	return errors.Join(d.read.Close(), d.write.Close())
}

// to makes a connection for an operation, which errors name.
func (d *Desk) to(operation string) sqlconn.Conn {
	return sqlconn.Conn{Operation: operation, DB: sqlconn.SQL{DB: d.read}}
}

func (d *Desk) resume(ctx context.Context) error {
	return d.to("see what the stations have").Each(ctx, func(scan func(...any) error) error {
		var k device
		h := &handedOut{since: time.Now()}
		err := scan(&k.lot, &k.position, &k.issue, &h.tries)
		d.out[k] = h
		return err
	}, "SELECT lot, position, issue, tries FROM device WHERE state = ?", Out)
}

// watch finds devices that are overdue.
func (d *Desk) watch(ctx context.Context) {
	d.mu.Lock()
	late := map[device]int{}
	for k, h := range d.out {
		if time.Since(h.since) > d.o.Timeout {
			late[k] = h.tries
		}
	}
	d.mu.Unlock()
	for k, tries := range late {
		err := d.to("note an overdue device").Named(d.write.Exec(ctx, "UPDATE device SET state = ?, reported = ? "+
			"WHERE lot = ? AND position = ? AND issue = ? AND tries = ? AND state = ?", Overdue, now(), k.lot,
			k.position, k.issue, tries, Out))
		if err != nil {
			if ctx.Err() == nil {
				d.o.Log.Error("an overdue device cannot be put down", "lot", k.lot, "position",
					k.position, "error", err)
			}
			continue
		}
		d.forget(k, tries)
	}
}

func (d *Desk) forget(k device, tries int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if h := d.out[k]; h != nil && h.tries == tries {
		delete(d.out, k)
	}
}

func now() int64 { return time.Now().UnixMilli() }

// lot gives a lot by the manifest in the folder of its injection packages.
func (d *Desk) lot(name string) (*lot, error) {
	if err := directory.CheckName(name); err != nil {
		return nil, refuse("the lot's name: %v", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if l := d.lots[name]; l != nil {
		return l, nil
	}
	m, jws, err := ReadManifest(d.o.Injection, name, d.o.Verifier)
	if err != nil {
		return nil, err
	}
	l := &lot{Manifest: m, jws: string(jws), shard: -1}
	d.lots[name] = l
	return l, nil
}

// ReadManifest reads a lot's manifest from the folder of the injection packages.
func ReadManifest(injection, lot string, v *directory.Verifier) (*directory.Manifest, []byte, error) {
	jws, err := os.ReadFile(filepath.Join(injection, lot, handover.ManifestFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, refuse("there is no lot %s: factory lot provision makes its injection packages", lot)
	}
	if err != nil {
		return nil, nil, err
	}
	m, err := v.Manifest(lot, jws)
	return m, jws, err
}

// Next gives a station the next device of a lot, or the one that it has.
func (d *Desk) Next(ctx context.Context, station, name string) (*Ticket, error) {
	l, err := d.lot(name)
	if err != nil {
		return nil, err
	}
	for {
		if t, err := d.held(ctx, station, l, func(device) bool { return true }); t != nil || err != nil {
			return t, err
		}
		at, err := d.free(ctx, l)
		if err != nil {
			return nil, err
		}
		k, t, err := d.ticket(ctx, l, at)
		if revoked, ok := errors.AsType[*revokedError](err); ok {
			if revoked.lot {
				return nil, refuse("lot %s is revoked, all of it and for good: no device of it gets a key any more",
					name)
			}
			if _, err := d.claim(ctx, k, station, Revoked, false); err != nil {
				return nil, err
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		if ok, err := d.claim(ctx, k, station, Out, false); err != nil || ok {
			return t, err
		}
	}
}

// Named gives a station the device with an IMEI.
func (d *Desk) Named(ctx context.Context, station, name string, imei kme.IMEI) (*Ticket, error) {
	l, err := d.lot(name)
	if err != nil {
		return nil, err
	}
	at, ok := l.Position(imei)
	if !ok {
		return nil, refuse("IMEI %s is not in lot %s", imei, name)
	}
	if t, err := d.held(ctx, station, l, func(k device) bool { return k.position == at }); t != nil || err != nil {
		return t, err
	}
	k, t, err := d.ticket(ctx, l, at)
	if errors.As(err, new(*revokedError)) {
		return nil, refuse("IMEI %s is revoked", imei)
	}
	if err != nil {
		return nil, err
	}
	ok, err = d.claim(ctx, k, station, Out, true)
	if err != nil {
		return nil, err
	}
	if !ok {
		was, by, err := d.state(ctx, k)
		if err != nil {
			return nil, err
		}
		switch was {
		case Injected:
			return nil, refuse("IMEI %s has its key, from station %s: a device that came back gets another one by "+
				"factory lot reissue", imei, by)
		case Out:
			return nil, refuse("IMEI %s is at station %s", imei, by)
		}
		return nil, refuse("IMEI %s is %s, by station %s", imei, was, by)
	}
	return t, nil
}

// Report notes what became of the device that a station has: Injected, Failed or Scrapped. The same report again
// changes nothing. A late report counts, unless the device was handed out again.
func (d *Desk) Report(ctx context.Context, station, name string, imei kme.IMEI, state State, note string) error {
	switch state {
	case Injected, Failed, Scrapped:
	default:
		return refuse("a device is injected, failed or scrapped, not %q", state)
	}
	if len(note) > 200 {
		return refuse("the note has 200 bytes at most")
	}
	note = strings.Map(func(r rune) rune { // whoever reads it may have a terminal
		if strict.Hidden(r) {
			return ' '
		}
		return r
	}, note)
	l, err := d.lot(name)
	if err != nil {
		return err
	}
	at, ok := l.Position(imei)
	if !ok {
		return refuse("IMEI %s is not in lot %s", imei, name)
	}
	k := device{lot: name, position: at}
	var was State
	var by string
	var tries int
	db := d.to("report a device")
	// the key that the station has, or had when it said the same, whatever was issued since; else the newest
	found, err := db.One(ctx, []any{&k.issue, &was, &by, &tries}, "SELECT issue, state, station, tries FROM device "+
		"WHERE lot = ?1 AND position = ?2 ORDER BY station = ?3 AND state = 'out' DESC, "+
		"station = ?3 AND state = ?4 DESC, issue DESC LIMIT 1", name, at, station, state)
	switch {
	case err != nil:
		return err
	case !found:
		return refuse("IMEI %s was handed to nobody", imei)
	case by != station:
		return refuse("IMEI %s is %s, by station %s: only that one reports it", imei, was, by)
	case was == state:
		return nil
	case was != Out && was != Overdue:
		return refuse("IMEI %s was reported %s before, and cannot be %s", imei, was, state)
	}
	var n int64
	err = db.Named(d.write.Do(ctx, func(ctx context.Context, tx *sqlconn.Tx) error {
		r, err := tx.ExecContext(ctx, "UPDATE device SET state = ?, reported = ?, note = ? WHERE lot = ? AND "+
			"position = ? AND issue = ? AND station = ? AND tries = ? AND state = ?",
			state, now(), note, name, at, k.issue, station, tries, was)
		if err == nil {
			n, err = r.RowsAffected()
		}
		return err
	}))
	if err != nil {
		return err
	}
	if n == 0 { // something came between: look again at what
		return d.Report(ctx, station, name, imei, state, note)
	}
	d.forget(k, tries)
	return nil
}

// held is the ticket of the device that a station has, which must be one of l that fits; nil if it has none.
func (d *Desk) held(ctx context.Context, station string, l *lot, fits func(device) bool) (*Ticket, error) {
	var k device
	found, err := d.to("see what a station has").One(ctx, []any{&k.lot, &k.position, &k.issue},
		"SELECT lot, position, issue FROM device WHERE state = 'out' AND station = ?", station)
	switch {
	case err != nil || !found:
		return nil, err
	case k.lot != l.Lot || !fits(k):
		return nil, refuse("this station has IMEI %s of lot %s: report that one first", d.imei(k), k.lot)
	}
	return d.again(ctx, l, k)
}

func (d *Desk) state(ctx context.Context, k device) (state State, station string, err error) {
	_, err = d.to("see what became of a device").One(ctx, []any{&state, &station},
		"SELECT state, station FROM device WHERE lot = ? AND position = ? AND issue = ?", k.lot, k.position, k.issue)
	return state, station, err
}

func (d *Desk) imei(k device) string {
	if l, err := d.lot(k.lot); err == nil {
		return l.IMEI(k.position).String()
	}
	return fmt.Sprintf("number %d", k.position)
}

// free is the first device of a lot that was never handed out.
func (d *Desk) free(ctx context.Context, l *lot) (at int, err error) {
	l.mu.Lock()
	from := l.cursor
	l.mu.Unlock()
	_, err = d.to("find a device that waits").One(ctx, []any{&at},
		`SELECT ?2 WHERE NOT EXISTS (SELECT 1 FROM device WHERE lot = ?1 AND position = ?2)
		UNION ALL SELECT * FROM (SELECT position + 1 FROM device AS d WHERE lot = ?1 AND position >= ?2
			AND NOT EXISTS (SELECT 1 FROM device AS e WHERE e.lot = ?1 AND e.position = d.position + 1) ORDER BY
				position LIMIT 1) LIMIT 1`, l.Lot, from)
	if err != nil {
		return 0, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cursor = max(l.cursor, at); at >= l.Devices() {
		return 0, ErrNoneLeft
	}
	return at, nil
}

// claim hands out a device that is waiting; if it was asked for by name, also one that failed or is overdue. It says
// whether it did: another station may have been faster.
func (d *Desk) claim(ctx context.Context, k device, station string, to State, named bool) (bool, error) {
	reported := int64(0)
	if to != Out {
		reported = now()
	}
	var tries int
	err := d.to("hand a device out").Named(d.write.Do(ctx, func(ctx context.Context, tx *sqlconn.Tx) error {
		return tx.QueryRowContext(ctx,
			`INSERT INTO device (lot, position, issue, again, state, station, handed, reported)
		VALUES (?1, ?2, ?3, EXISTS (SELECT 1 FROM device WHERE lot = ?1 AND position = ?2), ?4, ?5, ?6, ?7)
		ON CONFLICT (lot, position, issue) DO UPDATE SET state = excluded.state, station = excluded.station, handed =
			excluded.handed,
			reported = 0, tries = tries + 1, note = '' WHERE ?8 AND state IN ('failed', 'overdue') RETURNING tries`,
			k.lot, k.position, k.issue, to, station, now(), reported, named).Scan(&tries)
	}))
	var taken sqlite3.Error
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return false, nil
	case errors.As(err, &taken) && taken.Code == sqlite3.ErrConstraint: // the station asked twice at once
		return false, refuse("this station was just handed a device: ask again")
	case err != nil:
		return false, err
	}
	if to == Out {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.out[k] = &handedOut{tries: tries, since: time.Now()}
	}
	return true, nil
}
