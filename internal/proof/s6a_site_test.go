package proof

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/internal/faultmodule"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/internal/vaulttest"
	"github.com/kmehsm/kmehsm/kme"
)

// A site is two instances of keysvc on hosts of their own. Each has both tokens, one of them by way of a module that
// can fail. On the test's own host are Go's client, an MME, PostgreSQL and Vault; on the last one an HSS with kme.fdx,
// and PostgreSQL's standby. Client and HSS know both instances, which know both servers.
type site struct {
	*network
	lan       *lan
	tls       *tls.Config // of the HSS, which trusts the hosts
	primary   *pgtest.Server
	modules   [2]*faultmodule.Module
	tokens    [2][2]string // their URIs, of each instance
	settings  [2]string    // of the instances, but tokens and hsm_timeout
	instances [2]*testproc.Process
	timeout   time.Duration // of a call, with all its tries; half of it is for a call to the token
	client    *client.Client
	hss       *node
	mme       peerEdge
	imsis     atomic.Int64
	quiet     time.Duration // p99 of attaches while there is no fault; 0 before they were measured
	unread    chan device   // of shards that no instance has read

	mu       sync.Mutex
	attached []attached             // guarded by mu
	underWay map[int]time.Time      // guarded by mu: when the attach of each worker began
	again    map[string]int         // guarded by mu: why something was tried once more
	bound    map[string]*kme.Secret // guarded by mu: of whoever has attached, by IMSI
}

// Where they are, but for the instances.
const (
	hssHost  = 3
	database = "10.99.0.3"
	vault    = "10.99.0.4"
	standby  = "10.99.3.3"
)

// An attached is an attach that has ended well.
type attached struct {
	began time.Time
	took  time.Duration
}

func instanceName(i int) string { return fmt.Sprintf("instance %c", 'A'+i) }

func instanceURL(i int) string { return "https://" + address(i+1) + ":8443" }

func newSite(t *testing.T) *site {
	l := newLAN(t, hssHost+1)
	l.also(0, database)
	l.also(0, vault)
	l.also(hssHost, standby)
	w := newWorld(t, nil)
	hosts := &network{world: w}
	hosts.newCA("hosts-ca")
	hosts.certificate("hosts", "hosts-ca", fmt.Sprintf(
		"subjectAltName=IP:%s,IP:%s,IP:%s,IP:%s,IP:%s\nextendedKeyUsage=serverAuth\n",
		database, standby, vault, address(1), address(2)))
	published := vaulttest.Start(t, "-listen", vault+":0", "-tls-cert", w.path("hosts.pem"), "-tls-key",
		w.path("hosts.key"))
	published.Mount(t, "kme", "2")
	w.env = append(w.env, "VAULT_ADDR="+published.Addr, "VAULT_TOKEN="+published.Root,
		"VAULT_CACERT="+w.path("hosts-ca.pem"))
	w.directory = "vault:kme"
	pg := pgtest.StartTLS(t, database, w.path("hosts.pem"), w.path("hosts.key"))
	pg.StandbyIn(t, l.spaces[hssHost], standby)
	local := must.Get[*url.URL](t)(url.Parse(pg.Database(t)))
	w.env = append(w.env, "KMEHSM_STORE="+local.String())
	s := &site{network: newNetworkOf(w, 200, ""), lan: l, primary: pg, unread: make(chan device, 20),
		underWay: map[int]time.Time{}, again: map[string]int{}, bound: map[string]*kme.Secret{}}
	s.host, s.watchdog = address(hssHost), 30 // freeDiameter's own default
	s.inside = func(cmd *exec.Cmd) *exec.Cmd { return l.on(hssHost, cmd) }

	second := s.secondToken()
	library := w.path("library.so") // another copy than that of the modules
	must.Do(t, os.WriteFile(library, must.Get[[]byte](t)(os.ReadFile(softhsmtest.Library())), 0o600))
	for i, toks := range [][]softhsmtest.Tok{{w.operator, second}, {second, w.operator}} {
		dir := w.path(fmt.Sprint("module", i))
		must.Do(t, errors.Join(os.Mkdir(dir, 0o700), os.Mkdir(w.path(fmt.Sprint("state", i)), 0o700)))
		s.modules[i] = must.Get[*faultmodule.Module](t)(faultmodule.Build(dir, w.operator.Module))
		s.modules[i].Tell(t)
		s.tokens[i] = [2]string{s.modules[i].URI(toks[0].URI),
			strings.Replace(toks[1].URI, w.operator.Module, library, 1)}
		s.settings[i] = fmt.Sprintf("state: state%d\nlisten: %s:8443\ndrain_delay: 1s\n"+
			"tls: {certificate: hosts.pem, key: hosts.key, client_ca: ca.pem}\nimei_rate: 1000\n"+
			"store: postgres://postgres@%s:%d,%s:%d%s?target_session_attrs=read-write&"+
			"sslmode=verify-full&sslrootcert=%s\n"+
			"clients: [{name: hss, san: hss.test, roles: [hss], plmns: [all], provision_from: [any]}]\n", i,
			address(i+1), database, pg.Port, standby, pg.Port, local.Path, w.path("hosts-ca.pem"))
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(w.readFile("hosts-ca.pem"))
	s.tls = &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{must.Get[tls.Certificate](t)(
		tls.LoadX509KeyPair(w.path("hss.pem"), w.path("hss.key")))}}
	s.serve(testproc.Patience)
	var slowest time.Duration
	for _, d := range s.devices()[:20] {
		began := time.Now()
		must.Do(t, s.byClient(d))
		slowest = max(slowest, time.Since(began))
	}
	// 2 seconds, or more if this machine is slow. A fault lasts nearly as long, and an MME waits for twice Patience.
	s.serve(min(max(2*time.Second, 20*slowest), testproc.Patience/2))
	s.write("kme.conf", fmt.Sprintf("service = %s\nservice = %s\nca = %s\ncert = %s\nkey = %s\ntimeout_ms = %d\n",
		instanceURL(0), instanceURL(1), w.path("hosts-ca.pem"), w.path("hss.pem"), w.path("hss.key"),
		s.timeout.Milliseconds()))
	s.hss = s.start("hss", []string{"hssd:" + s.path("subscribers"), "kme:" + s.path("kme.conf")}, "mme")
	s.mme = s.hss.peer("mme", nil)
	return s
}

