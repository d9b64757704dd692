package api

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/genproto/googleapis/rpc/errdetails"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/kme"
)

// secret stands for what a driver or a token says: it is for the log.
const secret = "/srv/state: token serial 4711"

func TestToConnect(t *testing.T) {
	table := map[kme.Reason]struct {
		name string
		code connect.Code
	}{
		kme.Malformed:            {"MALFORMED", connect.CodeInvalidArgument},
		kme.NoAttempt:            {"NO_ATTEMPT", connect.CodeFailedPrecondition},
		kme.UnknownDevice:        {"UNKNOWN_DEVICE", connect.CodeNotFound},
		kme.RevokedDevice:        {"REVOKED_DEVICE", connect.CodePermissionDenied},
		kme.KMERejected:          {"KME_REJECTED", connect.CodePermissionDenied},
		kme.OtherDevice:          {"OTHER_DEVICE", connect.CodeFailedPrecondition},
		kme.CallerNotAllowed:     {"CALLER_NOT_ALLOWED", connect.CodePermissionDenied},
		kme.Overloaded:           {"OVERLOADED", connect.CodeResourceExhausted},
		kme.NotBound:             {"NOT_BOUND", connect.CodeFailedPrecondition},
		kme.HSMUnavailable:       {"HSM_UNAVAILABLE", connect.CodeUnavailable},
		kme.DirectoryUnavailable: {"DIRECTORY_UNAVAILABLE", connect.CodeUnavailable},
		kme.StoreUnavailable:     {"STORE_UNAVAILABLE", connect.CodeUnavailable},
		kme.RolledBack:           {"ROLLED_BACK", connect.CodeFailedPrecondition},
		kme.Damaged:              {"DAMAGED", connect.CodeFailedPrecondition},
	}
	for reason, want := range table {
		refusal := &binding.Refusal{Reason: reason, Message: "what the caller may know", Cause: errors.New(secret)}
		err := toConnect(fmt.Errorf("around it: %w", refusal))
		var e *connect.Error
		if !errors.As(err, &e) || e.Code() != want.code || e.Message() != "what the caller may know" {
			t.Errorf("%s: %v, want %s and the message alone", reason, err, want.code)
			continue
		}
		checkInfo(t, err, want.name)
	}
	for reason := range codes {
		if _, ok := table[reason]; !ok {
			t.Errorf("%s is not in the documented table", reason)
		}
	}
	for _, c := range []struct {
		err  error
		code connect.Code
	}{
		{fmt.Errorf("%s: %w", secret, context.Canceled), connect.CodeCanceled},
		{fmt.Errorf("%s: %w", secret, context.DeadlineExceeded), connect.CodeDeadlineExceeded},
		{errors.New(secret), connect.CodeInternal},
	} {
		if err := toConnect(c.err); connect.CodeOf(err) != c.code || strings.Contains(err.Error(), "4711") {
			t.Errorf("%v became %v, want %s without the cause", c.err, err, c.code)
		}
	}
}

// checkReason insists on the reason in both places where a client may look for it.
func checkReason(t *testing.T, err error, reason string) {
	t.Helper()
	var e *connect.Error
	if errors.As(err, &e) && !slices.Equal(e.Meta().Values("Kme-Reason"), []string{reason}) {
		t.Errorf("Kme-Reason is %q, want %q once", e.Meta().Values("Kme-Reason"), reason)
	}
	checkInfo(t, err, reason)
}

func checkInfo(t *testing.T, err error, reason string) {
	t.Helper()
	var e *connect.Error
	if !errors.As(err, &e) || len(e.Details()) != 1 {
		t.Errorf("%v: want one detail", err)
		return
	}
	value, verr := e.Details()[0].Value()
	if info, ok := value.(*errdetails.ErrorInfo); verr != nil || !ok || info.Domain != "kme" || info.Reason != reason ||
		len(info.Metadata) > 0 {
		t.Errorf("detail %v, error %v, want ErrorInfo of domain kme with %s", value, verr, reason)
	}
}

