package api

import (
	"context"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/kme"
)

// Every method, by every role, for a PLMN that the client may name and one that it may not.
func TestWhoMayDoWhat(t *testing.T) {
	may := map[string][]Role{
		"PrepareVector":        {RoleHSS},
		"EstablishKME":         {RoleHSS},
		"ReportAuthentication": {RoleHSS},
		"RestoreRAND":          {RoleHSS},
		"CheckEquipment":       {RoleHSS, RoleEIR},
		"GetBinding":           {RoleHSS, RoleAdmin, RoleMonitor},
		"ListBindings":         {RoleAdmin, RoleMonitor},
		"OpenProvisioning":     {RoleAdmin},
		"RevokeBinding":        {RoleAdmin},
		"Stream":               {RoleHSS, RoleEIR, RoleAdmin, RoleMonitor},
	}
	methods := kmev1.File_kme_v1_kme_proto.Services().ByName("KeyService").Methods()
	if methods.Len() != len(may) {
		t.Errorf("the service has %d methods, this table %d", methods.Len(), len(may))
	}
	store, err := sqlstore.Open(t.Context(), sqlstore.InFolder(t.TempDir()), kme.RandomSecret())
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	o := Options{Metrics: binding.NewMetrics(prometheus.NewRegistry()), Gather: http.NotFoundHandler(),
		Service: binding.NewService(binding.Options{Store: store, Times: binding.DefaultTimes(),
			Log: slog.New(slog.DiscardHandler)})}
	ask := func(clients *Clients, r *http.Request) string {
		w := httptest.NewRecorder()
		o := o
		o.Clients = clients
		NewHandler(o).ServeHTTP(w, r)
		if w.Code == http.StatusNotFound && !strings.Contains(w.Body.String(), "code") {
			t.Errorf("%s: %d %s", r.URL.Path, w.Code, w.Body)
		}
		return w.Body.String()
	}
	check := func(what string, names bool, some []Role, ask func(clients *Clients, imsi string) string) {
		refused := func(clients *Clients, imsi string) bool {
			return strings.Contains(ask(clients, imsi), "this client may not do that")
		}
		for _, role := range roles {
			clients := everybody(t, Client{Name: "test", Roles: []Role{role}, PLMNs: []string{"00101", "310150"}})
			want := slices.Contains(some, role)
			for imsi, named := range map[string]bool{"001010123456789": true, "310150123456789": true,
				"001020123456789": false, "310151123456789": false, "00101": true, "": false} {
				if strings.HasPrefix(what, "CheckEquipment") && imsi == "" {
					named = true // a device alone is of no PLMN
				}
				if got := !refused(clients, imsi); got != (want && (named || !names)) {
					t.Errorf("%s by %s for %q is allowed: %v", what, role, imsi, got)
				}
			}
		}
		if refused(everybody(t, Client{Name: "test", Roles: roles, PLMNs: []string{all}}), "262011234567890") {
			t.Errorf("%s is refused with all roles", what)
		}
		if !refused(new(Clients), "001010123456789") {
			t.Errorf("%s is allowed for nobody we know", what)
		}
	}
	for i := range methods.Len() {
		method := methods.Get(i)
		name := string(method.Name())
		if !method.IsStreamingClient() && !method.IsStreamingServer() {
			names := method.Input().Fields().ByName("imsi") != nil
			check(name, names, may[name], func(clients *Clients, imsi string) string {
				body := `{}`
				if names {
					body = `{"imsi": "` + imsi + `"}`
				}
				r := httptest.NewRequest("POST", service+name, strings.NewReader(body))
				r.Header.Set("Content-Type", "application/json")
				return ask(clients, r)
			})
			continue
		}
		// What it carries is methods' requests, each admitted as the method is.
		check(name, false, may[name], func(clients *Clients, imsi string) string {
			return ask(clients, streamOf(`{}`))
		})
		calls := method.Input().Fields().ByName("calls").Message().Oneofs().ByName("call").Fields()
		for i := range calls.Len() {
			call := calls.Get(i)
			carried := strings.TrimSuffix(string(call.Message().Name()), "Request")
			check(carried+" in a stream", true, may[carried], func(clients *Clients, imsi string) string {
				return ask(clients, streamOf(fmt.Sprintf(`{"calls":[{"%s":{"imsi":"%s"}}]}`, call.Name(), imsi)))
			})
		}
	}
}

