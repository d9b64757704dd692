package config

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

type settings struct {
	Text  string        `yaml:"text"`
	File  string        `yaml:"file" path:"file:"`
	Time  time.Duration `yaml:"time"`
	Times []string      `yaml:"times"`
	Count int           `yaml:"count"`
	TLS   struct {
		Key string `yaml:"key" path:""`
	} `yaml:"tls"`
}

var schema = Schema[settings]{See: "p check", Settings: []Setting[settings]{
	{Name: "text", Default: "a", Rule: "a or b", OK: func(c *settings) bool { return c.Text == "a" || c.Text == "b" }},
	{Name: "file", Secret: true}, {Name: "time", Default: "5m"}, {Name: "times"}, {Name: "count"}, {Name: "tls"},
}}

func read(t *testing.T, text string, given Given) (*settings, *Report) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "p.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return schema.Read(path, given)
}

// All that is wrong is said at once, in the order of the file.
func TestAllProblems(t *testing.T) {
	_, r := read(t, "time: 5\ntext: c\ntmies: [a]\nkey: x\ntls:\n  keys: y\ncount: 1.5\ncount: 2\nzebra: 1\n"+
		"file:\n", nil)
	want := []string{
		`line 1: time: must be a time, such as 5m, not "5": it has no unit: write 5s, 5m or 5h`,
		`line 2: text: must be a or b, not "c"`,
		`line 3: tmies: there is no such setting: did you mean times?`,
		`line 4: key: there is no such setting: did you mean tls.key?`,
		`line 6: tls.keys: there is no such setting: did you mean tls.key?`,
		`line 7: count: must be a whole number, not "1.5"`,
		`line 8: count: it is there twice: keep one of them`,
		`line 9: zebra: there is no such setting: see p check --help`,
		`line 10: file: it is empty: give it a value, or take it out`,
	}
	var got []string
	for _, p := range r.Problems() {
		got = append(got, p.String())
	}
	if !slices.Equal(got, want) {
		t.Errorf("%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if err := r.Err(); err == nil || strings.Count(err.Error(), r.Path+": line ") != len(want) {
		t.Errorf("the error: %v", err)
	}
}

// What is given goes before the file, which is told; a relative path is relative to the file, or to the working folder.
func TestGiven(t *testing.T) {
	t.Chdir(t.TempDir())
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	c, r := read(t, "text: b\nfile: file:x\ntls: {key: k}\n", nil)
	dir := filepath.Dir(r.Path)
	if r.Err() != nil || c.Text != "b" || c.File != "file:"+dir+"/x" || c.TLS.Key != dir+"/k" ||
		c.Time != 5*time.Minute {
		t.Errorf("%+v, %v", c, r.Err())
	}
	c, r = read(t, "text: b\nfile: file:x\n", Given{"text": {"a"}, "file": {"file:y"}, "tls-key": {"k"},
		"times": {"1", "2"}})
	if r.Err() != nil || c.Text != "a" || c.File != "file:"+here+"/y" || c.TLS.Key != here+"/k" || len(c.Times) != 2 {
		t.Errorf("%+v, %v", c, r.Err())
	}
	if p := r.Problems(); len(p) != 2 || !p[0].Warning || !p[1].Warning || !strings.Contains(p[0].String(), "text: ") {
		t.Errorf("what goes before the file: %+v", p)
	}
	if _, r := read(t, "", Given{"text": {"z"}}); r.Err() == nil ||
		!strings.Contains(r.Err().Error(), `the command line or the environment: text: must be a or b, not "z"`) {
		t.Errorf("a wrong one: %v", r.Err())
	}
	if _, r := read(t, "text: b\n", Given{"text": {"z"}}); r.Err() == nil {
		t.Error("a wrong one in the place of the file's was taken")
	}
	if _, r := read(t, "file: file:~/x\ntls: {key: ./~}\n", nil); len(r.Problems()) != 1 ||
		!strings.Contains(r.Err().Error(), "line 1: file: ~/x: ~ stands for a home folder only in a shell") {
		t.Errorf("a home folder: %v", r.Err())
	}
	values := Values(c)
	if !slices.Equal(values["times"], []string{"1", "2"}) || !slices.Equal(values["time"], []string{"5m0s"}) ||
		values["count"] != nil || values["tls-key"] == nil {
		t.Errorf("as flags: %q", values)
	}
}

func TestFind(t *testing.T) {
	etc := t.TempDir()
	t.Chdir(t.TempDir())
	is := func(named, want string) {
		t.Helper()
		if path, err := find(etc, "p", named); path != want || err != nil {
			t.Errorf("%q, %v, want %q", path, err, want)
		}
	}
	is("", "")
	write := func(path string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(path, nil, mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil { // whatever the umask is
			t.Fatal(err)
		}
	}
	write("p.yaml", 0o644)
	is("", "p.yaml")
	write("p.yaml", 0o646)
	if path, err := find(etc, "p", ""); err == nil || !strings.Contains(err.Error(), "--config p.yaml") {
		t.Errorf("one that all may write: %q, %v", path, err)
	}
	is("p.yaml", "p.yaml")
	write(filepath.Join(etc, "p.yaml"), 0o644)
	is("", filepath.Join(etc, "p.yaml"))
	is("other", "other")
}

// What is no configuration may be larger than the machine's memory.
func TestHugeFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 1<<40)); err != nil {
		t.Fatal(err)
	}
	_, r := Schema[struct{}]{}.Read(path, nil)
	if err := r.Err(); err == nil || !strings.Contains(err.Error(), "larger than any file of ours") {
		t.Error(err)
	}
}