// serve is a service with a real database, and no token: nothing here gets so far.
func serve(t *testing.T) (*httptest.Server, *sqlstore.Store) {
	t.Helper()
	return serveTo(t, Client{Name: "anybody", Roles: []Role{RoleHSS, RoleAdmin, RoleMonitor}, PLMNs: []string{all}})
}

// everybody has one client for whoever comes, and others.
func everybody(t *testing.T, client Client, others ...Client) *Clients {
	t.Helper()
	client.SAN = "everybody"
	clients, err := NewClients(append([]Client{client}, others...))
	if err != nil {
		t.Fatal(err)
	}
	clients.byUID[-1] = clients.bySAN[client.SAN]
	return clients
}

// serveTo serves everybody as one client.
func serveTo(t *testing.T, client Client) (*httptest.Server, *sqlstore.Store) {
	t.Helper()
	store, err := sqlstore.Open(t.Context(), sqlstore.InFolder(t.TempDir()), kme.RandomSecret())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	service := binding.NewService(binding.Options{Store: store, Times: binding.DefaultTimes(),
		Log: slog.New(slog.DiscardHandler)})
	ready := func(ctx context.Context) error {
		if _, ok := ctx.Deadline(); !ok {
			t.Error("a token that hangs would hang /readyz")
		}
		if _, err := store.Lots(ctx); err != nil {
			return fmt.Errorf("%s: %w", secret, err)
		}
		return nil
	}
	s := httptest.NewUnstartedServer(NewHandler(Options{
		Service: service, Clients: everybody(t, client), Metrics: binding.NewMetrics(prometheus.NewRegistry()),
		Gather: http.NotFoundHandler(),
		Ready:  func(ctx context.Context) ([]string, error) { return []string{"a warning"}, ready(ctx) },
	}))
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.Close)
	return s, store
}

func read(t *testing.T) func(resp *http.Response, err error) (int, string) {
	return func(resp *http.Response, err error) (int, string) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
}

const service = "/kme.v1.KeyService/"

