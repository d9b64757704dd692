package api

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// An authority certifies clients.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{template, key}
	a.certificate = a.issue(t, template, &key.PublicKey)
	return a
}

func (a *authority) issue(t *testing.T, template *x509.Certificate, key *ecdsa.PublicKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, key, a.key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// client is a certificate for a DNS name.
func (a *authority) client(t *testing.T, name string, until time.Time) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := a.issue(t, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "the " + name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: until,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, &key.PublicKey)
	return tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: key, Leaf: c}
}

// A lines is a log, JSON lines.
type lines struct {
	mu   sync.Mutex
	text strings.Builder // guarded by mu
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

// take gives what was logged, and forgets it.
func (l *lines) take(t *testing.T) (all []map[string]any) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.text.String()) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatal(line, err)
		}
		all = append(all, m)
	}
	l.text.Reset()
	return all
}

// A front is a service with a real database, served with mutual TLS and on a socket, as keysvc serves it.
type front struct {
	log      *lines
	store    *sqlstore.Store
	registry *prometheus.Registry
	ca       *authority
	url      string
	socket   string

	connections *Connections
}

func newFront(t *testing.T, list ...Client) *front {
	t.Helper()
	f := &front{log: new(lines), registry: prometheus.NewRegistry(), ca: newAuthority(t)}
	store, err := sqlstore.Open(t.Context(), sqlstore.InFolder(t.TempDir()), kme.RandomSecret())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	f.store = store
	clients, err := NewClients(list)
	if err != nil {
		t.Fatal(err)
	}
	metrics := binding.NewMetrics(f.registry)
	service := binding.NewService(binding.Options{
		Store: store, Times: binding.DefaultTimes(), Metrics: metrics, Log: slog.New(slog.NewJSONHandler(f.log, nil)),
	})
	handler := NewHandler(Options{Service: service, Clients: clients, Metrics: metrics, Gather: http.NotFoundHandler()})
	s := httptest.NewUnstartedServer(handler)
	pool := x509.NewCertPool()
	pool.AddCert(f.ca.certificate)
	s.TLS = &tls.Config{ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13}
	f.connections = NewConnections(service, func() *Clients { return clients }, 1000)
	s.Config.ConnState, s.Config.ConnContext = f.connections.State, ConnContext
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.Close)
	f.url, f.socket = s.URL, filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	local := &http.Server{Handler: handler, ConnContext: ConnContext, ConnState: f.connections.State,
		Protocols: new(http.Protocols)}
	local.Protocols.SetHTTP1(true)
	local.Protocols.SetUnencryptedHTTP2(true)
	go local.Serve(l)
	t.Cleanup(func() { local.Close() })
	return f
}

// call makes a call with certificates, or on the socket if they are nil; status is 0 if there was no answer.
func (f *front) call(t *testing.T, certificates []tls.Certificate, method, body string) (status int, answer string) {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, Certificates: certificates}}
	url := f.url
	if certificates == nil {
		url = "http://keysvc"
		transport.DialContext = func(context.Context, string, string) (net.Conn, error) {
			return net.Dial("unix", f.socket)
		}
	}
	defer transport.CloseIdleConnections()
	kind := "application/json"
	if method == "Stream" {
		transport.Protocols = new(http.Protocols)
		transport.Protocols.SetHTTP2(certificates != nil)
		transport.Protocols.SetUnencryptedHTTP2(certificates == nil)
		kind, body = "application/connect+json", enveloped(body)
	}
	r, err := (&http.Client{Transport: transport}).Post(url+service+method, kind, strings.NewReader(body))
	if err != nil {
		return 0, err.Error()
	}
	defer r.Body.Close()
	text, _ := io.ReadAll(r.Body)
	return r.StatusCode, string(text)
}

