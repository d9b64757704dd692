package proof

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/internal/faultmodule"
	"github.com/kmehsm/kmehsm/internal/freeport"
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
// On PostgreSQL, two instances serve one store, which has a synchronous standby: that one takes the place of the server
// that is lost, which comes back as its standby.
//
// make soak makes it long. These are the settings: KMEHSM_SOAK_BINDINGS, KMEHSM_SOAK_DURATION and KMEHSM_SOAK_SEED; and
// KMEHSM_SOAK_KEEP, a folder in which all stays, to go on with it, and which gets the results; and
// KMEHSM_SOAK_POSTGRES, the folder of the database then.
func TestSoakSQLiteVault(t *testing.T) { soakStore(t, "sqlite") }

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
	postgres     *pgtest.Server // the one that takes changes
	standby      *pgtest.Server // a synchronous one
	module       *faultmodule.Module
	grown, empty *instance
	beside       *instance // of the store of grown, on PostgreSQL
	devices      []*mesim.Device
	next         atomic.Int64 // of places for IMSIs
	rounds       int
	failovers    int

	// era counts up when an event begins, and when the service is back after it: odd means that all is well.
	era     atomic.Int64
	begun   atomic.Int64 // attaches
	revoked map[kme.IMSI]bool

	mu    sync.Mutex
	told  []told
	times struct{ well, all []time.Duration } // of whole attaches, with all their tries

	result soakResult
}

// An instance is a keysvc. grown and empty have a token and a store of their own.
type instance struct {
	name, store string
	tok         softhsmtest.Tok
	port        int
	process     atomic.Pointer[testproc.Process] // the one that serves now
	hss, admin  *client.Client
	http        *http.Client
}

func soakStore(t *testing.T, store string) {
	s := newSoak(t, store)
	s.fill()
	if s.standby != nil {
		s.standby.Follow(t, s.postgres)
	}
	for _, i := range s.instances() {
		s.serve(i)
	}
	before := s.bytes()
	s.result.BytesBefore = before
	s.load()
	for _, i := range s.instances() {
		must.Do(t, i.stop())
	}
	s.endStandby()
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
		// PostgreSQL's own user may enter it
		postgres = cmp.Or(os.Getenv("KMEHSM_SOAK_POSTGRES"), "/var/tmp/kmehsm-soak-postgres")
		_, ours := os.Stat(filepath.Join(dir, "ready"))
		if _, err := os.Stat(postgres); store == "postgres" && err == nil && ours != nil {
			t.Fatalf("%s has the database of another folder than %s: remove it, or set KMEHSM_SOAK_POSTGRES", postgres,
				dir)
		}
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
		os.Remove(filepath.Join(postgres, "standby.signal")) // of a run that failed after a failover
		s.postgres = pgtest.StartIn(t, postgres)
		s.postgres.Set(t, "synchronous_standby_names", "") // of an earlier run
		if postgres != "" {
			postgres += "-standby"
		}
		s.standby = pgtest.Place(t, postgres)
		s.grown.store = pgtest.Either(t, s.postgres.Named(t, "grown"), s.postgres, s.standby)
		s.empty.store = pgtest.Either(t, s.postgres.Named(t, "empty"), s.postgres, s.standby)
		s.beside = &instance{name: "beside", tok: s.grown.tok, store: s.grown.store}
		must.Do(t, os.MkdirAll(s.path("beside"), 0o700))
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

// instances are those of the grown database.
func (s *soak) instances() []*instance {
	if s.beside == nil {
		return []*instance{s.grown}
	}
	return []*instance{s.grown, s.beside}
}

// failOver has the standby take the place of the server that takes changes, which is killed.
func (s *soak) failOver(hold time.Duration) {
	s.postgres.Kill(s.t)
	time.Sleep(hold)
	s.standby.Promote(s.t)
	s.postgres, s.standby = s.standby, s.postgres
	s.failovers++
}

// endStandby leaves the first server, whose folder may stay, and no standby.
func (s *soak) endStandby() {
	if s.standby == nil {
		return
	}
	if s.failovers%2 == 1 {
		s.failOver(0)
		return
	}
	s.postgres.Set(s.t, "synchronous_standby_names", "")
	s.standby.Stop(s.t)
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
			s.t.Fatalf("%s was filled with %s bindings, not %s: remove it, and its PostgreSQL's folder", s.dir, have,
				want)
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
		testproc.Await(s.t, "the size of the database", func() bool { // the connection string has little time
			return db.QueryRowContext(s.t.Context(), "SELECT pg_database_size(current_database())").Scan(&sum) == nil
		})
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

// serve starts an instance; grown by way of the module that can fail.
func (s *soak) serve(i *instance) {
	s.t.Helper()
	var module *faultmodule.Module
	if i == s.grown {
		module = s.module
	}
	s.serveBy(i, module)
}

func (s *soak) serveBy(i *instance, module *faultmodule.Module) {
	s.t.Helper()
	if i.hss == nil {
		i.clients(s)
	}
	// An HSM that hangs is given up soon, a revocation is seen soon, and whoever tries again may do so often.
	s.write(i.name+".yaml", fmt.Sprintf("state: %s\nstore: '%s'\nsocket: %s.s\nlisten: 127.0.0.1:%d\nlog_level: warn\n"+
		"drain_delay: 1s\nhsm_timeout: 2s\nrevocation_ttl: 1s\npending_vectors: 1000\nimei_burst: 1000000\n"+
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
	urls := []string{i.url(s)}
	if i == s.grown && s.beside != nil {
		urls = append(urls, s.beside.url(s))
	}
	i.hss = must.Get[*client.Client](s.t)(client.New(client.Options{URLs: urls, TLS: &tls.Config{RootCAs: pool,
		Certificates: []tls.Certificate{own}}}))
	socket := s.path(i.name + ".s")
	i.admin = must.Get[*client.Client](s.t)(client.New(client.Options{URLs: []string{"unix:" + socket}}))
	i.http = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn,
		error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	s.t.Cleanup(func() { i.hss.Close(); i.admin.Close(); i.http.CloseIdleConnections() })
}

// url is where the instance listens, also when it has been away.
func (i *instance) url(s *soak) string {
	if i.port == 0 {
		i.port = must.Get[int](s.t)(freeport.On("127.0.0.1"))
	}
	return fmt.Sprintf("https://127.0.0.1:%d", i.port)
}

func (i *instance) stop() error { return i.process.Load().Stop(syscall.SIGTERM) }
