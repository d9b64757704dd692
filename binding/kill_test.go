package binding_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kmehsm/kmehsm/api"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/directory/filestore"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// childArgs has what the service process of TestKilled serves: token, store, folder of the directory, socket.
const childArgs = "KMEHSM_TEST_CHILD"

// serveChild is the service as a process that can be killed.
func serveChild(t *testing.T, args []string) {
	pool := must[*hsmkeys.OperatorPool](t)(hsmkeys.OpenOperatorPool(t.Context(), args[:1], hsmkeys.Options{}))
	store := openStore(t, pool.Tokens()[0], args[1])
	files := must[*filestore.Store](t)(filestore.Open(args[2]))
	readers := map[string]*directory.Reader{}
	for _, m := range must[[]*registry.Manufacturer](t)(store.Manufacturers(t.Context())) {
		readers[m.KeyID] = directory.NewReader(files,
			must[*directory.Verifier](t)(directory.ParseVerifier([]byte(m.PEM))),
			directory.ReaderOptions{ReadTimeout: testproc.Patience})
	}
	lots := must[*registry.Lots](t)(registry.NewLots(must[[]*registry.Lot](t)(store.Lots(t.Context())), readers))
	service := binding.NewService(binding.Options{Token: pool, Store: store, Lots: lots, Times: binding.DefaultTimes(),
		Log: slog.New(slog.DiscardHandler)})
	os.Remove(args[3])
	l := must[net.Listener](t)(net.Listen("unix", args[3]))
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{Protocols: protocols, ConnContext: api.ConnContext,
		Handler: api.NewHandler(api.Options{Service: service, Clients: anybody(t),
			Metrics: binding.NewMetrics(prometheus.NewRegistry()), Gather: http.NotFoundHandler(),
			Ready: func(context.Context) ([]string, error) { return nil, nil }})}
	t.Fatal(server.Serve(l))
}

// The service is killed with -9 under load, again and again, and with it PostgreSQL, where that is the store: every
// NW_SIG that a client received is in the store, and no KME is accepted twice, asked again in the same attempt or
// in others.
func TestKilled(t *testing.T) {
	if args := os.Getenv(childArgs); args != "" {
		serveChild(t, strings.Split(args, "\n"))
	}
	killed(t, sqlstore.InFolder(t.TempDir()), func(int) {})
}

func TestPostgresKilled(t *testing.T) {
	server := pgtest.Start(t)
	killed(t, server.Database(t), func(round int) {
		if round%3 == 2 {
			server.Kill(t)
			server.Run(t)
		}
	})
}

// A world is everything but the service, which is other processes. Its harness has one too, on the same store.
type world struct {
	*harness
	lot       *lot
	storeName string
	dir       string
}

func newWorld(t *testing.T, storeName string) *world {
	r, m := newHarness(t), newMaker(t)
	r.store = openStore(t, r.token, storeName)
	t.Cleanup(func() { r.store.Close() })
	r.recorder.Ledger, r.recorder.store = r.store, r.store
	r.enroll(t, m)
	l := m.newLot(t, "L1", kme.SuiteECDSA, vectors(t).lot(t, "lot-2048"), 1, newDevices(t, 5)...)
	r.take(t, m, l)
	return &world{r, l, storeName, m.dir}
}

