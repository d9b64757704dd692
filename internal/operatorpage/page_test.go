package operatorpage_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kmehsm/kmehsm/api"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/certtest"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/operatorpage"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

func TestMain(m *testing.M) { testproc.Main(m.Run) }

const (
	bound   = "001010000000001"
	refused = "001010000000002"
	foreign = "262010000000003"
	device  = "35209900000017"
	maker   = "uogvGY7XcA_OB_9takJbeRvZ4FEM767Bc3xPYsO5e-Q"
)

// A desk is the page on a service with a real database, with mutual TLS as keysvc serves it.
type desk struct {
	url    string
	dir    string // of certificates
	log    *testproc.Log
	health operatorpage.Health
}

func newDesk(t *testing.T) *desk {
	t.Helper()
	d := &desk{dir: certtest.Make(t, "127.0.0.1", "monitor.example", "hss.example", "all.example", "nobody.example"),
		log: new(testproc.Log), health: goodHealth()}
	store := must.Get[*sqlstore.Store](t)(sqlstore.Open(t.Context(), sqlstore.InFolder(t.TempDir()),
		kme.RandomSecret()))
	t.Cleanup(func() { store.Close() })
	for i, imsi := range []string{bound, foreign} {
		bind(t, store, must.Get[kme.IMSI](t)(kme.ParseIMSI(imsi)), byte(i))
	}
	metrics := binding.NewMetrics(prometheus.NewRegistry())
	service := binding.NewService(binding.Options{Store: store, Times: binding.DefaultTimes(), Metrics: metrics,
		Log: slog.New(slog.NewJSONHandler(d.log, nil))})
	one := must.Get[kme.IMSI](t)(kme.ParseIMSI(refused))
	imei := must.Get[kme.IMEI](t)(kme.ParseIMEI(device))
	for range 3 {
		service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: one, IMEI: imei, AttemptID: "<script>",
			Origin: binding.Origin{Provisioning: binding.Allowed}})
	}
	service.ReportAuthentication(t.Context(), must.Get[kme.IMSI](t)(kme.ParseIMSI(bound)), true,
		binding.Origin{Provisioning: binding.Allowed})
	clients := must.Get[*api.Clients](t)(api.NewClients([]api.Client{
		{Name: "ops", SAN: "monitor.example", Roles: []api.Role{api.RoleMonitor}, PLMNs: []string{"00101"}},
		{Name: "all", SAN: "all.example", Roles: []api.Role{api.RoleMonitor}, PLMNs: []string{"all"}},
		{Name: "hss", SAN: "hss.example", PLMNs: []string{"all"},
			Roles: []api.Role{api.RoleHSS, api.RoleAdmin, api.RoleMetrics}},
	}))
	// A day of a network, as counters tell it: more by day than by night.
	now := time.Now()
	history := operatorpage.NewHistory(now.Add(-24*time.Hour), nil)
	total := map[string]float64{}
	for m := range 24 * 60 {
		at := now.Add(time.Duration(m-24*60+1) * time.Minute)
		busy := 1 + math.Sin(float64(m)/24/60*2*math.Pi)
		total[binding.CountAttaches] += math.Round(900 * busy)
		total[binding.CountEstablished] += math.Round(20 * busy)
		if m%7 == 0 {
			total["OTHER_DEVICE"]++
		}
		if m > 700 && m < 760 {
			total["HSM_UNAVAILABLE"] += 41
		}
		history.Add(at, maps.Clone(total))
	}
	page := operatorpage.New(operatorpage.Options{Service: service, View: api.View, Version: "v1.0.0",
		Health: func(context.Context) operatorpage.Health { return d.health }, History: history,
		Count: func() {
			sum := maps.Clone(total)
			for name, n := range metrics.Totals() {
				sum[name] += n
			}
			history.Add(time.Now(), sum)
		}})
	s := httptest.NewUnstartedServer(api.For(api.RoleMonitor, service, clients, page))
	s.TLS = must.Get[*tls.Config](t)(config.ServerTLS(filepath.Join(d.dir, "127.0.0.1.pem"),
		filepath.Join(d.dir, "127.0.0.1.key"), filepath.Join(d.dir, "ca.pem"), tls.RequireAndVerifyClientCert))
	s.Config.ConnContext, s.Config.ErrorLog = api.ConnContext, slog.NewLogLogger(slog.DiscardHandler, 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	d.url = s.URL
	return d
}

