package binding_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/kmehsm/kmehsm/api"
	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/binding"
)

// anybody who reaches the socket may call everything.
func anybody(t *testing.T) *api.Clients {
	t.Helper()
	own := os.Getuid()
	return must[*api.Clients](t)(api.NewClients([]api.Client{{Name: "test", UID: &own, PLMNs: []string{"all"},
		Roles: []api.Role{api.RoleHSS, api.RoleAdmin, api.RoleMonitor}}}))
}

// listen serves the harness on a socket, HTTP/1.1 and HTTP/2, and gives a way to dial it.
func (r *harness) listen(t *testing.T) func(ctx context.Context) (net.Conn, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l := must[net.Listener](t)(net.Listen("unix", path))
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	handler := api.NewHandler(api.Options{Service: r.service, Clients: anybody(t),
		Metrics: binding.NewMetrics(prometheus.NewRegistry()), Gather: http.NotFoundHandler(),
		Ready: func(ctx context.Context) ([]string, error) { return nil, r.token.Ping(ctx) }})
	server := &http.Server{Handler: handler, Protocols: protocols, ConnContext: api.ConnContext}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	return func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "unix", path) }
}

// http2Client speaks HTTP/2 without TLS, as gRPC does on a socket.
func http2Client(t *testing.T, dial func(ctx context.Context) (net.Conn, error)) *http.Client {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols, DialContext: func(ctx context.Context, _, _ string) (net.Conn,
		error) {
		return dial(ctx)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

const establishPath = "/kme.v1.KeyService/EstablishKME"

// exchangeJSON makes the call with HTTP/1.1 and gives every byte of the answer but the Date.
func exchangeJSON(
	t *testing.T, dial func(ctx context.Context) (net.Conn, error), imsi, imei, attempt string, payload []byte,
) string {
	t.Helper()
	c := must[net.Conn](t)(dial(t.Context()))
	defer c.Close()
	body := must[[]byte](t)(json.Marshal(map[string]any{"imsi": imsi, "imei": imei, "attempt_id": attempt,
		"payload": payload}))
	fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: kme\r\nContent-Type: application/json\r\nConnection: close\r\n"+
		"Content-Length: %d\r\n\r\n%s", establishPath, len(body), body)
	var answer strings.Builder
	lines := bufio.NewReader(c)
	for {
		line, err := lines.ReadString('\n')
		if !strings.HasPrefix(line, "Date: ") {
			answer.WriteString(line)
		}
		if err == io.EOF {
			return answer.String()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// exchangeGRPC makes the call as a gRPC client does, without one, and gives status, headers, body and trailers.
func exchangeGRPC(t *testing.T, client *http.Client, imsi, imei, attempt string, payload []byte) string {
	t.Helper()
	message := must[[]byte](t)(proto.Marshal(&kmev1.EstablishKMERequest{Imsi: imsi, Imei: imei, AttemptId: attempt,
		Payload: payload}))
	frame := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
	req := must[*http.Request](t)(http.NewRequestWithContext(t.Context(), http.MethodPost, "http://kme"+establishPath,
		bytes.NewReader(frame)))
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("TE", "trailers")
	resp := must[*http.Response](t)(client.Do(req))
	defer resp.Body.Close()
	body := must[[]byte](t)(io.ReadAll(resp.Body))
	var answer strings.Builder
	fmt.Fprintf(&answer, "%s %s\n", resp.Proto, resp.Status)
	for _, h := range []http.Header{resp.Header, resp.Trailer} {
		h.Del("Date")
		for _, name := range slices.Sorted(maps.Keys(h)) {
			fmt.Fprintf(&answer, "%s: %q\n", name, h[name])
		}
	}
	fmt.Fprintf(&answer, "%x", body)
	return answer.String()
}

// Every payload that is rejected, for whatever reason, gets the same answer, byte for byte.
func TestOneAnswer(t *testing.T) {
	r, devices := newKnown(t)
	dial := r.listen(t)
	client := http2Client(t, dial)
	jsonAnswers, grpcAnswers := map[string]string{}, map[string]string{}
	try := func(v *vector, name string) {
		t.Helper()
		imsi := newIMSI()
		imei, attempt := devices[v].imei.String(), r.attempt(t, imsi)
		jsonAnswers[exchangeJSON(t, dial, imsi.String(), imei, attempt, v.Payload)] = name
		grpcAnswers[exchangeGRPC(t, client, imsi.String(), imei, attempt, v.Payload)] = name
	}
	for _, v := range vectors(t).Vectors {
		if v.Expect == "reject" && v.Why != "length" {
			try(v, v.Name)
		}
	}
	for _, v := range vectors(t).Vectors {
		if v.Expect == "accept" && !v.secondOfPair() {
			imsi := newIMSI()
			must[*binding.Established](t)(r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi,
				IMEI: devices[v].imei, AttemptID: r.attempt(t, imsi), Payload: v.Payload, Origin: here}))
			try(v, v.Name+", again")
		}
		if v.secondOfPair() {
			try(v, v.Name)
		}
	}
	for protocol, answers := range map[string]map[string]string{"JSON": jsonAnswers, "gRPC": grpcAnswers} {
		if len(answers) != 1 {
			t.Errorf("%d answers over %s, not 1: %q", len(answers), protocol, answers)
		}
		for answer := range answers {
			for _, want := range map[string][]string{
				"JSON": {"HTTP/1.1 403 ", `"code":"permission_denied"`, notAccepted, "google.rpc.ErrorInfo",
					"KME_REJECTED"},
				"gRPC": {"HTTP/2.0 200 ", `Grpc-Status: ["7"]`, "Grpc-Status-Details-Bin"},
			}[protocol] {
				if !strings.Contains(answer, want) {
					t.Errorf("the answer over %s has no %s: %s", protocol, want, answer)
				}
			}
		}
	}
}

// The whole flow with the field names and values that others script against.
func TestJSONFlow(t *testing.T) {
	r, m, l := newServed(t)
	dial := r.listen(t)
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return dial(ctx)
	}}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	call := func(method string, request map[string]any) map[string]any {
		t.Helper()
		body := must[[]byte](t)(json.Marshal(request))
		resp := must[*http.Response](t)(client.Post("http://kme/kme.v1.KeyService/"+method, "application/json",
			bytes.NewReader(body)))
		defer resp.Body.Close()
		answer := map[string]any{}
		if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s, %v, %v", method, resp.Status, answer, err)
		}
		return answer
	}
	check := func(what string, answer map[string]any, want map[string]any) {
		t.Helper()
		for name, w := range want {
			if answer[name] != w {
				t.Errorf("%s: %s is %v, want %v", what, name, answer[name], w)
			}
			delete(answer, name)
		}
		if len(answer) > 0 {
			t.Errorf("%s: also %v", what, answer)
		}
	}
	b64 := base64.StdEncoding.EncodeToString
	d, imsi, vector, clear := l.devices[0], newIMSI(), []byte("sixteen bytes ok"), []byte("and sixteen more")
	const origin = "MME.epc.mnc001.mcc001.3gppnetwork.org"

	prepare := map[string]any{"imsi": imsi, "rands": [][]byte{clear}, "origin": origin}
	attempt, _ := call("PrepareVector", prepare)["attempt_id"].(string)
	prepared := call("PrepareVector", prepare) // the one before stays open
	if other, _ := prepared["attempt_id"].(string); other == "" || attempt == "" {
		t.Errorf("attempts %q and %q", attempt, other)
	}
	delete(prepared, "attempt_id")
	checkRANDs(t, prepared, b64(clear))
	check("prepared", prepared, map[string]any{"control": "PROVISIONING_ONLY"})
	payload, p := d.payload(t)
	nwSig := p.NWSig()
	check("established", call("EstablishKME", map[string]any{"imsi": imsi, "imei": d.imei, "attempt_id": attempt,
		"payload": payload, "origin": strings.ToLower(origin)}),
		map[string]any{"nw_sig": b64(nwSig[:]), "state": "PENDING"})

	encrypted := encryptRAND(t, p.KME.Bytes(), [16]byte(vector))
	prepared = call("PrepareVector", map[string]any{"imsi": imsi, "rands": [][]byte{vector, vector}, "origin": origin,
		"no_provisioning": true})
	checkRANDs(t, prepared, b64(encrypted[:]), b64(encrypted[:]))
	check("prepared when bound", prepared, map[string]any{"control": "PREPROCESSED"})
	for rand, want := range map[string][]byte{string(encrypted[:]): vector, string(clear): clear} {
		check("restored", call("RestoreRAND", map[string]any{"imsi": imsi, "rand": []byte(rand), "origin": origin}),
			map[string]any{"rand": b64(want)})
	}
	b := call("GetBinding", map[string]any{"imsi": imsi})
	if b["established_at"] == nil {
		t.Error("pending without established_at")
	}
	delete(b, "established_at")
	check("pending", b, map[string]any{"imsi": imsi.String(), "imei": d.imei.String(), "lot": "L1",
		"manufacturer": m.KeyID(), "state": "PENDING"})
	check("reported from elsewhere",
		call("ReportAuthentication", map[string]any{"imsi": imsi, "ok": true, "origin": "another"}),
		map[string]any{"state": "PENDING", "control": "PROVISIONING_ONLY"})
	check("reported", call("ReportAuthentication", map[string]any{"imsi": imsi, "ok": true, "origin": origin}),
		map[string]any{"state": "ACTIVE", "control": "PREPROCESSED"})
	if b := call("GetBinding", map[string]any{"imsi": imsi}); b["state"] != "ACTIVE" || b["activated_at"] == nil {
		t.Errorf("active: %v", b)
	}
}