// Every line of a call says whose it is, also of one in a stream.
func TestActorInLog(t *testing.T) {
	own := os.Getuid()
	f := newFront(t,
		Client{Name: "hss-1", SAN: "hss.example", Roles: []Role{RoleHSS, RoleAdmin}, PLMNs: []string{"00101"}},
		Client{Name: "ops", UID: &own, Roles: []Role{RoleAdmin}, PLMNs: []string{all}})
	certificate := f.ca.client(t, "hss.example", time.Now().Add(time.Hour))
	hss := []tls.Certificate{certificate}
	const imsi = `"imsi":"001010000000001"`
	check := func(certificates []tls.Certificate, by, body, method, msg, how, role string) {
		t.Helper()
		status, answer := f.call(t, certificates, by, body)
		log := f.log.take(t)
		if len(log) != 1 || log[0]["msg"] != msg || how != "" && log[0]["reason"] != how {
			t.Errorf("%s: %d %s; the log has %v", method, status, answer, log)
			return
		}
		actor, _ := log[0]["actor"].(map[string]any)
		want := map[string]any{"client": "hss-1", "certificate": fingerprint(certificate.Leaf),
			"address": actor["address"]}
		if certificates == nil {
			want = map[string]any{"client": "ops", "user": fmt.Sprint("uid ", own)}
		} else if a, _ := actor["address"].(string); !strings.HasPrefix(a, "127.0.0.1:") {
			t.Errorf("%s: from %q", method, a)
		}
		if role != "" {
			want["role"] = role
		}
		if fmt.Sprint(actor) != fmt.Sprint(want) {
			t.Errorf("%s: the actor is %v, want %v", method, actor, want)
		}
		if log[0]["imsi"] == nil {
			t.Errorf("%s: no IMSI in %v", method, log[0])
		}
	}
	for _, c := range []struct {
		certificates []tls.Certificate
		method, body string
		msg, how     string
		role         string
	}{
		{hss, "PrepareVector", `{` + imsi + `,"rands":["AAECAwQFBgcICQoLDA0ODw=="]}`, "attempt opened", "", "hss"},
		{hss, "EstablishKME", `{` + imsi + `,"imei":"35209900000001"}`, "refused", "NO_ATTEMPT", "hss"},
		{hss, "ReportAuthentication", `{` + imsi + `}`, "refused", "NOT_BOUND", "hss"},
		{hss, "GetBinding", `{` + imsi + `}`, "refused", "NOT_BOUND", "hss"},
		{hss, "RevokeBinding", `{` + imsi + `}`, "refused", "NOT_BOUND", "admin"},
		{hss, "RevokeBinding", `{"imsi":"262010000000001"}`, "refused", "CALLER_NOT_ALLOWED", ""},
		{hss, "PrepareVector", `{` + imsi + `}`, "refused", "MALFORMED", "hss"},
		{hss, "PrepareVector", `{` + imsi + `,"origin":"a b"}`, "refused", "MALFORMED", "hss"},
		{hss, "EstablishKME", `{` + imsi + `,"imei":"1"}`, "refused", "MALFORMED", "hss"},
		{hss, "OpenProvisioning", `{` + imsi + `,"ttl":"0.1s"}`, "refused", "MALFORMED", "admin"},
		{nil, "OpenProvisioning", `{` + imsi + `}`, "provisioning opened", "", "admin"},
		{nil, "PrepareVector", `{` + imsi + `}`, "refused", "CALLER_NOT_ALLOWED", ""},
	} {
		check(c.certificates, c.method, c.body, c.method, c.msg, c.how, c.role)
		field := map[string]string{"PrepareVector": "prepare_vector", "EstablishKME": "establish_kme",
			"ReportAuthentication": "report_authentication", "GetBinding": "get_binding"}[c.method]
		if field != "" {
			other := strings.Replace(c.body, "001010000000001", "001010000000002", 1)
			check(c.certificates, "Stream", `{"calls":[{"`+field+`":`+other+`}]}`, c.method, c.msg, c.how, c.role)
		}
	}
}

// A refused call has one name in the log, whoever refuses it: its method's, as in metrics.
func TestCallInLog(t *testing.T) {
	f := newFront(t, Client{Name: "hss-1", SAN: "hss.example", Roles: roles, PLMNs: []string{"00101"}})
	certificates := []tls.Certificate{f.ca.client(t, "hss.example", time.Now().Add(time.Hour))}
	f.store.Close()
	const body = `{"imsi":"%s","imei":"35209900000001","rand":"AAECAwQFBgcICQoLDA0ODw==",
		"rands":["AAECAwQFBgcICQoLDA0ODw=="]}`
	for procedure := range allowed {
		method := strings.TrimPrefix(procedure, service)
		for imsi, reason := range map[string]string{"001010000000001": "STORE_UNAVAILABLE",
			"262010000000001": "CALLER_NOT_ALLOWED"} {
			if method == "Stream" || method == "ListBindings" && reason == "CALLER_NOT_ALLOWED" {
				continue // it is of no IMSI
			}
			f.call(t, certificates, method, fmt.Sprintf(body, imsi))
			log := f.log.take(t)
			if len(log) != 1 || log[0]["call"] != method || log[0]["reason"] != reason {
				t.Errorf("%s, %s: the log has %v", method, reason, log)
			}
		}
	}
}

