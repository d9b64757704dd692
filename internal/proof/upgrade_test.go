package proof

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/internal/programs"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// later is the keysvc of a later release: its schema has a column more than this one's, and a table; and with
// KMEHSM_TEST_BREAK=1 also a change that no earlier release can live with.
const later = "../later/keysvc"

const laterSchema = `package sqlstore

import "os"

func init() {
	known.Migrations = append(known.Migrations, "ALTER TABLE bindings ADD COLUMN note TEXT NOT NULL DEFAULT ''; " +
		"CREATE TABLE notes (imsi TEXT PRIMARY KEY)")
	if os.Getenv("KMEHSM_TEST_BREAK") != "" {
		known.Migrations = append(known.Migrations, "ALTER TABLE sightings ADD COLUMN place TEXT")
		known.Least = len(known.Migrations)
	}
}
`

const broken = "KMEHSM_TEST_BREAK=1"

var laterIs struct {
	sync.Mutex
	built bool
}

// buildLater builds later, once, with a file that the source does not have.
func buildLater(t *testing.T) {
	t.Helper()
	laterIs.Lock()
	defer laterIs.Unlock()
	if laterIs.built {
		return
	}
	dir := t.TempDir()
	added := filepath.Join(dir, "later.go")
	must.Do(t, os.WriteFile(added, []byte(laterSchema), 0o600))
	source := must.Get[string](t)(filepath.Abs("../../binding/sqlstore/later.go"))
	overlay := must.Get[[]byte](t)(json.Marshal(map[string]any{"Replace": map[string]string{source: added}}))
	file := filepath.Join(dir, "overlay.json")
	must.Do(t, os.WriteFile(file, overlay, 0o600))
	out, err := exec.Command("go", "build", "-trimpath", "-overlay", file, "-o",
		filepath.Join(programs.Dir(t), later), "github.com/kmehsm/kmehsm/cmd/keysvc").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	laterIs.built = true
}

// over is an HTTP/1.1 client of a socket.
func over(socket string) *http.Client {
	return &http.Client{Timeout: testproc.Patience, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}}}
}

// start starts an instance of a release, whose socket is its name.
func (w *world) start(release, name string, env ...string) *testproc.Process {
	w.t.Helper()
	cmd := w.command(w.operator, release, "serve", "--config", name+".yaml")
	cmd.Env = append(cmd.Env, env...)
	c := over(w.path(name))
	defer c.CloseIdleConnections()
	return testproc.Start(w.t, cmd, func(*testproc.Process) bool { return ready(c) })
}

func (w *world) stop(p *testproc.Process) {
	w.t.Helper()
	if err := p.Stop(syscall.SIGTERM); err != nil {
		w.t.Errorf("it ends with %v:\n%s", err, p.Log)
	}
}

// refused runs a command of a release, which must fail with exit code 1 and this sentence.
func (w *world) refused(want, release string, env []string, args ...string) {
	w.t.Helper()
	cmd := w.command(w.operator, release, args...)
	cmd.Env = append(cmd.Env, env...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(out), want) {
		w.t.Errorf("%s: %v, want %q:\n%s", strings.Join(args, " "), err, want, out)
	}
}

const (
	onlyNewer = "its schema has version 3, and only a program that knows version 3 can work with it: this one knows " +
		"version 1; use the release that upgraded it, or a newer one"
	serves = "a newer release has upgraded the store to schema version 2, and this one knows 1"
)

// attach is a first attach, from the first vector on.
func (w *world) attach(c *client.Client, d device, imsi kme.IMSI) error {
	ctx, plain := w.t.Context(), w.plaintext(d)
	v, err := c.PrepareVector(ctx, imsi, client.Origin{}, client.RAND{1})
	if err != nil {
		return err
	}
	imei, err := kme.ParseIMEI(d.imei)
	if err != nil {
		return err
	}
	e, err := c.EstablishKME(ctx, imsi, client.Origin{}, imei, v.AttemptID, w.encrypt(d, plain))
	if err != nil || e.NWSig != plain.NWSig() {
		return fmt.Errorf("%+v, %w", e, err)
	}
	if v, err = c.PrepareVector(ctx, imsi, client.Origin{}, client.RAND{2}); err != nil || v.AttemptID != "" {
		return fmt.Errorf("%+v, %w", v, err)
	}
	r, err := c.ReportAuthentication(ctx, imsi, client.Origin{}, true)
	if err != nil || r.State != kmev1.State_ACTIVE {
		return fmt.Errorf("%+v, %w", r, err)
	}
	return nil
}

