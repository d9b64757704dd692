package api

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/kme"
)

func device(t *testing.T, n int) kme.IMEI {
	t.Helper()
	imei, err := kme.ParseIMEI(fmt.Sprintf("35209900%06d", n))
	if err != nil {
		t.Fatal(err)
	}
	return imei
}

// bind makes a binding in a store.
func bind(t *testing.T, store binding.Store, imsi string, n int) {
	t.Helper()
	parsed, err := kme.ParseIMSI(imsi)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	q := binding.VectorRequest{IMSI: parsed, Origin: binding.Origin{Provisioning: binding.Allowed}, Now: now,
		AttemptTTL: time.Hour, PendingVectors: 3}
	d, err := store.Prepare(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	b := &binding.Binding{IMSI: parsed, IMEI: device(t, n), Manufacturer: "m", Lot: "L1", State: binding.Pending,
		Sealed: []byte{1}, Established: now, Expires: now.Add(time.Hour), AttemptID: d.Attempt.ID,
		PayloadSHA256: []byte{1}, NWSig: []byte{1}}
	if err := store.Establish(t.Context(), b, []byte("tag of "+imsi), true, now); err != nil {
		t.Fatal(err)
	}
}

// A page has what its client may name, as many as it asked for; no IMSI is in its token, and the token is good for the
// bindings that this client asked for, at every instance, and for nothing else.
func TestPages(t *testing.T) {
	store, err := sqlstore.Open(t.Context(), sqlstore.InFolder(t.TempDir()), kme.RandomSecret())
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	var mine, every []string // in the order of all IMSIs
	for i := range 12 {
		others, own := fmt.Sprintf("00101%010d", i), fmt.Sprintf("00102%010d", i)
		bind(t, store, others, 2*i)
		bind(t, store, own, 2*i+1)
		mine, every = append(mine, own), append(every, others, own)
	}
	bind(t, store, "001029000000001", 100) // of the longer PLMN 001 029, which another client has
	every = append(every, "001029000000001")
	slices.Sort(every)
	key := kme.RandomSecret()
	list := []Client{
		{Name: "a", SAN: "a", Roles: []Role{RoleMonitor}, PLMNs: []string{"00102"}},
		{Name: "b", SAN: "b", Roles: []Role{RoleMonitor}, PLMNs: []string{"00102"}},
		{Name: "c", SAN: "c", Roles: []Role{RoleMonitor}, PLMNs: []string{"001029"}},
		{Name: "all", SAN: "all", Roles: []Role{RoleMonitor}, PLMNs: []string{all}},
	}
	type page struct {
		Code     string
		Bindings []struct{ Imsi string }
		Next     string `json:"next_page_token"`
	}
	ask := func(client string, key kme.Secret, request map[string]any) (p page, text string) {
		t.Helper()
		clients, err := NewClients(list)
		if err != nil {
			t.Fatal(err)
		}
		clients.byUID[-1] = clients.bySAN[client]
		handler := NewHandler(Options{
			Service: binding.NewService(binding.Options{Store: store, Times: binding.DefaultTimes(),
				Log: slog.New(slog.DiscardHandler)}),
			Clients: clients, Metrics: binding.NewMetrics(prometheus.NewRegistry()), Gather: http.NotFoundHandler(),
			PageKey: key})
		body, err := json.Marshal(request)
		if err != nil {
			t.Fatal(err)
		}
		r := httptest.NewRequest("POST", service+"ListBindings", bytes.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil {
			t.Fatal(w.Body, err)
		}
		return p, w.Body.String()
	}
	walk := func(client string, size int) (all []string, pages []int, tokens []string) {
		t.Helper()
		for token := ""; ; {
			p, text := ask(client, key, map[string]any{"page_size": size, "page_token": token})
			if p.Code != "" || len(pages) > 30 {
				t.Fatal(text)
			}
			for _, b := range p.Bindings {
				all = append(all, b.Imsi)
			}
			pages = append(pages, len(p.Bindings))
			if token = p.Next; token == "" {
				return all, pages, tokens
			}
			tokens = append(tokens, token)
		}
	}
	got, sizes, tokens := walk("a", 5)
	if !slices.Equal(got, mine) || !slices.Equal(sizes, []int{5, 5, 2}) {
		t.Errorf("a sees %v in pages of %v", got, sizes)
	}
	if got, sizes, _ := walk("a", 6); !slices.Equal(got, mine) || !slices.Equal(sizes, []int{6, 6}) {
		t.Errorf("a sees %v in pages of %v", got, sizes)
	}
	if got, _, _ := walk("c", 5); !slices.Equal(got, []string{"001029000000001"}) {
		t.Errorf("c sees %v", got)
	}
	if got, _, _ := walk("all", 7); !slices.Equal(got, every) {
		t.Errorf("who may name all sees %v", got)
	}
	_, _, other := walk("a", 5)
	for i, token := range tokens {
		raw, err := base64.RawURLEncoding.DecodeString(token)
		for _, text := range []string{token, string(raw)} {
			if err != nil || strings.Contains(text, "00102") || strings.Contains(text, mine[0][5:]) {
				t.Errorf("token %q: %v", text, err)
			}
		}
		if token == other[i] || len(token) != len(tokens[0]) {
			t.Errorf("token %s for the same page is %s", token, other[i])
		}
	}
	token := tokens[0]
	flipped := []byte(token)
	flipped[3] ^= 1
	for what, p := range map[string]struct {
		client string
		key    kme.Secret
		token  string
		imei   string
	}{
		"another client of the same PLMN": {"b", key, token, ""},
		"another client":                  {"c", key, token, ""},
		"a client that may name all":      {"all", key, token, ""},
		"another device":                  {"a", key, token, device(t, 1).String()},
		"another key":                     {"a", kme.RandomSecret(), token, ""},
		"a bit flipped":                   {"a", key, string(flipped), ""},
		"cut off":                         {"a", key, token[:20], ""},
		"an IMSI":                         {"a", key, mine[4], ""},
		"what is no base64":               {"a", key, "!", ""},
	} {
		got, text := ask(p.client, p.key, map[string]any{"page_token": p.token, "imei": p.imei})
		if got.Code != "invalid_argument" || len(got.Bindings) > 0 ||
			!strings.Contains(text, "begin again without one") {
			t.Errorf("%s: %s", what, text)
		}
	}
	if got, text := ask("a", key, map[string]any{"imei": "1"}); got.Code != "invalid_argument" {
		t.Errorf("a malformed IMEI: %s", text)
	}
}