// bind makes an active binding.
func bind(t *testing.T, store *sqlstore.Store, imsi kme.IMSI, tag byte) {
	t.Helper()
	now := time.Now()
	here := binding.Origin{Provisioning: binding.Allowed}
	ask := binding.VectorRequest{IMSI: imsi, Origin: here, RANDs: []hsmkeys.RAND{{tag}}, Now: now,
		AttemptTTL: time.Hour, PendingVectors: 3}
	opened := must.Get[binding.Decision](t)(store.Prepare(t.Context(), ask))
	b := &binding.Binding{IMSI: imsi, IMEI: must.Get[kme.IMEI](t)(kme.ParseIMEI(device)), Manufacturer: maker,
		Lot: "L1", State: binding.Pending, Sealed: make([]byte, 40), NWSig: make([]byte, 32),
		AttemptID:     opened.Attempt.ID,
		PayloadSHA256: make([]byte, 32), Established: now, Expires: now.Add(time.Hour)}
	must.Do(t, store.Establish(t.Context(), b, []byte{tag}, true, now))
	ask.Ready, ask.RANDs = b.AttemptID, []hsmkeys.RAND{{tag, 1}}
	must.Get[binding.Decision](t)(store.Prepare(t.Context(), ask))
	must.Get[*binding.Subscription](t)(store.Report(t.Context(), imsi, kme.Origin{}, true, now))
}

func goodHealth() operatorpage.Health {
	day := 24 * time.Hour
	return operatorpage.Health{
		Warnings: []string{"the directory of manufacturer " + maker +
			" is not available; devices whose keys are cached go on"},
		Tokens: []operatorpage.Token{{Name: `token "operator" (serial 0a1b)`, Works: true, Sessions: 8},
			{Name: `token "operator-2" (serial 0a1c)`, Hung: 2, Reopened: 1}},
		Store: operatorpage.Store{Kind: "postgres", Works: true, Entries: 20_318_444, Counted: time.Now(),
			Bindings: map[binding.State]int64{binding.Active: 10_159_002, binding.Pending: 218, binding.Revoked: 1733}},
		Directories: []operatorpage.Directory{{Manufacturer: maker}},
		Certificates: []operatorpage.Certificate{
			{For: "server", Subject: "CN=keysvc.example", Ends: time.Now().Add(20*day + time.Hour)},
			{For: "client_ca", Subject: "CN=clients", Ends: time.Now().Add(700 * day)}},
		Lots: []operatorpage.Lot{
			{Manufacturer: maker, Lot: "L1", IMEIs: "35209900, 000001 to 020000", Devices: 20_000, Served: true,
				List: 12, Read: time.Now().Add(-30 * time.Second), Overdue: "failed"},
			{Manufacturer: maker, Lot: "L0", IMEIs: "35209900, 900000 to 999999", Devices: 100_000, Why: "retired",
				List: 3, Read: time.Now()}},
	}
}

// client is one with the certificate of a name.
func (d *desk) client(t *testing.T, name string) *http.Client {
	t.Helper()
	path := func(of string) string { return filepath.Join(d.dir, of) }
	config := must.Get[*tls.Config](t)(config.ClientTLS(path(name+".pem"), path(name+".key"), path("ca.pem")))
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}}
	t.Cleanup(c.CloseIdleConnections)
	return c
}

func (d *desk) ask(t *testing.T, client *http.Client, method, path string) (*http.Response, string) {
	t.Helper()
	req := must.Get[*http.Request](t)(http.NewRequest(method, d.url+path, nil))
	r := must.Get[*http.Response](t)(client.Do(req))
	defer r.Body.Close()
	return r, string(must.Get[[]byte](t)(io.ReadAll(r.Body)))
}

// lookUp gives the answer of the page, without its tags.
func (d *desk) lookUp(t *testing.T, client *http.Client, kind, number string) string {
	t.Helper()
	r, page := d.ask(t, client, "GET", "/?"+url.Values{"kind": {kind}, "number": {number}}.Encode())
	if r.StatusCode != http.StatusOK {
		t.Fatalf("%s %s: %s", kind, number, r.Status)
	}
	_, answer, found := strings.Cut(page, `<div class="answer"`)
	if !found {
		t.Fatalf("%s %s has no answer: %s", kind, number, page)
	}
	answer, _, _ = strings.Cut(answer, "</section>")
	return regexp.MustCompile(`<[^>]*>`).ReplaceAllString(answer, " ")
}