// Whoever is not let in is logged and counted: who it is, as far as it has said, and why.
func TestUnauthenticated(t *testing.T) {
	f := newFront(t, Client{Name: "hss-1", SAN: "hss.example", Roles: []Role{RoleHSS}, PLMNs: []string{all}})
	later := time.Now().Add(time.Hour)
	unknown, wrong := f.ca.client(t, "unknown.example", later), newAuthority(t).client(t, "hss.example", later)
	expired := f.ca.client(t, "hss.example", time.Now().Add(-time.Hour))
	count := map[string]float64{}
	for _, c := range []struct {
		what         string
		certificates []tls.Certificate
		why          string
		cause, name  string
		fingerprint  string
		status       int
	}{
		{"no certificate", []tls.Certificate{}, "handshake", "didn't provide a certificate", "", "", 0},
		{"another CA's certificate", []tls.Certificate{wrong}, "certificate", "unknown authority", "hss.example",
			fingerprint(wrong.Leaf), 0},
		{"an expired certificate", []tls.Certificate{expired}, "certificate", "expired", "hss.example",
			fingerprint(expired.Leaf), 0},
		{"an unknown client", []tls.Certificate{unknown}, "client", "", "unknown.example",
			fingerprint(unknown.Leaf), 403},
		{"an unknown user", nil, "user", "", "", "", 403},
	} {
		status, answer := f.call(t, c.certificates, "GetBinding", `{"imsi":"001010000000001"}`)
		if status != c.status {
			t.Errorf("%s: %d %s", c.what, status, answer)
		}
		var line map[string]any
		testproc.Await(t, "a line about "+c.what, func() bool { // the client may know before the server
			for _, line = range f.log.take(t) {
				return true
			}
			return false
		})
		text := fmt.Sprint(line)
		for _, want := range []string{c.cause, c.name, c.fingerprint} {
			if !strings.Contains(text, want) {
				t.Errorf("%s: %v does not say %q", c.what, text, want)
			}
		}
		from := "127.0.0.1:"
		if c.certificates == nil {
			from = fmt.Sprint("uid ", os.Getuid())
		}
		if line["level"] != "WARN" || line["msg"] != "client authentication failed" || line["why"] != c.why ||
			!strings.Contains(text, from) {
			t.Errorf("%s: %v", c.what, text)
		}
		if count[c.why]++; counted(t, f.registry, c.why) != count[c.why] {
			t.Errorf("%s: %v are counted as %q, want %v", c.what, counted(t, f.registry, c.why), c.why, count[c.why])
		}
	}
	// A probe that connects and goes has not tried to be anybody; and who is known is none of these.
	c, err := net.Dial("tcp", strings.TrimPrefix(f.url, "https://"))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	f.call(t, []tls.Certificate{f.ca.client(t, "hss.example", later)}, "GetBinding", `{"imsi":"001010000000001"}`)
	if log := f.log.take(t); len(log) != 1 || log[0]["reason"] != "NOT_BOUND" {
		t.Errorf("%v", log)
	}
}

// Whoever fails again and again does not fill the log, and is counted all the same.
func TestUnauthenticatedFlood(t *testing.T) {
	f := newFront(t, Client{Name: "hss-1", SAN: "hss.example", Roles: []Role{RoleHSS}, PLMNs: []string{all}})
	told, left, flood := 0, 0, 0
	for range 2 { // what was left out is told once
		for range 150 {
			flood++
			f.call(t, nil, "GetBinding", `{"imsi":"001010000000001"}`)
		}
		for end := time.Now().Add(time.Minute); told+left < flood &&
			time.Now().Before(end); time.Sleep(time.Second / 10) {
			for _, line := range f.log.take(t) {
				if n, ok := line["left_out"].(float64); ok {
					left += int(n)
				} else if line["why"] == "user" {
					told++
				}
			}
		}
	}
	if told+left != flood || told > flood/2 || told == 0 || counted(t, f.registry, "user") != float64(flood) {
		t.Errorf("of %d, %d lines, %d left out, %v counted", flood, told, left, counted(t, f.registry, "user"))
	}
}

