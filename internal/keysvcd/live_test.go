package keysvcd

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kmehsm/kmehsm/api"
	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/certtest"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/keysvcd/settings"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/kme"
)

// A site is a service's configuration, what it reads, and what it serves.
type site struct {
	*live
	registry.Store
	dir          string
	log          *strings.Builder
	manufacturer *registry.Manufacturer // the only one
	lots         []*registry.Lot
	err          error // the registry's
}

// Manufacturers and Lots are what a reload asks a Registry for.
func (s *site) Manufacturers(context.Context) ([]*registry.Manufacturer, error) {
	return []*registry.Manufacturer{s.manufacturer}, s.err
}
func (s *site) Lots(context.Context) ([]*registry.Lot, error) { return s.lots, s.err }

const (
	siteToken   = "token: pkcs11:token=operator?module-path=/dev/null&pin-source=file:/dev/null\n"
	siteBase    = siteToken + "listen: 127.0.0.1:0\ntls: {certificate: a.pem, key: a.key, client_ca: a.pem}\n"
	siteClients = "clients: [{name: hss-1, san: hss.example, roles: [hss], plmns: [all]}]\n"
)

func newSite(t *testing.T, store binding.Store) *site {
	t.Helper()
	s := &site{dir: certtest.Make(t, "a", "m"), log: new(strings.Builder)}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := pemkey.Encode(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	s.manufacturer = &registry.Manufacturer{KeyID: directory.NewVerifier(&key.PublicKey).KeyID(), PEM: string(public),
		Directory: "file:" + s.dir}
	s.write(t, siteBase+siteClients)
	cfg, report := settings.Read(settings.Source{Path: s.config()})
	if err := report.Err(); err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewJSONHandler(s.log, nil))
	s.live = &live{
		started: cfg, registry: s, log: log,
		open: opener(t.Context(), "", cfg.Login(), func(string) directory.ReaderOptions {
			return directory.ReaderOptions{}
		}, log),
		ready: func(context.Context, *binding.Service) ([]string, error) { return nil, nil },
		options: api.Options{Metrics: binding.NewMetrics(prometheus.NewRegistry()), Gather: http.NotFoundHandler(),
			Streams: api.NewStreams(),
			Service: binding.NewService(binding.Options{Store: store, Times: cfg.Times(), Log: log})},
	}
	if err := s.apply(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *site) config() string { return filepath.Join(s.dir, "keysvc.yaml") }

func (s *site) write(t *testing.T, config string) {
	t.Helper()
	if err := os.WriteFile(s.config(), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
}

// A reload that fails, at whatever stage, changes nothing; the same one, mended, changes all.
func TestReloadFails(t *testing.T) {
	s := newSite(t, nil)
	const newClients = "clients: [{name: other, san: other.example, roles: [hss], plmns: [all]}]\n"
	good := *s.manufacturer
	data, err := os.ReadFile(filepath.Join(s.dir, "a.pem"))
	if err != nil {
		t.Fatal(err)
	}
	ca, cas := string(data), 0
	notOne := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("none")}))
	ofCA := func(text string) string { // the configuration with that file
		cas++
		name := fmt.Sprintf("ca%d.pem", cas)
		if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return strings.Replace(siteBase, "client_ca: a.pem", "client_ca: "+name, 1) + newClients
	}
	for _, c := range []struct {
		stage  string
		config string
		spoil  func() (mend func())
		want   string
	}{
		{"no configuration", "", func() func() { os.Remove(s.config()); return func() {} }, "keysvc.yaml"},
		{"no YAML", "clients: [", nil, "yaml"},
		{"an unknown setting", siteBase + newClients + "listne: x\n", nil, "listne: there is no such setting"},
		{"no clients", siteBase, nil, "listen needs clients"},
		{"a bad list of clients", siteBase + strings.Replace(newClients, "hss", "root", 1), nil, `roles has "root"`},
		{"two of one certificate", siteBase + newClients[:len(newClients)-2] +
			", {name: x, san: other.example, roles: [hss], plmns: [all]}]\n", nil, "another client has the same"},
		{"no certificate", strings.Replace(siteBase, "a.pem", "nope.pem", 1) + newClients, nil, "server's certificate"},
		{"another's key", strings.Replace(siteBase, "a.key", "m.key", 1) + newClients, nil, "server's certificate"},
		{"a CA that is none", strings.Replace(siteBase, "client_ca: a.pem", "client_ca: a.key", 1) + newClients, nil,
			"no certificate"},
		{"no CA", ofCA(""), nil, "holds no certificate"},
		{"two CAs, of which one was cut short", ofCA(ca + ca[:len(ca)/2]), nil, "2 begin, and 1 can be read"},
		{"two CAs, of which one is damaged", ofCA(ca + strings.Replace(ca, "M", "*", 1)), nil,
			"2 begin, and 1 can be read"},
		{"two CAs, of which one is another object", ofCA(ca + notOne), nil, "after 1 that are"},
		{"a manufacturer's key that is none", siteBase + newClients, func() func() {
			s.manufacturer.PEM = "none"
			s.manufacturer.Directory = "file:" + s.dir + "/other"
			return func() { *s.manufacturer = good }
		}, "PEM"},
		{"a manufacturer without a directory", siteBase + newClients, func() func() {
			s.manufacturer.Directory = ""
			return func() { *s.manufacturer = good }
		}, "enrolled without a directory"},
		{"a lot of nobody's", siteBase + newClients, func() func() {
			s.lots = []*registry.Lot{{Manufacturer: "nobody", Manifest: &directory.Manifest{Lot: "L1"}}}
			return func() { s.lots = nil }
		}, "who is not enrolled"},
		{"no database", siteBase + newClients, func() func() {
			s.err = errors.New("the database is away")
			return func() { s.err = nil }
		}, "the database is away"},
	} {
		s.write(t, c.config)
		mend := func() {}
		if c.spoil != nil {
			mend = c.spoil()
		}
		before := s.Load()
		err := s.reload(t.Context(), settings.Source{Path: s.config()})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.stage, err, c.want)
		}
		if s.Load() != before {
			t.Errorf("%s: something has changed", c.stage)
		}
		mend()
	}
	before := s.Load()
	s.write(t, siteBase+newClients)
	if err := s.reload(t.Context(), settings.Source{Path: s.config()}); err != nil || s.Load() == before {
		t.Errorf("mended, it changes nothing: %v", err)
	}
	if strings.Contains(s.log.String(), "needs a restart") {
		t.Errorf("the log: %s", s.log)
	}
}

