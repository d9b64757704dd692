package proof

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/faultmodule"
	"github.com/kmehsm/kmehsm/internal/mesim"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/internal/vaulttest"
	"github.com/kmehsm/kmehsm/kme"
)

// A year in an hour: a database of many bindings, devices that attach all the time over mutual TLS, and reloads,
// revocations and outages of everything in random order. What holds in the end: every NW_SIG that was told has its
// binding; no KME was accepted twice; the service was back after each outage, without help; its memory, goroutines and
// files do not grow; and all of the database is what the service wrote. Then attaches are measured beside those of a
// service with an empty database, in alternation.
//
// make soak makes it long. These are the settings: KMEHSM_SOAK_BINDINGS, KMEHSM_SOAK_DURATION and KMEHSM_SOAK_SEED; and
// KMEHSM_SOAK_KEEP, a folder in which all stays, to go on with it, and which gets the results.
func TestSoakSQLiteVault(t *testing.T)   { soakStore(t, "sqlite") }
func TestSoakPostgresVault(t *testing.T) { soakStore(t, "postgres") }

// soakRoom is for the IMSIs of devices that attach, between two that are filled in: see fill in binding/sqlstore.
const soakRoom = 1000

// A soak is one run.
type soak struct {
	*world
	store        string
	bindings     int
	duration     time.Duration
	seed         uint64
	long         bool
	random       *mathrand.Rand // the order of events is its alone
	vault        *vaulttest.Server
	postgres     *pgtest.Server
	module       *faultmodule.Module
	grown, empty *instance
	devices      []*mesim.Device
	next         atomic.Int64 // of places for IMSIs
	rounds       int

	// era counts up when an event begins, and when the service is back after it: odd means that all is well.
	era     atomic.Int64
	begun   atomic.Int64 // attaches
	revoked map[kme.IMSI]bool

	mu    sync.Mutex
	told  []told
	times struct{ well, all []time.Duration } // of whole attaches, with all their tries

	result soakResult
}

// told is an IMSI whose device was told a NW_SIG.
type told struct {
	imsi kme.IMSI
	imei kme.IMEI
}

// An instance is a keysvc with a token and a store of its own.
type instance struct {
	name, store string
	tok         softhsmtest.Tok
	port        int
	process     atomic.Pointer[testproc.Process] // the one that serves now
	hss, admin  *client.Client
	http        *http.Client
}

// soakResult is what a run has found, as JSON.
type soakResult struct {
	Store            string                 `json:"store"`
	Machine          string                 `json:"machine"`
	Seed             uint64                 `json:"seed"`
	Bindings         int                    `json:"bindings"` // before the load
	FillSeconds      float64                `json:"fill_seconds,omitempty"`
	Seconds          float64                `json:"load_seconds"`
	Attached         int                    `json:"attached"`
	Replays          int64                  `json:"replays_refused"`
	Well             latency                `json:"attach_while_all_is_well"`
	All              latency                `json:"attach_with_outages"`
	Events           map[string]*soakEvents `json:"events"`
	Growth           map[string][2]float64  `json:"growth"` // medians of the two last thirds of the last process's life
	BytesBefore      int64                  `json:"bytes_before"`
	BytesABinding    float64                `json:"bytes_a_binding"` // by the load
	Shares           soakShares             `json:"shares"`
	VerifySeconds    float64                `json:"verify_seconds"`
	VerifyRows       int                    `json:"verify_rows"`
	VerifyPeakMiB    float64                `json:"verify_peak_mib"`
	BindingsInTheEnd int                    `json:"told_and_there"`
}

type soakEvents struct {
	Times int     `json:"times"`
	Held  float64 `json:"held_seconds_max"`
	Back  float64 `json:"back_seconds_median"` // after its end, until a device has attached that began after it
	Worst float64 `json:"back_seconds_max"`
	backs []float64
}

type latency struct {
	P50 float64 `json:"p50_ms"`
	P99 float64 `json:"p99_ms"`
	Max float64 `json:"max_ms"`
}

// soakShares compares full load on both databases, in alternation with the bare token.
type soakShares struct {
	Pairs      int        `json:"pairs"`
	Token      float64    `json:"token_per_second"`
	Grown      float64    `json:"grown_per_second"`
	Empty      float64    `json:"empty_per_second"`
	ShareGrown float64    `json:"share_grown"`
	ShareEmpty float64    `json:"share_empty"`
	Ratio      float64    `json:"grown_of_empty"` // the median of the pairs
	RatioMin   float64    `json:"grown_of_empty_min"`
	RatioMax   float64    `json:"grown_of_empty_max"`
	CPU        [2]float64 `json:"cpu_us"` // of keysvc and the database, an attach: grown, empty
	HalfGrown  latency    `json:"half_load_grown"`
	HalfEmpty  latency    `json:"half_load_empty"`
}

func soakStore(t *testing.T, store string) {
	s := newSoak(t, store)
	s.fill()
	s.serve(s.grown, s.module)
	before := s.bytes()
	s.result.BytesBefore = before
	s.load()
	must.Do(t, s.grown.stop())
	s.result.BytesABinding = float64(s.bytes()-before) / float64(max(1, s.result.Attached))
	s.shares()
	s.everythingTold()
	must.Do(t, s.grown.stop())
	s.verify()
	s.report()
}

