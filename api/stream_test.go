package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// A keptStore has every IMSI bound. It panics at those that end in 9, and keeps whoever asks for one that ends in 8.
type keptStore struct {
	binding.Store
	asked  atomic.Int64
	goOn   chan struct{}
	notice func(ctx context.Context)
}

func (s *keptStore) Subscription(ctx context.Context, imsi kme.IMSI, _ time.Time) (*binding.Subscription, error) {
	s.asked.Add(1)
	if s.notice != nil {
		s.notice(ctx)
	}
	switch digits := imsi.String(); digits[len(digits)-1] {
	case '9':
		panic("the store")
	case '8':
		select {
		case <-s.goOn:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return &binding.Subscription{Active: &binding.Binding{IMSI: imsi, State: "ACTIVE"}}, nil
}

// Report is as Subscription.
func (s *keptStore) Report(ctx context.Context, imsi kme.IMSI, _ kme.Origin, _ bool, now time.Time) (
	*binding.Subscription, error) {
	return s.Subscription(ctx, imsi, now)
}

const bound, panicking, kept = "001010000000001", "001010000000009", "001010000000008"

// A streaming is a service on a socket, and a stream to it.
type streaming struct {
	store    *keptStore
	registry *prometheus.Registry
	log      testproc.Log
	path     string // of the socket
	server   *http.Server
	served   chan struct{} // closed when it serves no more
	handler  *Handler
	opened   atomic.Int64  // streams
	unready  atomic.Bool   // as /readyz says
	leaving  atomic.Bool   // see Options
	timeout  time.Duration // of a request that is no stream
	client   kmev1connect.KeyServiceClient
	*connect.BidiStreamForClient[kmev1.StreamRequest, kmev1.StreamResponse]
}

func newStreaming(t *testing.T, transport *http.Transport) *streaming {
	t.Helper()
	return newStreamingOf(t, transport, testproc.Patience)
}

// newStreamingOf is newStreaming with the time that a request has which is no stream.
func newStreamingOf(t *testing.T, transport *http.Transport, timeout time.Duration) *streaming {
	t.Helper()
	s := &streaming{store: &keptStore{goOn: make(chan struct{})}, registry: prometheus.NewRegistry(),
		path: filepath.Join(t.TempDir(), "s"), timeout: timeout}
	metrics, streams := binding.NewMetrics(s.registry), NewStreams()
	service := binding.NewService(binding.Options{Store: s.store, Times: binding.DefaultTimes(), Metrics: metrics,
		Log: slog.New(slog.NewJSONHandler(&s.log, nil))})
	s.handler = NewHandler(Options{Service: service, Metrics: metrics, Gather: http.NotFoundHandler(), Streams: streams,
		Ready: func(context.Context) (_ []string, err error) {
			if s.unready.Load() {
				err = errors.New("no HSM")
			}
			return nil, err
		},
		Leaving: s.leaving.Load,
		Clients: everybody(t, Client{Name: "test", Roles: []Role{RoleHSS}, PLMNs: []string{"00101"}})})
	s.listen(t)
	transport.Protocols = new(http.Protocols)
	transport.Protocols.SetUnencryptedHTTP2(true)
	transport.DialContext = func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", s.path) }
	s.client = kmev1connect.NewKeyServiceClient(&http.Client{Transport: transport}, "http://keysvc")
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	s.BidiStreamForClient = s.client.Stream(ctx)
	t.Cleanup(func() { s.CloseRequest() })
	return s
}

// listen serves the service, also anew.
func (s *streaming) listen(t *testing.T) {
	t.Helper()
	l, err := net.Listen("unix", s.path)
	if err != nil {
		t.Fatal(err)
	}
	s.server = &http.Server{
		Protocols:   new(http.Protocols),
		ReadTimeout: s.timeout, WriteTimeout: s.timeout,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.opened.Add(1)
			s.handler.ServeHTTP(w, r)
		}),
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			return context.WithValue(ctx, connectionKey{}, &connection{uid: -1})
		},
	}
	s.server.Protocols.SetUnencryptedHTTP2(true)
	server, served := s.server, make(chan struct{})
	s.served = served
	go func() {
		defer close(served)
		server.Serve(l)
	}()
	t.Cleanup(func() { server.Close() })
}

// close ends the service at once. Its socket is gone then, also if it had not begun to serve.
func (s *streaming) close() {
	s.server.Close()
	<-s.served
}

