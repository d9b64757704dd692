package proof

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// attaches is how many devices go through the whole message flow in each set-up.
const attaches = 1000

// A diameter is real freeDiameter daemons around a real keysvc: an MME, an HSS and, in one set-up, an agent between them. One that has the extension asks
// keysvc.
type diameter struct {
	*world
	extensions string // the folder of the built ones
	keysvc     *exec.Cmd
	keysvcLog  *log
	http       *http.Client
	ports      map[string]int
	preload    string // libraries of sanitizers
}

// node is one daemon.
type node struct {
	d    *diameter
	name string
	cmd  *exec.Cmd
	log  *log
}

const (
	realm     = "hss.test"
	operatorK = "465b5ce8b199b49faa5f0a2ee238a6bc" // of all test SIMs: 3GPP TS 35.208, test set 1
	operatorO = "cd63cb71954a9f4e48a5994e37a02baf"
)

// newDiameter makes a lot, starts keysvc, and writes what the daemons need. sanitize is a list of gcc's sanitizers, or empty.
func newDiameter(t *testing.T, devices int, sanitize string) *diameter {
	t.Helper()
	if _, err := exec.LookPath("freeDiameterd"); err != nil {
		t.Fatal("there is no freeDiameterd: run scripts/deps.sh test")
	}
	d := &diameter{world: newWorld(t, nil), ports: map[string]int{}, keysvcLog: new(log)}
	d.extensions = d.path("extensions")
	if err := os.Mkdir(d.extensions, 0o700); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("make", "-C", "../../plugins/freediameter", "OUT="+d.extensions, "test")
	if sanitize != "" {
		build.Args = append(build.Args, "SANITIZE="+sanitize)
		for _, library := range []string{"libasan.so", "libubsan.so"} {
			path, err := exec.Command("gcc", "-print-file-name="+library).Output()
			if err != nil {
				t.Fatal(err)
			}
			d.preload += " " + strings.TrimSpace(string(path))
		}
	}
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}

	d.run(d.factory, "factory", "init")
	d.run(d.operator, "keysvc", "init")
	d.openssl(nil, "genrsa", "-out", "fixture.key", "3072")
	d.openssl(nil, "rsa", "-in", "fixture.key", "-pubout", "-out", "fixture.pem")
	d.run(d.factory, "factory", "fixture", "enroll", "--fixture-key", "fixture.pem", "--out", "fixture.json")
	d.run(d.factory, "factory", "operator", "enroll", "op", "--transport-key", "var/keysvc/transport.pem", "--so-pin-source", "file:"+d.factory.SOPINFile, "--out", "enrolment.jws")
	d.run(d.operator, "keysvc", "enroll", "enrolment.jws", "--manufacturer", "var/factory/manufacturer.pem", "--directory", "file:directory")
	d.run(d.factory, "factory", "lot", "create", "L1", "--directory", "file:directory", "--tac", "35209900", "--first", "0", "--count", fmt.Sprint(devices), "--bits", "2048")
	d.run(d.factory, "factory", "lot", "provision", "L1", "--directory", "file:directory", "--out", "injection")
	d.run(d.factory, "factory", "lot", "grant", "L1", "--directory", "file:directory", "--operator", "op", "--out", "L1.jws")
	d.run(d.operator, "keysvc", "lot", "import", "L1.jws")

	var sims bytes.Buffer
	for i := range devices {
		for _, plmn := range []string{"00101", "00102"} { // 00102 fails open, where a test says so
			fmt.Fprintf(&sims, "%s%010d %s %s\n", plmn, i, operatorK, operatorO)
		}
		fmt.Fprintf(&sims, "00101%010d %s %s\n", 5_000_000+i, operatorK, operatorO) // of mesim attach --tamper replay
	}
	d.write("subscribers", sims.String())
	d.openssl(nil, "dhparam", "-out", "dh.pem", "1024") // no connection uses it, and the daemon wants it
	d.startKeysvc()
	return d
}

