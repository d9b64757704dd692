package proof

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// A scripted service answers each call of a stream as its script says.
type scripted struct {
	kmev1connect.UnimplementedKeyServiceHandler
	path    string // of its socket
	server  *http.Server
	script  atomic.Pointer[func(c *kmev1.Call) (*kmev1.Answer, error)]
	streams atomic.Int64
	calls   atomic.Int64
	unready atomic.Bool
	asked   atomic.Int64 // whether it is ready
}

func (d *network) newScripted(name string) *scripted {
	s := &scripted{path: d.path(name)}
	s.listen(d.t)
	return s
}

// listen serves, again after server.Close.
func (s *scripted) listen(t *testing.T) {
	listener := must.Get[net.Listener](t)(net.Listen("unix", s.path))
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	mux := http.NewServeMux()
	mux.Handle(kmev1connect.NewKeyServiceHandler(s))
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		s.asked.Add(1)
		if s.unready.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	s.server = &http.Server{Handler: mux, Protocols: protocols}
	go s.server.Serve(listener)
	t.Cleanup(func() { s.server.Close() })
}

func (s *scripted) say(script func(c *kmev1.Call) (*kmev1.Answer, error)) { s.script.Store(&script) }

// Stream ends with the script's error, or in order if it says nothing.
func (s *scripted) Stream(
	_ context.Context, b *connect.BidiStream[kmev1.StreamRequest, kmev1.StreamResponse],
) error {
	s.streams.Add(1)
	for {
		m, err := b.Receive()
		if err != nil {
			return nil
		}
		for _, c := range m.Calls {
			s.calls.Add(1)
			a, err := (*s.script.Load())(c)
			if a == nil {
				return err
			}
			a.Id = c.Id
			if err := b.Send(&kmev1.StreamResponse{Answers: []*kmev1.Answer{a}}); err != nil {
				return err
			}
		}
	}
}