// What a reload does not change is named, again at each, and the rest is changed all the same.
func TestNeedsRestart(t *testing.T) {
	s := newSite(t, nil)
	for range 2 {
		s.log.Reset()
		before := s.Load()
		s.write(t, strings.Replace(siteBase, "token=operator", "token=hunter2", 1)+siteClients+
			"calls: 7\nlog_level: debug\nsocket: s\n")
		if err := s.reload(t.Context(), settings.Source{Path: s.config()}); err != nil || s.Load() == before {
			t.Error(err)
		}
		const want = `"needs a restart: tokens, socket, calls, log_level"`
		if text := s.log.String(); strings.Count(text, want) != 1 || strings.Contains(text, "hunter2") {
			t.Errorf("the log has no %s: %s", want, text)
		}
	}
	s.log.Reset()
	s.started.Socket = filepath.Join(s.dir, "s")
	s.write(t, siteBase+fmt.Sprintf("socket: s\nclients: [{name: x, uid: %d, roles: [hss], plmns: [all]}]\n",
		os.Getuid()+1))
	if err := s.reload(t.Context(), settings.Source{Path: s.config()}); err != nil ||
		!strings.Contains(s.log.String(), "needs a restart: socket, which is not open yet") {
		t.Errorf("%v; the log: %s", err, s.log)
	}
}

// A slowStore keeps whoever looks for a subscription.
type slowStore struct {
	binding.Store
	came, goOn chan struct{}
}

func (s *slowStore) Subscription(context.Context, kme.IMSI, time.Time) (*binding.Subscription, error) {
	s.came <- struct{}{}
	<-s.goOn
	return new(binding.Subscription), nil
}

// A call that is under way while a reload takes its client away ends as it began; the next one is refused. So it is in
// a stream that was opened before, which ends then; and each of its calls is made as the configuration is.
func TestCallsSeeOneState(t *testing.T) {
	store := &slowStore{came: make(chan struct{}), goOn: make(chan struct{})}
	s := newSite(t, store)
	own := os.Getuid()
	reload := func(uid int, plmn string) {
		t.Helper()
		s.write(t, siteBase+fmt.Sprintf("clients: [{name: me, uid: %d, roles: [hss], plmns: [%s]}]\n", uid, plmn))
		if err := s.reload(t.Context(), settings.Source{Path: s.config()}); err != nil {
			t.Fatal(err)
		}
	}
	reload(own, "all")
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: s, ConnContext: api.ConnContext, Protocols: new(http.Protocols)}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	go server.Serve(l)
	defer server.Close()
	dial := func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", path) }
	ask := func() string {
		c := &http.Client{Transport: &http.Transport{DialContext: dial}}
		defer c.CloseIdleConnections()
		r, err := c.Post("http://keysvc/kme.v1.KeyService/GetBinding", "application/json",
			strings.NewReader(`{"imsi":"001010000000001"}`))
		if err != nil {
			t.Error(err)
			return ""
		}
		defer r.Body.Close()
		body, _ := io.ReadAll(r.Body)
		return string(body)
	}
	http2 := &http.Transport{DialContext: dial, Protocols: new(http.Protocols)}
	http2.Protocols.SetUnencryptedHTTP2(true)
	defer http2.CloseIdleConnections()
	stream := kmev1connect.NewKeyServiceClient(&http.Client{Transport: http2}, "http://keysvc").Stream(t.Context())
	defer stream.CloseRequest()
	send := func(imsi string) {
		if err := stream.Send(&kmev1.StreamRequest{Calls: []*kmev1.Call{{Call: &kmev1.Call_GetBinding{
			GetBinding: &kmev1.GetBindingRequest{Imsi: imsi}}}}}); err != nil {
			t.Error(err)
		}
	}
	answered := func(want string) {
		t.Helper()
		m, err := stream.Receive()
		if err != nil || len(m.Answers) != 1 || m.Answers[0].GetError().GetReason() != want {
			t.Fatalf("in the stream: %v, %v, want %s", m, err, want)
		}
	}

	var underWay sync.WaitGroup
	underWay.Go(func() {
		if got := ask(); !strings.Contains(got, "NOT_BOUND") {
			t.Errorf("the call under way: %s", got)
		}
	})
	<-store.came
	send("001010000000001")
	<-store.came
	reload(own, "00102") // no more 00101
	send("001010000000001")
	answered("CALLER_NOT_ALLOWED")
	send("001020000000001")
	<-store.came
	reload(own+1, "all")
	if got := ask(); !strings.Contains(got, "CALLER_NOT_ALLOWED") {
		t.Errorf("the next call: %s", got)
	}
	send("001020000000001")
	for range 3 {
		store.goOn <- struct{}{}
	}
	underWay.Wait()
	for n := 0; n < 2; {
		m, err := stream.Receive()
		if err != nil {
			t.Fatalf("the calls under way: %v", err)
		}
		for _, a := range m.Answers {
			if n++; a.GetError().GetReason() != "NOT_BOUND" {
				t.Errorf("a call under way: %v", a)
			}
		}
	}
	_, err = stream.Receive()
	var e *connect.Error
	if !errors.As(err, &e) || e.Code() != connect.CodePermissionDenied ||
		e.Meta().Get(kme.ReasonHeader) != "CALLER_NOT_ALLOWED" {
		t.Errorf("the end of the stream: %v", err)
	}
}