func TestHealth(t *testing.T) {
	s, store := serve(t)
	check := func(path string, wantStatus int, wantBody string) {
		t.Helper()
		if status, body := read(t)(s.Client().Get(s.URL + path)); status != wantStatus || body != wantBody {
			t.Errorf("%s: %d, %q, want %d, %q", path, status, body, wantStatus, wantBody)
		}
	}
	check("/healthz", http.StatusOK, "ok\n")
	check("/readyz", http.StatusOK, "ready\nbut a warning\n")
	for _, path := range []string{"/healthz", "/readyz"} {
		if status, _ := read(t)(s.Client().Post(s.URL+path, "text/plain", nil)); status != http.StatusMethodNotAllowed {
			t.Errorf("POST %s: %d", path, status)
		}
	}
	if status, _ := read(t)(s.Client().Get(s.URL + "/")); status != http.StatusNotFound {
		t.Errorf("/: %d", status)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	check("/healthz", http.StatusOK, "ok\n")
	time.Sleep(readyFor) // what was found before is not said for longer
	check("/readyz", http.StatusServiceUnavailable, "not ready\n")
}

func TestJSON(t *testing.T) {
	s, _ := serve(t)
	vector := base64.StdEncoding.EncodeToString(make([]byte, 16))
	long := base64.StdEncoding.EncodeToString(make([]byte, maxRequest))
	for _, c := range []struct {
		name, method, body string
		status             int
		code, reason       string
	}{
		{"a good request", "PrepareVector", `{"imsi":"001010000000001","rands":["` + vector + `"]}`,
			http.StatusOK, "", ""},
		// A newer client may send more than this server knows.
		{"an unknown field", "PrepareVector", `{"imsi":"001010000000001","rands":["` + vector + `"],"plmn":"00101"}`,
			http.StatusOK, "", ""},
		{"no fields", "PrepareVector", `{}`, http.StatusBadRequest, "invalid_argument", "MALFORMED"},
		{"a malformed IMSI", "GetBinding", `{"imsi":"1"}`, http.StatusBadRequest, "invalid_argument", "MALFORMED"},
		{"no binding", "GetBinding", `{"imsi":"001010000000002"}`, http.StatusBadRequest,
			"failed_precondition", "NOT_BOUND"},
		{"no attempt", "EstablishKME",
			`{"imsi":"001010000000002","imei":"35209900000001","attempt_id":"a","payload":"AA=="}`,
			http.StatusBadRequest, "failed_precondition", "NO_ATTEMPT"},
		{"nothing", "PrepareVector", "", http.StatusBadRequest, "invalid_argument", "MALFORMED"},
		{"no JSON", "PrepareVector", `imsi=1`, http.StatusBadRequest, "invalid_argument", "MALFORMED"},
		{"bytes that are not base64", "PrepareVector", `{"imsi":"001010000000001","rands":["*"]}`,
			http.StatusBadRequest, "invalid_argument", "MALFORMED"},
		{"a number for a string", "PrepareVector", `{"imsi":1010000000001,"rands":["` + vector + `"]}`,
			http.StatusBadRequest, "invalid_argument", "MALFORMED"},
		{"above the limit", "EstablishKME",
			`{"imsi":"001010000000002","imei":"35209900000001","attempt_id":"a","payload":"` + long + `"}`,
			http.StatusBadRequest, "invalid_argument", "MALFORMED"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, way := range []string{"with its length", "chunked", "gzip"} {
				req := must.Get[*http.Request](t)(http.NewRequestWithContext(t.Context(), http.MethodPost,
					s.URL+service+c.method, strings.NewReader(c.body)))
				req.Header.Set("Content-Type", "application/json")
				switch way {
				case "chunked":
					req.ContentLength = -1
				case "gzip":
					packed := zip(t, c.body)
					req.Body, req.ContentLength = io.NopCloser(packed), int64(packed.Len())
					req.Header.Set("Content-Encoding", "gzip")
				}
				resp, err := s.Client().Do(req)
				status, body := read(t)(resp, err)
				if got := resp.Header.Get("Kme-Reason"); got != c.reason {
					t.Errorf("%s: Kme-Reason is %q, want %q", way, got, c.reason)
				}
				var answer struct {
					Code    string
					Details []struct{ Type, Value string }
				}
				if err := json.Unmarshal([]byte(body), &answer); err != nil {
					t.Fatal(err)
				}
				if status != c.status || answer.Code != c.code {
					t.Errorf("%s: %d, %s, want %d, %q", way, status, body, c.status, c.code)
				}
				if (len(answer.Details) == 1 && answer.Details[0].Type == "google.rpc.ErrorInfo") != (c.reason != "") {
					t.Errorf("%s: details %v, want an ErrorInfo: %v", way, answer.Details, c.reason != "")
				}
				if !strings.Contains(body, c.reason) {
					t.Errorf("%s: %s does not say %s", way, body, c.reason)
				}
			}
		})
	}
	if status, _ := read(t)(s.Client().Get(s.URL + service + "PrepareVector")); status != http.StatusMethodNotAllowed {
		t.Errorf("GET: %d", status)
	}
	if status, _ := read(t)(s.Client().Post(s.URL+service+"Nothing", "application/json",
		strings.NewReader("{}"))); status != http.StatusNotFound {
		t.Errorf("an unknown method: %d", status)
	}
}

// A client that sends all of a long request before it reads gets its answer.
func TestLongRequestIsAnswered(t *testing.T) {
	s, _ := serve(t)
	config := s.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
	config.NextProtos = []string{"http/1.1"}
	c := must.Get[*tls.Conn](t)(tls.Dial("tcp", s.Listener.Addr().String(), config))
	defer c.Close()
	const size = 5 << 20
	_, err := fmt.Fprintf(c, "POST %sGetBinding HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"+
		"Content-Length: %d\r\n\r\n%s", service, size, strings.Repeat(" ", size))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if status, body := read(t)(resp, err); status != http.StatusBadRequest || !strings.Contains(body, "at most") {
		t.Errorf("%d, %s", status, body)
	}
}