// end ends the service as keysvc does; listen begins it anew.
func (s *streaming) end(t *testing.T) {
	t.Helper()
	s.leaving.Store(true)
	s.handler.server.streams.Drain()
	time.Sleep(200 * time.Millisecond)
	if err := s.server.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	s.handler.server.streams.draining, s.handler.server.streams.drain = context.WithCancel(context.Background())
	s.leaving.Store(false)
}

func get(id uint64, imsi string) *kmev1.Call {
	return &kmev1.Call{Id: id, Call: &kmev1.Call_GetBinding{GetBinding: &kmev1.GetBindingRequest{Imsi: imsi}}}
}

func (s *streaming) send(t *testing.T, calls ...*kmev1.Call) {
	t.Helper()
	if err := s.Send(&kmev1.StreamRequest{Calls: calls}); err != nil {
		_, err = s.Receive()
		t.Fatal(err)
	}
}

// take waits for n answers. It gives what each is: an IMSI, or an error.
func (s *streaming) take(t *testing.T, n int) map[uint64][]string {
	t.Helper()
	all := map[uint64][]string{}
	for n > 0 {
		m, err := s.Receive()
		if err != nil {
			t.Fatalf("%d answers are missing: %v", n, err)
		}
		for _, a := range m.Answers {
			n--
			text := a.GetGetBinding().GetImsi()
			if e := a.GetError(); e != nil {
				text = fmt.Sprintf("%s %s: %s", e.Code, e.Reason, e.Message)
			}
			all[a.Id] = append(all[a.Id], text)
		}
	}
	return all
}

func (s *streaming) total(t *testing.T, family string) (n float64) {
	t.Helper()
	families, err := s.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.Metric {
			if f.GetName() == family {
				n += m.Counter.GetValue() + float64(m.Histogram.GetSampleCount())
			}
		}
	}
	return n
}

// Whatever calls a client makes, each is answered by itself: one that panics, hangs or is none at all is the end of no
// other, and not of the stream.
func TestStream(t *testing.T) {
	s := newStreamingOf(t, new(http.Transport), time.Second)
	s.store.notice = func(ctx context.Context) {
		if until, ok := ctx.Deadline(); !ok || time.Until(until) > maxWait {
			t.Errorf("a call may go on until %v, %v", until, ok)
		}
	}
	short := get(6, kept)
	short.TimeoutMs = 50
	long := get(7, bound)
	long.TimeoutMs = 1<<32 - 1
	s.send(t, get(1, bound), get(2, panicking), get(3, "00102000000001"), &kmev1.Call{Id: 4}, get(5, bound),
		get(5, "001010000000002"), get(0, bound), short, long, &kmev1.Call{Id: 8, Call: &kmev1.Call_GetBinding{}})
	got := s.take(t, 10)
	for id, want := range map[uint64]string{
		1: "[" + bound + "]", 2: "[internal : internal error]",
		3: "[permission_denied CALLER_NOT_ALLOWED: this client may not do that]",
		4: "[invalid_argument MALFORMED: a call of a stream is one of ", 0: "[" + bound + "]",
		6: "[deadline_exceeded : the caller's deadline has passed]", 7: "[" + bound + "]",
		8: "[permission_denied CALLER_NOT_ALLOWED: ",
	} {
		if text := fmt.Sprint(got[id]); !strings.HasPrefix(text, want) {
			t.Errorf("%d: %s, want %s", id, text, want)
		}
	}
	if len(got[5]) != 2 || got[5][0] == got[5][1] {
		t.Errorf("two calls of one id: %v", got[5])
	}
	if panics, calls := s.total(t, "kme_panics_total"), s.total(t, "kme_call_seconds"); panics != 1 || calls != 10 {
		t.Errorf("%v panics and %v calls are counted", panics, calls)
	}
	if log := s.log.String(); strings.Count(log, "panic: ") != 1 || strings.Count(log, "CALLER_NOT_ALLOWED") != 2 ||
		strings.Count(log, `"call":"Stream"`) != 1 {
		t.Errorf("the log: %s", log)
	}
	time.Sleep(2 * s.timeout) // a stream is longer
	s.send(t, get(9, bound))
	s.take(t, 1)
	s.send(t, get(10, kept))
	if err := s.CloseRequest(); err != nil { // what is under way is answered
		t.Error(err)
	}
	close(s.store.goOn)
	if got := s.take(t, 1); fmt.Sprint(got) != "map[10:["+kept+"]]" {
		t.Error(got)
	}
	if _, err := s.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("the end: %v", err)
	}
}