func newSoak(t *testing.T, store string) *soak {
	number := func(name string, otherwise int) int {
		return must.Get[int](t)(strconv.Atoi(cmp.Or(os.Getenv(name), strconv.Itoa(otherwise))))
	}
	s := &soak{store: store, bindings: number("KMEHSM_SOAK_BINDINGS", 2000),
		seed: uint64(number("KMEHSM_SOAK_SEED", int(time.Now().Unix()))), revoked: map[kme.IMSI]bool{},
		duration: must.Get[time.Duration](t)(time.ParseDuration(cmp.Or(os.Getenv("KMEHSM_SOAK_DURATION"), "5s")))}
	s.long, s.random = s.duration >= time.Minute, mathrand.New(mathrand.NewPCG(s.seed, 0))
	dir, keep := t.TempDir(), os.Getenv("KMEHSM_SOAK_KEEP")
	postgres := ""
	if keep != "" {
		dir = filepath.Join(keep, store)
		postgres = "/var/tmp/kmehsm-soak-postgres" // PostgreSQL's own user may enter it
	}
	t.Logf("%s, %d bindings, seed %d", store, s.bindings, s.seed)
	must.Do(t, os.MkdirAll(dir, 0o700))
	s.vault = vaulttest.StartIn(t, filepath.Join(dir, "vault"))
	s.world = newWorldIn(t, dir, nil, "VAULT_ADDR="+s.vault.Addr, "VAULT_TOKEN="+s.vault.Root)
	s.directory = "vault:kme"
	tokens := softhsmtest.Make(t, s.path("softhsm"), "factory", "operator", "empty")
	s.grown = &instance{name: "grown", tok: tokens["operator"], store: "sqlite:" + s.path("grown/keysvc.db")}
	s.empty = &instance{name: "empty", tok: tokens["empty"], store: "sqlite:" + s.path("empty/keysvc.db")}
	if store == "postgres" {
		s.postgres = pgtest.StartIn(t, postgres)
		s.grown.store = s.postgres.Named(t, "grown")
		s.empty.store = s.postgres.Named(t, "empty")
	}
	s.module = must.Get[*faultmodule.Module](t)(faultmodule.Build(dir,
		regexp.MustCompile(`module-path=([^&]*)`).FindStringSubmatch(s.grown.tok.URI)[1]))
	must.Do(t, s.module.Set())
	s.result = soakResult{Store: store, Machine: machine(), Seed: s.seed, Bindings: s.bindings,
		Events: map[string]*soakEvents{}, Growth: map[string][2]float64{}}
	ready := s.path("ready")
	if _, err := os.Stat(ready); errors.Is(err, fs.ErrNotExist) {
		s.vault.Mount(t, "kme", "2")
		s.setUpSoak()
		must.Do(t, os.WriteFile(ready, nil, 0o600))
	}
	fleet := must.Get[*mesim.Fleet](t)(s.fleet("L1"))
	s.devices = must.Get[[]*mesim.Device](t)(fleet.Devices(s.t.Context(), 0, 0))
	s.next.Store(mathrand.Int64N(int64(s.bindings) * (soakRoom - 1)))
	return s
}

// setUpSoak makes a manufacturer, a lot, and both operators.
func (s *soak) setUpSoak() {
	manufacturer := field(s.t, s.run(s.factory, "factory", "init", "--json"), "manufacturer")
	s.enrolFixture()
	devices := 128
	if s.long {
		devices = 2000
	}
	s.makeLot(lotOf{"L1", "tr33868-ecdsa-p256", "35100000", 2048, devices})
	for _, i := range []*instance{s.grown, s.empty} {
		s.keysvc(i, "init")
		transport := field(s.t, s.keysvc(i, "transport", "new", "--json"), "thumbprint")
		s.run(s.factory, "factory", "operator", "enroll", i.name, "--transport-key", i.name+"/transport.json",
			"--thumbprint", transport, "--so-pin-source", "file:"+s.factory.SOPINFile, "--out", i.name+".jws")
		s.keysvc(i, "enroll", i.name+".jws", "--manufacturer", "var/factory/manufacturer.pem",
			"--thumbprint", manufacturer, "--directory", s.directory)
		s.grant(i, "L1")
	}
	s.newCA("ca")
	s.certificate("server", "ca", "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth\n")
	s.certificate("hss", "ca", "subjectAltName=DNS:hss.test\nextendedKeyUsage=clientAuth\n")
}

func (s *soak) grant(i *instance, lot string) {
	file := i.name + "-" + lot + ".jws"
	s.run(s.factory, "factory", "lot", "grant", lot, "--directory", s.directory, "--operator", i.name, "--out", file)
	s.keysvc(i, "lot", "import", file)
}

// keysvc runs a command of an instance, which must succeed.
func (s *soak) keysvc(i *instance, args ...string) string {
	s.t.Helper()
	env := s.env
	defer func() { s.env = env }()
	s.env = slices.Concat(env, []string{"KMEHSM_STATE=" + i.name, "KMEHSM_STORE=" + i.store})
	return s.run(i.tok, "keysvc", args...)
}

func (s *soak) fleet(lot string) (*mesim.Fleet, error) {
	return mesim.OpenFleet(s.path("injection/"+lot), s.path("fixture.key"), []string{s.path("fixture.json")})
}