// The page is for the role monitor alone, only reads, and lets a browser do nothing else.
func TestPage(t *testing.T) {
	d := newDesk(t)
	monitor := d.client(t, "monitor.example")
	for _, name := range []string{"hss.example", "nobody.example"} {
		for _, path := range []string{"/", "/page.css", "/?kind=IMSI&number=" + bound} {
			if r, body := d.ask(t, d.client(t, name), "GET", path); r.StatusCode != http.StatusForbidden ||
				body != "this client may not do that\n" {
				t.Errorf("%s gets %s: %s %s", name, path, r.Status, body)
			}
		}
	}
	if r, err := (&http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}).
		Get(d.url); err == nil {
		t.Errorf("without a certificate: %s", r.Status)
	}
	for _, method := range []string{"POST", "PUT", "DELETE", "PATCH"} {
		if r, _ := d.ask(t, monitor, method, "/"); r.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("%s: %s", method, r.Status)
		}
	}
	for path, want := range map[string]int{"/": 200, "/page.css": 200, "/page.html": 404, "/metrics": 404,
		"/kme.v1.KeyService/GetBinding": 404, "/x": 404} {
		r, _ := d.ask(t, monitor, "GET", path)
		if r.StatusCode != want {
			t.Errorf("%s: %s, want %d", path, r.Status, want)
		}
		policy := r.Header.Get("Content-Security-Policy")
		if !strings.HasPrefix(policy, "default-src 'none'; style-src 'self';") || strings.Contains(policy, "script") ||
			strings.Contains(policy, "unsafe") || r.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("%s: the policy is %q, headers %v", path, policy, r.Header)
		}
	}
	_, page := d.ask(t, monitor, "GET", "/")
	for _, want := range []string{"Works, with 2 warnings", `role="status"`, "10\u202f159\u202f002",
		"▲</span>\n20 days left", "(server): 20 days left",
		"▲</span> not served: retired", "▲</span> failed", "■</span> does not\nwork", "Refusals by reason",
		"OTHER_DEVICE",
		"HSM_UNAVAILABLE</b>: 2\u202f419;", "NO_ATTEMPT</b>: 3;", "Attaches</b>:"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page has no %q", want)
		}
	}
	if strings.Contains(page, "<script") || strings.Contains(page, "://") || strings.Contains(page, " style=") {
		t.Error("the page has a script, a style of its own, or refers to something elsewhere")
	}
	d = newDesk(t)
	d.health = operatorpage.Health{Problem: "the HSM is on <fire>"}
	if _, page := d.ask(t, d.client(t, "monitor.example"), "GET", "/"); !strings.Contains(page,
		"■</span> Not ready: the HSM is on &lt;fire&gt;") || strings.Count(page, "Not known while the") != 2 ||
		strings.Contains(page, "No lot") || strings.Contains(page, "No manufacturer") {
		t.Errorf("a service that is not ready: %s", page)
	}
	d = newDesk(t)
	d.health = operatorpage.Health{Store: operatorpage.Store{Works: true}}
	for days, want := range map[time.Duration]string{-1: "it has ended", 0: "less than a day left", 1: "1 day left"} {
		d.health.Certificates = append(d.health.Certificates, operatorpage.Certificate{For: "server", Subject: want,
			Ends: time.Now().Add(days*24*time.Hour + time.Hour)})
	}
	_, page = d.ask(t, d.client(t, "monitor.example"), "GET", "/")
	for _, want := range []string{"Works, with 3 warnings", "No lot was imported", "No manufacturer is enrolled",
		"it has ended (server): it has ended", "less than a day left (server): less than a day left",
		"1 day left (server): 1 day left"} {
		if !strings.Contains(page, want) {
			t.Errorf("an empty service whose certificates end: no %q in %s", want, page)
		}
	}
}