// Messages that are none, or too long, end their stream, with an error that says so.
func TestStreamGarbage(t *testing.T) {
	many := make([]*kmev1.Call, maxMessage)
	for i := range many {
		many[i] = new(kmev1.Call)
	}
	long, err := proto.Marshal(&kmev1.StreamRequest{Calls: many})
	if err != nil {
		t.Fatal(err)
	}
	for want, message := range map[string]string{
		"invalid_argument":   "\x0a\xff",
		"resource_exhausted": string(long),
	} {
		s := newStreaming(t, new(http.Transport))
		r := streamOf(message)
		r.Header.Set("Content-Type", "application/connect+proto")
		w := httptest.NewRecorder()
		s.handler.ServeHTTP(w, r)
		if body := w.Body.String(); !strings.Contains(body, `"code":"`+want+`"`) || s.store.asked.Load() > 0 {
			t.Errorf("%s: %q", want, body)
		}
	}
}

// When the service ends, a stream is answered what is under way, and nothing else is begun.
func TestStreamDrains(t *testing.T) {
	s := newStreaming(t, new(http.Transport))
	idle := s.client.Stream(t.Context()) // nothing comes in it any more
	defer idle.CloseRequest()
	if err := idle.Send(new(kmev1.StreamRequest)); err != nil {
		t.Fatal(err)
	}
	testproc.Await(t, "the idle stream is open", func() bool { return s.opened.Load() == 1 })
	s.send(t, get(1, kept))
	testproc.Await(t, "the call is under way", func() bool { return s.store.asked.Load() == 1 })
	ended := make(chan error, 1)
	s.handler.server.streams.Drain()
	go func() { ended <- s.server.Shutdown(t.Context()) }()
	s.Send(&kmev1.StreamRequest{Calls: []*kmev1.Call{get(2, bound)}})
	select {
	case err := <-ended:
		t.Fatalf("it has ended while a call was under way: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	close(s.store.goOn)
	if got := s.take(t, 1); fmt.Sprint(got) != "map[1:["+kept+"]]" {
		t.Error(got)
	}
	if _, err := s.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("the end: %v", err)
	}
	if err := <-ended; err != nil || s.store.asked.Load() != 1 {
		t.Errorf("%v; %d calls were made", err, s.store.asked.Load())
	}
}

// A client that does not read its answers has as many calls under way as a stream may have, and then none: the stream
// is ended. Others are served meanwhile.
func TestStreamIsNotRead(t *testing.T) {
	const window = 64 << 10
	s := newStreaming(t, &http.Transport{HTTP2: &http.HTTP2Config{MaxReceiveBufferPerStream: window}})
	s.handler.server.streams.patience = 5 * time.Second // longer than a busy machine writes an answer
	other := newStreaming(t, new(http.Transport))
	calls := make([]*kmev1.Call, 64)
	for i := range calls {
		calls[i] = get(1, bound)
	}
	before, most := runtime.NumGoroutine(), 0
	sent := 0
	for s.Send(&kmev1.StreamRequest{Calls: calls}) == nil {
		sent += len(calls)
		most = max(most, runtime.NumGoroutine())
		other.send(t, get(1, bound))
		other.take(t, 1)
	}
	var n int
	for {
		m, err := s.Receive()
		if err != nil {
			break
		}
		n += len(m.Answers)
	}
	// An answer has more than 20 bytes.
	made := int(s.store.asked.Load())
	if made > n+2*maxUnderWay+window/20 || sent <= made || most-before > maxUnderWay+50 {
		t.Errorf("of %d calls, %d were made, and %d answers were read; %d goroutines", sent, made, n, most-before)
	}
}

// A stream that has all the calls that it may have is not read, and goes on when they end.
func TestStreamIsFull(t *testing.T) {
	s := newStreaming(t, new(http.Transport))
	const n = maxUnderWay + 100
	calls := make([]*kmev1.Call, n)
	for i := range calls {
		calls[i] = get(uint64(i), kept)
	}
	s.send(t, calls...)
	testproc.Await(t, "the stream is full", func() bool { return s.store.asked.Load() == maxUnderWay })
	time.Sleep(100 * time.Millisecond)
	if got := s.store.asked.Load(); got != maxUnderWay {
		t.Errorf("%d calls are under way", got)
	}
	close(s.store.goOn)
	if got := s.take(t, n); len(got) != n {
		t.Errorf("%d calls were answered", len(got))
	}
}

// A connection has no more streams than it may have.
func TestStreamsOfAConnection(t *testing.T) {
	s := newStreaming(t, new(http.Transport))
	open := []*connect.BidiStreamForClient[kmev1.StreamRequest, kmev1.StreamResponse]{s.BidiStreamForClient}
	for range maxStreams - 1 {
		open = append(open, s.client.Stream(t.Context()))
	}
	try := func(b *connect.BidiStreamForClient[kmev1.StreamRequest, kmev1.StreamResponse]) error {
		if err := b.Send(&kmev1.StreamRequest{Calls: []*kmev1.Call{get(1, bound)}}); err != nil {
			t.Log(err)
		}
		_, err := b.Receive()
		return err
	}
	for _, b := range open {
		if err := try(b); err != nil {
			t.Error(err)
		}
	}
	more := s.client.Stream(t.Context())
	err := try(more)
	var e *connect.Error
	if !errors.As(err, &e) || e.Code() != connect.CodeResourceExhausted ||
		e.Meta().Get(kme.ReasonHeader) != "OVERLOADED" {
		t.Errorf("one stream more: %v", err)
	}
	for _, b := range append(open, more) {
		b.CloseRequest()
		b.CloseResponse()
	}
	testproc.Await(t, "there is room for another", func() bool {
		b := s.client.Stream(t.Context())
		defer b.CloseResponse()
		defer b.CloseRequest()
		return try(b) == nil
	})
}

// Whatever comes as a message is answered, or ends the stream; nothing panics.
func FuzzStream(f *testing.F) {
	registry := prometheus.NewRegistry()
	metrics := binding.NewMetrics(registry)
	service := binding.NewService(binding.Options{Store: &keptStore{}, Times: binding.DefaultTimes(), Metrics: metrics,
		Log: slog.New(slog.DiscardHandler)})
	clients, err := NewClients([]Client{{Name: "fuzz", SAN: "fuzz", Roles: []Role{RoleMonitor}, PLMNs: []string{all}}})
	if err != nil {
		f.Fatal(err)
	}
	clients.byUID[-1] = clients.bySAN["fuzz"] // it may do nothing but GetBinding
	h := NewHandler(Options{Service: service, Metrics: metrics, Gather: http.NotFoundHandler(), Clients: clients})
	for _, calls := range [][]*kmev1.Call{
		nil, {{}}, {get(0, bound), get(0, bound)}, {get(1<<64-1, "")}, {{Id: 7, TimeoutMs: 1<<32 - 1}},
		{{Call: &kmev1.Call_EstablishKme{EstablishKme: &kmev1.EstablishKMERequest{Payload: []byte{1}}}}},
		{{Call: &kmev1.Call_PrepareVector{}}, {Call: &kmev1.Call_ReportAuthentication{}}},
	} {
		message, err := proto.Marshal(&kmev1.StreamRequest{Calls: calls})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(message)
	}
	f.Add([]byte{0xff})
	f.Add([]byte("\x0a\x02\x9a\x06")) // a field that a call does not have
	f.Fuzz(func(t *testing.T, message []byte) {
		r := streamOf(string(message))
		r.Header.Set("Content-Type", "application/connect+proto")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		body := w.Body.Bytes()
		m, n := new(kmev1.StreamRequest), 0
		valid := len(message) <= maxMessage && proto.Unmarshal(message, m) == nil
		for len(body) >= 5 && body[0] == 0 {
			size := int(body[3])<<8 | int(body[4]) | int(body[2])<<16
			answers := new(kmev1.StreamResponse)
			if err := proto.Unmarshal(body[5:5+size], answers); err != nil {
				t.Fatal(err)
			}
			n += len(answers.Answers)
			for _, a := range answers.Answers {
				if a.Answer == nil || a.GetError().GetCode() == "internal" {
					t.Errorf("an answer: %v", a)
				}
			}
			body = body[5+size:]
		}
		if text := string(body); n != len(m.Calls) && valid || strings.Contains(text, `"error"`) == valid {
			t.Errorf("%d answers to %v, and at the end %q", n, m, text)
		}
	})
}