// streamOf is a stream that has one message, and waits for its answers.
func streamOf(message string) *http.Request {
	r := httptest.NewRequest("POST", kmev1connect.KeyServiceStreamProcedure, strings.NewReader(enveloped(message)))
	r.Header.Set("Content-Type", "application/connect+json")
	r.ProtoMajor, r.ProtoMinor = 2, 0
	return r
}

// enveloped has a message's flags and length before it.
func enveloped(message string) string {
	return string(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message)))) + message
}

// Who may provision, by the configuration of the client and the name of the origin.
func TestProvisionFrom(t *testing.T) {
	for _, c := range []struct {
		from         []string
		origin, imsi string
		want         bool
	}{
		{nil, "", "001010000000001", true},
		{nil, "mme.epc.mnc001.mcc001.3gppnetwork.org", "001010000000001", true},
		{nil, "MME.EPC.MNC001.MCC001.3GPPNETWORK.ORG", "001010000000001", true},
		{nil, "amf.5gc.mnc410.mcc310.3gppnetwork.org", "310410000000001", true},
		{nil, "amf.5gc.mnc410.mcc310.3gppnetwork.org", "310411000000001", false},
		{nil, "mme.epc.mnc002.mcc001.3gppnetwork.org", "001010000000001", false},
		// 001 010, and 001 01 by another reading
		{nil, "mme.epc.mnc010.mcc001.3gppnetwork.org", "001010000000001", true},
		{nil, "mme.epc.mnc101.mcc001.3gppnetwork.org", "001010000000001", false},
		{nil, "mme.epc.mnc001.mcc001.3gppnetwork.org.example", "001010000000001", false},
		{nil, "mnc001.mcc001.3gppnetwork.org", "001010000000001", false},
		{nil, "mme.example", "001010000000001", false},
		{[]string{"home"}, "", "001010000000001", true},
		{[]string{"mme.example"}, "MME.example", "001010000000001", true},
		{[]string{"MME.example"}, "mme.example", "001010000000001", true},
		{[]string{"mme.example"}, "a.mme.example", "001010000000001", false},
		{[]string{"mme.example"}, "", "001010000000001", false},
		{[]string{"*.example"}, "mme.example", "001010000000001", true},
		{[]string{"*.example"}, "mmeexample", "001010000000001", false},
		{[]string{"other", "any"}, "whoever", "001010000000001", true},
		{[]string{"any"}, "", "001010000000001", true},
		{[]string{"26202"}, "mme.epc.mnc002.mcc262.3gppnetwork.org", "001010000000001", true},
		{[]string{"310410"}, "mme.epc.mnc410.mcc310.3gppnetwork.org", "001010000000001", true},
		{[]string{"310410"}, "mme.epc.mnc041.mcc310.3gppnetwork.org", "310410000000001", false},
		{[]string{"26202"}, "mme.epc.mnc001.mcc001.3gppnetwork.org", "001010000000001", false},
		{[]string{"26202"}, "mme.epc.mnc002.mcc262.3gppnetwork.org.example", "262020000000001", false},
		{[]string{"26202"}, "26202", "262020000000001", false},
		{[]string{"26202"}, "", "262020000000001", false},
	} {
		client := Client{Name: "hss", SAN: "hss", Roles: []Role{RoleHSS}, PLMNs: []string{all}, ProvisionFrom: c.from}
		all, err := NewClients([]Client{client})
		if err != nil {
			t.Fatal(err)
		}
		o, err := all.bySAN["hss"].origin(c.origin, c.imsi, false)
		if err != nil || (o.Provisioning == binding.Allowed) != c.want || o.Name.String() != strings.ToLower(c.origin) {
			t.Errorf("provision_from %q, origin %q, IMSI %s: %+v, %v, want %v", c.from, c.origin, c.imsi,
				o, err, c.want)
		}
		if o, _ := all.bySAN["hss"].origin(c.origin, c.imsi, true); o.Provisioning != binding.Declined {
			t.Errorf("who declines: %+v", o)
		}
	}
	for _, bad := range []string{"", "a b", "*", "*.", "*.*.x", "a*", "1", "2620", "2620212"} {
		_, err := NewClients([]Client{{Name: "hss", SAN: "hss", Roles: []Role{RoleHSS}, PLMNs: []string{all},
			ProvisionFrom: []string{bad}}})
		if !strings.Contains(fmt.Sprint(err), fmt.Sprintf("provision_from has %q", bad)) {
			t.Errorf("provision_from %q: %v", bad, err)
		}
	}
}

