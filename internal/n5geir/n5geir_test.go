package n5geir

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// asked makes a request, and holds its answer to 3GPP's document.
func asked(t *testing.T, o Options, method, target string, header ...string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequest(method, target, nil)
	for _, h := range header {
		key, value, _ := strings.Cut(h, ": ")
		r.Header.Add(key, value)
	}
	a := httptest.NewRecorder()
	Handler(o).ServeHTTP(a, r)
	(&openAPI{t}).checkAnswer(a)
	return a
}

const (
	pei  = "pei=imei-352099001761481"
	supi = "supi=imsi-001010123456789"
)

// What a query asks, and which cause a query has that asks nothing. The check gives every status, and may not be asked
// of anything else.
func TestQuery(t *testing.T) {
	const ok, missing, incorrect, optional, unknown = "WHITELISTED", "MANDATORY_QUERY_PARAM_MISSING",
		"MANDATORY_QUERY_PARAM_INCORRECT", "OPTIONAL_QUERY_PARAM_INCORRECT", "ERROR_EQUIPMENT_UNKNOWN"
	for _, c := range []struct {
		query, want string
		code        int
		imei, imsi  string
	}{
		{pei + "&" + supi, ok, 200, "35209900176148", "001010123456789"},
		{pei, ok, 200, "35209900176148", ""},
		{supi + "&" + pei + "&gpsi=msisdn-491711234567&supported-features=0", ok, 200, "35209900176148",
			"001010123456789"},
		{"pei=imeisv-3520990017614823", ok, 200, "35209900176148", ""},
		{"pei=imei%2D352099001761480", ok, 200, "35209900176148", ""}, // a spare digit
		{pei + "&supi=nai-user%40example.org", ok, 200, "35209900176148", ""},
		{pei + "&gpsi=extid-a%40b&supported-features=", ok, 200, "35209900176148", ""},
		{"pei=mac-00-00-5E-00-53-00", unknown, 404, "", ""},
		{"pei=mac-00-00-5E-00-53-00-untrusted&" + supi, unknown, 404, "", ""},
		{"pei=eui-AC-DE-48-23-45-67-01-9F", unknown, 404, "", ""},
		{"", missing, 400, "", ""},
		{supi, missing, 400, "", ""},
		{"PEI=imei-352099001761481", missing, 400, "", ""},
		{"pei=", incorrect, 400, "", ""},
		{"pei", incorrect, 400, "", ""},
		{"pei=imei-352099001761482", incorrect, 400, "", ""},
		{"pei=352099001761481", incorrect, 400, "", ""},
		{"pei=imei-35209900176148x", incorrect, 400, "", ""},
		{pei + "&" + pei, incorrect, 400, "", ""},
		{"pei=mac-00-00-5E-00-53-00&supi=x", optional, 400, "", ""},
		{pei + "&supi=", optional, 400, "", ""},
		{pei + "&supi=imsi-00101", optional, 400, "", ""},
		{pei + "&supi=suci-0-001-01-0-0-0-01", optional, 400, "", ""},
		{pei + "&" + supi + "&" + supi, optional, 400, "", ""},
		{pei + "&gpsi=491711234567", optional, 400, "", ""},
		{pei + "&gpsi=extid-a", optional, 400, "", ""},
		{pei + "&supported-features=0x1", optional, 400, "", ""},
		{pei + "&imei=1", "INVALID_QUERY_PARAM", 400, "", ""},
		{pei + ";" + supi, "INVALID_MSG_FORMAT", 400, "", ""},
		{"pei=%", "INVALID_MSG_FORMAT", 400, "", ""},
	} {
		var q *kmev1.CheckEquipmentRequest
		a := asked(t, Options{Check: func(_ *http.Request, asked *kmev1.CheckEquipmentRequest) (
			*kmev1.CheckEquipmentResponse, error) {
			q = asked
			return &kmev1.CheckEquipmentResponse{Status: kmev1.EquipmentStatus_WHITELISTED}, nil
		}}, "GET", path+"?"+c.query)
		if a.Code != c.code || !strings.Contains(a.Body.String(), `"`+c.want+`"`) || (q != nil) != (c.code == 200) ||
			q.GetImei() != c.imei || q.GetImsi() != c.imsi {
			t.Errorf("%s: %d %s, asked %v; want %d %s", c.query, a.Code, a.Body, q, c.code, c.want)
		}
	}
}