// What a stream may do to kme.fdx that keysvc does seldom or never.
func TestS6aStream(t *testing.T) {
	t.Parallel()
	d := newNetwork(t, 1, "")
	service := d.newScripted("scripted")
	d.write("scripted.conf", fmt.Sprintf("service = unix:%s\nbreaker = 1000\ntimeout_ms = %d\n", service.path,
		unhurried.Milliseconds()))
	d.start("hss", []string{"hssd:" + d.path("subscribers"), "kme:" + d.path("scripted.conf")}, "mme")
	d.start("mme", []string{"mme:" + d.path("m")}, "hss").connected("hss")
	m := d.mme("m")

	ended := false
	good := func() (*kmev1.Answer, error) { return prepared(func(*kmev1.PrepareVectorResponse) {}) }
	notAllowed := connect.NewError(connect.CodePermissionDenied, nil)
	notAllowed.Meta().Set("Kme-Reason", string(kme.CallerNotAllowed))
	for _, c := range []struct {
		name, want string
		script     func(c *kmev1.Call) (*kmev1.Answer, error)
	}{
		{"an answer", "AIA 2001 2 -", func(c *kmev1.Call) (*kmev1.Answer, error) {
			q := c.GetPrepareVector()
			if len(q.GetRands()) != 1 || q.Imsi != unbound || q.Origin != identity("mme") ||
				int64(c.TimeoutMs) != unhurried.Milliseconds() {
				t.Errorf("the call is %v", c)
			}
			return good()
		}},
		{"a stream that ends in order before it has begun the call", "AIA 2001 2 -",
			func(*kmev1.Call) (*kmev1.Answer, error) {
				if ended = !ended; ended {
					return nil, nil
				}
				return good()
			}},
		{"streams that end in order again and again", "AIA 4181", func(*kmev1.Call) (*kmev1.Answer, error) {
			return nil, nil
		}},
		{"a stream that ends with an error", "AIA 4181", func(*kmev1.Call) (*kmev1.Answer, error) {
			return nil, connect.NewError(connect.CodeInternal, nil)
		}},
		// libcurl does not always tell why
		{"a stream that is refused", "AIA", func(*kmev1.Call) (*kmev1.Answer, error) {
			return nil, notAllowed
		}},
		{"a call that is refused", "AIA 5420", func(*kmev1.Call) (*kmev1.Answer, error) {
			return failed(string(kme.NotBound))
		}},
		{"a reason that nobody knows", "AIA 4181", func(*kmev1.Call) (*kmev1.Answer, error) {
			return failed(strings.Repeat("X", 1000))
		}},
		{"too few RANDs", "AIA 4181", func(*kmev1.Call) (*kmev1.Answer, error) {
			return prepared(func(r *kmev1.PrepareVectorResponse) { r.Rands = nil })
		}},
		{"too many RANDs", "AIA 4181", func(*kmev1.Call) (*kmev1.Answer, error) {
			return prepared(func(r *kmev1.PrepareVectorResponse) { r.Rands = slices.Repeat(r.Rands, 40) })
		}},
		{"a RAND of another length", "AIA 4181", func(*kmev1.Call) (*kmev1.Answer, error) {
			return prepared(func(r *kmev1.PrepareVectorResponse) { r.Rands[0] = r.Rands[0][:15] })
		}},
		{"no control", "AIA 4181", func(*kmev1.Call) (*kmev1.Answer, error) {
			return prepared(func(r *kmev1.PrepareVectorResponse) { r.Control = 0 })
		}},
		{"an attempt with a pre-processed RAND", "AIA 4181", func(*kmev1.Call) (*kmev1.Answer, error) {
			return prepared(func(r *kmev1.PrepareVectorResponse) { r.AttemptId = "AAAA" })
		}},
		{"the answer to another method", "AIA 4181", func(*kmev1.Call) (*kmev1.Answer, error) {
			return &kmev1.Answer{Answer: &kmev1.Answer_RestoreRand{RestoreRand: &kmev1.RestoreRANDResponse{}}}, nil
		}},
		{"a message beyond all bounds", "AIA 4181", func(*kmev1.Call) (*kmev1.Answer, error) {
			return failed(strings.Repeat("X", 2<<20))
		}},
		{"and an answer in the end", "AIA 2001 2 -", func(*kmev1.Call) (*kmev1.Answer, error) { return good() }},
	} {
		service.say(c.script)
		f := m.expect(c.name, c.want, "AIR", unbound, "1", "-")
		if good := c.want == "AIA 2001 2 -"; good != (len(f) == 5) {
			t.Errorf("%s: %v has the wrong number of vectors", c.name, f)
		}
	}
	before := service.streams.Load()
	for range 5 {
		m.expect("more answers", "AIA 2001 2 -", "AIR", unbound, "1", "-")
	}
	if n := service.streams.Load(); n != before {
		t.Errorf("%d more streams for 5 more calls", n-before)
	}
	t.Run("instances", func(t *testing.T) { severalInstances(t, d) })
}

func prepared(change func(r *kmev1.PrepareVectorResponse)) (*kmev1.Answer, error) {
	r := &kmev1.PrepareVectorResponse{Control: kmev1.Control_PREPROCESSED,
		Rands: [][]byte{bytes.Repeat([]byte{0xa5}, 16)}}
	change(r)
	return &kmev1.Answer{Answer: &kmev1.Answer_PrepareVector{PrepareVector: r}}, nil
}

func failed(reason string) (*kmev1.Answer, error) {
	e := &kmev1.CallError{Code: "internal", Reason: reason}
	return &kmev1.Answer{Answer: &kmev1.Answer_Error{Error: e}}, nil
}

