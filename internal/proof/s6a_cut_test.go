package proof

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
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
	unread    chan device // of shards that no instance has read

	mu       sync.Mutex
	attached []attached             // guarded by mu
	underWay map[int]time.Time      // guarded by mu: when the attach of each worker began
	again    map[string]int         // guarded by mu: why something was tried once more
	bound    map[string]*kme.Secret // guarded by mu: of who has attached, by IMSI
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
	published := vaulttest.Start(t, "-listen", vault+":0")
	published.Mount(t, "kme", "2")
	w := newWorld(t, nil, "VAULT_ADDR="+published.Addr, "VAULT_TOKEN="+published.Root)
	w.directory = "vault:kme"
	hosts := &network{world: w}
	hosts.newCA("hosts-ca")
	hosts.certificate("hosts", "hosts-ca", fmt.Sprintf(
		"subjectAltName=IP:%s,IP:%s,IP:%s,IP:%s\nextendedKeyUsage=serverAuth\n",
		database, standby, address(1), address(2)))
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
		s.settings[i] = fmt.Sprintf("state: state%d\nlisten: %s:8443\n"+
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

// secondToken is a token with the keys of the first.
func (s *site) secondToken() softhsmtest.Tok {
	s.t.Helper()
	second := softhsmtest.Make(s.t, s.path("softhsm"), "second")["second"]
	said := func(tok softhsmtest.Tok, name, program string, args ...string) string {
		s.t.Helper()
		return field(s.t, s.run(tok, program, append(args, "--json")...), name)
	}
	to := said(second, "thumbprint", "keysvc", "backup", "prepare", "--state", "spare", "--out", "restore-key.json")
	made := said(s.operator, "thumbprint", "keysvc", "backup", "create", "--to", "restore-key.json", "--thumbprint", to,
		"--so-pin-source", "file:"+s.operator.SOPINFile, "--out", "backup.json")
	s.run(second, "keysvc", "backup", "restore", "backup.json", "--state", "spare", "--thumbprint", made)
	transport := said(second, "thumbprint", "keysvc", "transport", "new", "--out", "transport-2.json")
	s.run(s.factory, "factory", "operator", "enroll", "op", "--transport-key", "transport-2.json", "--thumbprint",
		transport, "--so-pin-source", "file:"+s.factory.SOPINFile, "--out", "enrolment-2.jws")
	s.run(second, "keysvc", "enroll", "enrolment-2.jws", "--manufacturer", "var/factory/manufacturer.pem",
		"--thumbprint",
		said(s.factory, "manufacturer", "factory", "init"), "--directory", s.directory)
	s.run(second, "keysvc", "lot", "import", "L1.jws")
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

// twice does what an attach consists of, and once more if that fails.
func (s *site) twice(what string, f func() error) error {
	err := f()
	if err == nil {
		return nil
	}
	s.mu.Lock()
	s.again[fmt.Sprintf("%s: %v", what, err)]++
	s.mu.Unlock()
	if again := f(); again != nil {
		return fmt.Errorf("%s: %w, and once more: %w", what, err, again)
	}
	return nil
}

// byClient attaches a subscriber that nobody has had by the Go client.
func (s *site) byClient(d device) error {
	ctx, c := s.t.Context(), s.client
	imsi, err := kme.ParseIMSI(fmt.Sprintf("00103%010d", s.imsis.Add(1)))
	imei, ierr := kme.ParseIMEI(d.imei)
	if err := errors.Join(err, ierr); err != nil {
		return err
	}
	var v client.Vectors
	var sent client.RAND
	prepare := func() (err error) {
		rand.Read(sent[:])
		v, err = c.PrepareVector(ctx, imsi, client.Origin{}, sent)
		return err
	}
	if err := s.twice("PrepareVector", prepare); err != nil {
		return err
	}
	if v.AttemptID == "" {
		return fmt.Errorf("IMSI %s is bound, and has not attached", imsi)
	}
	plain := s.plaintext(d)
	payload, id := s.encrypt(d, plain), v.AttemptID
	if err := s.twice("EstablishKME", func() error {
		e, err := c.EstablishKME(ctx, imsi, client.Origin{}, imei, id, payload)
		if err == nil && e.NWSig != plain.NWSig() {
			err = fmt.Errorf("NW_SIG is %x", e.NWSig)
		}
		return err
	}); err != nil {
		return err
	}
	if err := s.twice("PrepareVector", prepare); err != nil {
		return err
	}
	if p := (&phone{d: s.network, imsi: imsi.String(), kme: &plain.KME}); v.AttemptID != "" ||
		p.decrypt(v.RANDs[0][:]) != sent {
		return fmt.Errorf("IMSI %s: the vector is not under its KME: %+v", imsi, v)
	}
	if err := s.twice("ReportAuthentication", func() error {
		r, err := c.ReportAuthentication(ctx, imsi, client.Origin{}, true)
		if err == nil && (r.State != kmev1.State_ACTIVE || !r.Served) {
			err = fmt.Errorf("%+v", r)
		}
		return err
	}); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bound[imsi.String()] = &plain.KME
	return nil
}

// byHSS attaches a phone by S6a: one that has a KME as one that comes back.
func (s *site) byHSS(p *phone) error {
	var a aia
	air := func() error {
		if a = s.mme.air(p.imsi, 1, options{}); a.lost != "" || a.result != 2001 {
			return fmt.Errorf("%d %s", a.result, a.lost)
		}
		return nil
	}
	ulr := func(payload []byte, attempt string, nwSig []byte) func() error {
		return func() error {
			u := s.mme.ulr(p.imsi, p.imei, payload, attempt, options{})
			if u.lost != "" || u.result != 2001 || !bytes.Equal(u.nwSig, nwSig) {
				return fmt.Errorf("%d, status %q, NW-Sig %x %s", u.result, u.status, u.nwSig, u.lost)
			}
			return nil
		}
	}
	if err := s.twice("AIR", air); err != nil {
		return err
	}
	if p.kme == nil {
		if a.control != clearOnly {
			return fmt.Errorf("IMSI %s is bound, and has not attached", p.imsi)
		}
		plain, payload := p.payload()
		want := plain.NWSig()
		if err := s.twice("ULR with a payload", ulr(payload, a.attempt, want[:])); err != nil {
			return err
		}
		p.kme = &plain.KME
		if err := s.twice("AIR", air); err != nil {
			return err
		}
	}
	if a.control != preprocessed || len(a.eutran) != 1 {
		return fmt.Errorf("IMSI %s: %d vectors, Binding-Control %d", p.imsi, len(a.eutran), a.control)
	}
	if err := p.accepts(a.eutran[0], false); err != nil {
		return fmt.Errorf("IMSI %s: %w", p.imsi, err)
	}
	if err := s.twice("ULR", ulr(nil, "", nil)); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bound[p.imsi] = p.kme
	return nil
}

// work attaches again and again, with a pause that leaves the machine to others, until the test ends it.
func (s *site) work(worker int, stop <-chan struct{}, attach func() error) {
	for {
		began := time.Now()
		s.mu.Lock()
		s.underWay[worker] = began
		s.mu.Unlock()
		err := attach()
		s.mu.Lock()
		delete(s.underWay, worker)
		if err == nil {
			s.attached = append(s.attached, attached{began, time.Since(began)})
		}
		s.mu.Unlock()
		if err != nil {
			s.t.Errorf("an attach failed that was tried once more: %v", err)
		}
		select {
		case <-stop:
			return
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// during has a fault last for some time, and says what the attaches that began meanwhile took: where it is felt, one of
// them has had to wait for it. It returns when both instances get calls again, by either client.
func (s *site) during(what string, lasts time.Duration, felt bool, begin func() (mend func())) {
	s.t.Helper()
	s.mu.Lock()
	s.attached, s.again = nil, map[string]int{}
	s.mu.Unlock()
	mend := begin()
	time.Sleep(lasts)
	mend()
	mended := time.Now()
	var before [2]int
	established := func(i int) int { return strings.Count(s.instances[i].Log.String(), `"imsi":"00103`) }
	for i := range s.instances {
		testproc.Await(s.t, what+": "+instanceName(i)+" is ready", func() bool { return s.isReady(i) })
		before[i] = established(i)
	}
	for i := range s.instances {
		testproc.Await(s.t, what+": "+instanceName(i)+" gets calls again", func() bool {
			return established(i) > before[i]
		})
	}
	s.hssHasBoth(what)
	testproc.Await(s.t, what+": attaches end", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return !slices.ContainsFunc(slices.Collect(maps.Values(s.underWay)), mended.After)
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	var times []time.Duration
	for _, a := range s.attached {
		if a.began.Before(mended) {
			times = append(times, a.took)
		}
	}
	if len(times) == 0 {
		s.t.Fatalf("%s: nobody has attached", what)
	}
	slices.Sort(times)
	at := func(percent int) time.Duration { return times[(len(times)-1)*percent/100].Round(time.Millisecond) }
	s.t.Logf("%-40s %3d attaches, p50 %5v, p99 %5v; both instances are back after %v; once more: %v", what, len(times),
		at(50), at(99), time.Since(mended).Round(time.Millisecond), s.again)
	if slowest := times[len(times)-1]; felt && slowest < min(lasts/3, time.Second) {
		s.t.Errorf("%s: nobody has felt it: the slowest attach took %v", what, slowest)
	}
}

// hssHasBoth waits until kme.fdx gives calls to both instances.
func (s *site) hssHasBoth(what string) {
	s.t.Helper()
	testproc.Await(s.t, what+": kme.fdx has both instances again", func() bool {
		log := s.hss.Log.String()
		return strings.Count(log, "it gets no calls") == strings.Count(log, "is ready again")
	})
}

// Two instances, two tokens, PostgreSQL with its standby, and Vault: instances and tokens are killed, hang and are cut
// off in turn under load, and the network between each two parts loses everything without a word. No attach fails that
// is tried once more, by the Go client or by kme.fdx, and no binding is lost.
func TestS6aPostgresVaultCutOff(t *testing.T) {
	t.Parallel()
	if !inOwnNetwork(t) {
		return
	}
	s := newSite(t)
	t.Logf("a call has %v", s.timeout)
	stop := make(chan struct{})
	var all sync.WaitGroup
	devices := s.devices()
	for worker := range 3 {
		p := make(chan *phone, 10)
		for range cap(p) {
			p <- s.phone()
		}
		all.Go(func() {
			s.work(2*worker, stop, func() error {
				d := devices[worker]
				select {
				case d = <-s.unread:
				default:
				}
				return s.byClient(d)
			})
		})
		all.Go(func() {
			s.work(2*worker+1, stop, func() error {
				next := <-p
				defer func() { p <- next }()
				return s.byHSS(next)
			})
		})
	}
	end := sync.OnceFunc(func() { close(stop); all.Wait() })
	t.Cleanup(end)

	lasts := s.timeout * 3 / 4
	s.during("nothing", lasts, false, func() func() { return func() {} })
	cut := func(what string, lasts time.Duration, felt bool, one, other string) {
		s.during("network, "+what, lasts, felt, func() func() { return s.lan.cut(one, other) })
	}
	cut("MME - HSS", lasts, true, address(0), address(hssHost))
	// Nothing is confirmed until TCP tries again, at the latest after as long as the cut has lasted: at most a second
	// try's time, and less than a transaction has.
	cut("primary - standby", min(lasts, 1500*time.Millisecond), true, database, address(hssHost))
	unread := devices[40:] // of shards that nobody has read
	for i := range s.instances {
		_, name, _ := strings.Cut(instanceName(i), " ")
		s.during(instanceName(i)+" killed", lasts, false, func() func() {
			s.instances[i].Kill()
			return func() { s.startInstance(i) }
		})
		s.during(instanceName(i)+" hangs", lasts, true, func() func() {
			suspend(t, s.instances[i])
			return func() { s.instances[i].Cmd.Process.Signal(syscall.SIGCONT) }
		})
		// "hang" is what a module does whose network to its HSM is cut.
		for fault, line := range map[string]string{"removed": "* removed", "hangs": "* hang",
			"answers errors": "* 0x30"} {
			s.during("token of "+name+" "+fault, lasts, false, func() func() {
				s.modules[i].Tell(t, line)
				return func() { s.modules[i].Tell(t) }
			})
		}
		cut("Go client - "+name, lasts, true, address(0), address(i+1))
		cut("HSS - "+name, lasts, true, address(hssHost), address(i+1))
		cut(name+" - primary", lasts, true, database, address(i+1))
		cut(name+" - standby", lasts, false, standby, address(i+1))
		for range cap(s.unread) {
			s.unread <- unread[0]
			unread = unread[shardSize:]
		}
		cut(name+" - Vault", lasts, true, vault, address(i+1))
	}
	end()
	s.allTokensAway()
	s.nothingIsLost()
}

// allTokensAway has both tokens of both instances hang, as the modules of an HSM do whose network is cut, and work
// again. Meanwhile what needs them is refused at once, and for what it is. Nobody restarts anything.
func (s *site) allTokensAway() {
	s.t.Helper()
	for i := range s.instances { // both by the module that can hang
		s.tokens[i][1] = strings.Replace(s.tokens[i][1], s.path("library.so"), s.modules[i].Path, 1)
	}
	s.serve(s.timeout)
	s.hssHasBoth("anew")
	p := s.phone()
	must.Do(s.t, s.byHSS(p))
	imsi := must.Get[kme.IMSI](s.t)(kme.ParseIMSI(p.imsi))
	for _, m := range s.modules {
		m.Tell(s.t, "* hang")
	}
	for i := range s.instances {
		alone := must.Get[*client.Client](s.t)(client.New(client.Options{URLs: []string{instanceURL(i)}, TLS: s.tls,
			Timeout: testproc.Patience, Tries: 1}))
		defer alone.Close()
		prepare := func(imsi kme.IMSI) (time.Duration, error) {
			began := time.Now()
			_, err := alone.PrepareVector(s.t.Context(), imsi, client.Origin{Name: must.Get[kme.Origin](s.t)(
				kme.ParseOrigin(identity("mme")))}, client.RAND{})
			return time.Since(began), err
		}
		testproc.Await(s.t, instanceName(i)+" is not ready", func() bool { return !s.isReady(i) })
		var refused, without []time.Duration
		for range 21 {
			took, err := prepare(imsi)
			if !errors.Is(err, client.Reason(kme.HSMUnavailable)) {
				s.t.Errorf("%s without a token: %v", instanceName(i), err)
			}
			refused = append(refused, took)
			took, err = prepare(must.Get[kme.IMSI](s.t)(kme.ParseIMSI(fmt.Sprintf("00104%010d", s.imsis.Add(1)))))
			if err != nil {
				s.t.Errorf("%s without a token, of a subscriber who is not bound: %v", instanceName(i), err)
			}
			without = append(without, took)
		}
		slices.Sort(refused)
		slices.Sort(without)
		s.t.Logf("%s without a token: a refusal takes %v, a call that needs none %v", instanceName(i), refused[10],
			without[10])
		if refused[10] > 5*without[10] {
			s.t.Errorf("%s without a token does not refuse at once", instanceName(i))
		}
		if log := s.instances[i].Log.String(); !strings.Contains(log,
			`"not ready","cause":"the token is not available`) {
			s.t.Errorf("the log of %s does not say why it is not ready", instanceName(i))
		}
	}
	if a := s.mme.air(p.imsi, 1, options{}); a.lost != "" || a.result != 4181 {
		s.t.Errorf("by kme.fdx, without a token: %d %s", a.result, a.lost)
	}
	mended := time.Now()
	for _, m := range s.modules {
		m.Tell(s.t)
	}
	for i := range s.instances {
		testproc.Await(s.t, instanceName(i)+" is ready by itself", func() bool { return s.isReady(i) })
	}
	s.hssHasBoth("all tokens away")
	s.t.Logf("all is back after %v", time.Since(mended).Round(time.Millisecond))
	for _, d := range s.devices()[:20] {
		if err := errors.Join(s.byClient(d), s.byHSS(p)); err != nil {
			s.t.Errorf("after the tokens are back: %v", err)
		}
	}
}

// nothingIsLost checks that who has attached is bound, and gets vectors under the KME that the device has.
func (s *site) nothingIsLost() {
	active := map[string]bool{}
	for line := range strings.Lines(s.run(s.operator, "keysvc", "binding", "list")) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "ACTIVE" {
			active[f[0]] = true
		}
	}
	for imsi, secret := range s.bound {
		if !active[imsi] {
			s.t.Errorf("IMSI %s has attached, and is not ACTIVE", imsi)
			continue
		}
		var sent client.RAND
		rand.Read(sent[:])
		v, err := s.client.PrepareVector(s.t.Context(), must.Get[kme.IMSI](s.t)(kme.ParseIMSI(imsi)), client.Origin{},
			sent)
		if err != nil || v.AttemptID != "" ||
			(&phone{d: s.network, imsi: imsi, kme: secret}).decrypt(v.RANDs[0][:]) != sent {
			s.t.Errorf("IMSI %s: its vector is not under its KME: %v", imsi, err)
		}
	}
	s.run(s.operator, "keysvc", "store", "verify")
	s.t.Logf("%d subscribers have attached, and are ACTIVE with their KMEs", len(s.bound))
}
