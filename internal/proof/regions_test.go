package proof

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// A distance is a folder with the socket of a server of PostgreSQL that is far away: whatever is sent either way takes
// half of a round trip.
type distance struct {
	dir       string
	roundTrip atomic.Int64 // in nanoseconds
}

func newDistance(t *testing.T, server string) *distance {
	t.Helper()
	const socket = ".s.PGSQL.5432"
	d := &distance{dir: must.Get[string](t)(os.MkdirTemp("", "far-"))} // the server's user may enter it
	l := must.Get[net.Listener](t)(net.Listen("unix", filepath.Join(d.dir, socket)))
	must.Do(t, errors.Join(os.Chmod(d.dir, 0o711), os.Chmod(filepath.Join(d.dir, socket), 0o777)))
	t.Cleanup(func() { l.Close(); os.RemoveAll(d.dir) })
	go func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("unix", filepath.Join(server, socket))
			if err != nil {
				near.Close()
				continue
			}
			go d.carry(near, far)
			go d.carry(far, near)
		}
	}()
	return d
}

func (d *distance) carry(from, to net.Conn) {
	type sent struct {
		data   []byte
		arrive time.Time
	}
	way := make(chan sent, 1000)
	go func() {
		defer to.Close()
		for s := range way {
			time.Sleep(time.Until(s.arrive))
			if _, err := to.Write(s.data); err != nil {
				from.Close() // and so nothing more is sent
			}
		}
	}()
	defer close(way)
	for {
		data := make([]byte, 1<<16)
		n, err := from.Read(data)
		if n > 0 {
			way <- sent{data[:n], time.Now().Add(time.Duration(d.roundTrip.Load()) / 2)}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				from.Close()
			}
			return
		}
	}
}

// How many round trips a call waits for if the database is in another region than the service, or its standby is in
// another one than the database. docs/capacity.md has the figures.
func TestPostgresRegions(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	w.setUp(lotOf{"LE", "tr33868-ecdsa-p256", "35209900", 2048, 6})
	devices := w.devices()
	primary := pgtest.Start(t)
	database := must.Get[*url.URL](t)(url.Parse(primary.Database(t)))
	q := database.Query()
	toPrimary, toStandby := newDistance(t, q.Get("host")), newDistance(t, q.Get("host"))
	standby := primary.Standby(t)
	standby.Set(t, "primary_conninfo", fmt.Sprintf("host=%s port=5432 user=postgres", toStandby.dir))
	w.run(w.operator, "keysvc", "store", "migrate", "--from", "sqlite:"+w.path("var/keysvc/keysvc.db"), "--to",
		database.String())
	serve := func(name string) *client.Client {
		t.Helper()
		must.Do(t, os.Mkdir(w.path("state-"+name), 0o700))
		must.Do(t, os.WriteFile(w.path(name+".yaml"), fmt.Appendf(nil, "state: state-%s\nsocket: %[1]s\nstore: %q\n"+
			"drain_delay: 0s\nimei_rate: 1000\n", name, database), 0o600))
		w.start("keysvc", name)
		c := must.Get[*client.Client](t)(client.New(client.Options{URLs: []string{"unix:" + w.path(name)},
			Timeout: testproc.Patience}))
		t.Cleanup(c.Close)
		return c
	}
	beside := serve("beside") // the primary
	q.Set("host", toPrimary.dir)
	q.Del("connect_timeout")
	database.RawQuery = q.Encode()
	c := serve("service")
	var last atomic.Int64
	next := func() kme.IMSI {
		return must.Get[kme.IMSI](t)(kme.ParseIMSI(fmt.Sprintf("0010100000%05d", last.Add(1))))
	}
	bound := next()
	must.Do(t, w.attach(c, devices[0], bound))

	const far = 100 * time.Millisecond // more than what else a busy machine does in a call
	fastest := func(f func() error) time.Duration {
		t.Helper()
		var took []time.Duration
		for range 5 {
			began := time.Now()
			must.Do(t, f())
			took = append(took, time.Since(began))
		}
		return slices.Min(took)
	}
	calls := []struct {
		what string
		do   func() error
		near time.Duration
	}{
		{what: "a vector of a bound subscription", do: func() error {
			_, err := c.PrepareVector(t.Context(), bound, client.Origin{}, client.RAND{3})
			return err
		}},
		{what: "a report that only reads", do: func() error {
			_, err := c.ReportAuthentication(t.Context(), bound, client.Origin{}, true)
			return err
		}},
		{what: "a whole first attach", do: func() error { return w.attach(c, devices[1], next()) }},
	}
	// together is how long an attach takes if 24 are made at each of some instances, twice.
	together := func(instances ...*client.Client) []time.Duration {
		t.Helper()
		took := make([]atomic.Int64, len(instances))
		var all sync.WaitGroup
		for i, c := range instances {
			for n := range 24 {
				all.Go(func() {
					for range 2 {
						began := time.Now()
						if err := w.attach(c, devices[n%len(devices)], next()); err != nil {
							t.Error(err)
						}
						took[i].Add(int64(time.Since(began)) / 48)
					}
				})
			}
		}
		all.Wait()
		each := make([]time.Duration, len(instances))
		for i := range each {
			each[i] = time.Duration(took[i].Load())
		}
		return each
	}
	for i := range calls {
		calls[i].near = fastest(calls[i].do)
	}
	for _, region := range []struct {
		what           string
		service, other time.Duration
		most           [3]float64 // round trips
	}{
		{"the primary is near, and its standby far", 0, far, [3]float64{0.5, 0.5, 8}},
		{"the primary is far, and its standby near", far, 0, [3]float64{1.5, 1.5, 20}},
		{"both are far", far, far, [3]float64{1.5, 1.5, 27}},
	} {
		toPrimary.roundTrip.Store(int64(region.service))
		toStandby.roundTrip.Store(int64(region.other))
		for i, call := range calls {
			took, most := fastest(call.do), region.most[i]+5*float64(call.near)/float64(far)
			trips := func() float64 { return float64(took-call.near) / float64(far) }
			for try := 1; trips() > most && try < 5; try++ { // other work may have come between
				took = min(took, fastest(call.do))
			}
			t.Logf("%s: %s waits for %.1f round trips (%v, and %v if all is near)", region.what, call.what, trips(),
				took, call.near)
			if trips() > most {
				t.Errorf("%s: %s waits for more than %.1f round trips", region.what, call.what, most)
			}
		}
		t.Logf("%s: of 24 at once, an attach waits for %.1f round trips", region.what,
			float64(together(c)[0])/float64(far))
	}
	at := together(c, beside)
	t.Logf("24 at once where both are far, and 24 where the primary is: an attach waits for %.1f round trips, and %.1f",
		float64(at[0])/float64(far), float64(at[1])/float64(far))
}