// severalInstances holds kme.fdx against the rules that the Go client has for several instances.
func severalInstances(t *testing.T, d *network) {
	const vector = "AIA 2001 2 -"
	a, b := d.newScripted("sa"), d.newScripted("sb")
	d.write("two.conf", fmt.Sprintf("service = unix:%s\nservice = unix:%s\ntimeout_ms = %d\nbreaker = 1000\n"+
		"origin_rate = 100000\n", a.path, b.path, unhurried.Milliseconds()))
	hss := d.start("hss2", []string{"hssd:" + d.path("subscribers"), "kme:" + d.path("two.conf")}, "mme2")
	d.start("mme2", []string{"mme:" + d.path("m2")}, "hss2").connected("hss2")
	m := d.mme("m2")
	m.t = t
	good := func(*kmev1.Call) (*kmev1.Answer, error) { return prepared(func(*kmev1.PrepareVectorResponse) {}) }
	both := func() { a.say(good); b.say(good) }
	air := func(what, want string) { t.Helper(); m.expect(what, want, "AIR", unbound, "1", "-") }
	// shared waits until both get calls.
	shared := func() {
		t.Helper()
		both()
		a.unready.Store(false)
		testproc.Await(t, "both get calls", func() bool {
			before, other := a.calls.Load(), b.calls.Load()
			air("a call", vector)
			air("a call", vector)
			return a.calls.Load() > before && b.calls.Load() > other
		})
	}
	// left says that an instance gets no calls until it is ready.
	left := func(i *scripted) {
		t.Helper()
		before, asked := i.calls.Load(), i.asked.Load()
		for range 6 {
			air("the other has a call", vector)
		}
		testproc.Await(t, "it is asked again whether it is ready", func() bool { return i.asked.Load() > asked+1 })
		air("the other has a call", vector)
		if n := i.calls.Load() - before; n != 0 {
			t.Errorf("an instance that is not ready got %d calls", n)
		}
	}

	both()
	for range 100 {
		air("a call", vector)
	}
	if a, b := a.calls.Load(), b.calls.Load(); a < 20 || b < 20 || a+b != 100 {
		t.Errorf("%d and %d calls of 100", a, b)
	}

	a.server.Close()
	for range 20 {
		air("one is killed", vector)
	}
	a.unready.Store(true)
	a.listen(t)
	left(a)
	shared()

	// Silent: it keeps a call for half of its time.
	silence := make(chan struct{})
	a.unready.Store(true)
	a.say(func(c *kmev1.Call) (*kmev1.Answer, error) { <-silence; return nil, errors.New("gone") })
	for range 20 {
		air("one is silent", vector)
	}
	left(a)
	testproc.Await(t, "the log says that it is silent", func() bool {
		return strings.Contains(hss.Log.String(), a.path+": no answer within timeout_ms: it gets no calls")
	})
	close(silence)
	shared()
	forgotten(t, a, m)
	shared()

	for _, reason := range []kme.Reason{kme.HSMUnavailable, kme.StoreUnavailable} {
		a.unready.Store(true)
		a.say(func(*kmev1.Call) (*kmev1.Answer, error) { return failed(string(reason)) })
		for range 20 {
			air(string(reason), vector)
		}
		left(a)
		shared()
	}
	for _, reason := range []kme.Reason{kme.Overloaded, kme.DirectoryUnavailable} {
		a.say(func(*kmev1.Call) (*kmev1.Answer, error) { return failed(string(reason)) })
		before, other := a.calls.Load(), b.calls.Load()
		for range 100 {
			air(string(reason), vector)
		}
		if n := a.calls.Load() - before; n < 20 || n > 80 {
			t.Errorf("%s: it got %d calls of 100", reason, n)
		}
		if n := b.calls.Load() - other; n != 100 {
			t.Errorf("%s: the other got %d calls of 100", reason, n)
		}
	}
	b.say(func(*kmev1.Call) (*kmev1.Answer, error) { return failed(string(kme.Overloaded)) })
	before := a.calls.Load() + b.calls.Load()
	air("both are overloaded", "AIA 4181")
	if n := a.calls.Load() + b.calls.Load() - before; n != 2 {
		t.Errorf("a call was made %d times at two instances", n)
	}
	b.unready.Store(true)
	a.say(good)
	b.say(func(*kmev1.Call) (*kmev1.Answer, error) { return failed(string(kme.HSMUnavailable)) })
	for range 20 {
		air("one is about to be away", vector)
	}
	a.say(func(*kmev1.Call) (*kmev1.Answer, error) { return failed(string(kme.Overloaded)) })
	b.say(good)
	for range 2 {
		air("one is overloaded, and the other away", "AIA 4181")
	}
	b.unready.Store(false)
	shared()
	a.say(func(*kmev1.Call) (*kmev1.Answer, error) { return failed(string(kme.NotBound)) })
	b.say(func(*kmev1.Call) (*kmev1.Answer, error) { return failed(string(kme.NotBound)) })
	before = a.calls.Load() + b.calls.Load()
	air("who is not bound", "AIA 5420")
	if n := a.calls.Load() + b.calls.Load() - before; n != 1 {
		t.Errorf("a refusal was asked for %d times", n)
	}

	// A report of a failure is made once, whatever becomes of it.
	for what, end := range map[string]func() (*kmev1.Answer, error){
		"an error":        func() (*kmev1.Answer, error) { return failed(string(kme.StoreUnavailable)) },
		"a broken stream": func() (*kmev1.Answer, error) { return nil, errors.New("broken") },
	} {
		var reports atomic.Int64
		script := func(c *kmev1.Call) (*kmev1.Answer, error) {
			if c.GetReportAuthentication() != nil {
				reports.Add(1)
				return end()
			}
			return &kmev1.Answer{Answer: &kmev1.Answer_EstablishKme{EstablishKme: &kmev1.EstablishKMEResponse{
				NwSig: make([]byte, 32), State: kmev1.State_PENDING}}}, nil
		}
		a.say(script)
		b.say(script)
		m.expect(what, "ULA 5012", "ULR", marked("ulr=5012", 1), "35209900000001", strings.Repeat("00", 256), "AAAA")
		if n := reports.Load(); n != 1 {
			t.Errorf("%s: a report of a failure was made %d times", what, n)
		}
		shared()
	}

	// One that was not sent, since its instance cannot be reached, goes to the other.
	for range 8 {
		b.server.Close()
		var reports atomic.Int64
		a.say(func(c *kmev1.Call) (*kmev1.Answer, error) {
			if c.GetReportAuthentication() != nil {
				reports.Add(1)
				return failed(string(kme.StoreUnavailable))
			}
			return &kmev1.Answer{Answer: &kmev1.Answer_EstablishKme{EstablishKme: &kmev1.EstablishKMEResponse{
				NwSig: make([]byte, 32), State: kmev1.State_PENDING}}}, nil
		})
		m.expect("one is not there", "ULA 5012", "ULR", marked("ulr=5012", 1), "35209900000001",
			strings.Repeat("00", 256), "AAAA")
		if n := reports.Load(); n != 1 {
			t.Errorf("a report of a failure was made %d times at the instance that is there", n)
		}
		b.listen(t)
		shared()
	}

	a.server.Close()
	b.server.Close()
	for range 2 {
		air("both are away", "AIA 4181")
	}
	b.listen(t)
	air("one is back", vector)
	if hss.Ended() {
		t.Error("the HSS has ended")
	}
}

// forgotten has the network forget the connection of an instance's stream, and take others: the stream is given up,
// although there are calls under way on it at every moment.
func forgotten(t *testing.T, a *scripted, m *mme) {
	t.Helper()
	gone, before := make(chan struct{}), a.streams.Load()
	defer close(gone)
	a.say(func(*kmev1.Call) (*kmev1.Answer, error) {
		if a.streams.Load() == before {
			<-gone
		}
		return prepared(func(*kmev1.PrepareVectorResponse) {})
	})
	testproc.Await(t, "another stream is opened under load", func() bool {
		m.next++
		fmt.Fprintf(m.conn, "AIR %d %s 1 -\n", m.next, unbound) // nobody waits for its answer
		time.Sleep(200 * time.Millisecond)
		return a.streams.Load() > before
	})
}
