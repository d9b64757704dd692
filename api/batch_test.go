package api

import (
	"context"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/genproto/googleapis/rpc/errdetails"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/binding"
)

// results gives all results of a stream, by their calls' places.
func results(t *testing.T, stream *connect.ServerStreamForClient[kmev1.EstablishKMEsResponse], err error) (map[int32]*kmev1.EstablishKMEsResponse_Result, error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	all := map[int32]*kmev1.EstablishKMEsResponse_Result{}
	for stream.Receive() {
		for _, r := range stream.Msg().Results {
			if all[r.Call] != nil {
				t.Errorf("call %d has two results", r.Call)
			}
			all[r.Call] = r
		}
	}
	return all, stream.Err()
}

// Each call has the result that it would have by itself. (With payloads that are good, mesim and the client's tests call it.)
func TestEstablishKMEs(t *testing.T) {
	s, store := serve(t)
	calls := []*kmev1.EstablishKMERequest{
		{Imsi: "001010000000001", Imei: "35209900000001", AttemptId: "a", Payload: make([]byte, 256)}, // no attempt
		{Imsi: "1", Imei: "35209900000001"},
		{Imsi: "001010000000001", Imei: "35209900000001x"},
		{},
	}
	for name, options := range map[string][]connect.ClientOption{"Connect": nil, "JSON": {connect.WithProtoJSON()}, "gRPC": {connect.WithGRPC()}, "gRPC-Web": {connect.WithGRPCWeb()}} {
		t.Run(name, func(t *testing.T) {
			client := kmev1connect.NewKeyServiceClient(s.Client(), s.URL, options...)
			stream, err := client.EstablishKMEs(t.Context(), connect.NewRequest(&kmev1.EstablishKMEsRequest{Calls: calls}))
			all, err := results(t, stream, err)
			if err != nil || len(all) != len(calls) {
				t.Fatalf("%d results, %v", len(all), err)
			}
			for i, call := range calls {
				_, err := client.EstablishKME(t.Context(), connect.NewRequest(call))
				e := err.(*connect.Error)
				info, _ := e.Details()[0].Value()
				got := all[int32(i)].GetRefused()
				if got.GetCode() != int32(e.Code()) || got.GetMessage() != e.Message() || got.GetReason() != info.(*errdetails.ErrorInfo).Reason {
					t.Errorf("call %d: %v, by itself %v", i, got, err)
				}
			}
			for _, n := range []int{0, kmev1.MaxCalls + 1} {
				stream, err := client.EstablishKMEs(t.Context(), connect.NewRequest(&kmev1.EstablishKMEsRequest{Calls: make([]*kmev1.EstablishKMERequest, n)}))
				all, err := results(t, stream, err)
				if connect.CodeOf(err) != connect.CodeInvalidArgument || len(all) > 0 {
					t.Errorf("%d calls: %v, %v", n, all, err)
				}
				checkInfo(t, err, "MALFORMED")
			}
		})
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	stream, err := kmev1connect.NewKeyServiceClient(s.Client(), s.URL).EstablishKMEs(t.Context(), connect.NewRequest(&kmev1.EstablishKMEsRequest{Calls: calls}))
	if all, err := results(t, stream, err); err != nil || all[0].GetRefused().GetReason() != "STORE_UNAVAILABLE" || all[1].GetRefused().GetReason() != "MALFORMED" {
		t.Errorf("%v, %v", all, err)
	}
}

// A client's rate and PLMNs are about calls, however they come.
func TestEstablishKMEsAreCalls(t *testing.T) {
	s, _ := serveTo(t, Client{Name: "slow", Roles: []Role{RoleHSS}, PLMNs: []string{"00101"}, Rate: 0.001})
	calls := []*kmev1.EstablishKMERequest{{Imsi: "001020000000001"}}
	for range 5 {
		calls = append(calls, &kmev1.EstablishKMERequest{Imsi: "001010000000001"})
	}
	stream, err := kmev1connect.NewKeyServiceClient(s.Client(), s.URL).EstablishKMEs(t.Context(), connect.NewRequest(&kmev1.EstablishKMEsRequest{Calls: calls}))
	all, err := results(t, stream, err)
	if err != nil {
		t.Fatal(err)
	}
	reasons := map[string]int{}
	for _, r := range all {
		reasons[r.GetRefused().GetReason()]++
	}
	want := map[string]int{"CALLER_NOT_ALLOWED": 1, "MALFORMED": 1, "OVERLOADED": 4}
	if all[0].GetRefused().GetReason() != "CALLER_NOT_ALLOWED" || !maps.Equal(reasons, want) {
		t.Errorf("%v of a client that may make one call and may not name the first IMSI", reasons)
	}
}

// What one call panics of is that call's end alone, however it came: it is answered, logged and counted, and nothing is
// taken up for ever.
func TestPanic(t *testing.T) {
	var log strings.Builder
	registry := prometheus.NewRegistry()
	metrics := binding.NewMetrics(registry)
	// Whoever asks its store panics.
	service := binding.NewService(nil, nil, new(binding.Lots), binding.DefaultTimes(),
		slog.New(slog.NewJSONHandler(&log, nil)))
	service.Observe(metrics)
	anybody := Client{Name: "anybody", Roles: []Role{RoleHSS, RoleMetrics}, PLMNs: []string{all},
		ProvisionFrom: []string{anywhere}}
	panics := func(context.Context) ([]string, error) { panic("readiness") }
	gather := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("gathering") })
	s := httptest.NewUnstartedServer(NewHandler(Options{Service: service, Clients: everybody(t, anybody), Metrics: metrics,
		Gather: gather, Ready: panics}))
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
		if got := log.String(); strings.Count(got, `"stack"`) != int(want) {
			t.Errorf("want %v panics in the log: %s", want, got)
		}
	}

	stream, err := kmev1connect.NewKeyServiceClient(s.Client(), s.URL).EstablishKMEs(t.Context(), connect.NewRequest(&kmev1.EstablishKMEsRequest{Calls: []*kmev1.EstablishKMERequest{
		{Imsi: "001010000000001", Imei: "35209900000001"}, {Imsi: "1"},
	}}))
	all, err := results(t, stream, err)
	if err != nil || all[0].GetRefused().GetCode() != int32(connect.CodeInternal) || all[1].GetRefused().GetReason() != "MALFORMED" {
		t.Errorf("%v, %v", all, err)
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
	if n := service.Coming(); n != 0 {
		t.Errorf("%d calls are on their way to the store for ever", n)
	}
	for _, want := range []string{"nil pointer", "service.go", "KeyService/PrepareVector"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log does not say %q: %s", want, log.String())
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