func (d *diameter) write(name, text string) {
	d.t.Helper()
	if err := os.WriteFile(d.path(name), []byte(text), 0o600); err != nil {
		d.t.Fatal(err)
	}
}

func (d *diameter) startKeysvc() {
	d.t.Helper()
	d.write("keysvc.yaml", "state: var/keysvc\nsocket: s\n")
	d.keysvc = d.command(d.operator, "keysvc", "serve", "--config", "keysvc.yaml")
	d.keysvc.Stderr = d.keysvcLog
	if err := d.keysvc.Start(); err != nil {
		d.t.Fatal(err)
	}
	cmd := d.keysvc
	d.t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	d.http = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", d.path("s"))
	}}}
	await(d.t, "keysvc", func() bool {
		r, err := d.http.Get("http://keysvc/readyz")
		if err != nil {
			return false
		}
		r.Body.Close()
		return r.StatusCode == http.StatusOK
	})
}

// port is a daemon's, free a moment ago.
func (d *diameter) port(name string) int {
	d.t.Helper()
	if d.ports[name] == 0 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			d.t.Fatal(err)
		}
		d.ports[name] = l.Addr().(*net.TCPAddr).Port
		l.Close()
	}
	return d.ports[name]
}

// identity is a daemon's. The agent is of the HSS's realm: a request to that realm is then for it.
func identity(name string) string {
	if strings.HasPrefix(name, "mme") {
		return name + ".mme.test"
	}
	return name + "." + realm
}

// start starts a daemon with extensions, each the name of one and its configuration, and connections to peers.
func (d *diameter) start(name string, extensions []string, peers ...string) *node {
	d.t.Helper()
	id := identity(name)
	if _, err := os.Stat(d.path(name + ".pem")); err != nil {
		d.openssl(nil, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-keyout", name+".key", "-out", name+".pem", "-subj", "/CN="+id)
	}
	var c bytes.Buffer
	fmt.Fprintf(&c, "Identity = %q;\nRealm = %q;\nPort = %d;\nSecPort = 0;\nNo_SCTP;\nNo_IPv6;\nListenOn = \"127.0.0.1\";\nTcTimer = 1;\nTwTimer = 6;\n", id, id[strings.Index(id, ".")+1:], d.port(name))
	fmt.Fprintf(&c, "TLS_Cred = %q, %q;\nTLS_CA = %q;\nTLS_DH_File = %q;\n", d.path(name+".pem"), d.path(name+".key"), d.path(name+".pem"), d.path("dh.pem"))
	for _, e := range extensions {
		extension, conf, _ := strings.Cut(e, ":")
		fmt.Fprintf(&c, "LoadExtension = %q : %q;\n", filepath.Join(d.extensions, extension+".fdx"), conf)
	}
	for _, p := range peers {
		fmt.Fprintf(&c, "ConnectPeer = %q { ConnectTo = \"127.0.0.1\"; Port = %d; No_TLS; };\n", identity(p), d.port(p))
	}
	d.write(name+".conf", c.String())
	n := &node{d: d, name: name, log: new(log), cmd: exec.Command("freeDiameterd", "-c", d.path(name+".conf"))}
	n.cmd.Dir, n.cmd.Stdout, n.cmd.Stderr = d.dir, n.log, n.log
	if d.preload != "" {
		d.write("lsan.supp", "leak:gnutls_x509_crt_list_import2\n") // the daemon's own, once
		n.cmd.Env = append(os.Environ(), "LD_PRELOAD="+d.preload, "LSAN_OPTIONS=suppressions="+d.path("lsan.supp"), "UBSAN_OPTIONS=print_stacktrace=1")
	}
	if err := n.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() {
		n.cmd.Process.Kill()
		n.cmd.Wait()
		if d.t.Failed() {
			text := n.log.String()
			d.t.Logf("%s:\n%s", name, text[max(0, len(text)-3000):])
		}
	})
	return n
}

