package api

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// A ticketStore gives tickets. Whoever asks it for anything else panics.
type ticketStore struct {
	binding.Store
	tickets atomic.Int64
}

func (s *ticketStore) Soon() (done func()) {
	s.tickets.Add(1)
	return func() { s.tickets.Add(-1) }
}

// What one call panics of is that call's end alone, however it came: it is answered, logged and counted, and nothing is
// taken up for ever.
func TestPanic(t *testing.T) {
	stacks := testproc.Logged(t)
	var log strings.Builder
	registry := prometheus.NewRegistry()
	metrics := binding.NewMetrics(registry)
	store := new(ticketStore)
	service := binding.NewService(binding.Options{
		Store: store, Times: binding.DefaultTimes(), Metrics: metrics, Log: slog.New(slog.NewJSONHandler(&log, nil)),
	})
	anybody := Client{Name: "anybody", Roles: []Role{RoleHSS, RoleMetrics}, PLMNs: []string{all},
		ProvisionFrom: []string{anywhere}}
	panics := func(context.Context) ([]string, error) { panic("readiness") }
	gather := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("gathering") })
	s := httptest.NewUnstartedServer(NewHandler(Options{Service: service, Clients: everybody(t, anybody),
		Metrics: metrics,
		Gather:  gather, Ready: panics}))
	s.EnableHTTP2 = true
	s.StartTLS()
	defer s.Close()
	counted := func(want float64) {
		t.Helper()
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() == "kme_panics_total" && f.Metric[0].Counter.GetValue() != want {
				t.Errorf("%v panics are counted, want %v", f.Metric[0].Counter.GetValue(), want)
			}
		}
		for _, got := range []string{log.String(), stacks.String()} {
			if strings.Count(got, `"cause":`) != int(want) {
				t.Errorf("want %v panics in the log: %s", want, got)
			}
		}
	}

	client := kmev1connect.NewKeyServiceClient(s.Client(), s.URL)
	establish := &kmev1.EstablishKMERequest{Imsi: "001010000000001", Imei: "35209900000001"}
	if _, err := client.EstablishKME(t.Context(),
		connect.NewRequest(establish)); connect.CodeOf(err) != connect.CodeInternal {
		t.Errorf("EstablishKME: %v", err)
	}
	counted(1)
	for name, option := range map[string]connect.ClientOption{
		"Connect": connect.WithClientOptions(), "JSON": connect.WithProtoJSON(), "gRPC": connect.WithGRPC(),
		"gRPC-Web": connect.WithGRPCWeb(),
	} {
		client := kmev1connect.NewKeyServiceClient(s.Client(), s.URL, option)
		request := &kmev1.PrepareVectorRequest{Imsi: "001010000000001", Rands: [][]byte{make([]byte, 16)}}
		_, err := client.PrepareVector(t.Context(), connect.NewRequest(request))
		if connect.CodeOf(err) != connect.CodeInternal || err.Error() != "internal: internal error" {
			t.Errorf("%s: %v", name, err)
		}
	}
	counted(5)
	if n := store.tickets.Load(); n != 0 {
		t.Errorf("%d tickets of the store are out for ever", n)
	}
	for _, want := range []string{"nil pointer", "vectors.go", `"call":"PrepareVector"`} {
		if text := log.String() + stacks.String(); !strings.Contains(text, want) {
			t.Errorf("the log does not say %q: %s", want, text)
		}
	}
	if status, body := read(t)(s.Client().Get(s.URL + "/readyz")); status != http.StatusServiceUnavailable ||
		body != "not ready\n" {
		t.Errorf("/readyz: %d, %s", status, body)
	}
	counted(6)
	if status, body := read(t)(s.Client().Get(s.URL + "/metrics")); status != http.StatusInternalServerError ||
		body != "internal error\n" {
		t.Errorf("/metrics: %d, %s", status, body)
	}
	counted(7)
}