// Two instances of one release on PostgreSQL are replaced by a later one's, one after the other and under load of whole
// attaches and other calls, while a balancer asks /readyz: no call fails. What the earlier release cannot work with, it
// refuses.
func TestPostgresUpgradeAtNoon(t *testing.T) {
	t.Parallel()
	buildLater(t)
	w := newWorld(t, nil)
	w.setUp(lotOf{"LE", "tr33868-ecdsa-p256", "35209900", 2048, 6})
	devices := w.devices()
	server := pgtest.Start(t)
	server.Exec(t, "CREATE ROLE service LOGIN")
	owner := server.Database(t)
	store := server.As(t, owner, "service")
	upgrade := []string{"store", "upgrade", "--store", owner, "--role", "service"}
	w.run(w.operator, "keysvc", upgrade...)
	w.run(w.operator, "keysvc", "store", "migrate", "--from", "sqlite:"+w.path("var/keysvc/keysvc.db"), "--to", store)
	var urls []string
	for _, name := range []string{"a", "b"} {
		must.Do(t, os.Mkdir(w.path("state-"+name), 0o700))
		must.Do(t, os.WriteFile(w.path(name+".yaml"), fmt.Appendf(nil,
			"state: state-%s\nsocket: %[1]s\nstore: %q\ndrain_delay: %s\nimei_rate: 1000\n", name, store, drainDelay),
			0o600))
		urls = append(urls, "unix:"+w.path(name))
	}
	a, b := w.start("keysvc", "a"), w.start("keysvc", "b")
	c := must.Get[*client.Client](t)(client.New(client.Options{URLs: urls, Timeout: testproc.Patience}))
	defer c.Close()

	ctx, stop := context.WithCancel(t.Context())
	var load sync.WaitGroup
	var begun, attached, streamed, balanced atomic.Int64
	imsi := func(n int64) kme.IMSI {
		one, err := kme.ParseIMSI(fmt.Sprintf("0010100000%05d", n))
		if err != nil {
			t.Error(err)
		}
		return one
	}
	attach := func(d device) error {
		err := w.attach(c, d, imsi(50000+begun.Add(1)))
		if err == nil {
			attached.Add(1)
		}
		return err
	}
	must.Do(t, attach(devices[0]))
	bound := imsi(50001)
	for _, d := range devices[:4] {
		load.Go(func() {
			for ctx.Err() == nil {
				if err := attach(d); err != nil {
					t.Errorf("an attach: %v", err)
				}
			}
		})
	}
	for worker := range int64(4) {
		load.Go(func() {
			for n := worker * 10000; ctx.Err() == nil; n++ {
				// What may be made only once, and changes the store.
				if _, err := c.OpenProvisioning(t.Context(), imsi(10000+n), time.Hour); err != nil {
					t.Error(err)
				}
				if v, err := c.PrepareVector(t.Context(), imsi(10000+n), client.Origin{}, client.RAND{1}); err != nil {
					t.Error(err)
				} else if v.AttemptID == "" {
					t.Errorf("%+v", v)
				}
				if v, err := c.PrepareVector(t.Context(), bound, client.Origin{}, client.RAND{3}); err != nil {
					t.Errorf("a bound subscription: %v", err)
				} else if v.AttemptID != "" {
					t.Errorf("a bound subscription: %+v", v)
				}
				if _, err := c.ReportAuthentication(t.Context(), bound, client.Origin{}, false); err != nil {
					t.Error(err)
				}
				streamed.Add(1)
			}
		})
	}
	load.Go(func() { w.balance(ctx, []string{"a", "b"}, &balanced) })
	var rate float64   // attaches a second, when they were last shared
	shared := func() { // until both instances have their share, and of all kinds of calls
		t.Helper()
		before, too, whole, began := streamed.Load(), balanced.Load(), attached.Load(), time.Now()
		time.Sleep(time.Second) // a client asks every half a second whether an instance is ready
		testproc.Await(t, "calls are made", func() bool {
			return streamed.Load() > before+20 && balanced.Load() > too+20 && attached.Load() > whole+10
		})
		rate = float64(attached.Load()-whole) / time.Since(began).Seconds()
	}
	drain := func(p *testproc.Process) {
		t.Helper()
		before, began := attached.Load(), time.Now()
		w.stop(p)
		during, quarter := attached.Load()-before, max(1, int64(rate*time.Since(began).Seconds()/4))
		_, draining, _ := strings.Cut(p.Log.String(), `"draining"`)
		here := strings.Count(draining, `"imsi":"00101000005`)
		t.Logf("%d attaches while an instance ended; when its streams ended it was at work on %d KMEs", during, here)
		if during < quarter {
			t.Errorf("%d attaches while an instance ended, and not a quarter of what there was before, %d", during,
				quarter)
		}
	}
	shared()
	w.run(w.operator, later, upgrade...)
	shared()
	drain(a)
	a = w.start(later, "a")
	shared()
	asking := over(w.path("b"))
	testproc.Await(t, "/readyz of the earlier release, which runs on, says what it serves", func() bool {
		r := must.Get[*http.Response](t)(asking.Get("http://keysvc/readyz"))
		defer r.Body.Close()
		return strings.Contains(string(must.Get[[]byte](t)(io.ReadAll(r.Body))), serves)
	})
	asking.CloseIdleConnections()
	drain(b)
	b = w.start("keysvc", "b") // and back: it serves beside the later one
	shared()
	drain(b)
	if !strings.Contains(b.Log.String(), serves) {
		t.Errorf("the log of the earlier release, which was started anew:\n%s", b.Log)
	}
	b = w.start(later, "b")
	shared()

	// What is connected is not broken.
	w.refused("an older keysvc is connected, from this machine as service", later, []string{broken}, upgrade...)
	shared()
	stop()
	load.Wait()
	t.Logf("%d attaches, %d rounds of other calls, %d calls by the balancer", attached.Load(), streamed.Load(),
		balanced.Load())
	w.stop(a)
	w.stop(b)
	cmd := w.command(w.operator, later, upgrade...)
	cmd.Env = append(cmd.Env, broken)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	w.refused(onlyNewer, "keysvc", nil, "serve", "--config", "a.yaml")
	w.refused(onlyNewer, "keysvc", nil, "store", "verify", "--store", store)
	a = w.start(later, "a", broken)
	w.stop(a)
}