// connected waits until a daemon has so many open connections.
func (n *node) connected(peers ...string) {
	n.d.t.Helper()
	await(n.d.t, n.name+" connected", func() bool {
		text := n.log.String()
		return !slices.ContainsFunc(peers, func(p string) bool {
			// The last word on a peer counts.
			open, closed := -1, -1
			for _, state := range []string{"'STATE_OPEN'", "'STATE_CLOSED'", "'STATE_SUSPECT'"} {
				at := strings.LastIndex(text, "-> "+state+"\t'"+identity(p)+"'")
				if state == "'STATE_OPEN'" {
					open = at
				} else {
					closed = max(closed, at)
				}
			}
			return open <= closed
		})
	})
}

// stop ends a daemon, which must end well.
func (n *node) stop() {
	n.d.t.Helper()
	n.cmd.Process.Signal(syscall.SIGTERM)
	done := make(chan error, 1)
	go func() { done <- n.cmd.Wait() }()
	select {
	case err := <-done:
		if err != nil {
			n.d.t.Errorf("%s ended with %v", n.name, err)
		}
	case <-time.After(40 * time.Second):
		n.d.t.Errorf("%s does not end", n.name)
	}
}

// conf writes a configuration of the extension.
func (d *diameter) conf(name string, lines ...string) (extension string) {
	d.write(name, "service = unix:"+d.path("s")+" # keysvc\n"+strings.Join(lines, "\n")+"\n")
	return "kme:" + d.path(name)
}