// checkRANDs takes the RANDs out of an answer.
func checkRANDs(t *testing.T, answer map[string]any, want ...string) {
	t.Helper()
	if got := fmt.Sprint(answer["rands"]); got != fmt.Sprint(want) {
		t.Errorf("RANDs %s, want %s", got, want)
	}
	delete(answer, "rands")
}

// A generated client over gRPC finds the reason where it expects it.
func TestGRPCFlow(t *testing.T) {
	r, _, l := newServed(t)
	client := kmev1connect.NewKeyServiceClient(http2Client(t, r.listen(t)), "http://kme", connect.WithGRPC())
	ctx, d, imsi := t.Context(), l.devices[0], newIMSI()
	prepared, err := client.PrepareVector(ctx,
		connect.NewRequest(&kmev1.PrepareVectorRequest{Imsi: imsi.String(), Rands: newRANDs(3)}))
	if err != nil || prepared.Msg.Control != kmev1.Control_PROVISIONING_ONLY {
		t.Fatal(prepared, err)
	}
	payload, p := d.payload(t)
	request := &kmev1.EstablishKMERequest{Imsi: imsi.String(), Imei: d.imei.String(), AttemptId: prepared.Msg.AttemptId,
		Payload: payload}
	established, err := client.EstablishKME(ctx, connect.NewRequest(request))
	if want := p.NWSig(); err != nil || !bytes.Equal(established.Msg.NwSig, want[:]) ||
		established.Msg.State != kmev1.State_PENDING {
		t.Fatal(established, err)
	}
	// A failed authentication leaves no binding, and so no state.
	reported, err := client.ReportAuthentication(ctx,
		connect.NewRequest(&kmev1.ReportAuthenticationRequest{Imsi: imsi.String()}))
	if err != nil || reported.Msg.State != kmev1.State_STATE_UNSPECIFIED {
		t.Error(reported, err)
	}
	_, err = client.RestoreRAND(ctx,
		connect.NewRequest(&kmev1.RestoreRANDRequest{Imsi: imsi.String(), Rand: make([]byte, 16)}))
	if connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("restore without a binding: %v", err)
	}
}