func TestClients(t *testing.T) {
	uid := 1000
	good := []Client{
		{Name: "a", SAN: "hss.example", Roles: []Role{RoleHSS}, PLMNs: []string{"00101"}},
		{Name: "b", SAN: "spiffe://example/ops", Roles: []Role{RoleAdmin}, PLMNs: []string{all}},
		{Name: "c", UID: &uid, Roles: []Role{RoleMonitor}, PLMNs: []string{"310150"}},
		{Name: "d", SAN: "metrics.example", Roles: []Role{RoleMetrics}},
	}
	c, err := NewClients(good)
	if err != nil {
		t.Fatal(err)
	}
	ops, _ := url.Parse("spiffe://example/ops")
	for _, e := range []struct {
		name        string
		certificate *x509.Certificate
		uid         int
		want        string
	}{
		{"a DNS name", &x509.Certificate{DNSNames: []string{"other", "hss.example"}}, -1, "a"},
		{"a URI", &x509.Certificate{URIs: []*url.URL{ops}}, -1, "b"},
		{"a user", nil, 1000, "c"},
		{"another user", nil, 1001, ""},
		{"nobody", nil, -1, ""},
		{"no common name", &x509.Certificate{}, 1000, ""},
		{"another name", &x509.Certificate{DNSNames: []string{"hss.example.evil", "*.example"}}, 1000, ""},
	} {
		got := ""
		if client := c.of(e.certificate, e.uid); client != nil {
			got = client.Name
		}
		if got != e.want {
			t.Errorf("%s is %q, want %q", e.name, got, e.want)
		}
	}
	if !c.OtherUsers(os.Getuid()) || c.OtherUsers(uid) {
		t.Error("the users who are to reach the socket")
	}
	negative := -1
	for want, e := range map[string]Client{
		"no name":              {SAN: "x", Roles: []Role{RoleHSS}, PLMNs: []string{all}},
		"either a san":         {Name: "x", Roles: []Role{RoleHSS}, PLMNs: []string{all}},
		"a san or a uid":       {Name: "x", SAN: "x", UID: &uid, Roles: []Role{RoleHSS}, PLMNs: []string{all}},
		"no roles":             {Name: "x", SAN: "x", PLMNs: []string{all}},
		"roles has \"root\"":   {Name: "x", SAN: "x", Roles: []Role{"root"}, PLMNs: []string{all}},
		"no plmns":             {Name: "x", SAN: "x", Roles: []Role{RoleHSS}},
		"or write [all]":       {Name: "x", SAN: "x", Roles: []Role{RoleMetrics, RoleMonitor}},
		"plmns has \"0010\"":   {Name: "x", SAN: "x", Roles: []Role{RoleHSS}, PLMNs: []string{"0010"}},
		"plmns has \"00101a\"": {Name: "x", SAN: "x", Roles: []Role{RoleHSS}, PLMNs: []string{"00101a"}},
		"another client has":   {Name: "x", SAN: "hss.example", Roles: []Role{RoleHSS}, PLMNs: []string{all}},
		"rate is a number of":  {Name: "x", SAN: "x", Roles: []Role{RoleHSS}, PLMNs: []string{all}, Rate: -1},
		"a second, or 0":       {Name: "x", SAN: "x", Roles: []Role{RoleHSS}, PLMNs: []string{all}, Rate: math.NaN()},
		"uid is a number":      {Name: "x", UID: &negative, Roles: []Role{RoleHSS}, PLMNs: []string{all}},
	} {
		if _, err := NewClients(append(slices.Clone(good), e)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v does not say %q", e, err, want)
		}
	}
}