// fill brings the database to so many bindings, by the store's own code.
func (s *soak) fill() {
	s.t.Helper()
	done, want := s.path("filled"), fmt.Sprint(s.bindings)
	if have, err := os.ReadFile(done); err == nil {
		if string(have) != want {
			s.t.Fatalf("%s was filled with %s bindings, not %s: remove it, and %s", s.dir, have, want,
				"/var/tmp/kmehsm-soak-postgres")
		}
		s.t.Logf("the database is there, with %s bindings and what an earlier run has added", have)
		return
	}
	start := time.Now()
	cmd := exec.Command("go", "test", "-count=1", "-timeout=0", "-v", "-run=^TestFill$", "../../binding/sqlstore")
	cmd.Env = slices.Concat(s.env, []string{"KMEHSM_TOKEN=" + s.grown.tok.URI, "KMEHSM_STORE=" + s.grown.store,
		"KMEHSM_ROWS=" + want})
	cmd.Stderr = os.Stderr
	if s.long {
		cmd.Stdout = os.Stdout
	}
	must.Do(s.t, cmd.Run())
	must.Do(s.t, os.WriteFile(done, []byte(want), 0o600))
	s.result.FillSeconds = time.Since(start).Seconds()
	s.t.Logf("%d bindings and %d entries of the ledger in %.0f s: %d MiB", s.bindings, 2*s.bindings,
		s.result.FillSeconds, s.bytes()>>20)
}

// bytes is what the grown database takes of the disk.
func (s *soak) bytes() (sum int64) {
	s.t.Helper()
	if s.postgres != nil {
		db := must.Get[*sql.DB](s.t)(sql.Open("pgx", s.grown.store))
		defer db.Close()
		must.Do(s.t, db.QueryRowContext(s.t.Context(), "SELECT pg_database_size(current_database())").Scan(&sum))
		return sum
	}
	files := must.Get[[]string](s.t)(filepath.Glob(s.path("grown/keysvc.db*")))
	for _, f := range files {
		if info, err := os.Stat(f); err == nil {
			sum += info.Size()
		}
	}
	return sum
}

// serve starts an instance; with a module, by way of it.
func (s *soak) serve(i *instance, module *faultmodule.Module) {
	s.t.Helper()
	if i.port == 0 {
		l := must.Get[net.Listener](s.t)(net.Listen("tcp", "127.0.0.1:0"))
		i.port = l.Addr().(*net.TCPAddr).Port
		l.Close()
		i.clients(s)
	}
	// An HSM that hangs is given up soon, a revocation is seen soon, and whoever tries again may do so often.
	s.write(i.name+".yaml", fmt.Sprintf("state: %s\nstore: '%s'\nsocket: %s.s\nlisten: 127.0.0.1:%d\nlog_level: warn\n"+
		"hsm_timeout: 2s\nrevocation_ttl: 1s\npending_vectors: 1000\nimei_burst: 1000000\n"+
		"tls: {certificate: server.pem, key: server.key, client_ca: ca.pem}\nclients:\n"+
		"- {name: socket, uid: %d, roles: [hss, admin, monitor, metrics], plmns: [all]}\n"+
		"- {name: hss, san: hss.test, roles: [hss], plmns: [all]}\n", i.name, i.store, i.name, i.port, os.Getuid()))
	tok := i.tok
	if module != nil {
		tok.URI = module.URI(tok.URI)
	}
	cmd := s.command(tok, "keysvc", "serve", "--config", i.name+".yaml")
	if module != nil {
		cmd.Env = append(cmd.Env, module.Env()...)
	}
	log := must.Get[*os.File](s.t)(os.OpenFile(s.path(i.name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600))
	defer log.Close()
	cmd.Stderr = log
	i.process.Store(testproc.Start(s.t, cmd, func(*testproc.Process) bool { return ready(i.http) }))
}

// clients makes those of an instance, which stay while it comes and goes.
func (i *instance) clients(s *soak) {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(s.readFile("ca.pem"))
	own := must.Get[tls.Certificate](s.t)(tls.LoadX509KeyPair(s.path("hss.pem"), s.path("hss.key")))
	i.hss = must.Get[*client.Client](s.t)(client.New(client.Options{URLs: []string{fmt.Sprintf("https://127.0.0.1:%d",
		i.port)}, TLS: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{own}}}))
	socket := s.path(i.name + ".s")
	i.admin = must.Get[*client.Client](s.t)(client.New(client.Options{URLs: []string{"unix:" + socket}}))
	i.http = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn,
		error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	s.t.Cleanup(func() { i.hss.Close(); i.admin.Close(); i.http.CloseIdleConnections() })
}

func (i *instance) stop() error { return i.process.Load().Stop(syscall.SIGTERM) }

// imsi is one that is free, at a place of the database that is far from the one before.
func (s *soak) imsi() (imsi kme.IMSI) {
	const far = 1_000_000_007 // a prime
	places := int64(s.bindings) * (soakRoom - 1)
	place := s.next.Add(1) * far % places
	must.Do(s.t, imsi.UnmarshalText(fmt.Appendf(nil, "00101%010d",
		place/(soakRoom-1)*soakRoom+1+place%(soakRoom-1))))
	return imsi
}

var errBoundBefore = errors.New("the IMSI was bound by an earlier run")

