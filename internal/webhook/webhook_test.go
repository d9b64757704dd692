package webhook

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/kmehsm/kmehsm/internal/testproc"
)

// received is what a webhook got of an event.
type received struct {
	header http.Header
	body   []byte
}

var secret = []byte("0123456789abcdef0123456789abcdef")

// newSender sends to a handler until the test ends, or stop is called.
func newSender(t *testing.T, handler http.HandlerFunc, change func(*Options)) (s *Sender, stop func()) {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	o := Options{URL: server.URL, Secret: func() ([]byte, error) { return secret, nil }, Source: "//here/keysvc",
		Client: server.Client(), Log: slog.New(slog.DiscardHandler), Registry: prometheus.NewRegistry(),
		Pause: time.Millisecond}
	change(&o)
	s = New(o)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); s.Run(ctx) }()
	stop = func() { cancel(); <-ended }
	t.Cleanup(stop)
	return s, stop
}

func (s *Sender) count(result string) int {
	return int(testutil.ToFloat64(s.events.WithLabelValues(result)))
}

// An event is a CloudEvent that its receiver can authenticate; it is the same one each time that it is tried.
func TestSend(t *testing.T) {
	got := make(chan received, 10)
	var tries atomic.Int64
	s, _ := newSender(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got <- received{r.Header, body}
		switch tries.Add(1) {
		case 1:
			w.WriteHeader(http.StatusInternalServerError)
		case 2: // is not followed
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
		}
	}, func(*Options) {})
	s.Send("test.kind", "subject", map[string]int{"n": 1})
	var ids []string
	for range 3 {
		e := <-got
		var body map[string]any
		if err := json.Unmarshal(e.body, &body); err != nil {
			t.Fatal(err)
		}
		id, at := e.header.Get("Webhook-Id"), e.header.Get("Webhook-Timestamp")
		if e.header.Get("Webhook-Signature") != "v1,"+Signature(secret, id, at, e.body) || id == "" || at == "" {
			t.Errorf("signed %v", e.header)
		}
		if e.header.Get("Content-Type") != "application/cloudevents+json; charset=utf-8" ||
			body["specversion"] != "1.0" || body["id"] != id || body["source"] != "//here/keysvc" ||
			body["type"] != "test.kind" || body["subject"] != "subject" || body["data"].(map[string]any)["n"] != 1.0 {
			t.Errorf("the event is %s", e.body)
		}
		if _, err := time.Parse(time.RFC3339, body["time"].(string)); err != nil {
			t.Error(err)
		}
		ids = append(ids, id)
	}
	if ids[0] != ids[1] || ids[1] != ids[2] {
		t.Errorf("it has the ids %v", ids)
	}
	testproc.Await(t, "an event is sent", func() bool { return s.count("sent") == 1 })
	if s.count("retried") != 2 || s.count("dropped") != 0 {
		t.Errorf("retried %d, dropped %d", s.count("retried"), s.count("dropped"))
	}
}

// A receiver's address may have a key in it: the log has none of it.
func TestNoURLInTheLog(t *testing.T) {
	log := new(testproc.Log)
	s, _ := newSender(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, func(o *Options) {
		o.URL, o.Log = o.URL+"/hook/PATH-KEY?key=QUERY-KEY", slog.New(slog.NewJSONHandler(log, nil))
	})
	s.Send("test.kind", "subject", nil)
	testproc.Await(t, "a failed try", func() bool { return s.count("retried") > 1 })
	if text := log.String(); strings.Contains(text, "KEY") || !strings.Contains(text, "EOF") {
		t.Errorf("the log: %s", text)
	}
}

// An event is signed with the secret that there is when it is tried. It waits while there is none.
func TestSecretChanges(t *testing.T) {
	got := make(chan received, 1)
	var asked atomic.Int64
	another := []byte("another secret, of 32 bytes too.")
	s, _ := newSender(t, func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got <- received{r.Header, body}
	}, func(o *Options) {
		o.Secret = func() ([]byte, error) {
			switch asked.Add(1) {
			case 1:
				return secret, nil
			case 2:
				return nil, errors.New("the file is away")
			}
			return another, nil
		}
	})
	for _, key := range [][]byte{secret, another} {
		s.Send("test.kind", "subject", nil)
		e := <-got
		if e.header.Get("Webhook-Signature") != "v1,"+Signature(key, e.header.Get("Webhook-Id"),
			e.header.Get("Webhook-Timestamp"), e.body) {
			t.Errorf("signed %v, want by %q", e.header, key)
		}
	}
	if s.count("retried") != 1 {
		t.Errorf("retried %d", s.count("retried"))
	}
}

