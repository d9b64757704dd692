package api

import (
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
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
	s, _ := serveTo(t, &Client{Name: "slow", Roles: []Role{RoleHSS}, PLMNs: []string{"00101"}, ProvisionFrom: []string{home}, limit: rate.NewLimiter(0, 3)})
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
	if all[0].GetRefused().GetReason() != "CALLER_NOT_ALLOWED" || !maps.Equal(reasons, map[string]int{"CALLER_NOT_ALLOWED": 1, "MALFORMED": 3, "OVERLOADED": 2}) {
		t.Errorf("%v of a client that may make three calls and may not name the first IMSI", reasons)
	}
}

// What one call panics of is that call's end alone, as it is where each call is a request.
func TestPanic(t *testing.T) {
	var log strings.Builder
	service := binding.NewService(nil, nil, new(binding.Lots), binding.DefaultTimes(), slog.New(slog.NewJSONHandler(&log, nil))) // whoever asks its store panics
	clients := new(atomic.Pointer[Clients])
	clients.Store(&Clients{byUID: map[int]*Client{-1: {Name: "anybody", Roles: []Role{RoleHSS}, PLMNs: []string{all}, ProvisionFrom: []string{anywhere}}}})
	s := httptest.NewServer(NewHandler(service, clients, binding.NewMetrics(prometheus.NewRegistry()), http.NotFoundHandler(), nil, nil))
	defer s.Close()
	stream, err := kmev1connect.NewKeyServiceClient(s.Client(), s.URL).EstablishKMEs(t.Context(), connect.NewRequest(&kmev1.EstablishKMEsRequest{Calls: []*kmev1.EstablishKMERequest{
		{Imsi: "001010000000001", Imei: "35209900000001"}, {Imsi: "1"},
	}}))
	all, err := results(t, stream, err)
	if err != nil || all[0].GetRefused().GetCode() != int32(connect.CodeInternal) || all[1].GetRefused().GetReason() != "MALFORMED" {
		t.Errorf("%v, %v", all, err)
	}
	if got := log.String(); !strings.Contains(got, "nil pointer") || !strings.Contains(got, "service.go") {
		t.Errorf("the log does not say where: %s", got)
	}
}