// serve starts the instances, anew if they run, and makes the Go client, for calls that have this time.
func (s *site) serve(timeout time.Duration) {
	s.t.Helper()
	s.timeout = timeout
	for i, runs := range s.instances {
		if runs != nil {
			runs.Kill()
		}
		s.write(fmt.Sprintf("keysvc%d.yaml", i), fmt.Sprintf("hsm_timeout: %v\ntokens: [%q, %q]\n", timeout/2,
			s.tokens[i][0], s.tokens[i][1])+s.settings[i])
		s.startInstance(i)
	}
	s.client = must.Get[*client.Client](s.t)(client.New(client.Options{URLs: []string{instanceURL(0), instanceURL(1)},
		TLS: s.tls, Timeout: timeout}))
	s.t.Cleanup(s.client.Close)
}

// secondToken is a token with the keys of the first. Its commands name it: the state folder notes the first.
func (s *site) secondToken() softhsmtest.Tok {
	s.t.Helper()
	second := softhsmtest.Make(s.t, s.path("softhsm"), "second")["second"]
	said := func(tok softhsmtest.Tok, name, program string, args ...string) string {
		s.t.Helper()
		return field(s.t, s.run(tok, program, append(args, "--token", tok.URI, "--json")...), name)
	}
	to := said(second, "thumbprint", "keysvc", "backup", "prepare", "--state", "spare", "--out", "restore-key.json")
	made := said(s.operator, "thumbprint", "keysvc", "backup", "create", "--to", "restore-key.json", "--thumbprint", to,
		"--so-pin-source", "file:"+s.operator.SOPINFile, "--out", "backup.json")
	s.run(second, "keysvc", "backup", "restore", "backup.json", "--state", "spare", "--thumbprint", made, "--token",
		second.URI)
	transport := said(second, "thumbprint", "keysvc", "transport", "new", "--out", "transport-2.json")
	s.run(s.factory, "factory", "operator", "enroll", "op", "--transport-key", "transport-2.json", "--thumbprint",
		transport, "--so-pin-source", "file:"+s.factory.SOPINFile, "--out", "enrolment-2.jws")
	s.run(second, "keysvc", "enroll", "enrolment-2.jws", "--manufacturer", "var/factory/manufacturer.pem",
		"--thumbprint",
		said(s.factory, "manufacturer", "factory", "init"), "--directory", s.directory, "--token", second.URI)
	s.run(second, "keysvc", "lot", "import", "L1.jws", "--token", second.URI)
	return second
}

func (s *site) startInstance(i int) {
	s.t.Helper()
	cmd := s.command(s.operator, "keysvc", "serve", "--config", fmt.Sprintf("keysvc%d.yaml", i))
	cmd.Env = slices.DeleteFunc(append(cmd.Env, s.modules[i].Env()...), func(v string) bool {
		return strings.HasPrefix(v, "KMEHSM_TOKEN=") || strings.HasPrefix(v, "KMEHSM_STORE=")
	})
	inside := s.lan.on(i+1, cmd)
	inside.Args[0] = instanceName(i)
	s.instances[i] = testproc.Start(s.t, inside, func(*testproc.Process) bool { return s.isReady(i) })
}

func (s *site) isReady(i int) bool {
	c := &http.Client{Timeout: testproc.Patience, Transport: &http.Transport{TLSClientConfig: s.tls.Clone(),
		DisableKeepAlives: true}}
	r, err := c.Get(instanceURL(i) + "/readyz")
	if err != nil {
		return false
	}
	r.Body.Close()
	return r.StatusCode == http.StatusOK
}