const drainDelay = 3 * time.Second

// balance makes calls at the instances that say that they are ready, in turn, each by itself.
func (w *world) balance(ctx context.Context, names []string, made *atomic.Int64) {
	up := make([]atomic.Pointer[time.Time], len(names)) // when an instance was asked that was ready; else nil
	clients := make([]*http.Client, len(names))
	var asking sync.WaitGroup
	defer asking.Wait()
	for i, name := range names {
		clients[i] = over(w.path(name))
		asking.Go(func() {
			c := over(w.path(name))
			defer c.CloseIdleConnections()
			for ctx.Err() == nil {
				if asked := new(time.Now()); ready(c) {
					up[i].Store(asked)
				} else {
					up[i].Store(nil)
				}
				time.Sleep(100 * time.Millisecond)
			}
		})
	}
	for n := 0; ctx.Err() == nil; n++ {
		i := n % len(names)
		asked := up[i].Load()
		if asked == nil {
			time.Sleep(time.Millisecond)
			continue
		}
		r, err := clients[i].Post("http://keysvc/kme.v1.KeyService/PrepareVector", "application/json",
			bytes.NewBufferString(`{"imsi":"001010000099999","rands":["AAAAAAAAAAAAAAAAAAAAAA=="]}`))
		if err != nil {
			if time.Since(*asked) < drainDelay { // a test that stood still knows too little
				w.t.Errorf("a call by the balancer, to %s: %v", names[i], err)
			}
			continue
		}
		body, err := io.ReadAll(r.Body)
		r.Body.Close()
		if err != nil || r.StatusCode != http.StatusOK {
			w.t.Errorf("a call by the balancer, to %s: %s, %s, %v", names[i], r.Status, body, err)
		}
		made.Add(1)
	}
}

// A service on SQLite is replaced by a later release, whose start upgrades the store, and by the earlier one again.
func TestUpgradeOnSQLite(t *testing.T) {
	t.Parallel()
	buildLater(t)
	w := newWorld(t, nil)
	w.run(w.operator, "keysvc", "init")
	must.Do(t, os.WriteFile(w.path("s.yaml"), []byte("state: var/keysvc\nsocket: s\ndrain_delay: 0s\n"), 0o600))
	c := must.Get[*client.Client](t)(client.New(client.Options{URLs: []string{"unix:" + w.path("s")},
		Timeout: testproc.Patience}))
	defer c.Close()
	one := must.Get[kme.IMSI](t)(kme.ParseIMSI("001010000000001"))
	opened := ""
	for i, step := range []struct {
		release string
		warns   bool
	}{{"keysvc", false}, {later, false}, {"keysvc", true}} {
		service := w.start(step.release, "s")
		if i == 0 {
			a, err := c.OpenProvisioning(t.Context(), one, time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			opened = a.GetAttemptId()
		}
		v, err := c.PrepareVector(t.Context(), one, client.Origin{}, client.RAND{1})
		if err != nil || v.AttemptID != opened {
			t.Errorf("step %d: %+v, %v, want attempt %q", i, v, err, opened)
		}
		w.stop(service)
		if warns := strings.Contains(service.Log.String(), serves); warns != step.warns {
			t.Errorf("step %d: it warns %v:\n%s", i, warns, service.Log)
		}
	}
	w.refused("would not have all of it", "keysvc", nil, "store", "migrate", "--from",
		"sqlite:"+w.path("var/keysvc/keysvc.db"), "--to", "sqlite:"+w.path("copy.db"))
	w.stop(w.start(later, "s", broken))
	w.refused(onlyNewer, "keysvc", nil, "serve", "--config", "s.yaml")
}