// Health is for clients, in gRPC's own words too; the counts are for those with the role metrics; and that the process
// runs is no secret.
func TestHealthAndMetrics(t *testing.T) {
	var log strings.Builder
	registry := prometheus.NewRegistry()
	o := Options{
		Service: binding.NewService(binding.Options{Times: binding.DefaultTimes(),
			Log: slog.New(slog.NewJSONHandler(&log, nil))}),
		Metrics: binding.NewMetrics(registry),
		Gather:  http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "kme_counts") }),
	}
	ask := func(clients *Clients, broken error, method, path string) (int, string) {
		r := httptest.NewRequest(method, path, strings.NewReader(`{}`))
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		o := o
		o.Clients, o.Ready = clients, func(context.Context) ([]string, error) { return nil, broken }
		NewHandler(o).ServeHTTP(w, r)
		return w.Code, w.Body.String()
	}
	of := func(r Role) *Clients {
		return everybody(t, Client{Name: "test", Roles: []Role{r}, PLMNs: []string{"00101"}})
	}
	for _, c := range []struct {
		method, path string
		broken       error
		clients      *Clients
		code         int
		text         string
	}{
		{"GET", "/healthz", nil, new(Clients), http.StatusOK, "ok\n"},
		{"GET", "/readyz", nil, new(Clients), http.StatusForbidden, "this client may not do that\n"},
		{"GET", "/metrics", nil, new(Clients), http.StatusForbidden, "this client may not do that\n"},
		{"GET", "/metrics", nil, of(RoleMonitor), http.StatusForbidden, "this client may not do that\n"},
		{"GET", "/metrics", nil, of(RoleAdmin), http.StatusForbidden, "this client may not do that\n"},
		{"GET", "/metrics", nil, of(RoleMetrics), http.StatusOK, "kme_counts"},
		{"POST", health, nil, new(Clients), http.StatusForbidden, `"code":"permission_denied"`},
		{"POST", health, nil, of(RoleHSS), http.StatusOK, `"SERVING`},
		{"POST", health, errors.New("away"), of(RoleHSS), http.StatusOK, `"NOT_SERVING`},
	} {
		code, text := ask(c.clients, c.broken, c.method, c.path)
		text = strings.ReplaceAll(text, "SERVING_STATUS_", "")
		if code != c.code || !strings.Contains(text, c.text) {
			t.Errorf("%s: %d %s, want %d %s", c.path, code, text, c.code, c.text)
		}
	}
	for _, role := range roles {
		if code, text := ask(of(role), nil, "GET", "/readyz"); code != http.StatusOK || text != "ready\n" {
			t.Errorf("/readyz for %s: %d %s", role, code, text)
		}
		if code, text := ask(of(role), nil, "GET", "/healthz"); code != http.StatusOK {
			t.Errorf("/healthz for %s: %d %s", role, code, text)
		}
	}
	for _, path := range []string{"/readyz", "/metrics", health} {
		if !strings.Contains(log.String(), `"path":"`+path+`"`) {
			t.Errorf("who asked for %s, and was refused, is not in the log: %s", path, log.String())
		}
	}
}

// Nothing that a client asks for, whatever its role, is read into memory at any length, and that is logged.
func TestLongRequests(t *testing.T) {
	var log strings.Builder
	handler := NewHandler(Options{
		Service: binding.NewService(binding.Options{Times: binding.DefaultTimes(),
			Log: slog.New(slog.NewTextHandler(&log, nil))}),
		Clients: everybody(t, Client{Name: "test", Roles: roles, PLMNs: []string{all}}),
		Metrics: binding.NewMetrics(prometheus.NewRegistry()), Gather: http.NotFoundHandler(),
		Ready: func(context.Context) ([]string, error) { return nil, nil },
	})
	calls := []string{health}
	for procedure := range allowed {
		if procedure != kmev1connect.KeyServiceStreamProcedure { // whose messages have a bound of their own
			calls = append(calls, procedure)
		}
	}
	for _, call := range calls {
		long := `{` + strings.Repeat(" ", maxRequest) + `}`
		known := httptest.NewRequest("POST", call, strings.NewReader(long))
		unknown := httptest.NewRequest("POST", call, io.MultiReader(strings.NewReader(long)))
		packed := httptest.NewRequest("POST", call, zip(t, long))
		packed.Header.Set("Content-Encoding", "gzip")
		for i, r := range []*http.Request{known, unknown, packed} {
			r.Header.Set("Content-Type", "application/json")
			log.Reset()
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, r)
			if w.Code != http.StatusBadRequest || w.Header().Get("Kme-Reason") != "MALFORMED" ||
				strings.Count(log.String(), "msg=refused reason=MALFORMED") != 1 {
				t.Errorf("%s, %d: %d %s; the log has %s", call, i, w.Code, w.Body, &log)
			}
		}
	}
}

