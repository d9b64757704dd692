package api

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"connectrpc.com/grpcreflect"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/binding"
)

// Reflection tells administrators, and nobody else, what can be called.
func TestReflection(t *testing.T) {
	ask := func(clients *Clients) (files int, services []protoreflect.FullName, err error) {
		t.Helper()
		s := httptest.NewUnstartedServer(NewHandler(Options{Clients: clients, Gather: http.NotFoundHandler(),
			Metrics: binding.NewMetrics(prometheus.NewRegistry()),
			Service: binding.NewService(binding.Options{Times: binding.DefaultTimes(),
				Log: slog.New(slog.DiscardHandler)})}))
		s.EnableHTTP2 = true
		s.StartTLS()
		defer s.Close()
		stream := grpcreflect.NewClient(s.Client(), s.URL, connect.WithGRPC()).NewStream(t.Context())
		defer stream.Close()
		if services, err = stream.ListServices(); err != nil {
			return 0, nil, err
		}
		all, err := stream.FileContainingSymbol(kmev1connect.KeyServiceName)
		return len(all), services, err
	}
	for _, role := range roles {
		clients := everybody(t, Client{Name: "test", Roles: []Role{role}, PLMNs: []string{all}})
		files, services, err := ask(clients)
		if role == RoleAdmin {
			if err != nil || files == 0 || !slices.Contains(services, kmev1connect.KeyServiceName) {
				t.Errorf("an administrator: %d files, services %v, %v", files, services, err)
			}
		} else if connect.CodeOf(err) != connect.CodePermissionDenied ||
			!strings.Contains(err.Error(), "this client may not do that") {
			t.Errorf("%s: services %v, %v", role, services, err)
		}
	}
	if _, services, err := ask(new(Clients)); connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("nobody that we know: services %v, %v", services, err)
	}
}