// attach has mesim play devices through the MME. It gives what mesim printed.
func (d *diameter) attach(socket string, ok bool, args ...string) (result struct {
	Attached  int
	Rejected  map[string]int
	PerSecond float64 `json:"per_second"`
}) {
	d.t.Helper()
	cmd := d.command(d.operator, "mesim", append([]string{"attach", "--injection", "injection", "--fixture-key", "fixture.key", "--fixture-enrolment", "fixture.json",
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
	t    *testing.T
	conn net.Conn
	buf  []byte
	next int
}

func (d *diameter) mme(socket string) *mme {
	d.t.Helper()
	var conn net.Conn
	await(d.t, "the MME's socket", func() (ok bool) {
		var err error
		conn, err = net.Dial("unix", d.path(socket))
		return err == nil
	})
	d.t.Cleanup(func() { conn.Close() })
	return &mme{t: d.t, conn: conn}
}

// ask makes one request, and gives the answer's fields behind its id.
func (m *mme) ask(command string, args ...string) []string {
	m.t.Helper()
	m.next++
	if _, err := fmt.Fprintf(m.conn, "%s %d %s\n", command, m.next, strings.Join(args, " ")); err != nil {
		m.t.Fatal(err)
	}
	m.conn.SetReadDeadline(time.Now().Add(30 * time.Second))
	for {
		if line, rest, ok := bytes.Cut(m.buf, []byte("\n")); ok {
			m.buf = rest
			if f := strings.Fields(string(line)); len(f) >= 3 && f[1] == fmt.Sprint(m.next) {
				return append([]string{f[0]}, f[2:]...)
			}
			continue
		}
		chunk := make([]byte, 4096)
		n, err := m.conn.Read(chunk)
		if err != nil {
			m.t.Fatal(err)
		}
		m.buf = append(m.buf, chunk[:n]...)
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

func (d *diameter) states() map[string]int {
	d.t.Helper()
	states := map[string]int{}
	for line := range strings.Lines(d.run(d.operator, "keysvc", "binding", "list")) {
		if f := strings.Fields(line); len(f) > 2 && f[0] != "IMSI" {
			states[f[2]]++
		}
	}
	return states
}

// setUps are an HSS that has the extension itself, whose handlers send their answers in either way, and one that has an agent in front of it.
var setUps = []struct {
	name  string
	start func(d *diameter) (nodes []*node, front string)
}{
	{"in the HSS", func(d *diameter) ([]*node, string) {
		return []*node{d.start("hss", []string{"hss:" + d.path("subscribers"), d.conf("kme.conf")}, "mme")}, "hss"
	}},
	{"in the HSS, loaded first", func(d *diameter) ([]*node, string) {
		return []*node{d.start("hss", []string{d.conf("kme.conf"), "hss:act:" + d.path("subscribers")}, "mme")}, "hss"
	}},
	{"in an agent", func(d *diameter) ([]*node, string) {
		hss := d.start("hss", []string{"hss:" + d.path("subscribers")}, "agent")
		return []*node{hss, d.start("agent", []string{d.conf("kme.conf")}, "hss", "mme")}, "agent"
	}},
}

// The message flow of the text, with real Diameter nodes: devices attach, resynchronise and are refused.
func TestS6a(t *testing.T) {
	for _, s := range setUps {
		t.Run(s.name, func(t *testing.T) {
			devices := attaches
			if strings.HasSuffix(s.name, "first") {
				devices = 50
			}
			d := newDiameter(t, devices+50, "")
			nodes, front := s.start(d)
			client := d.start("mme", []string{"mme:" + d.path("m")}, front)
			client.connected(front)
			d.mme("m")

			result := d.attach("m", true, "--count", fmt.Sprint(devices), "--concurrency", "16")
			t.Logf("%d devices attached, %.0f a second", result.Attached, result.PerSecond)
			if states := d.states(); states["ACTIVE"] != devices || len(states) != 1 {
				t.Errorf("bindings %v, want %d ACTIVE", states, devices)
			}
			if n := strings.Count(nodes[0].log.String(), "resynchronised"); n != devices {
				t.Errorf("the HSS was resynchronised %d times, not %d", n, devices)
			}
			for i, kind := range []string{"kme", "signature", "payload", "other-device", "other-lot", "replay"} {
				first := devices + 5*i
				if kind == "replay" {
					first = devices + 40 // its devices attach, too
				}
				result := d.attach("m", true, "--first", fmt.Sprint(first), "--count", "2", "--first-imsi", "001010000000000", "--tamper", kind)
				if result.Rejected["5420/1"] != 2 {
					t.Errorf("%s: %v, want 5420 with status 1", kind, result.Rejected)
				}
			}
			m := d.mme("m")
			m.expect("a subscriber that nobody knows", "AIA 5001 - -", "AIR", "001019999999999", "1", "-")
			m.expect("and its location", "ULA 5001 - -", "ULR", "001019999999999", "35209900000001", "-", "-")
			m.expect("an attempt that is none", "ULA 5420 2 -", "ULR", "001010000000990", "35209900000001", strings.Repeat("00", 256), "AAAAAAAAAAAAAAAAAAAAAA")
			m.expect("a payload of another length", "ULA 5420", "ULR", "001010000000990", "35209900000001", "00", "AAAAAAAAAAAAAAAAAAAAAA")
			m.expect("an IMEI that is none", "ULA 5420 1 -", "ULR", "001010000000990", "3520990000000X", strings.Repeat("00", 256), "AAAAAAAAAAAAAAAAAAAAAA")
			if vectors := m.expect("five vectors at once", "AIA 2001 2 -", "AIR", "001010000000000", "5", "-"); len(vectors) != 4+5 {
				t.Errorf("%d vectors, not 5", len(vectors)-4)
			}
			m.expect("AUTS by who has no K", "AIA 4181", "AIR", "001010000000000", "1", strings.Repeat("5a", 30))
			for _, n := range append(slices.Clone(nodes), client) {
				if n.cmd.ProcessState != nil {
					t.Errorf("%s has ended", n.name)
				}
			}
			for _, n := range append([]*node{client}, reversed(nodes)...) {
				n.stop()
				time.Sleep(300 * time.Millisecond) // peers that say goodbye at once wait for each other
			}
		})
	}
}

func reversed(nodes []*node) []*node {
	nodes = slices.Clone(nodes)
	slices.Reverse(nodes)
	return nodes
}