// start starts a service process on a socket.
func (w *world) start(t *testing.T, socket string) *testproc.Process {
	t.Helper()
	child := exec.Command(os.Args[0], "-test.run=^TestKilled$")
	child.Env = append(os.Environ(), childArgs+"="+strings.Join([]string{w.tokenURI, w.storeName, w.dir, socket}, "\n"))
	return testproc.Start(t, child, func(*testproc.Process) bool {
		c, err := net.Dial("unix", socket)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// Two service processes on one PostgreSQL: the same payload at both is established once and answered the same, and one
// KME for two subscriptions is accepted by one of them.
func TestPostgresTwoInstances(t *testing.T) {
	w := newWorld(t, pgtest.Start(t).Database(t))
	var clients []*client.Client
	for range 2 {
		socket := filepath.Join(t.TempDir(), "s")
		w.start(t, socket)
		c := must[*client.Client](t)(client.New(client.Options{URLs: []string{"unix:" + socket},
			Timeout: testproc.Patience}))
		defer c.Close()
		clients = append(clients, c)
	}
	ctx := t.Context()
	for round := range 20 {
		d := w.lot.devices[round%5]
		var imsis [2]kme.IMSI
		var ids [2]string
		for i := range 2 { // the attempts are opened by one, and used at the other
			imsis[i] = newIMSI()
			ids[i] = must[client.Vectors](t)(clients[1-i].PrepareVector(ctx, imsis[i], client.Origin{},
				client.RAND{})).AttemptID
		}
		payload, plain := d.payload(t)
		want := plain.NWSig()
		both := func(at func(i int) int) (errs [2]error) {
			var all sync.WaitGroup
			for i := range 2 {
				all.Go(func() {
					e, err := clients[i].EstablishKME(ctx, imsis[at(i)], client.Origin{}, d.imei, ids[at(i)], payload)
					if errs[i] = err; err == nil && e.NWSig != want {
						t.Errorf("NW_SIG %x, want %x", e.NWSig, want)
					}
				})
			}
			all.Wait()
			return errs
		}
		if round%2 == 0 {
			if errs := both(func(int) int { return 0 }); errs[0] != nil || errs[1] != nil {
				t.Errorf("the same call at both: %v", errs)
			}
			continue
		}
		errs := both(func(i int) int { return i })
		refused := errs[0]
		if refused == nil {
			refused = errs[1]
		}
		if (errs[0] == nil) == (errs[1] == nil) || !errors.Is(refused, client.Reason(kme.KMERejected)) {
			t.Errorf("one KME for two subscriptions: %v", errs)
		}
	}
}

// An attempt is one that a load has made.
type attempt struct {
	imsi    kme.IMSI
	device  *device
	id      string
	payload []byte
	nwSig   []byte // as the client received it; nil if it did not
}

// workers are how many devices of a crowd attach at a time.
const workers = 4

// A crowd are devices that attach without a pause, whatever becomes of the service.
type crowd struct {
	*world
	socket  string
	answers atomic.Int64

	mu      sync.Mutex
	all     []*attempt      // guarded by mu
	failed  []time.Time     // guarded by mu: when calls began that had no answer
	longest time.Duration   // guarded by mu: that a call with an answer took
	back    time.Time       // guarded by mu: when an outage was over; zero before
	since   []time.Duration // guarded by mu: what calls took that began when it was, and had an answer
}

// call makes a call, and counts it.
func (c *crowd) call(f func() error) error {
	began := time.Now()
	err := f()
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.failed = append(c.failed, began)
	} else {
		c.longest = max(c.longest, time.Since(began))
		if !c.back.IsZero() && began.After(c.back) {
			c.since = append(c.since, time.Since(began))
		}
	}
	return err
}

// dial makes a client of so many tries.
func (c *crowd) dial(t *testing.T, tries int) *client.Client {
	return must[*client.Client](t)(client.New(client.Options{URLs: []string{"unix:" + c.socket}, Tries: tries,
		Timeout: testproc.Patience}))
}

func (c *crowd) establish(ctx context.Context, service *client.Client, a *attempt) error {
	return c.call(func() error {
		e, err := service.EstablishKME(ctx, a.imsi, client.Origin{}, a.device.imei, a.id, a.payload)
		if err == nil {
			a.nwSig = e.NWSig[:]
			c.answers.Add(1)
		}
		return err
	})
}

// come begins the load, and returns when a binding was established since: from then on an outage can lose something.
// stop ends it.
func (c *crowd) come(t *testing.T) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var load sync.WaitGroup
	for w := range workers {
		load.Go(func() {
			service := c.dial(t, 1)
			defer service.Close()
			for ctx.Err() == nil {
				a := &attempt{imsi: newIMSI(), device: c.lot.devices[w]}
				if c.call(func() error {
					v, err := service.PrepareVector(ctx, a.imsi, client.Origin{}, client.RAND{})
					if err == nil {
						a.id = v.AttemptID
					}
					return err
				}) != nil {
					continue
				}
				a.payload, _ = a.device.payload(t)
				c.establish(ctx, service, a)
				c.mu.Lock()
				c.all = append(c.all, a)
				c.mu.Unlock()
			}
		})
	}
	for before := c.answers.Load(); c.answers.Load() == before; {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(time.Duration(rand.IntN(150)) * time.Millisecond)
	return func() { cancel(); load.Wait() }
}

// nothingIsLost checks that what a client was told is in the store, that what it was not told it is told now, and that
// no KME is accepted twice.
func (c *crowd) nothingIsLost(t *testing.T) {
	service := c.dial(t, 3)
	defer service.Close()
	answered, lost := 0, 0
	for _, a := range c.all {
		if a.nwSig != nil {
			answered++
			b := must[*binding.Subscription](t)(c.store.Subscription(t.Context(), a.imsi, time.Now())).Latest()
			if b == nil || !bytes.Equal(b.NWSig, a.nwSig) || b.IMEI != a.device.imei {
				t.Fatalf("a client has an NW_SIG of IMSI %s, and the store %+v", a.imsi, b)
			}
			continue
		}
		// The answer was lost, with what was committed or before: asked again there is one.
		lost++
		if err := c.establish(t.Context(), service, a); err != nil {
			t.Fatalf("the same call again: %v", err)
		}
	}
	for i, a := range c.all {
		if i%7 != 0 {
			continue
		}
		was := a.nwSig
		if err := c.establish(t.Context(), service, a); err != nil || !bytes.Equal(a.nwSig, was) {
			t.Errorf("the same call again: %v", err)
		}
		other := newIMSI()
		v, err := service.PrepareVector(t.Context(), other, client.Origin{}, client.RAND{})
		if err != nil {
			t.Fatal(err)
		}
		again := &attempt{imsi: other, device: a.device, id: v.AttemptID, payload: a.payload}
		if err := c.establish(t.Context(), service, again); !errors.Is(err, client.Reason(kme.KMERejected)) {
			t.Errorf("a KME that was used: %v", err)
		}
	}
	t.Logf("%d answers, all in the store; %d lost ones asked for again", answered, lost)
}

func killed(t *testing.T, storeName string, besides func(round int)) {
	kills := 6
	if os.Getenv("KMEHSM_SOAK") != "" {
		kills = 100
	}
	c := &crowd{world: newWorld(t, storeName), socket: filepath.Join(t.TempDir(), "s")}
	for round := range kills {
		child := c.start(t, c.socket)
		stop := c.come(t)
		besides(round)
		child.Kill()
		stop()
	}
	c.start(t, c.socket)
	c.nothingIsLost(t)
}

// The primary server is killed under load, and its synchronous standby promoted.
func TestPostgresStandby(t *testing.T) {
	primary := pgtest.Start(t)
	standby := primary.Standby(t)
	c := &crowd{world: newWorld(t, pgtest.Either(t, primary.Database(t), primary, standby)),
		socket: filepath.Join(t.TempDir(), "s")}
	warned := func(what string) {
		t.Helper()
		if got := must[[]string](t)(c.store.Warnings(t.Context())); (what != "") != strings.Contains(
			strings.Join(got, "\n"), "could lose") || !strings.Contains(strings.Join(got, "\n"), what) {
			t.Errorf("%q does not say %q", got, what)
		}
	}
	warned("")
	primary.Set(t, "synchronous_commit", "remote_write")
	warned("remote_write")
	primary.Set(t, "synchronous_commit", "on")
	primary.Set(t, "synchronous_standby_names", "")
	warned("asynchronous")
	primary.Set(t, "synchronous_standby_names", "*")
	warned("")
	c.failOver(t, standby, primary.Kill, 0)
}

// The primary's host loses its power: its connections stay, and nobody answers. Each of them is not waited for anew.
func TestPostgresStandbySilent(t *testing.T) {
	primary := pgtest.Start(t)
	standby := primary.Standby(t)
	c := &crowd{world: newWorld(t, pgtest.Either(t, primary.Database(t), primary, standby)),
		socket: filepath.Join(t.TempDir(), "s")}
	defer primary.Thaw(t) // or it does not end
	// A transaction is under way; and then the primary is asked for a connection once, until connect_timeout.
	c.failOver(t, standby, primary.Freeze, 5*time.Second+2*time.Second)
}

// failOver loses the primary under load, and has its standby promoted, as Patroni would. The service goes on with that,
// without a restart, and nothing that it told is lost. It may wait so long for a primary that is silent.
func (c *crowd) failOver(t *testing.T, standby *pgtest.Server, lose func(testing.TB), silent time.Duration) {
	t.Helper()
	c.start(t, c.socket)
	stop := c.come(t)
	mark := must[*binding.Mark](t)(c.store.Check(t.Context(), new(binding.Mark)))
	c.mu.Lock()
	usual := c.longest
	c.mu.Unlock()
	lose(t)
	time.Sleep(200 * time.Millisecond) // calls fail meanwhile
	promoting := time.Now()
	standby.Promote(t)
	promoted, before := time.Now(), c.answers.Load()
	testproc.Await(t, "the service goes on", func() bool { return c.answers.Load() > before })
	back := time.Now()
	c.mu.Lock()
	c.back = back
	c.mu.Unlock()
	for range 3 * workers { // whatever connections it had to the primary
		before := c.answers.Load()
		testproc.Await(t, "it serves", func() bool { return c.answers.Load() > before })
	}
	c.mu.Lock()
	late := 0
	for _, began := range c.failed {
		if began.After(promoted) {
			late++
		}
	}
	if slices.Sort(c.since); len(c.since) > 0 { // other work may have begun meanwhile
		usual = max(usual, c.since[len(c.since)/2])
	}
	c.mu.Unlock()
	took := back.Sub(promoted)
	t.Logf("the promotion took %v; the service is back %v after it, where a call usually took %v; "+
		"%d calls have failed that began since", promoted.Sub(promoting), took, usual, late)
	// A machine on which a call takes longer has more time. A worker may have had a connection to the primary.
	if took > silent+max(3*time.Second, 40*usual) || late > workers {
		t.Error("the service is not back soon after the promotion")
	}
	time.Sleep(200 * time.Millisecond)
	stop()
	testproc.Await(t, "this process goes on, too", func() bool {
		_, err := c.store.Subscription(t.Context(), newIMSI(), time.Now())
		return err == nil
	})
	c.nothingIsLost(t)
	report := must[*sqlstore.Report](t)(c.store.Verify(t.Context(), func(int, int) {}))
	if len(report.Damaged) > 0 {
		t.Errorf("%+v", report)
	}
	must[*binding.Mark](t)(c.store.Check(t.Context(), mark))
}

// The standby is away, and the primary gives up waiting for it: others then see what it has not confirmed. Nobody is
// told an NW_SIG that only the primary has, also not whoever asks again.
func TestPostgresStandbyAway(t *testing.T) {
	primary := pgtest.Start(t)
	standby := primary.Standby(t)
	c := &crowd{world: newWorld(t, primary.Database(t)), socket: filepath.Join(t.TempDir(), "s")}
	c.start(t, c.socket)
	service := c.dial(t, 1)
	defer service.Close()
	a := &attempt{imsi: newIMSI(), device: c.lot.devices[0]}
	v := must[client.Vectors](t)(service.PrepareVector(t.Context(), a.imsi, client.Origin{}, client.RAND{}))
	a.id = v.AttemptID
	a.payload, _ = a.device.payload(t)
	standby.Freeze(t)
	defer standby.Thaw(t)
	for _, what := range []string{"a call", "the same call again"} {
		if err := c.establish(t.Context(), service, a); !errors.Is(err, client.Reason(kme.StoreUnavailable)) {
			t.Errorf("%s: %v, without the standby", what, err)
		}
		testproc.Await(t, "what is not confirmed can be read", func() bool {
			return must[*binding.Subscription](t)(c.store.Subscription(t.Context(), a.imsi, time.Now())).Pending != nil
		})
	}
	standby.Thaw(t)
	if err := c.establish(t.Context(), service, a); err != nil {
		t.Errorf("with the standby: %v", err)
	}
}

// A call is made again that has failed, since the standby has not confirmed it. The primary is lost, and the standby
// promoted, after what the call had made was read on the primary, and before a commit confirms that. NW_SIG is told of
// what the promoted server has, and of nothing else.
func TestPostgresReadBeforeFailover(t *testing.T) {
	primary := pgtest.Start(t)
	standby := primary.Standby(t)
	w := newWorld(t, pgtest.Either(t, primary.Database(t), primary, standby))
	imsi, d := newIMSI(), w.lot.devices[0]
	attempt := w.attempt(t, imsi)
	payload, plain := d.payload(t)
	call := func() (*binding.Established, error) {
		return w.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
			AttemptID: attempt, Payload: payload, Origin: here})
	}
	standby.Set(t, "primary_conninfo", "")
	testproc.Await(t, "the standby is away", func() bool {
		return strings.Contains(strings.Join(must[[]string](t)(w.store.Warnings(t.Context())), ""), "and 0 of them are")
	})
	_, err := call()
	checkRefused(t, "without the standby", err, kme.StoreUnavailable, "")
	testproc.Await(t, "what is not confirmed can be read", func() bool {
		return must[*binding.Subscription](t)(w.store.Subscription(t.Context(), imsi, time.Now())).Pending != nil
	})
	w.recorder.onFirst("Settle", func() error {
		standby.Promote(t)
		primary.Kill(t)
		testproc.Await(t, "others go on at the promoted server", func() bool { return w.vector(t, newIMSI()) == nil })
		return nil
	})
	_, err = call()
	checkRefused(t, "a binding that the promoted server has not", err, kme.NoAttempt, "")
	w.checkBound(t, imsi, false)
	want := plain.NWSig()
	if e, err := call(); err != nil || !bytes.Equal(e.NWSig, want[:]) {
		t.Errorf("once more, on the promoted server: %v, %v", e, err)
	}
	w.checkBound(t, imsi, true)
}
