package proof

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/freeport"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

const success = "2001"

// A network is real freeDiameter daemons around a real keysvc: an MME, an HSS and, in one set-up, an agent between
// them. One that has the extension asks keysvc.
type network struct {
	*world
	extensions string // the folder of those that are built
	keysvc     *testproc.Process
	http       *http.Client
	ports      map[string]int
	preload    string                    // libraries of sanitizers
	libraries  string                    // the folder of those that come before the system's
	host       string                    // the address of the daemons; empty: 127.0.0.1
	watchdog   int                       // seconds: TwTimer; 0: 6
	inside     func(*exec.Cmd) *exec.Cmd // has a daemon run on another host; nil: on this one

	devicesLeft []device // that no test has had
}

// node is one daemon.
type node struct {
	d    *network
	name string
	*testproc.Process
}

const (
	realm     = "hss.test"
	away      = "epc.mnc002.mcc262.3gppnetwork.org" // another network's
	home      = "epc.mnc001.mcc001.3gppnetwork.org" // the realm of the MMEs: that of the IMSIs (TS 23.003, 19.2)
	operatorK = "465b5ce8b199b49faa5f0a2ee238a6bc"  // of all test SIMs: 3GPP TS 35.208, test set 1
	operatorO = "cd63cb71954a9f4e48a5994e37a02baf"
)

// marks are what the test HSS does with subscribers who have one (plugins/freediameter/test/hssd.c).
var marks = []string{"ulr=5001", "ulr=5012", "air=4181", "repeat", "split"}

// marked is a subscriber with a mark, one of ten.
func marked(mark string, k int) string {
	return fmt.Sprintf("0010190%08d", 10*slices.Index(marks, mark)+k)
}

// newNetwork makes a lot, starts keysvc, and writes what the daemons need. sanitize is a list of gcc's sanitizers, or
// empty.
func newNetwork(t *testing.T, devices int, sanitize string) *network {
	t.Helper()
	d := newNetworkOf(newWorld(t, nil), devices, sanitize)
	d.startKeysvc()
	return d
}

// newNetworkOf is newNetwork without its keysvc.
func newNetworkOf(w *world, devices int, sanitize string) *network {
	t := w.t
	t.Helper()
	if !strings.Contains(t.Name(), "S6a") {
		t.Fatal("a test that needs Diameter says S6a in its name: make check leaves it out")
	}
	if _, err := exec.LookPath("freeDiameterd"); err != nil {
		t.Fatal("there is no freeDiameterd: run scripts/deps.sh test")
	}
	d := &network{world: w, ports: map[string]int{}}
	d.extensions, d.preload = extensions(t, sanitize)
	d.setUp(lotOf{"L1", "tr33868-ecdsa-p256", "35209900", 2048, devices})
	var sims bytes.Buffer
	for i := range devices {
		for _, plmn := range []string{"00101", "00102"} { // 00102 fails open, where a test says so
			fmt.Fprintf(&sims, "%s%010d %s %s\n", plmn, i, operatorK, operatorO)
		}
		fmt.Fprintf(&sims, "00101%010d %s %s\n", 5_000_000+i, operatorK, operatorO) // of mesim attach --tamper replay
	}
	for _, mark := range marks {
		for k := range 10 {
			fmt.Fprintf(&sims, "%s %s %s %s\n", marked(mark, k), operatorK, operatorO, mark)
		}
	}
	d.write("subscribers", sims.String())
	// no connection uses it, and the daemon wants it
	d.openssl(nil, "genpkey", "-genparam", "-algorithm", "DH", "-pkeyopt", "group:ffdhe2048", "-out", "dh.pem")
	d.newCA("ca")
	d.certificate("server", "ca", "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth\n")
	d.certificate("hss", "ca", "subjectAltName=DNS:hss.test\nextendedKeyUsage=clientAuth\n")
	return d
}

// built are kme.fdx and what its tests need, by the sanitizers that they are built with: they are built once.
var built struct {
	sync.Mutex
	dir     string // a folder of this package's tests
	preload map[string]string
}