// An event whose sending panics is sent again.
func TestPanic(t *testing.T) {
	testproc.Logged(t)
	var asked atomic.Int64
	got := make(chan struct{}, 1)
	s, _ := newSender(t, func(http.ResponseWriter, *http.Request) { got <- struct{}{} }, func(o *Options) {
		o.Secret = func() ([]byte, error) {
			if asked.Add(1) == 1 {
				panic("in the secret")
			}
			return secret, nil
		}
	})
	s.Send("test.kind", "subject", nil)
	<-got
	if s.count("retried") != 1 {
		t.Errorf("retried %d", s.count("retried"))
	}
}

// The example of the Standard Webhooks specification.
func TestSignature(t *testing.T) {
	secret, err := ParseSecret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
	if err != nil {
		t.Fatal(err)
	}
	if got := Signature(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", []byte(`{"test": 2432232314}`)); got !=
		"g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=" {
		t.Errorf("the signature is %s", got)
	}
}

// A webhook that accepts nothing holds nobody up: what is too much is dropped and counted, and so is what is too old.
func TestDropped(t *testing.T) {
	hold, held := make(chan struct{}), make(chan struct{}, 1)
	s, stop := newSender(t, func(w http.ResponseWriter, r *http.Request) {
		select {
		case held <- struct{}{}:
		default:
		}
		<-hold
		w.WriteHeader(http.StatusServiceUnavailable)
	}, func(o *Options) { o.GiveUp = time.Nanosecond })
	s.Send("first", "", nil)
	<-held // it is being tried
	for range maxWaiting + 5 {
		s.Send("more", "", nil)
	}
	if n := s.count("dropped"); n != 5 {
		t.Errorf("%d were dropped of those that were too much, want 5", n)
	}
	close(hold)
	testproc.Await(t, "those that are too old are dropped", func() bool { return s.count("dropped") == maxWaiting+6 })
	stop()
	if s.count("sent") != 0 || s.count("retried") != 0 {
		t.Errorf("sent %d, retried %d", s.count("sent"), s.count("retried"))
	}
}

// What waits when the service ends is sent then.
func TestEnd(t *testing.T) {
	hold, held := make(chan struct{}), make(chan struct{}, 10)
	s, stop := newSender(t, func(http.ResponseWriter, *http.Request) { held <- struct{}{}; <-hold }, func(*Options) {})
	s.Send("one", "", nil)
	<-held
	s.Send("two", "", nil)
	time.AfterFunc(10*time.Millisecond, func() { close(hold) })
	stop()
	if s.count("sent") != 2 || s.count("dropped") != 0 {
		t.Errorf("sent %d, dropped %d", s.count("sent"), s.count("dropped"))
	}
}

// However much waits, and however little the receiver accepts: when the service ends, what is being tried and what
// comes next are tried once more, and nothing else.
func TestEndOfAFailingReceiver(t *testing.T) {
	for range 20 { // one that goes on by chance does so in half of them
		hold, held := make(chan struct{}), make(chan struct{}, 100)
		s, stop := newSender(t, func(w http.ResponseWriter, _ *http.Request) {
			held <- struct{}{}
			<-hold
			w.WriteHeader(http.StatusServiceUnavailable)
		}, func(*Options) {})
		for range 20 {
			s.Send("one", "", nil)
		}
		<-held
		time.AfterFunc(time.Millisecond, func() { close(hold) })
		stop()
		if more := len(held); more > 1 && s.count("retried") == 0 || s.count("dropped") != 20 {
			t.Fatalf("tried %d times more, dropped %d of 20", more, s.count("dropped"))
		}
	}
}

func TestRefused(t *testing.T) {
	for url, good := range map[string]bool{
		"https://fraud.example/hook": true, "http://127.0.0.1:9/hook": true, "http://[::1]/": true,
		"http://localhost/": true, "http://fraud.example/": false, "https://": false, "fraud.example": false, "": false,
		"https://user:word@fraud.example/": false, "ftp://fraud.example/": false,
	} {
		if err := CheckURL(url); (err == nil) != good {
			t.Errorf("%q: %v", url, err)
		}
	}
	for _, secret := range []string{"", "whsec_", "whsec_c2hvcnQ=", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_!"} {
		if _, err := ParseSecret(secret); err == nil {
			t.Errorf("%q is a secret", secret)
		}
	}
}
