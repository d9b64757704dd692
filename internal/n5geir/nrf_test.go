package n5geir

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/testproc"
)

// An nrf is an NRF that answers with codes, one after the other, and then as one does that knows us.
type nrf struct {
	mu    sync.Mutex
	codes []int    // guarded by mu
	asked []string // guarded by mu: METHOD BODY
}

func (n *nrf) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked = append(n.asked, strings.TrimSpace(r.Method+" "+string(body)))
	code := map[string]int{"PUT": 201, "PATCH": 204, "DELETE": 204}[r.Method]
	if len(n.codes) > 0 {
		code, n.codes = n.codes[0], n.codes[1:]
	}
	if r.URL.Path != "/root/nnrf-nfm/v1/nf-instances/"+instance ||
		r.Method == "PATCH" && r.Header.Get("Content-Type") != "application/json-patch+json" {
		code = 400
	}
	w.WriteHeader(code)
	if r.Method == "PUT" {
		io.WriteString(w, `{"heartBeatTimer":1}`)
	}
}

func (n *nrf) methods() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var all []string
	for _, a := range n.asked {
		method, _, _ := strings.Cut(a, " ")
		all = append(all, method)
	}
	return strings.Join(all, " ")
}

// We register, send heartbeats, register again with an NRF that was away or has forgotten us, and deregister.
func TestRegistration(t *testing.T) {
	n := &nrf{codes: []int{503, 201, 204, 404, 201, 500, 201}}
	server := httptest.NewServer(n)
	defer server.Close()
	log := new(testproc.Log)
	r := &Registration{URL: server.URL + "/root/", Instance: instance, Address: "eir.example:8444", Tokens: true,
		Client: server.Client(), Log: slog.New(slog.NewJSONHandler(log, nil)), retry: time.Millisecond}
	ctx, end := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); r.Run(ctx) }()
	const want = "PUT PUT PATCH PATCH PUT PATCH PUT PATCH"
	testproc.Await(t, "heartbeats", func() bool { return strings.HasPrefix(n.methods(), want) })
	end()
	<-ended
	if got := n.methods(); !strings.HasPrefix(got, want) || !strings.HasSuffix(got, " DELETE") {
		t.Errorf("it asked %s", got)
	}
	if n.asked[2] != `PATCH [{"op":"replace","path":"/nfStatus","value":"REGISTERED"}]` {
		t.Errorf("a heartbeat is %s", n.asked[2])
	}
	if text := log.String(); strings.Count(text, "registered at the NRF") != 3 || !strings.Contains(text, "503") {
		t.Errorf("the log: %s", text)
	}
}

// An NRF that is not there is no trouble at the end.
func TestRegistrationAway(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	server.Close()
	log := new(testproc.Log)
	r := &Registration{URL: server.URL, Instance: instance, Address: "127.0.0.1:1", Client: server.Client(),
		Log: slog.New(slog.NewJSONHandler(log, nil)), retry: time.Millisecond}
	ctx, end := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); r.Run(ctx) }()
	testproc.Await(t, "a warning", func() bool { return strings.Contains(log.String(), "it is asked again") })
	end()
	<-ended
	if strings.Count(log.String(), "\n") != 1 {
		t.Errorf("the log: %s", log)
	}
}

// What we say of ourselves is an NFProfile of 3GPP's document.
func TestProfile(t *testing.T) {
	o := &openAPI{t}
	schema := o.at("TS29510_Nnrf_NFManagement.yaml", "#/components/schemas/NFProfile")
	for _, address := range []string{"eir.example:8444", "192.0.2.1:443", "[2001:db8::1]:443"} {
		profile, err := (&Registration{Instance: instance, Address: address, Tokens: true}).profile()
		if err != nil {
			t.Fatal(err)
		}
		text, _ := json.Marshal(profile)
		var v any
		json.Unmarshal(text, &v)
		for _, fault := range o.check("profile", v, schema) {
			t.Errorf("%s: %s", address, fault)
		}
	}
	for _, address := range []string{"", "eir.example", "eir.example:x", "eir.example:99999"} {
		if p, err := (&Registration{Address: address}).profile(); err == nil {
			t.Errorf("%q: %v", address, p)
		}
	}
}