// extensions gives the folder of what is built with sanitizers, and the libraries of these.
func extensions(t *testing.T, sanitize string) (dir, preload string) {
	t.Helper()
	built.Lock()
	defer built.Unlock()
	dir = filepath.Join(built.dir, "with-"+sanitize)
	if preload, done := built.preload[sanitize]; done {
		return dir, preload
	}
	must.Do(t, os.MkdirAll(dir, 0o700))
	// go test keeps a result until something changes that the test has read itself.
	sources, err := filepath.Glob("../../plugins/freediameter/*/*.[ch]")
	more, merr := filepath.Glob("../../plugins/freediameter/*.[ch]")
	if err := errors.Join(err, merr); err != nil {
		t.Fatal(err)
	}
	for _, source := range append(sources, more...) {
		if _, err := os.ReadFile(source); err != nil {
			t.Fatal(err)
		}
	}
	build := exec.Command("make", "-C", "../../plugins/freediameter", "OUT="+dir, "test")
	if sanitize != "" {
		build.Args = append(build.Args, "SANITIZE="+sanitize)
		for _, library := range []string{"libasan.so", "libubsan.so"} {
			path, err := exec.Command("gcc", "-print-file-name="+library).Output()
			if err != nil {
				t.Fatal(err)
			}
			preload += " " + strings.TrimSpace(string(path))
		}
	}
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	built.preload[sanitize] = preload
	return dir, preload
}

var ec = []string{"-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"}

func (w *world) newCA(name string) {
	w.t.Helper()
	w.openssl(nil, slices.Concat([]string{"req", "-x509"}, ec,
		[]string{"-keyout", name + ".key", "-out", name + ".pem", "-days", "2", "-subj", "/CN=test CA " + name})...)
}

func (w *world) certificate(name, ca, extensions string) {
	w.t.Helper()
	w.write(name+".ext", extensions)
	request := w.openssl(nil,
		slices.Concat([]string{"req"}, ec, []string{"-keyout", name + ".key", "-subj", "/CN=" + name})...)
	w.openssl(request, "x509", "-req", "-CA", ca+".pem", "-CAkey", ca+".key", "-CAcreateserial", "-days", "2",
		"-out", name+".pem", "-extfile", name+".ext")
}

func (w *world) write(name, text string) {
	w.t.Helper()
	if err := os.WriteFile(w.path(name), []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// startKeysvc starts keysvc. On its socket, devices may be provisioned from home, and from more.
func (d *network) startKeysvc(more ...string) {
	d.t.Helper()
	d.write("keysvc.yaml", fmt.Sprintf("state: var/keysvc\nsocket: s\ndrain_delay: 0s\nlisten: 127.0.0.1:%d\n"+
		"tls: {certificate: server.pem, key: server.key, client_ca: ca.pem}\nclients:\n"+
		"- {name: socket, uid: %d, roles: [hss, admin, monitor, metrics], plmns: [all], provision_from: ['%s']}\n"+
		"- {name: hss, san: hss.test, roles: [hss], plmns: [all]}\n",
		d.port("keysvc"), os.Getuid(), strings.Join(append([]string{"home"}, more...), "', '")))
	d.http = d.local()
	d.keysvc = testproc.Start(d.t, d.command(d.operator, "keysvc", "serve", "--config", "keysvc.yaml"),
		func(*testproc.Process) bool { return ready(d.http) })
}

// local makes HTTP calls on keysvc's socket.
func (d *network) local() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", d.path("s"))
		},
	}}
}

// suspend has keysvc hang until it gets SIGCONT.
func (d *network) suspend() {
	d.t.Helper()
	suspend(d.t, d.keysvc)
}

// suspend has a process hang. A signal stops each thread when it next runs.
func suspend(t *testing.T, p *testproc.Process) {
	t.Helper()
	p.Cmd.Process.Signal(syscall.SIGSTOP)
	testproc.Await(t, "all threads of a process are stopped", func() bool {
		states, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", p.Cmd.Process.Pid))
		return err == nil && !slices.ContainsFunc(states, func(path string) bool {
			state, err := os.ReadFile(path)
			return err == nil && !bytes.Contains(state, []byte(") T "))
		})
	})
}

// port is a daemon's.
func (d *network) port(name string) int {
	d.t.Helper()
	if d.ports[name] == 0 {
		d.ports[name] = must.Get[int](d.t)(freeport.On("127.0.0.1"))
	}
	return d.ports[name]
}

// identity is a daemon's, or a peer's. The agent is of the HSS's realm: a request to that realm is then for it.
func identity(name string) string {
	if strings.HasPrefix(name, "mme") {
		return name + "." + home
	}
	if strings.HasPrefix(name, "visited") {
		return name + "." + away
	}
	return name + "." + realm
}