// patient makes a call until it is answered, through an outage of anything.
func patient[A any](ctx context.Context, call func() (A, error)) (a A, err error) {
	ctx, cancel := context.WithTimeout(ctx, testproc.Patience)
	defer cancel()
	for {
		a, err = call()
		var refused *client.Error
		if err == nil || errors.As(err, &refused) && !refused.Temporary() || ctx.Err() != nil {
			return a, err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// attach plays one device's whole attach as HSS and device see it. note gets what it was told.
func (s *soak) attach(ctx context.Context, c *client.Client, d *mesim.Device, replay bool, note func(told)) error {
	imsi := s.imsi()
	m, err := d.Message(imsi)
	if err != nil {
		return err
	}
	established, err := s.establish(ctx, c, imsi, d, m)
	if err != nil {
		return err
	}
	if established.NWSig != m.NWSig() {
		return fmt.Errorf("IMSI %s: NW_SIG is not that of the device", imsi)
	}
	note(told{imsi, d.IMEI})
	random := randomRAND()
	vectors, err := patient(ctx, func() (client.Vectors, error) {
		return c.PrepareVector(ctx, imsi, client.Origin{}, random)
	})
	if err == nil {
		err = m.Decrypts(vectors, random)
	}
	if err != nil {
		return fmt.Errorf("IMSI %s, after its NW_SIG: %w", imsi, err)
	}
	report, err := patient(ctx, func() (client.Report, error) {
		return c.ReportAuthentication(ctx, imsi, client.Origin{}, true)
	})
	if err != nil || report.State != kmev1.State_ACTIVE {
		return fmt.Errorf("IMSI %s, after its NW_SIG: state %v, %w", imsi, report.State, err)
	}
	if !replay {
		return nil
	}
	other := s.imsi()
	if _, err := s.establish(ctx, c, other, d, m); errors.Is(err, errBoundBefore) {
		return nil
	} else if !errors.Is(err, client.Reason(kme.KMERejected)) {
		return fmt.Errorf("the KME of %s was to be accepted for %s too: %w", imsi, other, err)
	}
	atomic.AddInt64(&s.result.Replays, 1)
	return nil
}

func (s *soak) establish(
	ctx context.Context, c *client.Client, imsi kme.IMSI, d *mesim.Device, m *mesim.Message,
) (e client.Establishment, err error) {
	random := randomRAND()
	vectors, err := patient(ctx, func() (client.Vectors, error) {
		return c.PrepareVector(ctx, imsi, client.Origin{}, random)
	})
	if err != nil {
		return e, fmt.Errorf("IMSI %s: %w", imsi, err)
	}
	if vectors.AttemptID == "" {
		return e, errBoundBefore
	}
	e, err = patient(ctx, func() (client.Establishment, error) {
		return c.EstablishKME(ctx, imsi, client.Origin{}, d.IMEI, vectors.AttemptID, m.Payload)
	})
	if err != nil {
		return e, fmt.Errorf("IMSI %s, IMEI %s: %w", imsi, d.IMEI, err)
	}
	return e, nil
}

func randomRAND() (r client.RAND) {
	rand.Read(r[:])
	return r
}

// load has devices attach for as long as the run is, and everything happen to the service.
func (s *soak) load() {
	ctx, cancel := context.WithCancel(s.t.Context())
	defer cancel()
	s.era.Store(1)
	var workers sync.WaitGroup
	for w := range 8 {
		workers.Go(func() {
			for i := w; ctx.Err() == nil; i += 8 {
				s.begun.Add(1)
				start, era := time.Now(), s.era.Load()
				err := s.attach(context.WithoutCancel(ctx), s.grown.hss, s.devices[i%len(s.devices)], i%50 == 0,
					func(b told) { s.mu.Lock(); s.told = append(s.told, b); s.mu.Unlock() })
				if errors.Is(err, errBoundBefore) {
					continue
				} else if err != nil {
					s.t.Error(err)
					return
				}
				took := time.Since(start)
				s.mu.Lock()
				s.times.all = append(s.times.all, took)
				if era%2 == 1 && s.era.Load() == era {
					s.times.well = append(s.times.well, took)
				}
				s.mu.Unlock()
			}
		})
	}
	start := time.Now()
	series := new(series)
	var watch sync.WaitGroup
	watch.Go(func() { s.comeBack(ctx) })
	watch.Go(func() {
		for ctx.Err() == nil {
			series.sample(s.grown)
			time.Sleep(max(100*time.Millisecond, s.duration/1000))
		}
	})
	s.happen(start, series)
	cancel()
	workers.Wait()
	watch.Wait()
	s.result.Seconds, s.result.Attached = time.Since(start).Seconds(), len(s.times.all)
	s.result.Well, s.result.All = latencyOf(s.times.well), latencyOf(s.times.all)
	series.flat(s)
}

// comeBack has subscribers that are bound already come back, as most do in a year: each is seen with its device. What
// keysvc remembers of them is full within the first minutes of an hour.
func (s *soak) comeBack(ctx context.Context) {
	random := mathrand.New(mathrand.NewPCG(s.seed, 1))
	for ctx.Err() == nil {
		i := random.IntN(s.bindings) // as fill in binding/sqlstore has it
		var imsi kme.IMSI
		var imei kme.IMEI
		must.Do(s.t, imsi.UnmarshalText(fmt.Appendf(nil, "00101%010d", i*soakRoom)))
		must.Do(s.t, imei.UnmarshalText(fmt.Append(nil, 35209900000000+i)))
		e, err := s.grown.hss.CheckEquipment(ctx, imei, imsi)
		var refused *client.Error
		if err == nil && e.Status != kmev1.EquipmentStatus_WHITELISTED ||
			errors.As(err, &refused) && !refused.Temporary() {
			s.t.Errorf("IMEI %s, IMSI %s: equipment %v, %v", imei, imsi, e.Status, err)
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// happen makes events in random order, all of them once at least, until the time is over. In the second half the
// process is not ended any more, so that one lives long enough to see it grow.
func (s *soak) happen(start time.Time, series *series) {
	events := s.events()
	said := start
	for round := 0; round == 0 || time.Since(start) < s.duration; round++ {
		names := slices.Sorted(maps.Keys(events))
		s.random.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
		for _, name := range names {
			e := events[name]
			if e.ends && round > 0 && time.Since(start) > s.duration/2 || round > 0 && time.Since(start) > s.duration {
				continue
			}
			hold, pause := time.Duration(100+s.random.IntN(400))*time.Millisecond, 100*time.Millisecond
			if s.long {
				hold = time.Duration(200+s.random.IntN(6000)) * time.Millisecond
				pause = time.Duration(1000+s.random.IntN(4000)) * time.Millisecond
			}
			time.Sleep(pause)
			s.era.Add(1)
			began := time.Now()
			e.make(hold)
			if e.ends {
				series.restart()
			}
			held := time.Since(began)
			back := s.back(name)
			s.era.Add(1)
			s.result.note(name, held, back)
			if time.Since(said) > max(30*time.Second, s.duration/60) {
				said = time.Now()
				s.t.Logf("%s of %s: %d attaches, %s", time.Since(start).Round(time.Second), s.duration,
					s.begun.Load(), series.now())
			}
			if s.t.Failed() {
				return
			}
		}
	}
}

// back waits until a device has attached that began after now.
func (s *soak) back(after string) time.Duration {
	start := time.Now()
	for {
		err := s.attach(s.t.Context(), s.grown.hss, s.devices[0], false,
			func(b told) { s.mu.Lock(); s.told = append(s.told, b); s.mu.Unlock() })
		if !errors.Is(err, errBoundBefore) {
			if err != nil {
				s.t.Errorf("the service is not back after %s: %v", after, err)
			}
			return time.Since(start)
		}
	}
}

type soakEvent struct {
	make func(hold time.Duration)
	ends bool // the process of keysvc
}

func (s *soak) events() map[string]soakEvent {
	t := s.t
	hsm := func(line string) soakEvent {
		return soakEvent{make: func(hold time.Duration) {
			s.module.Tell(t, line)
			time.Sleep(hold)
			s.module.Tell(t)
		}}
	}
	reload := func() { must.Do(t, s.grown.process.Load().Cmd.Process.Signal(syscall.SIGHUP)) }
	events := map[string]soakEvent{
		"the token is pulled out":         hsm("* removed"),
		"the token hangs":                 hsm("C_Sign hang"),
		"the token has lost its sessions": hsm("* 0xb3"),
		"the token is 5 ms away":          hsm("* delay 5000"),
		"keysvc is killed":                {ends: true, make: func(time.Duration) { s.kill() }},
		"keysvc is ended and started": {ends: true, make: func(time.Duration) {
			must.Do(t, s.grown.stop())
			s.serve(s.grown, s.module)
		}},
		"SIGHUP":                        {make: func(time.Duration) { reload() }},
		"a binding is revoked":          {make: func(time.Duration) { s.revokeBinding() }},
		"a device is revoked":           {make: func(time.Duration) { s.revokeDevice() }},
		"a lot is imported":             {make: func(time.Duration) { s.importLot(reload) }},
		"the equipment list is changed": {make: func(time.Duration) { s.changeEquipment() }},
		"the server's certificate is replaced": {make: func(time.Duration) {
			s.certificate("server", "ca", "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth\n")
			reload()
		}},
		"Vault hangs": {make: func(hold time.Duration) {
			s.vault.Freeze(t)
			time.Sleep(hold)
			s.vault.Thaw(t)
		}},
		"Vault is killed": {make: func(hold time.Duration) {
			s.vault.Kill()
			time.Sleep(hold)
			s.vault.Restart(t, false)
		}},
	}
	if s.postgres != nil {
		events["PostgreSQL hangs"] = soakEvent{make: func(hold time.Duration) {
			s.postgres.Freeze(t)
			time.Sleep(hold)
			s.postgres.Thaw(t)
		}}
		events["PostgreSQL is killed"] = soakEvent{make: func(hold time.Duration) {
			s.postgres.Kill(t)
			time.Sleep(hold)
			s.postgres.Run(t)
		}}
	}
	return events
}

func (s *soak) kill() {
	mended := s.tokenFiles()
	s.grown.process.Load().Kill()
	mended()
	s.serve(s.grown, s.module)
}

// revokeBinding ends one that was told, by the command or by a call.
func (s *soak) revokeBinding() {
	// The first event comes soon: on a busy machine no device has attached by then.
	testproc.Await(s.t, "a device has attached that has not been revoked", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.told) > len(s.revoked)
	})
	s.mu.Lock()
	var b told
	for ok := false; !ok; ok = !s.revoked[b.imsi] {
		b = s.told[s.random.IntN(len(s.told))]
	}
	s.revoked[b.imsi] = true
	s.mu.Unlock()
	// One that is being established is ACTIVE soon, and a revocation stands.
	testproc.Await(s.t, "its device has attached", func() bool {
		is, err := s.grown.admin.GetBinding(s.t.Context(), b.imsi)
		return err == nil && is.State == kmev1.State_ACTIVE
	})
	if s.random.IntN(2) == 0 {
		s.keysvc(s.grown, "binding", "revoke", b.imsi.String(), "--yes")
		return
	}
	if _, err := patient(s.t.Context(), func() (*kmev1.GetBindingResponse, error) {
		return s.grown.admin.RevokeBinding(s.t.Context(), b.imsi)
	}); err != nil {
		s.t.Error(err)
	}
}

// revokeDevice revokes one of a new lot, which is refused soon after.
func (s *soak) revokeDevice() {
	s.importLot(func() { must.Do(s.t, s.grown.process.Load().Cmd.Process.Signal(syscall.SIGHUP)) })
	lot := s.lot()
	d := must.Get[[]*mesim.Device](s.t)(must.Get[*mesim.Fleet](s.t)(s.fleet(lot)).Devices(s.t.Context(), 1, 1))[0]
	s.run(s.factory, "factory", "lot", "revoke", lot, d.IMEI.String(), "--reason", "stolen", "--yes", "--directory",
		s.directory)
	m := must.Get[*mesim.Message](s.t)(d.Message(kme.IMSI{}))
	testproc.Await(s.t, "the device is refused", func() bool {
		imsi := s.imsi()
		m = must.Get[*mesim.Message](s.t)(d.Message(imsi))
		_, err := s.establish(s.t.Context(), s.grown.hss, imsi, d, m)
		return errors.Is(err, client.Reason(kme.RevokedDevice))
	})
}

// lot is the name of the last one of this run.
func (s *soak) lot() string { return fmt.Sprintf("S%d-%d", s.seed, s.rounds) }

// importLot makes a lot while the service runs; one of its devices attaches after the reload.
func (s *soak) importLot(reload func()) {
	s.rounds++
	number := must.Get[[]string](s.t)(filepath.Glob(s.path("injection/*")))
	s.makeLot(lotOf{s.lot(), "tr33868-ecdsa-p256", fmt.Sprintf("3510%04d", len(number)), 2048, 4})
	s.grant(s.grown, s.lot())
	reload()
	d := must.Get[[]*mesim.Device](s.t)(must.Get[*mesim.Fleet](s.t)(s.fleet(s.lot())).Devices(s.t.Context(), 0, 1))[0]
	testproc.Await(s.t, "a device of the new lot is known", func() bool {
		err := s.attach(s.t.Context(), s.grown.hss, d, false,
			func(b told) { s.mu.Lock(); s.told = append(s.told, b); s.mu.Unlock() })
		if err != nil && !errors.Is(err, client.Reason(kme.UnknownDevice)) && !errors.Is(err, errBoundBefore) {
			s.t.Error(err)
		}
		return err == nil || s.t.Failed()
	})
}

// changeEquipment blacklists a device, and takes it out again.
func (s *soak) changeEquipment() {
	imei := s.devices[s.random.IntN(len(s.devices))].IMEI
	is := func(want kmev1.EquipmentStatus) {
		testproc.Await(s.t, "equipment "+want.String(), func() bool {
			e, err := s.grown.hss.CheckEquipment(s.t.Context(), imei, kme.IMSI{})
			return err == nil && e.Status == want
		})
	}
	s.keysvc(s.grown, "equipment", "add", imei.String(), "--status", "blacklisted", "--reason", "stolen")
	is(kmev1.EquipmentStatus_BLACKLISTED)
	s.keysvc(s.grown, "equipment", "remove", imei.String(), "--reason", "found")
	is(kmev1.EquipmentStatus_WHITELISTED)
}

func (r *soakResult) note(name string, held, back time.Duration) {
	e := r.Events[name]
	if e == nil {
		e = new(soakEvents)
		r.Events[name] = e
	}
	e.Times++
	e.backs = append(e.backs, back.Seconds())
	e.Held, e.Back, e.Worst = max(e.Held, held.Seconds()), median(e.backs), slices.Max(e.backs)
}

// A series is what the process of an instance takes, over its life.
type series struct {
	mu     sync.Mutex
	values map[string][]float64
}

func (x *series) restart() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.values = nil
}

// watched are metrics of the process; beside them there is its memory without what is of files.
var watched = []string{"go_goroutines", "process_open_fds", "go_memstats_next_gc_bytes"}

func (x *series) sample(i *instance) {
	r, err := i.http.Get("http://keysvc/metrics")
	if err != nil {
		return // it is away
	}
	defer r.Body.Close()
	var text bytes.Buffer
	text.ReadFrom(r.Body)
	found := map[string]float64{}
	for line := range strings.Lines(text.String()) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if slices.Contains(watched, name) {
			found[name], _ = strconv.ParseFloat(value, 64)
		}
	}
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", i.process.Load().Cmd.Process.Pid))
	for line := range strings.Lines(string(status)) {
		if kib, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			found["rss_mib"], _ = strconv.ParseFloat(strings.Fields(kib)[0], 64)
			found["rss_mib"] /= 1024
		}
	}
	found["go_heap_mib"] = found["go_memstats_next_gc_bytes"] / 2 / (1 << 20) // what the last collection has left
	delete(found, "go_memstats_next_gc_bytes")
	if len(found) != 1+len(watched) {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.values == nil {
		x.values = map[string][]float64{}
	}
	for name, v := range found {
		x.values[name] = append(x.values[name], v)
	}
}

func (x *series) now() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	var all []string
	for _, name := range slices.Sorted(maps.Keys(x.values)) {
		v := x.values[name]
		all = append(all, fmt.Sprintf("%s %.0f", name, v[len(v)-1]))
	}
	return strings.Join(all, ", ")
}

// flat compares the last two thirds of the process's life: nothing grows any more.
func (x *series) flat(s *soak) {
	for name, v := range x.values {
		n := len(v) / 3
		if n < 3 {
			s.t.Logf("%s: only %d samples", name, len(v))
			continue
		}
		earlier, later := median(v[n:2*n]), median(v[2*n:])
		s.result.Growth[name] = [2]float64{earlier, later}
		// The caches that are bounded are full by then: 200,000 subscriptions were seen.
		if s.duration >= 30*time.Minute && later > 1.1*earlier+10 {
			s.t.Errorf("%s has grown from %.0f to %.0f", name, earlier, later)
		}
	}
}

// shares measures full load on the grown and on the empty database, in alternation, each after the bare token.
func (s *soak) shares() {
	pairs, each := 2, 100*time.Millisecond
	if s.long {
		pairs, each = 8, 5*time.Second
	}
	s.serve(s.grown, nil)
	s.serve(s.empty, nil)
	token := s.bareToken()
	both := []*instance{s.grown, s.empty}
	var bare []float64
	var rates, cpu [2][]float64
	var ratios, sg, se []float64
	for pair := range pairs + 1 {
		var rate, spent [2]float64
		b := token(each)
		for k := range both {
			i := (k + pair) % 2
			times, us := s.full(both[i], each, 0)
			rate[i], spent[i] = float64(len(times))/each.Seconds(), us
		}
		if pair == 0 { // it warms the caches
			continue
		}
		bare = append(bare, b)
		for i := range both {
			rates[i], cpu[i] = append(rates[i], rate[i]), append(cpu[i], spent[i])
		}
		ratios, sg, se = append(ratios, rate[0]/rate[1]), append(sg, rate[0]/b), append(se, rate[1]/b)
		s.t.Logf("token %.0f a second, grown %.0f, empty %.0f; CPU %.0f and %.0f us", b, rate[0], rate[1], spent[0],
			spent[1])
	}
	r := &s.result.Shares
	r.Pairs, r.Token, r.Grown, r.Empty = pairs, median(bare), median(rates[0]), median(rates[1])
	r.ShareGrown, r.ShareEmpty = median(sg), median(se)
	r.Ratio, r.RatioMin, r.RatioMax = median(ratios), slices.Min(ratios), slices.Max(ratios)
	r.CPU = [2]float64{median(cpu[0]), median(cpu[1])}
	var half [2][]time.Duration
	for pair := range pairs {
		for k := range both {
			i := (k + pair) % 2
			times, _ := s.full(both[i], each, r.Empty/2)
			half[i] = append(half[i], times...)
		}
	}
	r.HalfGrown, r.HalfEmpty = latencyOf(half[0]), latencyOf(half[1])
	must.Do(s.t, s.empty.stop())
	if s.long && r.Ratio < 0.8 {
		s.t.Errorf("a grown database has %.2f of the attaches of an empty one", r.Ratio)
	}
}

// bareToken gives the rate of the lot's bare private-key operations, in this process.
func (s *soak) bareToken() func(time.Duration) float64 {
	s.t.Setenv("SOFTHSM2_CONF", s.path("softhsm/softhsm2.conf"))
	token := must.Get[*hsmkeys.OperatorToken](s.t)(hsmkeys.OpenOperator(s.t.Context(), s.grown.tok.URI,
		hsmkeys.Options{}))
	s.t.Cleanup(func() { token.Close() })
	var all struct{ Lots []*directory.Manifest }
	must.Do(s.t, json.Unmarshal([]byte(s.keysvc(s.grown, "lot", "list", "--json")), &all))
	at := slices.IndexFunc(all.Lots, func(m *directory.Manifest) bool { return m.Lot == "L1" })
	lot := all.Lots[at]
	return func(d time.Duration) float64 {
		return must.Get[float64](s.t)(token.BareDecryptions(s.t.Context(), hsmkeys.Key{Role: hsmkeys.RoleLot,
			Manufacturer: lot.Manufacturer, Name: lot.Lot}, lot.PublicKey(), 0, d))
	}
}

// full has 64 devices at once attach to an instance for so long; with a rate, each when it is due, and timed from then
// on. It gives what each took, and what keysvc and the database spent on it.
func (s *soak) full(i *instance, d time.Duration, rate float64) (times []time.Duration, cpu float64) {
	var all sync.WaitGroup
	var mu sync.Mutex
	var next atomic.Int64
	start, before := time.Now(), s.cpu(i)
	for range 64 {
		all.Go(func() {
			for {
				n, due := next.Add(1)-1, time.Now()
				if rate > 0 {
					due = start.Add(time.Duration(float64(n) / rate * float64(time.Second)))
					time.Sleep(time.Until(due))
				}
				if due.Sub(start) >= d {
					return
				}
				err := s.attach(s.t.Context(), i.hss, s.devices[int(n)%len(s.devices)], false, func(b told) {
					if i == s.grown {
						mu.Lock()
						s.told = append(s.told, b)
						mu.Unlock()
					}
				})
				if errors.Is(err, errBoundBefore) {
					continue
				} else if err != nil {
					s.t.Error(err)
					return
				}
				mu.Lock()
				times = append(times, time.Since(due))
				mu.Unlock()
			}
		})
	}
	all.Wait()
	return times, float64((s.cpu(i) - before).Microseconds()) / float64(max(1, len(times)))
}

// cpu is what an instance and the database have spent so far.
func (s *soak) cpu(i *instance) (sum time.Duration) {
	s.t.Helper()
	stat := must.Get[[]byte](s.t)(os.ReadFile(fmt.Sprintf("/proc/%d/stat", i.process.Load().Cmd.Process.Pid)))
	var user, system int64
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	must.Get[int](s.t)(fmt.Sscan(fields[11]+" "+fields[12], &user, &system))
	if s.postgres != nil {
		sum = s.postgres.CPU(s.t)
	}
	return sum + time.Duration(user+system)*10*time.Millisecond // proc(5), for every program on Linux
}

// everythingTold has all that was told looked up: each has its binding.
func (s *soak) everythingTold() {
	start := time.Now()
	var next, there, gone atomic.Int64
	var all sync.WaitGroup
	for range 32 {
		all.Go(func() {
			for n := next.Add(1) - 1; n < int64(len(s.told)) && gone.Load() < 10; n = next.Add(1) - 1 {
				b, want := s.told[n], kmev1.State_ACTIVE
				if s.revoked[b.imsi] {
					want = kmev1.State_REVOKED
				}
				is, err := s.grown.admin.GetBinding(s.t.Context(), b.imsi)
				if err != nil || is.State != want || is.Imei != b.imei.String() {
					s.t.Errorf("IMSI %s was told a NW_SIG for IMEI %s, and is %v of %s, not %v: %v", b.imsi, b.imei,
						is.GetState(), is.GetImei(), want, err)
					gone.Add(1)
					continue
				}
				there.Add(1)
			}
		})
	}
	all.Wait()
	s.result.BindingsInTheEnd = int(there.Load())
	s.t.Logf("%d told NW_SIGs have their bindings (%s); %d KMEs were refused a second time", there.Load(),
		time.Since(start).Round(time.Second), s.result.Replays)
	if s.result.Replays == 0 {
		s.t.Error("no KME was tried twice")
	}
}

// verify runs keysvc store verify.
func (s *soak) verify() {
	cmd := s.command(s.grown.tok, "keysvc", "store", "verify", "--json")
	cmd.Env = append(cmd.Env, "KMEHSM_STATE="+s.grown.name, "KMEHSM_STORE="+s.grown.store)
	cmd.Stderr = os.Stderr
	start := time.Now()
	out, err := cmd.Output()
	var found struct {
		OK   bool
		Rows int
	}
	if jerr := json.Unmarshal(out, &found); err != nil || jerr != nil || !found.OK || found.Rows < 4*s.bindings {
		s.t.Errorf("keysvc store verify: %v\n%s", errors.Join(err, jerr), out)
	}
	r := &s.result
	r.VerifySeconds, r.VerifyRows = time.Since(start).Seconds(), found.Rows
	r.VerifyPeakMiB = float64(cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss) / 1024
}

// report writes the results beside the folder of the run, and says them.
func (s *soak) report() {
	text := must.Get[[]byte](s.t)(json.MarshalIndent(s.result, "", "  "))
	base := filepath.Join(filepath.Dir(s.dir), s.store)
	table := s.result.table()
	must.Do(s.t, os.WriteFile(base+".json", append(text, '\n'), 0o644))
	must.Do(s.t, os.WriteFile(base+".md", []byte(table), 0o644))
	s.t.Logf("%s.json\n%s", base, table)
}

// table is the result in Markdown.
func (r *soakResult) table() string {
	var b strings.Builder
	row := func(name, format string, args ...any) { fmt.Fprintf(&b, "| "+name+" | "+format+" |\n", args...) }
	fmt.Fprintf(&b, "| %s, %s | |\n|---|---|\n", r.Store, r.Machine)
	row("bindings before the load, and entries of the ledger", "%d, %d", r.Bindings, 2*r.Bindings)
	row("filled in", "%.0f s", r.FillSeconds)
	row("load, seed", "%.0f s, %d", r.Seconds, r.Seed)
	row("attached; KMEs refused a second time", "%d; %d", r.Attached, r.Replays)
	row("whole attach, 8 at once, while all is well: p50 / p99, ms", "%.1f / %.1f", r.Well.P50, r.Well.P99)
	row("and with outages: p50 / p99 / max, ms", "%.1f / %.1f / %.0f", r.All.P50, r.All.P99, r.All.Max)
	for _, name := range slices.Sorted(maps.Keys(r.Events)) {
		e := r.Events[name]
		row(name+": times; back after, median / max, s", "%d; %.2f / %.2f", e.Times, e.Back, e.Worst)
	}
	for _, name := range slices.Sorted(maps.Keys(r.Growth)) {
		row(name+", second and last third", "%.0f, %.0f", r.Growth[name][0], r.Growth[name][1])
	}
	row("database before the load; more a binding", "%.2f GB; %.2f kB", float64(r.BytesBefore)/1e9, r.BytesABinding/1e3)
	h := r.Shares
	row("full load, grown and empty: of the token's rate", "%.3f, %.3f", h.ShareGrown, h.ShareEmpty)
	row("grown of empty (median of pairs, min to max)", "**%.3f** (%.3f to %.3f, %d pairs)", h.Ratio, h.RatioMin,
		h.RatioMax, h.Pairs)
	row("CPU of keysvc and the database, grown and empty, ms", "%.2f, %.2f", h.CPU[0]/1e3, h.CPU[1]/1e3)
	row("at half load, grown: p50 / p99, ms", "%.1f / %.1f", h.HalfGrown.P50, h.HalfGrown.P99)
	row("at half load, empty: p50 / p99, ms", "%.1f / %.1f", h.HalfEmpty.P50, h.HalfEmpty.P99)
	row("keysvc store verify: rows, time, memory", "%d, %.0f s, %.0f MiB", r.VerifyRows, r.VerifySeconds,
		r.VerifyPeakMiB)
	return b.String()
}

func latencyOf(times []time.Duration) (l latency) {
	if len(times) == 0 {
		return l
	}
	slices.Sort(times)
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	return latency{ms(times[len(times)/2]), ms(times[len(times)*99/100]), ms(times[len(times)-1])}
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

// machine says what it was measured on.
func machine() string {
	data, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(data)) {
		if name, value, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "model name" {
			return fmt.Sprintf("%d cores, %s", runtime.NumCPU(), strings.TrimSpace(value))
		}
	}
	return fmt.Sprintf("%d cores", runtime.NumCPU())
}