// One number is explained, and whatever else is asked gets a sentence.
func TestLookUp(t *testing.T) {
	d := newDesk(t)
	monitor, all := d.client(t, "monitor.example"), d.client(t, "all.example")
	for _, c := range []struct {
		client       *http.Client
		kind, number string
		want, not    []string
	}{
		{monitor, "IMSI", bound, []string{"IMSI " + bound + ": ACTIVE", "is bound to device " + device,
			"No refusal of a call", "What to do", "nothing"}, nil},
		{monitor, "IMSI", " " + bound + " ", []string{"is bound to device"}, nil},
		{monitor, "IMSI", refused, []string{"It was never bound.", "EstablishKME at", "NO_ATTEMPT",
			"no attempt was open", "What to do", "attach again"},
			[]string{"<script>"}},
		{monitor, "IMSI", foreign, []string{"No answer:", "PLMN that you may not see"}, []string{device}},
		{all, "IMSI", foreign, []string{"is bound to device"}, nil},
		{monitor, "IMEI", device, []string{"in no lot", bound, "ACTIVE"}, []string{foreign}},
		{all, "IMEI", device, []string{bound, foreign}, nil},
		{monitor, "IMEI", "35209900000025", []string{"No subscription that you may see"}, nil},
		{monitor, "IMSI", "12x", []string{"No answer:"}, nil},
		{monitor, "IMSI", "", []string{"No answer:"}, nil},
		{monitor, "IMEI", "123", []string{"No answer:"}, nil},
		{monitor, "IMSI", `"><script>alert(1)</script>`, []string{"No answer:"}, []string{"alert(1)"}},
		{monitor, "IMSI", strings.Repeat("1", 5000), []string{"No answer:"}, nil},
		{monitor, "else", bound, []string{"say whether it is an IMSI or an IMEI"}, []string{device}},
	} {
		answer := d.lookUp(t, c.client, c.kind, c.number)
		for _, w := range c.want {
			if !strings.Contains(answer, w) {
				t.Errorf("%s %.30q: no %q in %s", c.kind, c.number, w, answer)
			}
		}
		for _, w := range c.not {
			if strings.Contains(answer, w) {
				t.Errorf("%s %.30q: %q is in %s", c.kind, c.number, w, answer)
			}
		}
	}
	if text := d.log.String(); !strings.Contains(text, `"subscription explained"`) || !strings.Contains(text,
		`"client":"ops"`) {
		t.Error("the log does not say who looked")
	}
}

// The page is of use to whoever does not see it, or uses no mouse: what a checker of such pages looks for first.
func TestAccessible(t *testing.T) {
	d := newDesk(t)
	_, page := d.ask(t, d.client(t, "monitor.example"), "GET", "/?kind=IMEI&number="+device)
	if !strings.Contains(page, `<html lang="en">`) || strings.Count(page, "<h1") != 1 || !strings.Contains(page,
		`<main id="main"`) || !strings.Contains(page, `href="#main"`) {
		t.Error("the page has no language, one heading, main part, or link to it")
	}
	if n := strings.Count(page, "<table"); n < 6 || n != strings.Count(page, "<caption") {
		t.Errorf("%d tables have %d captions", n, strings.Count(page, "<caption"))
	}
	if regexp.MustCompile(`<th( class="\w+")?>`).MatchString(page) {
		t.Error("a heading of a table does not say of what")
	}
	for _, svg := range regexp.MustCompile(`(?s)<svg.*?</svg>`).FindAllString(page, -1) {
		id := regexp.MustCompile(`role="img" aria-labelledby="([^"]+)"`).FindStringSubmatch(svg)
		if id == nil || !strings.Contains(svg, `<title id="`+id[1]+`">`) || strings.Count(page, `id="`+id[1]+`"`) != 1 {
			t.Errorf("a plot has no name of its own: %.200s", svg)
		}
	}
	ids := map[string]bool{}
	for _, m := range regexp.MustCompile(` id="([^"]+)"`).FindAllStringSubmatch(page, -1) {
		if ids[m[1]] {
			t.Errorf("two elements are %s", m[1])
		}
		ids[m[1]] = true
	}
	for _, m := range regexp.MustCompile(` (?:for|aria-labelledby|aria-describedby|href)="#?([\w-]+)"`).
		FindAllStringSubmatch(page, -1) {
		if !ids[m[1]] && m[1] != "data" {
			t.Errorf("there is no %s", m[1])
		}
	}
	for _, input := range regexp.MustCompile(`(?s)<input[^>]*>`).FindAllString(page, -1) {
		id := regexp.MustCompile(` id="(\w+)"`).FindStringSubmatch(input)
		labelled := id != nil && strings.Contains(page, `<label for="`+id[1]+`">`) ||
			strings.Contains(page, "<label>"+input)
		if !labelled {
			t.Errorf("nothing says what this is for: %s", input)
		}
	}
	// Every colour of text against every ground that it may stand on, by WCAG 2.2, 1.4.3.
	css := string(must.Get[[]byte](t)(os.ReadFile("page.css")))
	if !strings.Contains(css, ":focus-visible { outline: 3px solid") || strings.Contains(css, "outline: none") {
		t.Error("what has the focus is not shown")
	}
	text := regexp.MustCompile(`--(?:ink|dim|good|warn|bad): (#[0-9a-f]{6})|a \{ color: (#[0-9a-f]{6})`).
		FindAllStringSubmatch(css, -1)
	if len(text) != 6 {
		t.Fatalf("%d colours of text", len(text))
	}
	for _, c := range text {
		for _, ground := range []string{"#ffffff", "#f6f8fa"} {
			if r := contrast(t, c[1]+c[2], ground); r < 4.5 {
				t.Errorf("%s on %s has a contrast of %.1f", c[1]+c[2], ground, r)
			}
		}
	}
	if contrast(t, "#777777", "#ffffff") >= 4.5 || contrast(t, "#767676", "#ffffff") < 4.5 { // the well-known border
		t.Error("the contrast is not what WCAG says")
	}
}