// Nobody fills the log with long names and paths, be it a stranger or a client.
func TestLinesAreShort(t *testing.T) {
	f := newFront(t, Client{Name: "hss-1", SAN: "hss.example", Roles: []Role{RoleHSS}, PLMNs: []string{all}})
	later, long := time.Now().Add(time.Hour), strings.Repeat("x", 20_000)
	named := func(names ...string) []tls.Certificate {
		key := must.Get[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		c := newAuthority(t).issue(t, &x509.Certificate{SerialNumber: big.NewInt(2), NotAfter: later, DNSNames: names,
			Subject: pkix.Name{CommonName: names[0]}}, &key.PublicKey)
		return []tls.Certificate{{Certificate: [][]byte{c.Raw}, PrivateKey: key, Leaf: c}}
	}
	hss := []tls.Certificate{f.ca.client(t, "hss.example", later)}
	for what, c := range map[string]struct {
		certificates []tls.Certificate
		method       string
	}{
		"a path":                       {nil, "../" + long},
		"a method":                     {nil, long},
		"a certificate of a long name": {named(long), "GetBinding"},
		"a certificate of many names":  {named(slices.Repeat([]string{"name.example"}, 2000)...), "GetBinding"},
		"a client's path":              {hss, "../grpc.reflection.v1.ServerReflection/" + long},
	} {
		f.call(t, c.certificates, c.method, "{}")
		var log []map[string]any
		testproc.Await(t, "a line about "+what, func() bool { log = f.log.take(t); return len(log) > 0 })
		if n := len(fmt.Sprint(log)); n > 2000 {
			t.Errorf("%s: the log has %d bytes", what, n)
		}
	}
}

// Whoever fails again and again without a certificate does not hide who has one, and is no client.
func TestFloodHidesNobody(t *testing.T) {
	f := newFront(t, Client{Name: "hss-1", SAN: "hss.example", Roles: []Role{RoleHSS}, PLMNs: []string{all}})
	for range 3 * 20 {
		f.call(t, nil, "GetBinding", `{"imsi":"001010000000001"}`)
	}
	unknown := f.ca.client(t, "unknown.example", time.Now().Add(time.Hour))
	f.log.take(t)
	f.call(t, []tls.Certificate{unknown}, "GetBinding", `{"imsi":"001010000000001"}`)
	if text := fmt.Sprint(f.log.take(t)); !strings.Contains(text, fingerprint(unknown.Leaf)) {
		t.Errorf("the log has nothing of it: %s", text)
	}
}

// Whoever is not let in is refused, logged and counted whatever it sends, and to which path.
func TestStrangersAreNotRead(t *testing.T) {
	f := newFront(t, Client{Name: "hss-1", SAN: "hss.example", Roles: []Role{RoleHSS}, PLMNs: []string{all}})
	unknown := []tls.Certificate{f.ca.client(t, "unknown.example", time.Now().Add(time.Hour))}
	for _, body := range []string{`{`, `{"imsi":1}`, strings.Repeat(" ", maxRequest+1)} {
		for _, method := range []string{"PrepareVector", "RevokeBinding", "Nope"} {
			status, answer := f.call(t, unknown, method, body)
			log := f.log.take(t)
			if status != 403 || len(log) != 1 || log[0]["msg"] != "client authentication failed" ||
				log[0]["call"] != method {
				t.Errorf("%s, %.20q: %d %s; the log has %v", method, body, status, answer, log)
			}
		}
	}
}

// counted is kme_unauthenticated_total, by why.
func counted(t *testing.T, registry *prometheus.Registry, why string) (n float64) {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.Metric {
			if f.GetName() == "kme_unauthenticated_total" && m.Label[0].GetValue() == why {
				n = m.Counter.GetValue()
			}
		}
	}
	return n
}

// A name of one kind in a certificate is not taken for the same text of another kind.
func TestKindsOfNames(t *testing.T) {
	clients := must.Get[*Clients](t)(NewClients([]Client{
		{Name: "host", SAN: "hss.example", Roles: []Role{RoleHSS}, PLMNs: []string{all}},
		{Name: "uri", SAN: "spiffe://op.example/hss", Roles: []Role{RoleHSS}, PLMNs: []string{all}},
	}))
	for _, c := range []struct{ dns, uri, want string }{
		{dns: "hss.example", want: "host"}, {uri: "spiffe://op.example/hss", want: "uri"},
		{uri: "hss.example"}, {dns: "spiffe://op.example/hss"},
	} {
		shown := new(x509.Certificate)
		if shown.DNSNames = []string{c.dns}; c.uri != "" {
			shown.URIs = []*url.URL{must.Get[*url.URL](t)(url.Parse(c.uri))}
		}
		got := ""
		if client := clients.of(shown, -1); client != nil {
			got = client.Name
		}
		if got != c.want {
			t.Errorf("DNS name %q, URI %q: client %q, want %q", c.dns, c.uri, got, c.want)
		}
	}
}