// start starts a daemon with extensions, each the name of one and its configuration, and connections to peers.
func (d *network) start(name string, extensions []string, peers ...string) *node {
	d.t.Helper()
	id := identity(name)
	own := "node-" + name
	if _, err := os.Stat(d.path(own + ".pem")); err != nil {
		d.openssl(nil, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
			"-keyout", own+".key", "-out", own+".pem", "-subj", "/CN="+id)
	}
	var c bytes.Buffer
	fmt.Fprintf(&c, "Identity = %q;\nRealm = %q;\nPort = %d;\nSecPort = 0;\nNo_SCTP;\nNo_IPv6;\n"+
		"ListenOn = %q;\nTcTimer = 1;\nTwTimer = %d;\n", id, id[strings.Index(id, ".")+1:], d.port(name),
		cmp.Or(d.host, "127.0.0.1"), cmp.Or(d.watchdog, 6))
	fmt.Fprintf(&c, "TLS_Cred = %q, %q;\nTLS_CA = %q;\nTLS_DH_File = %q;\n", d.path(own+".pem"), d.path(own+".key"),
		d.path(own+".pem"), d.path("dh.pem"))
	program := []string{"freeDiameterd", "-c", d.path(name + ".conf")}
	var ready func(p *testproc.Process) bool
	for _, e := range extensions {
		extension, conf, _ := strings.Cut(e, ":")
		if extension == "hssd" { // a program of its own, with its arguments
			program = append([]string{filepath.Join(d.extensions, "hssd"), d.path(name + ".conf")},
				strings.Split(conf, ":")...)
			ready = func(p *testproc.Process) bool { return strings.Contains(p.Log.String(), "subscribers") }
			continue
		}
		fmt.Fprintf(&c, "LoadExtension = %q : %q;\n", filepath.Join(d.extensions, extension+".fdx"), conf)
	}
	for _, p := range peers {
		fmt.Fprintf(&c, "ConnectPeer = %q { ConnectTo = \"127.0.0.1\"; Port = %d; No_TLS; };\n", identity(p), d.port(p))
	}
	d.write(name+".conf", c.String())
	cmd := exec.Command(program[0], program[1:]...)
	cmd.Dir = d.dir
	if d.libraries != "" {
		cmd.Env = append(os.Environ(), "LD_LIBRARY_PATH="+d.libraries)
	}
	if d.preload != "" {
		cmd.Env = append(os.Environ(), "LD_PRELOAD="+d.preload, "ASAN_OPTIONS=detect_odr_violation=0",
			"UBSAN_OPTIONS=print_stacktrace=1")
	}
	if d.inside != nil {
		cmd = d.inside(cmd)
	}
	return &node{d, name, testproc.Start(d.t, cmd, ready)}
}

// connected waits until a daemon has an open connection to each of these peers.
func (n *node) connected(peers ...string) {
	n.d.t.Helper()
	testproc.Await(n.d.t, n.name+" connected", func() bool {
		return !slices.ContainsFunc(peers, func(p string) bool { return !n.open(p) })
	})
}

// open says whether a daemon's last word on a peer is that it is open: on its way to be closed it is so no more.
func (n *node) open(peer string) bool {
	states := regexp.MustCompile(`-> '(STATE_\w+)'\t'`+regexp.QuoteMeta(identity(peer))+`'`).
		FindAllStringSubmatch(n.Log.String(), -1)
	return len(states) > 0 && states[len(states)-1][1] == "STATE_OPEN"
}

// stop ends a daemon, which must end well. But freeDiameter 1.2.1 gives its own threads 20 turns to leave a queue at
// its end, and aborts if a busy machine has not let one run: nothing of ours is in that.
func (n *node) stop() {
	n.d.t.Helper()
	err := n.Stop(syscall.SIGTERM)
	if err != nil && !strings.Contains(n.Log.String(), "fd_fifo_del: Assertion `++loops < 20' failed") {
		n.d.t.Errorf("%s ended with %v", n.name, err)
	}
}

// unhurried is as long for a call as a busy machine may need, and less than the test MME waits.
const unhurried = 20 * time.Second

// conf writes a configuration of the extension, which is unhurried if no line says how long a call has.
func (d *network) conf(name string, lines ...string) (extension string) {
	text := "service = unix:" + d.path("s") + " # keysvc\n" + strings.Join(lines, "\n") + "\n"
	if !strings.Contains(text, "timeout_ms") {
		text += fmt.Sprintf("timeout_ms = %d\n", unhurried.Milliseconds())
	}
	d.write(name, text)
	return "kme:" + d.path(name)
}

// confHTTPS is conf by way of mutual TLS.
func (d *network) confHTTPS() (extension string) { return d.confTrusting("ca.pem") }

// confTrusting is confHTTPS with another CA for keysvc's certificate.
func (d *network) confTrusting(ca string) (extension string) {
	d.write("https.conf", fmt.Sprintf("service = https://127.0.0.1:%d\nca = %s\ncert = %s\nkey = %s\n"+
		"timeout_ms = %d\n", d.port("keysvc"), d.path(ca), d.path("hss.pem"), d.path("hss.key"),
		unhurried.Milliseconds()))
	return "kme:" + d.path("https.conf")
}