func contrast(t *testing.T, a, b string) float64 {
	t.Helper()
	luminance := func(hex string) (l float64) {
		for i, weight := range []float64{.2126, .7152, .0722} {
			n := must.Get[uint64](t)(strconv.ParseUint(hex[1+2*i:3+2*i], 16, 8))
			c := float64(n) / 255
			if c <= .04045 {
				c /= 12.92
			} else {
				c = math.Pow((c+.055)/1.055, 2.4)
			}
			l += weight * c
		}
		return l
	}
	la, lb := luminance(a), luminance(b)
	return (max(la, lb) + .05) / (min(la, lb) + .05)
}

// In a browser, which gets it through a proxy that has the certificate: nothing else is loaded, nothing breaks the
// policy, the style is used and the form works. KMEHSM_SCREENSHOTS names the folder for pictures.
func TestPageInBrowser(t *testing.T) {
	browser, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatalf("%v: scripts/deps.sh test installs it", err)
	}
	d := newDesk(t)
	target := must.Get[*url.URL](t)(url.Parse(d.url))
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.Transport = d.client(t, "monitor.example").Transport
	var mu sync.Mutex
	var asked []string
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		asked = append(asked, r.Method+" "+r.URL.Path)
		mu.Unlock()
		proxy.ServeHTTP(w, r)
	}))
	defer front.Close()
	run := func(args ...string) (page, errors string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, browser, append([]string{"--headless", "--no-sandbox", "--disable-gpu",
			"--disable-dev-shm-usage", "--hide-scrollbars", "--enable-logging=stderr",
			"--user-data-dir=" + t.TempDir()},
			args...)...)
		cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
		var errs strings.Builder
		cmd.Stderr = &errs
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v: %s %s", browser, err, &errs, out)
		}
		return string(out), errs.String()
	}
	look := front.URL + "/?kind=IMSI&number=" + refused
	page, errors := run("--window-size=1280,900", "--dump-dom", look)
	for _, want := range []string{"<h3>IMSI " + refused + ": UNBOUND</h3>", "It was never bound.",
		"have the device attach again",
		`<rect class="down"`, `<rect class="up"`, `aria-labelledby="plot-OTHER_DEVICE"`} {
		if !strings.Contains(page, want) {
			t.Errorf("the page has no %s:\n%s", want, page)
		}
	}
	for line := range strings.Lines(errors) {
		if strings.Contains(line, "CONSOLE") {
			t.Errorf("the browser complains: %s", line)
		}
	}
	mu.Lock()
	slices.Sort(asked)
	if got := fmt.Sprint(slices.Compact(asked)); got != "[GET / GET /page.css]" {
		t.Errorf("the browser asked for %s", got)
	}
	mu.Unlock()
	to := os.Getenv("KMEHSM_SCREENSHOTS")
	if to == "" {
		to = t.TempDir()
	}
	for name, c := range map[string]struct{ size, url string }{
		"operator-page.png":        {"1280,1920", front.URL + "/"},
		"operator-page-lookup.png": {"1280,900", look},
		"operator-page-narrow.png": {"480,1400", front.URL + "/?kind=IMEI&number=" + device},
	} {
		path := filepath.Join(to, name)
		run("--window-size="+c.size, "--screenshot="+path, c.url)
		if info, err := os.Stat(path); err != nil || info.Size() < 10_000 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
}