// zip packs a body: what is small on the wire may be large in memory.
func zip(t *testing.T, body string) *bytes.Buffer {
	t.Helper()
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	must.Get[int](t)(io.WriteString(z, body))
	must.Do(t, z.Close())
	return &packed
}

func TestJSONNames(t *testing.T) {
	s, _ := serve(t)
	status, body := read(t)(s.Client().Post(s.URL+service+"PrepareVector", "application/json",
		strings.NewReader(`{"imsi":"001010000000001","rands":["AAECAwQFBgcICQoLDA0ODw=="]}`)))
	var answer map[string]any
	if err := json.Unmarshal([]byte(body), &answer); err != nil || status != http.StatusOK {
		t.Fatalf("%d, %s, %v", status, body, err)
	}
	id, _ := answer["attempt_id"].(string)
	if len(answer) != 3 || fmt.Sprint(answer["rands"]) != "[AAECAwQFBgcICQoLDA0ODw==]" ||
		answer["control"] != "PROVISIONING_ONLY" || len(id) != 32 {
		t.Errorf("answer %v", answer)
	}
	for state, want := range map[binding.State]kmev1.State{
		binding.Pending: kmev1.State_PENDING, binding.Active: kmev1.State_ACTIVE, "": kmev1.State_STATE_UNSPECIFIED,
	} {
		if got := toState(state); got != want {
			t.Errorf("state %q is %s, want %s", state, got, want)
		}
	}
}