func TestNearest(t *testing.T) {
	names := []string{"listen", "socket", "store", "state", "log_level", "token", "tls"}
	for word, want := range map[string]string{
		"listne": "listen", "tsl": "tls", "lisen": "listen", "sotre": "store", "stroe": "store",
		"log-level": "log_level",
		"tokens":    "token", "tok": "token", "zebra": "", "": "", "x": "", "LISTEN": "",
	} {
		if got := Nearest(word, names); got != want {
			t.Errorf("%q: %q, want %q", word, got, want)
		}
	}
}

// certificate writes one that is good until then, and its key, and gives their paths.
func certificate(
	t *testing.T, name string, from, until time.Time, usage ...x509.ExtKeyUsage,
) (certificate, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: from, NotAfter: until,
		Subject: pkix.Name{CommonName: name}, ExtKeyUsage: usage}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certificate, key = filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".key")
	for path, block := range map[string]*pem.Block{certificate: {Type: "CERTIFICATE", Bytes: der},
		key: {Type: "PRIVATE KEY", Bytes: keyDER}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certificate, key
}

func TestServerTLS(t *testing.T) {
	now := time.Now()
	good, goodKey := certificate(t, "good", now.Add(-time.Hour), now.Add(90*24*time.Hour))
	soon, soonKey := certificate(t, "soon", now.Add(-5*time.Hour), now.Add(time.Hour))
	past, pastKey := certificate(t, "past", now.Add(-2*time.Hour), now.Add(-time.Hour))
	late, lateKey := certificate(t, "late", now.Add(time.Hour), now.Add(2*time.Hour))
	theirs, theirsKey := certificate(t, "theirs", now.Add(-time.Hour), now.Add(90*24*time.Hour),
		x509.ExtKeyUsageClientAuth)
	both, bothKey := certificate(t, "both", now.Add(-time.Hour), now.Add(90*24*time.Hour),
		x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth)
	open := filepath.Join(t.TempDir(), "open.key")
	data, err := os.ReadFile(goodKey)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(open, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	const own = "the server's certificate "
	for _, c := range []struct{ what, certificate, key, ca, want string }{
		{"all is well", good, goodKey, good, ""},
		{"it expires soon", soon, soonKey, good, "warning tls.certificate: " + own + soon + " expires at"},
		{"it has expired", past, pastKey, good, "tls.certificate: " + own + past + " has expired at"},
		{"it is not good yet", late, lateKey, good, "tls.certificate: " + own + late + " is not good before"},
		{"it is a client's", theirs, theirsKey, good, "tls.certificate: " + own + theirs + " is not for a server: its"},
		{"it is a client's too", both, bothKey, good, ""},
		{"another's key", good, soonKey, good, "tls.key: the key " + soonKey + " is not that of"},
		{"a key that is none", good, good, good, "tls.key: " + good + " holds no private key"},
		{"a key that all may read", good, open, good,
			"tls.key: the key of " + own[:len(own)-1] + ", " + open + " is open"},
		{"no key", good, "none", good, "tls.key: the key of the server's certificate, none cannot be read"},
		{"no certificate", "none", goodKey, good, "tls.certificate: the server's certificate none cannot be read"},
		{"a certificate that is none", goodKey, goodKey, good, "tls.certificate: the server's certificate " + goodKey +
			" holds something that is no certificate"},
		{"a CA that has expired", good, goodKey, past, "tls.client_ca: the clients' CA " + past +
			" (CN=past) has expired"},
		{"no CA", good, goodKey, "none", "tls.client_ca: the clients' CA none cannot be read"},
	} {
		var r Report
		r.ServerTLS(c.certificate, c.key, c.ca)
		var got []string
		for _, p := range r.Problems() {
			text := p.String()
			if p.Warning {
				text = "warning " + text
			}
			if p.Remedy == "" {
				t.Errorf("%s: %s has no remedy", c.what, text)
			}
			got = append(got, text)
		}
		if c.want == "" && len(got) > 0 || c.want != "" && (len(got) != 1 || !strings.HasPrefix(got[0], c.want)) {
			t.Errorf("%s: %q, want %q", c.what, got, c.want)
		}
	}
	var r Report
	if r.ServerTLS(past, soonKey, "none"); len(r.Problems()) != 3 {
		t.Errorf("three are wrong: %v", r.Problems())
	}
}

func TestPlaces(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var r Report
	at := func(setting, address string) { r.Addresses(Address{Setting: setting, At: address}) }
	at("a", l.Addr().String())
	l.Close()
	at("b", l.Addr().String())
	at("c", "192.0.2.1:0")
	at("c", "192.0.2.1:0") // which is known already
	at("d", "")
	at("e", "no.such.host.invalid:0")
	dir := t.TempDir()
	r.Parent("store", "the database", filepath.Join(dir, "a/b/c.db"))
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r.Parent("store", "the database", filepath.Join(file, "c.db"))
	r.Folder("directory", "the directory", dir, "")
	r.Folder("directory", "the directory", file, "")
	r.Folder("directory", "the directory", filepath.Join(dir, "none"), "")
	r.Made("socket", "the folder", dir)
	r.Made("socket", "the folder", filepath.Join(dir, "a"))
	r.Made("socket", "the folder", filepath.Join(dir, "a/b"))
	r.Made("socket", "the folder", file)
	r.Made("socket", "the folder", filepath.Join(file, "a"))
	for i, want := range []string{"a: " + l.Addr().String() + " is in use (ss -ltnp shows by whom)",
		"c: 192.0.2.1:0 is no address of this machine", "e: the host of no.such.host.invalid:0 is not known",
		"store: the database " + file + "/c.db cannot be made", "directory: the directory " + file + " is no folder",
		"directory: the directory " + dir + "/none cannot be opened",
		"socket: the folder: there is no folder " + dir + "/a to make b in",
		"socket: the folder: " + file + " is a file",
		"socket: the folder: " + file + " is a file"} {
		if all := r.Problems(); len(all) != 9 || !strings.HasPrefix(all[i].String(), want) {
			t.Fatalf("%v\nhave no %s", fmt.Sprint(all), want)
		}
	}
}

// Two settings that are one address are named both, before anybody listens.
func TestDistinct(t *testing.T) {
	for _, c := range []struct {
		a, b string
		same bool
	}{
		{"127.0.0.1:8443", "127.0.0.1:8443", true}, {":8443", "127.0.0.1:8443", true},
		{"[::1]:8443", "0.0.0.0:8443", true}, {"127.0.0.1:8443", "[::]:8443", true},
		{"localhost:8443", "127.0.0.1:8443", true}, {"127.0.0.1:8443", "127.0.0.1:08443", true},
		{"127.0.0.1:8443", "127.0.0.1:8444", false}, {"127.0.0.1:8443", "127.0.0.2:8443", false},
		{"127.0.0.1:0", "127.0.0.1:0", false}, {"", "", false}, {"", "127.0.0.1:8443", false}, {"x", "x", false},
	} {
		var r Report
		r.Distinct(Address{Setting: "a", At: c.a}, Address{Setting: "b", At: c.b})
		if (r.Err() != nil) != c.same || c.same && !strings.Contains(r.Err().Error(), "b: "+c.b+" and a "+c.a) {
			t.Errorf("%s, %s: %v", c.a, c.b, r.Err())
		}
	}
}

// An address that nobody can have is none.
func TestAddress(t *testing.T) {
	for text, want := range map[string][3]bool{ // to listen at; to be reached at; as a URL's
		"h:1": {true, true, true}, "127.0.0.1:0": {true, false, true}, ":8443": {true, false, false},
		"[::1]:65535": {true, true, true}, "h:65536": {}, "h:99999": {}, "h:-1": {}, "h": {false, false, true}, "": {},
		"h:": {false, false, true}, "::1:1": {}, "h:x1": {}, " h:1": {true, true, false},
	} {
		if got := [3]bool{IsAddress(text), IsReachable(text), IsURL("https://"+text, "http", "https")}; got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
	if IsURL("ftp://h", "http", "https") || IsURL("h:1", "http") {
		t.Error("another scheme")
	}
}