// The statuses that there are, and every refusal.
func TestAnswers(t *testing.T) {
	answer := func(a *kmev1.CheckEquipmentResponse, err error) Options {
		return Options{Check: func(*http.Request, *kmev1.CheckEquipmentRequest) (*kmev1.CheckEquipmentResponse, error) {
			return a, err
		}}
	}
	for _, s := range []kmev1.EquipmentStatus{kmev1.EquipmentStatus_WHITELISTED, kmev1.EquipmentStatus_GREYLISTED,
		kmev1.EquipmentStatus_BLACKLISTED} {
		a := asked(t, answer(&kmev1.CheckEquipmentResponse{Status: s}, nil), "GET", path+"?"+pei)
		if want := `{"status":"` + s.String() + `"}`; strings.TrimSpace(a.Body.String()) != want || a.Code != 200 {
			t.Errorf("%d %s, want %s", a.Code, a.Body, want)
		}
	}
	for _, c := range []struct {
		err   error
		code  int
		cause string
	}{
		{&binding.Refusal{Reason: kme.UnknownDevice}, 404, "ERROR_EQUIPMENT_UNKNOWN"},
		{&binding.Refusal{Reason: kme.CallerNotAllowed, Message: "this client may not do that"}, 403, ""},
		{&binding.Refusal{Reason: kme.Overloaded}, 503, "NF_CONGESTION"},
		{&binding.Refusal{Reason: kme.DirectoryUnavailable}, 503, ""},
		{&binding.Refusal{Reason: kme.StoreUnavailable, Cause: errors.New("SECRET")}, 503, ""},
		{&binding.Refusal{Reason: kme.Damaged}, 500, "SYSTEM_FAILURE"},
		{&binding.Refusal{Reason: kme.RolledBack}, 500, "SYSTEM_FAILURE"},
		{&binding.Refusal{Reason: "NEW"}, 500, ""},
		{errors.New("SECRET"), 500, "UNSPECIFIED_NF_FAILURE"},
	} {
		a := asked(t, answer(nil, c.err), "GET", path+"?"+pei)
		if a.Code != c.code || (c.cause == "") == strings.Contains(a.Body.String(), `"cause"`) ||
			!strings.Contains(a.Body.String(), c.cause) || strings.Contains(a.Body.String(), "SECRET") {
			t.Errorf("%v: %d %s, want %d %s", c.err, a.Code, a.Body, c.code, c.cause)
		}
	}
	for _, other := range []string{
		"/", "/n5g-eir-eic/v2/equipment-status", path + "/", "/kme.v1.KeyService/GetBinding",
	} {
		if a := asked(t, answer(nil, errors.New("asked")), "GET", other+"?"+pei); a.Code != 404 ||
			!strings.Contains(a.Body.String(), "RESOURCE_URI_STRUCTURE_NOT_FOUND") {
			t.Errorf("%s: %d %s", other, a.Code, a.Body)
		}
	}
	for _, method := range []string{"POST", "HEAD", "DELETE"} {
		if a := asked(t, answer(nil, errors.New("asked")), method, path+"?"+pei); a.Code != 405 ||
			a.Header().Get("Allow") != "GET" {
			t.Errorf("%s: %d %s", method, a.Code, a.Body)
		}
	}
}

// A panic is answered, and counted: net/http would end the connection.
func TestPanic(t *testing.T) {
	log, before := testproc.Logged(t), panics.Count()
	check := func(*http.Request, *kmev1.CheckEquipmentRequest) (*kmev1.CheckEquipmentResponse, error) {
		panic("in a check")
	}
	a := asked(t, Options{Check: check}, "GET", path+"?"+pei)
	if a.Code != http.StatusInternalServerError || !strings.Contains(a.Body.String(), "UNSPECIFIED_NF_FAILURE") ||
		strings.Contains(a.Body.String(), "in a check") {
		t.Errorf("%d %s", a.Code, a.Body)
	}
	if n := panics.Count() - before; n != 1 || !strings.Contains(log.String(), "in a check") {
		t.Errorf("%d panics are counted; the log: %s", n, log)
	}
}

// Whatever a query has, its answer is one that 3GPP's document knows.
func FuzzQuery(f *testing.F) {
	for _, q := range []string{pei + "&" + supi, "pei=mac-00-00-5E-00-53-00", pei + ";", "pei=%", "", "&&=&pei"} {
		f.Add(q)
	}
	f.Fuzz(func(t *testing.T, query string) {
		q, p := parse(query)
		switch {
		case (q == nil) == (p == nil):
			t.Errorf("%q: %v, %v", query, q, p)
		case q != nil:
			_, imei := kme.ParseIMEI(q.Imei)
			if _, imsi := kme.ParseIMSI(q.Imsi); imei != nil || q.Imsi != "" && imsi != nil {
				t.Errorf("%q: %v", query, q)
			}
		case p.Status != 400 && p.Status != 404 || p.Cause == "":
			t.Errorf("%q: %+v", query, p)
		}
	})
}