// The reason is the same whichever protocol a client speaks, and the cause is in none.
func TestProtocols(t *testing.T) {
	s, store := serve(t)
	for name, options := range map[string][]connect.ClientOption{
		"Connect":  nil,
		"JSON":     {connect.WithProtoJSON()},
		"gRPC":     {connect.WithGRPC()},
		"gRPC-Web": {connect.WithGRPCWeb()},
	} {
		client := kmev1connect.NewKeyServiceClient(s.Client(), s.URL, options...)
		_, err := client.GetBinding(t.Context(), connect.NewRequest(&kmev1.GetBindingRequest{Imsi: "001010000000001"}))
		if connect.CodeOf(err) != connect.CodeFailedPrecondition {
			t.Errorf("%s: %v", name, err)
		}
		checkReason(t, err, "NOT_BOUND")
		for _, more := range [][]connect.ClientOption{nil, {connect.WithSendGzip()}} {
			_, err := kmev1connect.NewKeyServiceClient(s.Client(), s.URL, slices.Concat(options, more)...).EstablishKME(
				t.Context(), connect.NewRequest(&kmev1.EstablishKMERequest{Payload: make([]byte, maxRequest)}))
			if connect.CodeOf(err) != connect.CodeInvalidArgument {
				t.Errorf("%s, above the limit: %v", name, err)
			}
			checkReason(t, err, "MALFORMED")
		}
		vector := &kmev1.PrepareVectorRequest{Imsi: "001010000000001", Rands: [][]byte{make([]byte, 16)}}
		if answer, err := client.PrepareVector(t.Context(), connect.NewRequest(vector)); err != nil ||
			answer.Header().Get("Kme-Reason") != "" {
			t.Errorf("%s: %v, %v", name, answer, err)
		}
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	client := kmev1connect.NewKeyServiceClient(s.Client(), s.URL)
	calls := map[string]func() error{
		"PrepareVector": func() error {
			_, err := client.PrepareVector(t.Context(),
				connect.NewRequest(&kmev1.PrepareVectorRequest{Imsi: "001010000000001",
					Rands: [][]byte{make([]byte, 16)}}))
			return err
		},
		"EstablishKME": func() error {
			_, err := client.EstablishKME(t.Context(),
				connect.NewRequest(&kmev1.EstablishKMERequest{Imsi: "001010000000001", Imei: "35209900000001"}))
			return err
		},
		"ReportAuthentication": func() error {
			_, err := client.ReportAuthentication(t.Context(),
				connect.NewRequest(&kmev1.ReportAuthenticationRequest{Imsi: "001010000000001"}))
			return err
		},
		"RestoreRAND": func() error {
			_, err := client.RestoreRAND(t.Context(),
				connect.NewRequest(&kmev1.RestoreRANDRequest{Imsi: "001010000000001", Rand: make([]byte, 16)}))
			return err
		},
		"GetBinding": func() error {
			_, err := client.GetBinding(t.Context(),
				connect.NewRequest(&kmev1.GetBindingRequest{Imsi: "001010000000001"}))
			return err
		},
	}
	for name, call := range calls {
		err := call()
		if connect.CodeOf(err) != connect.CodeUnavailable || strings.Contains(err.Error(), "sql") ||
			strings.Contains(err.Error(), "closed") {
			t.Errorf("%s on a closed database: %v, want unavailable without the cause", name, err)
		}
		checkReason(t, err, "STORE_UNAVAILABLE")
	}
}

// What is no IMSI or IMEI is refused before anything else is done with it: the store, which is closed, is not asked.
func TestMalformed(t *testing.T) {
	s, store := serve(t)
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	c := kmev1connect.NewKeyServiceClient(s.Client(), s.URL)
	ctx := t.Context()
	const imsi, imei = "001010000000001", "35209900000001"
	establish := func(imsi, imei string) error {
		_, err := c.EstablishKME(ctx, connect.NewRequest(&kmev1.EstablishKMERequest{Imsi: imsi, Imei: imei}))
		return err
	}
	if err := establish(imsi, imei); connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("of both good: %v", err)
	}
	for name, bad := range map[string]string{
		"empty": "", "short": imsi[:5], "long": imsi + "0", "with a sign": "+" + imsi[1:],
		"with a zero byte": imsi[:14] + "\x00", "with a letter": "12a456",
	} {
		for method, err := range map[string]error{
			"EstablishKME": establish(bad, imei),
			"PrepareVector": second(c.PrepareVector(ctx,
				connect.NewRequest(&kmev1.PrepareVectorRequest{Imsi: bad, Rands: [][]byte{make([]byte, 16)}}))),
			"RestoreRAND": second(c.RestoreRAND(ctx,
				connect.NewRequest(&kmev1.RestoreRANDRequest{Imsi: bad, Rand: make([]byte, 16)}))),
			"ReportAuthentication": second(c.ReportAuthentication(ctx,
				connect.NewRequest(&kmev1.ReportAuthenticationRequest{Imsi: bad}))),
			"GetBinding": second(c.GetBinding(ctx, connect.NewRequest(&kmev1.GetBindingRequest{Imsi: bad}))),
			"RevokeBinding": second(c.RevokeBinding(ctx,
				connect.NewRequest(&kmev1.RevokeBindingRequest{Imsi: bad}))),
			"OpenProvisioning": second(c.OpenProvisioning(ctx,
				connect.NewRequest(&kmev1.OpenProvisioningRequest{Imsi: bad}))),
		} {
			if connect.CodeOf(err) != connect.CodeInvalidArgument {
				t.Errorf("%s of an IMSI %s: %v", method, name, err)
				continue
			}
			checkReason(t, err, "MALFORMED")
		}
	}
	for name, bad := range map[string]string{
		"empty": "", "short": imei[1:], "with the wrong check digit": "352099000000011", "long": imei + "000",
	} {
		err := establish(imsi, bad)
		if connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("an IMEI %s: %v", name, err)
			continue
		}
		checkReason(t, err, "MALFORMED")
	}
}

func second[T any](_ T, err error) error { return err }
