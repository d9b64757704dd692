package api

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/kme"
)

func TestClientRate(t *testing.T) {
	c, err := NewClients([]Client{{Name: "slow", SAN: "slow", Roles: []Role{RoleHSS}, PLMNs: []string{all},
		Rate: 0.001}, {Name: "free", SAN: "free", Roles: []Role{RoleHSS}, PLMNs: []string{all}}})
	if err != nil {
		t.Fatal(err)
	}
	slow, free := c.bySAN["slow"], c.bySAN["free"]
	if slow.tooMany() || !slow.tooMany() || !slow.tooMany() {
		t.Error("one call of a client with a rate below one, and no second")
	}
	for range 1000 {
		if free.tooMany() {
			t.Fatal("a client without a rate is limited")
		}
	}
}

const health = "/grpc.health.v1.Health/Check"

// A client's rate is also that of what it may not call, of what cannot be read, and of what is no call: the counts, and
// what can be called. Each refusal is in the log.
func TestRateOfOthers(t *testing.T) {
	for _, c := range []struct {
		method, path, kind, body string
		roles                    []Role
		first                    kme.Reason
	}{
		{"GET", "/metrics", "", "", roles, ""},
		{"GET", "/metrics", "", "", []Role{RoleEIR}, kme.CallerNotAllowed},
		{"POST", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "json", "{}", roles, ""},
		{"POST", service + "GetBinding", "json", "{}", []Role{RoleEIR}, kme.CallerNotAllowed},
		{"POST", service + "GetBinding", "json", "{", []Role{RoleEIR}, kme.CallerNotAllowed},
		{"POST", service + "GetBinding", "json", "{", roles, kme.Malformed},
		{"POST", service + "GetBinding", "json; charset=utf-8", `{"imsi":1}`, roles, kme.Malformed},
		{"POST", service + "GetBinding", "proto", "\xff", roles, kme.Malformed},
		{"POST", service + "GetBinding", "grpc", "\x00\x00\x00\x00\x01\xff", roles, kme.Malformed},
		{"POST", service + "GetBinding", "grpc-web", "\x00\x00\x00\x00\x01\xff", roles, kme.Malformed},
	} {
		var log strings.Builder
		handler := NewHandler(Options{
			Service: binding.NewService(binding.Options{Times: binding.DefaultTimes(),
				Log: slog.New(slog.NewJSONHandler(&log, nil))}),
			Clients: everybody(t, Client{Name: "test", Roles: c.roles, PLMNs: []string{"00101"}, Rate: 0.001}),
			Metrics: binding.NewMetrics(prometheus.NewRegistry()), Gather: http.NotFoundHandler(),
		})
		var reasons []string
		for range 2 {
			r := httptest.NewRequest(c.method, c.path, strings.NewReader(c.body))
			r.Header.Set("Content-Type", "application/"+c.kind)
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, r)
			reasons = append(reasons, w.Header().Get(kme.ReasonHeader))
		}
		if !slices.Equal(reasons, []string{string(c.first), string(kme.Overloaded)}) ||
			!strings.Contains(log.String(), string(c.first)) || !strings.Contains(log.String(), reasons[1]) {
			t.Errorf("%s %q: refused with %q, and in the log as %s", c.path, c.body, reasons, log.String())
		}
	}
}

// One client's calls that wait, for a store that does not answer, say, take no more memory than maxCalls of them, and
// keep no other client out.
func TestCallsUnderWay(t *testing.T) {
	g := &guard{metrics: binding.NewMetrics(prometheus.NewRegistry()), service: binding.NewService(binding.Options{
		Times: binding.DefaultTimes(), Log: slog.New(slog.DiscardHandler)})}
	g.metrics.Methods("GetBinding")
	clients := must.Get[*Clients](t)(NewClients([]Client{
		{Name: "one", SAN: "one", Roles: roles, PLMNs: []string{all}},
		{Name: "two", SAN: "two", Roles: roles, PLMNs: []string{all}}}))
	answer, entered := make(chan struct{}), make(chan struct{})
	call := g.around(func(context.Context, connect.AnyRequest) (connect.AnyResponse, error) {
		entered <- struct{}{}
		<-answer
		return connect.NewResponse(&kmev1.GetBindingResponse{}), nil
	})
	by := func(client string) error {
		ctx := context.WithValue(t.Context(), callerKey{}, &caller{client: clients.bySAN[client]})
		_, err := call(ctx, named{connect.NewRequest(&kmev1.GetBindingRequest{Imsi: "001010000000001"})})
		return err
	}
	var under sync.WaitGroup
	begin := func(client string) {
		under.Go(func() {
			if err := by(client); err != nil {
				t.Error(err)
			}
		})
		<-entered
	}
	for range maxCalls {
		begin("one")
	}
	refused := make(chan error)
	go func() { refused <- by("one") }()
	select {
	case err := <-refused:
		if r := refusalOf(err); r == nil || r.Reason != kme.Overloaded {
			t.Errorf("one more: %v", err)
		}
	case <-entered:
		t.Error("one more is made")
	}
	begin("two")
	close(answer)
	under.Wait()
	begin("one")
	under.Wait()
}

// named is a request that has reached the handler of GetBinding.
type named struct {
	*connect.Request[kmev1.GetBindingRequest]
}

func (named) Spec() connect.Spec { return connect.Spec{Procedure: service + "GetBinding"} }
