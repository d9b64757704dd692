package proof

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/client/udm"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

const eirInstance = "5e0b0ba0-1c26-4d5a-8a2c-36d4f2a2a001"

// An AMF asks a real keysvc for a device, over HTTP/2 with mutual TLS and an NRF's access token, before and after it
// has proven itself; and keysvc is registered at that NRF as long as it serves.
func TestN5gEIR(t *testing.T) {
	t.Parallel()
	d := &network{world: newWorld(t, nil), ports: map[string]int{}}
	d.setUp(lotOf{"L1", "tr33868-ecdsa-p256", "35209900", 2048, 2})
	d.newCA("ca")
	d.newCA("stranger-ca")
	d.certificate("server", "ca", "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
	for name, ca := range map[string]string{"amf": "ca", "monitor": "ca", "nobody": "ca", "stranger": "stranger-ca"} {
		d.certificate(name, ca, "subjectAltName=DNS:"+name+".test\nextendedKeyUsage=clientAuth\n")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	d.write("nrf.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})))
	nrf := d.startNRF()
	d.write("keysvc.yaml", fmt.Sprintf("state: var/keysvc\nsocket: s\ndrain_delay: 0s\n"+
		"tls: {certificate: server.pem, key: server.key, client_ca: ca.pem}\n"+
		"eir: {listen: '127.0.0.1:%d', token_key: nrf.pem, instance: %s, nrf: '%s', advertise: '127.0.0.1:%d'}\n"+
		"clients:\n- {name: socket, uid: %d, roles: [hss, admin, metrics], plmns: [all]}\n"+
		"- {name: amf, san: amf.test, roles: [eir], plmns: ['00101']}\n"+
		"- {name: monitor, san: monitor.test, roles: [monitor], plmns: [all]}\n",
		d.port("eir"), eirInstance, nrf.URL, d.port("eir"), os.Getuid()))
	local := d.local()
	service := testproc.Start(t, d.command(d.operator, "keysvc", "serve", "--config", "keysvc.yaml"),
		func(*testproc.Process) bool { return ready(local) })
	testproc.Await(t, "registration", func() bool { return nrf.said("PUT /nnrf-nfm/v1/nf-instances/" + eirInstance) })

	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, nil)
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.Signed(signer).Claims(map[string]any{"iss": "nrf", "sub": "amf", "aud": "5G_EIR",
		"scope": "n5g-eir-eic", "exp": time.Now().Add(time.Hour).Unix()}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	ask := func(name, token, query string, protocols ...string) (int, string) {
		t.Helper()
		own, err := tls.LoadX509KeyPair(d.path(name+".pem"), d.path(name+".key"))
		if err != nil {
			t.Fatal(err)
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(d.readFile("ca.pem"))
		spoken := new(http.Protocols)
		spoken.SetHTTP2(len(protocols) == 0)
		spoken.SetHTTP1(len(protocols) > 0)
		transport := &http.Transport{Protocols: spoken,
			TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{own}}}
		defer transport.CloseIdleConnections()
		q, err := http.NewRequest("GET", fmt.Sprintf("https://127.0.0.1:%d/n5g-eir-eic/v1/equipment-status?%s",
			d.port("eir"), query), nil)
		if err != nil {
			t.Fatal(err)
		}
		if token != "" {
			q.Header.Set("Authorization", "Bearer "+token)
		}
		a, err := transport.RoundTrip(q)
		if err != nil {
			return 0, err.Error()
		}
		defer a.Body.Close()
		body, _ := io.ReadAll(a.Body)
		return a.StatusCode, strings.TrimSpace(string(body))
	}
	expect := func(what, query string, code int, body string) {
		t.Helper()
		if c, b := ask("amf", token, query); c != code || !strings.Contains(b, body) {
			t.Errorf("%s: %d %s, want %d %s", what, c, b, code, body)
		}
	}

	devices := d.devices()
	keysvc, err := client.New(client.Options{URLs: []string{"unix:" + d.path("s")}, Timeout: testproc.Patience})
	if err != nil {
		t.Fatal(err)
	}
	defer keysvc.Close()
	u := new5G(t, udm.New(keysvc), 0, devices[0])
	pei, supi := "pei=imeisv-"+devices[0].imei+"01", "&supi="+u.supi
	expect("not proven", pei+supi, 200, `{"status":"GREYLISTED"}`)
	u.run(d.world)
	expect("proven", pei+supi, 200, `{"status":"WHITELISTED"}`)
	expect("proven, without a SUPI", pei, 200, `{"status":"WHITELISTED"}`)
	expect("another device", "pei=imei-"+devices[1].imei+"0"+supi, 200, `{"status":"BLACKLISTED"}`)
	expect("no IMEI", "pei=mac-00-00-5E-00-53-00", 404, `"ERROR_EQUIPMENT_UNKNOWN"`)
	expect("no PEI", "supi="+u.supi, 400, `"MANDATORY_QUERY_PARAM_MISSING"`)
	expect("another network's subscription", pei+"&supi=imsi-262021234567890", 403, `"this client may not do that"`)

	for _, c := range []struct {
		who, token string
		code       int
	}{{"amf", "", 401}, {"amf", token + "x", 401}, {"monitor", token, 403}, {"nobody", token, 403},
		{"stranger", token, 0}} {
		if code, body := ask(c.who, c.token, pei); code != c.code {
			t.Errorf("%s with token %q: %d %s, want %d", c.who, c.token, code, body, c.code)
		}
	}
	if code, body := ask("amf", token, pei, "HTTP/1.1"); code != 0 {
		t.Errorf("over HTTP/1.1: %d %s", code, body)
	}
	testproc.Await(t, "a heartbeat", func() bool {
		return nrf.said("PATCH /nnrf-nfm/v1/nf-instances/" + eirInstance)
	})
	if err := service.Stop(syscall.SIGTERM); err != nil {
		t.Errorf("keysvc serve: %v", err)
	}
	if !nrf.said("DELETE /nnrf-nfm/v1/nf-instances/" + eirInstance) {
		t.Errorf("the NRF heard %q", nrf.asked)
	}
	for _, want := range []string{`"why":"token"`, `"client":"amf"`, `"registered at the NRF"`} {
		if !strings.Contains(service.Log.String(), want) {
			t.Errorf("the log has no %s:\n%s", want, service.Log)
		}
	}
	if strings.Contains(service.Log.String(), token) {
		t.Error("an access token is in the log")
	}
}

// An nrf notes what it is asked, over HTTP/2 and by keysvc's certificate.
type nrf struct {
	*httptest.Server
	mu    sync.Mutex
	asked []string // guarded by mu
}

func (n *nrf) said(what string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Contains(n.asked, what)
}

func (d *network) startNRF() *nrf {
	d.t.Helper()
	n := new(nrf)
	n.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n.mu.Lock()
		defer n.mu.Unlock()
		if r.ProtoMajor != 2 {
			http.Error(w, "HTTP/2 only", http.StatusHTTPVersionNotSupported)
			return
		}
		n.asked = append(n.asked, r.Method+" "+r.URL.Path)
		if r.Method == http.MethodPut {
			w.WriteHeader(http.StatusCreated)
			io.WriteString(w, `{"heartBeatTimer":1}`)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	}))
	own, err := tls.LoadX509KeyPair(d.path("server.pem"), d.path("server.key"))
	if err != nil {
		d.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(d.readFile("ca.pem"))
	n.EnableHTTP2 = true
	n.TLS = &tls.Config{Certificates: []tls.Certificate{own}, ClientCAs: pool,
		ClientAuth: tls.RequireAndVerifyClientCert}
	n.StartTLS()
	d.t.Cleanup(n.Close)
	return n
}