// A reload changes the server's certificate, the clients' CA, and the keys of access tokens, for new connections, also
// of AMFs. One that is open is served on.
func TestCertificatesChange(t *testing.T) {
	s := newSite(t, nil)
	before, after := certtest.Make(t, "127.0.0.1", "hss.example"), certtest.Make(t, "127.0.0.1", "hss.example")
	tokens := filepath.Join(s.dir, "tokens.pem")
	s.started.EIR.Listen, s.started.EIR.TokenKey = "127.0.0.1:0", tokens
	copyTo := func(to, from string) {
		t.Helper()
		must.Do(t, os.WriteFile(to, must.Get[[]byte](t)(os.ReadFile(from)), 0o600))
	}
	reload := func(from string) {
		t.Helper()
		for name, file := range map[string]string{"server.pem": "127.0.0.1.pem", "server.key": "127.0.0.1.key",
			"clients.pem": "ca.pem"} {
			copyTo(filepath.Join(s.dir, name), filepath.Join(from, file))
		}
		must.Do(t, s.reload(t.Context(), settings.Source{Path: s.config()}))
	}
	s.write(t, siteToken+"listen: 127.0.0.1:0\n"+
		"tls: {certificate: server.pem, key: server.key, client_ca: clients.pem}\n"+
		siteClients)
	copyTo(tokens, filepath.Join(before, "ca.pem"))
	reload(before)

	d := aDaemon(s.options.Service)
	d.live = s.live
	listeners := must.Get[[]served](t)(d.listen())
	for _, l := range listeners {
		go l.server.Serve(l.Listener)
		defer l.server.Close()
	}
	client := func(own, ca string) *http.Client {
		c := must.Get[*tls.Config](t)(config.ClientTLS(filepath.Join(own, "hss.example.pem"),
			filepath.Join(own, "hss.example.key"), filepath.Join(ca, "ca.pem")))
		c.ClientSessionCache = tls.NewLRUClientSessionCache(1)
		return &http.Client{Transport: &http.Transport{TLSClientConfig: c, ForceAttemptHTTP2: true}}
	}
	get := func(c *http.Client, address string) error {
		r, err := c.Get("https://" + address + "/healthz")
		if err == nil {
			io.Copy(io.Discard, r.Body)
			r.Body.Close()
		}
		return err
	}
	if len(listeners) != 2 {
		t.Fatalf("%d listeners, of the service and for AMFs", len(listeners))
	}
	for _, l := range listeners {
		address := l.Addr().String()
		reload(before)
		open := client(before, before)
		for _, change := range []struct{ now, old string }{{before, after}, {after, before}} {
			reload(change.now)
			if err := get(client(change.now, change.now), address); err != nil {
				t.Error(err)
			}
			if err := get(client(change.old, change.now), address); err == nil {
				t.Error("a certificate of another CA is taken")
			}
			if err := get(client(change.now, change.old), address); err == nil {
				t.Error("the server shows the certificate of before")
			}
			if err := get(open, address); err != nil {
				t.Errorf("a connection that is open: %v", err)
			}
		}
	}
	must.Do(t, os.WriteFile(tokens, []byte("none"), 0o600))
	if err := s.reload(t.Context(), settings.Source{Path: s.config()}); err == nil ||
		!strings.Contains(err.Error(), "token_key") {
		t.Errorf("keys of access tokens that are none: %v", err)
	}
}
