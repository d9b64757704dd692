package proof

import (
	"bytes"
	"context"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"connectrpc.com/connect"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/kme"
)

// A scripted service answers each call of a stream as its script says.
type scripted struct {
	kmev1connect.UnimplementedKeyServiceHandler
	script  atomic.Pointer[func(c *kmev1.Call) (*kmev1.Answer, error)]
	streams atomic.Int64
}

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
	d := newNetwork(t, 1, "")
	service := new(scripted)
	listener, err := net.Listen("unix", d.path("scripted"))
	if err != nil {
		t.Fatal(err)
	}
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	mux := http.NewServeMux()
	mux.Handle(kmev1connect.NewKeyServiceHandler(service))
	server := &http.Server{Handler: mux, Protocols: protocols}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
	d.write("scripted.conf", "service = unix:"+d.path("scripted")+"\nbreaker = 1000\n")
	d.start("hss", []string{"hssd:" + d.path("subscribers"), "kme:" + d.path("scripted.conf")}, "mme")
	d.start("mme", []string{"mme:" + d.path("m")}, "hss").connected("hss")
	m := d.mme("m")

	prepared := func(change func(r *kmev1.PrepareVectorResponse)) (*kmev1.Answer, error) {
		r := &kmev1.PrepareVectorResponse{Control: kmev1.Control_PREPROCESSED,
			Rands: [][]byte{bytes.Repeat([]byte{0xa5}, 16)}}
		change(r)
		return &kmev1.Answer{Answer: &kmev1.Answer_PrepareVector{PrepareVector: r}}, nil
	}
	ended := false
	good := func() (*kmev1.Answer, error) { return prepared(func(*kmev1.PrepareVectorResponse) {}) }
	notAllowed := connect.NewError(connect.CodePermissionDenied, nil)
	notAllowed.Meta().Set("Kme-Reason", string(kme.CallerNotAllowed))
	failed := func(reason string) (*kmev1.Answer, error) {
		e := &kmev1.CallError{Code: "internal", Reason: reason}
		return &kmev1.Answer{Answer: &kmev1.Answer_Error{Error: e}}, nil
	}
	for _, c := range []struct {
		name, want string
		script     func(c *kmev1.Call) (*kmev1.Answer, error)
	}{
		{"an answer", "AIA 2001 2 -", func(c *kmev1.Call) (*kmev1.Answer, error) {
			q := c.GetPrepareVector()
			if len(q.GetRands()) != 1 || q.Imsi != unbound || q.Origin != identity("mme") || c.TimeoutMs != 2000 {
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
		service.script.Store(&c.script)
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
}
