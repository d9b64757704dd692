package api

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/kme"
)

// The names of statuses and reasons are those of the protocol; a device that nothing is known of is refused where the
// policy says so, with the reason and the code of UNKNOWN_DEVICE.
func TestCheckEquipmentAnswers(t *testing.T) {
	store, err := sqlstore.Open(t.Context(), sqlstore.InFolder(t.TempDir()), kme.RandomSecret())
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	list := []binding.Listing{{Prefix: "35209900", Status: binding.Greylisted}, {Prefix: "35209901",
		Status: binding.Blacklisted}}
	if _, err := store.List(t.Context(), list); err != nil {
		t.Fatal(err)
	}
	policy := binding.DefaultEquipmentPolicy()
	policy.NotInLot = binding.Unknown
	eir := binding.NewService(binding.Options{Store: store, Listings: store, Equipment: &policy,
		Times: binding.DefaultTimes(), Log: slog.New(slog.DiscardHandler)})
	if err := eir.LoadListings(t.Context()); err != nil {
		t.Fatal(err)
	}
	h := NewHandler(Options{Service: eir, Metrics: binding.NewMetrics(prometheus.NewRegistry()),
		Gather:  http.NotFoundHandler(),
		Clients: everybody(t, Client{Name: "eir", Roles: []Role{RoleEIR}, PLMNs: []string{"00101"}})})
	for body, want := range map[string]string{
		`{"imei":"35209900000001"}`:                                `{"status":"GREYLISTED","reason":"LISTED"}`,
		`{"imei":"3520990100000101","imsi":"001010000000001"}`:     `{"status":"BLACKLISTED","reason":"LISTED"}`,
		`{"imei":"49015420323751","imsi":"001010000000001"}`:       `UNKNOWN_DEVICE`,
		`{"imei":"49015420323751"}`:                                `UNKNOWN_DEVICE`,
		`{"imei":"4901542032375","imsi":"001010000000001"}`:        `MALFORMED`,
		`{"imei":"49015420323751","imsi":"00101"}`:                 `MALFORMED`,
		`{"imei":"49015420323751","imsi":"001020000000001"}`:       `CALLER_NOT_ALLOWED`,
		`{"imei":"352099000000013","imsi":"001010000000001"}`:      `MALFORMED`, // its check digit
		`{"imsi":"001010000000001"}`:                               `MALFORMED`,
		`{"imei":"35209900000001","imsi":"001010000000001\u0000"}`: `MALFORMED`,
	} {
		r := httptest.NewRequest("POST", service+"CheckEquipment", strings.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		got := w.Body.String()
		if reason := w.Header().Get(kme.ReasonHeader); reason != "" {
			got = reason
		}
		if strings.ReplaceAll(got, " ", "") != want || (w.Code == http.StatusNotFound) != (want == "UNKNOWN_DEVICE") {
			t.Errorf("%s: %d %s, want %s", body, w.Code, w.Body, want)
		}
	}
}