// attach has mesim play devices through the MME. It gives what mesim printed.
func (d *network) attach(socket string, ok bool, args ...string) (result struct {
	Attached  int
	Rejected  map[string]int
	PerSecond float64 `json:"per_second"`
}) {
	d.t.Helper()
	cmd := d.command(d.operator, "mesim", append([]string{"attach", "--injection", "injection",
		"--fixture-key", "fixture.key", "--fixture-enrolment", "fixture.json",
		"--server", "s6a:" + d.path(socket), "--subscribers", "subscribers"}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if (err == nil) != ok {
		d.t.Fatalf("mesim %v: %v\n%s%s", args, err, out, stderr.String())
	}
	if err := json.Unmarshal(out, &result); err != nil {
		d.t.Fatal(err)
	}
	return result
}

// mme is a connection to a test MME.
type mme struct {
	t     *testing.T
	conn  net.Conn
	lines *bufio.Reader
	next  int
}

func (d *network) mme(socket string) *mme {
	d.t.Helper()
	var conn net.Conn
	testproc.Await(d.t, "the MME's socket", func() (ok bool) {
		var err error
		conn, err = net.Dial("unix", d.path(socket))
		return err == nil
	})
	d.t.Cleanup(func() { conn.Close() })
	return &mme{t: d.t, conn: conn, lines: bufio.NewReader(conn)}
}

// ask makes one request, and gives the answer's fields behind its id. Without a peer nothing is sent, and it is made
// again: on a busy machine a connection may end, which then begins anew.
func (m *mme) ask(command string, args ...string) []string {
	m.t.Helper()
	for deadline := time.Now().Add(testproc.Patience); ; time.Sleep(50 * time.Millisecond) {
		got := m.askOnce(command, args...)
		if strings.Join(got, " ") != "ERR no-peer" || time.Now().After(deadline) {
			return got
		}
	}
}

func (m *mme) askOnce(command string, args ...string) []string {
	m.t.Helper()
	m.next++
	if _, err := fmt.Fprintf(m.conn, "%s %d %s\n", command, m.next, strings.Join(args, " ")); err != nil {
		m.t.Fatal(err)
	}
	m.conn.SetReadDeadline(time.Now().Add(testproc.Patience))
	for {
		line, err := m.lines.ReadString('\n')
		if err != nil {
			m.t.Fatal(err)
		}
		if f := strings.Fields(line); len(f) >= 3 && f[1] == fmt.Sprint(m.next) {
			return append([]string{f[0]}, f[2:]...)
		}
	}
}

// expect is ask with an answer whose first fields must be these.
func (m *mme) expect(what, want string, command string, args ...string) []string {
	m.t.Helper()
	got := m.ask(command, args...)
	if s := strings.Join(got, " "); s != want && !strings.HasPrefix(s, want+" ") {
		m.t.Errorf("%s: %s, want %s", what, s, want)
	}
	return got
}

// Subscribers who never attach: of the home network, and of one whose IMSIs fail open where a test says so.
const (
	unbound = "001010005000000"
	openTo  = "001020000000000"
)

func (d *network) states() map[string]int {
	d.t.Helper()
	states := map[string]int{}
	for line := range strings.Lines(d.run(d.operator, "keysvc", "binding", "list")) {
		if f := strings.Fields(line); len(f) > 2 && f[0] != "IMSI" {
			states[f[2]]++
		}
	}
	return states
}

// setUps are an HSS that has the extension itself, whose handlers send their answers in either way, and one that has an
// agent in front of it.
var setUps = []struct {
	name  string
	start func(d *network) (nodes []*node, front string)
}{
	{"in the HSS", func(d *network) ([]*node, string) {
		return []*node{d.start("hss", []string{"hssd:" + d.path("subscribers"), d.conf("kme.conf")}, "mme")}, "hss"
	}},
	{"in an HSS whose handlers return answers", func(d *network) ([]*node, string) {
		return []*node{d.start("hss", []string{d.conf("kme.conf"), "hssd:" + d.path("subscribers") + ":act"},
			"mme")}, "hss"
	}},
	{"in an agent", func(d *network) ([]*node, string) {
		hss := d.start("hss", []string{"hssd:" + d.path("subscribers")}, "agent")
		agent := d.start("agent", []string{d.confHTTPS()}, "hss", "mme")
		agent.connected("hss") // it refuses what it cannot pass on
		return []*node{hss, agent}, "agent"
	}},
}

func stopAll(nodes ...*node) {
	for _, n := range nodes {
		n.d.t.Helper()
		n.stop()
		time.Sleep(300 * time.Millisecond) // peers that say goodbye at once wait for each other
	}
}

func reversed(nodes []*node) []*node {
	nodes = slices.Clone(nodes)
	slices.Reverse(nodes)
	return nodes
}