// However many ask, over HTTP and gRPC, whether the service is ready, its HSM and its store are asked once a second.
func TestReadyOnceASecond(t *testing.T) {
	var asked atomic.Int64
	handler := NewHandler(Options{
		Service: binding.NewService(binding.Options{Times: binding.DefaultTimes(), Log: slog.New(slog.DiscardHandler)}),
		Clients: everybody(t, Client{Name: "test", Roles: []Role{RoleMetrics}, PLMNs: []string{all}}),
		Metrics: binding.NewMetrics(prometheus.NewRegistry()), Gather: http.NotFoundHandler(),
		Ready: func(ctx context.Context) ([]string, error) {
			if _, ok := ctx.Deadline(); !ok {
				t.Error("a token that hangs would hang all who ask")
			}
			asked.Add(1)
			return []string{"one is away"}, nil
		},
	})
	synctest.Test(t, func(t *testing.T) {
		for tenth := range 21 {
			var all sync.WaitGroup
			for range 16 {
				all.Go(func() {
					for method, path := range map[string]string{"GET": "/readyz", "POST": health} {
						r := httptest.NewRequest(method, path, strings.NewReader(`{}`))
						r.Header.Set("Content-Type", "application/json")
						w := httptest.NewRecorder()
						handler.ServeHTTP(w, r)
						if w.Code != http.StatusOK || method == "GET" && w.Body.String() != "ready\nbut one is away\n" {
							t.Errorf("%s: %d %s", path, w.Code, w.Body)
						}
					}
				})
			}
			all.Wait()
			if n := asked.Load(); n != int64(1+tenth/10) {
				t.Errorf("asked %d times in %d tenths of a second", n, tenth)
			}
			time.Sleep(time.Second / 10)
		}
	})
}

// An IMSI is of the longest PLMN that the configuration names, for whichever client.
func TestPLMNs(t *testing.T) {
	client := func(name string, plmns ...string) Client {
		return Client{Name: name, SAN: name, Roles: []Role{RoleHSS}, PLMNs: plmns}
	}
	for _, c := range []struct {
		others  []Client
		mine    []string
		imsi    string
		allowed bool
	}{
		{nil, []string{"31041"}, "310410000000001", true}, // nobody says that there is another
		{[]Client{client("b", "310410")}, []string{"31041"}, "310410000000001", false},
		{[]Client{client("b", "310410")}, []string{"31041"}, "310411000000001", true},
		{[]Client{client("b", "310410")}, []string{"31041", "310410"}, "310410000000001", true},
		{[]Client{client("b", "31041")}, []string{"310410"}, "310410000000001", true},
		{[]Client{client("b", "31041")}, []string{"310410"}, "310411000000001", false},
		{[]Client{client("b", "31041", "310410")}, []string{all}, "310410000000001", true},
		{[]Client{client("b", all)}, []string{"31041"}, "310410000000001", true},
		{[]Client{{Name: "b", SAN: "b", Roles: []Role{RoleHSS}, PLMNs: []string{all},
			ProvisionFrom: []string{"310410"}}},
			[]string{"31041"}, "310410000000001", false},
	} {
		clients := everybody(t, client("a", c.mine...), c.others...)
		if got := clients.byUID[-1].view.Has(c.imsi); got != c.allowed {
			t.Errorf("a client for %q beside %+v may name %s: %v", c.mine, c.others, c.imsi, got)
		}
	}
	for _, c := range []struct {
		named        []string
		from         string
		origin, imsi string
		want         bool
	}{
		// A home is that of the IMSI's own PLMN.
		{[]string{all}, home, "mme.epc.mnc041.mcc310.3gppnetwork.org", "310410000000001", true},
		{[]string{"31041"}, home, "mme.epc.mnc041.mcc310.3gppnetwork.org", "310410000000001", true},
		{[]string{"310410"}, home, "mme.epc.mnc041.mcc310.3gppnetwork.org", "310410000000001", false},
		{[]string{"310410"}, home, "mme.epc.mnc410.mcc310.3gppnetwork.org", "310410000000001", true},
		{[]string{"310410"}, home, "mme.epc.mnc041.mcc310.3gppnetwork.org", "310411000000001", true},
		{[]string{"31041"}, home, "mme.epc.mnc410.mcc310.3gppnetwork.org", "310410000000001", false},
		// A name whose MNC begins with 0 has two readings, of which the longer counts if it is named.
		{[]string{"31041"}, "31041", "mme.epc.mnc041.mcc310.3gppnetwork.org", "310410000000001", true},
		{[]string{"310041"}, "31041", "mme.epc.mnc041.mcc310.3gppnetwork.org", "310410000000001", false},
		{[]string{"310041"}, "310041", "mme.epc.mnc041.mcc310.3gppnetwork.org", "310410000000001", true},
	} {
		a := client("a", all)
		a.ProvisionFrom = []string{c.from}
		clients := everybody(t, a, client("b", c.named...))
		o, err := clients.byUID[-1].origin(c.origin, c.imsi, false)
		if err != nil || (o.Provisioning == binding.Allowed) != c.want {
			t.Errorf("%s, with %q named, for %s from %s: %+v, %v", c.from, c.named, c.imsi, c.origin, o, err)
		}
	}
}
