package station

import (
	cryptorand "crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/directory/filestore"
	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

func TestMain(m *testing.M) { softhsmtest.Main(m, 12) }

// A shop is a line with one lot, L1, provisioned.
type shop struct {
	*Options
	line     *factory.Line
	manifest *directory.Manifest
}

func newShop(t *testing.T, devices int) *shop {
	t.Helper()
	tok := softhsmtest.Token(t)
	token := must(hsmkeys.OpenFactory(t.Context(), tok.URI, hsmkeys.Options{}))
	pem, _, _, err := factory.Init(t.Context(), token)
	if err != nil {
		t.Fatal(err)
	}
	token.Close()
	fixture := must(rsa.GenerateKey(cryptorand.Reader, 3072))
	if _, err := factory.EnrollFixture(t.Context(), tok.URI, hsmkeys.PIN(tok.SOPIN), "f1", &fixture.PublicKey,
		0); err != nil {
		t.Fatal(err)
	}
	token = must(hsmkeys.OpenFactory(t.Context(), tok.URI, hsmkeys.Options{}))
	t.Cleanup(func() { token.Close() })
	store := must(filestore.Open(t.TempDir()))
	s := &shop{Options: &Options{State: t.TempDir(), Injection: t.TempDir(), Store: store,
		Verifier: must(directory.ParseVerifier(pem)), Timeout: time.Hour, Log: slog.New(slog.DiscardHandler)}}
	s.line = must(factory.NewLine(token, store, factory.State{Dir: s.State}))
	tac := must(kme.ParseTAC("35209900"))
	s.manifest = must(s.line.CreateLot(t.Context(),
		factory.LotSpec{Lot: "L1", Range: directory.Range{TAC: tac, Count: devices}, Bits: 2048, Suite: kme.SuiteECDSA,
			ShardSize: 16, Primes: hsmkeys.PrimesAuto}))
	must(s.line.Provision(t.Context(), "L1", factory.ProvisionOptions{Out: s.Injection, Workers: 2}))
	return s
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func (s *shop) open(t *testing.T) *Desk {
	t.Helper()
	d, err := Open(t.Context(), *s.Options)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// Many stations at once, each asking more often than it must, while the desk is closed and opened again: each device
// goes to one station, and in the end the report has each once, as it was reported.
func TestStations(t *testing.T) {
	const devices, stations = 300, 12
	s := newShop(t, devices)
	d := s.open(t)
	if _, err := Open(t.Context(), *s.Options); err == nil ||
		!strings.Contains(err.Error(), "another process is at work") {
		t.Errorf("opened twice: %v", err)
	}
	var mu sync.Mutex
	holder, result := map[kme.IMEI]string{}, map[kme.IMEI]State{}
	work := func(station string, n int) error {
		for range n {
			ticket, err := d.Next(t.Context(), station, "L1")
			if errors.Is(err, ErrNoneLeft) {
				return nil
			}
			if err != nil {
				return err
			}
			mu.Lock()
			if by := holder[ticket.IMEI]; by != "" && by != station {
				err = fmt.Errorf("IMEI %s went to %s and to %s", ticket.IMEI, by, station)
			}
			holder[ticket.IMEI] = station
			mu.Unlock()
			if err != nil {
				return err
			}
			for range rand.N(3) {
				again, err := d.Next(t.Context(), station, "L1")
				if err != nil || again.IMEI != ticket.IMEI {
					return fmt.Errorf("asked again: %v, %v", again, err)
				}
			}
			if rand.N(10) == 0 {
				continue // and ask for the same one
			}
			state := []State{Injected, Injected, Injected, Failed, Scrapped}[rand.N(5)]
			for range 1 + rand.N(2) {
				if err := d.Report(t.Context(), station, "L1", ticket.IMEI, state, ""); err != nil {
					return err
				}
			}
			mu.Lock()
			result[ticket.IMEI] = state
			mu.Unlock()
		}
		return nil
	}
	start := time.Now()
	for rounds := 0; len(result) < devices; rounds++ {
		if rounds == 1000 {
			t.Fatal("the lot does not come to an end")
		}
		var g sync.WaitGroup
		for i := range stations {
			g.Go(func() {
				if err := work(fmt.Sprintf("S%02d", i), 10); err != nil {
					t.Error(err)
				}
			})
		}
		g.Wait()
		if t.Failed() {
			return
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		d = s.open(t)
	}
	t.Logf("%.0f devices a second, each handed out and reported durably", devices/time.Since(start).Seconds())
	defer d.Close()
	n, want := 0, Counts{Lot: "L1", Devices: devices}
	for line, err := range Report(t.Context(), s.State, s.manifest) {
		if err != nil || line.State != result[line.IMEI] || line.Station != holder[line.IMEI] || line.Issue != 0 ||
			line.Handed == nil || line.Reported == nil || line.Tries != 1 || line.IMEI != s.manifest.IMEI(n) {
			t.Fatalf("line %d is %+v, %v, and was %s at %s", n, line, err, result[line.IMEI], holder[line.IMEI])
		}
		n++
		*map[State]*int{Injected: &want.Injected, Failed: &want.Failed, Scrapped: &want.Scrapped}[line.State]++
	}
	status := must(d.Status(t.Context()))
	want.Ready = status.Lots[0].Ready // none, once the directory was read
	if n != devices || want.Ready > 0 || len(status.Lots) != 1 || status.Lots[0] != want {
		t.Errorf("%d lines, counts %+v, want %+v", n, status.Lots, want)
	}
	sum, hour := 0, 0
	for _, w := range status.Stations {
		sum += w.Injected
	}
	for _, m := range status.Hour {
		hour += m.Injected
	}
	if sum != want.Injected || hour != want.Injected || len(status.Hour) != 60 || status.PerHour <= 0 {
		t.Errorf("stations %d, hour %d, want %d; %v an hour", sum, hour, want.Injected, status.PerHour)
	}
}

func TestOverdue(t *testing.T) {
	s := newShop(t, 20)
	s.Timeout = 200 * time.Millisecond
	d := s.open(t)
	defer func() { d.Close() }()
	overdue := func(n int) {
		t.Helper()
		for deadline := time.Now().Add(testproc.Patience); time.Now().Before(deadline); time.Sleep(
			20 * time.Millisecond) {
			var have int
			if err := d.read.QueryRow("SELECT count(*) FROM device WHERE state = 'overdue'").Scan(&have); err != nil {
				t.Fatal(err)
			}
			if have == n {
				return
			}
		}
		t.Fatalf("there are not %d devices overdue", n)
	}
	ctx := t.Context()
	first := must(d.Next(ctx, "A", "L1")).IMEI
	// That somebody has set the clock changes nothing: here, as if it had been set back by a day since.
	if err := d.write.Exec(ctx, "UPDATE device SET handed = handed + 86400000; UPDATE event SET at = at + "+
		"86400000"); err != nil {
		t.Fatal(err)
	}
	overdue(1)
	if status, err := d.Status(ctx); err != nil || status.Lots[0].Overdue != 1 || status.Lots[0].Waiting != 19 ||
		status.PerHour != 0 {
		t.Errorf("%+v, %v", status, err)
	}
	second := must(d.Next(ctx, "A", "L1")).IMEI
	if second == first {
		t.Error("an overdue device was handed out without being asked for")
	}
	// Whoever is late is heard, as long as nobody else has the device.
	if err := d.Report(ctx, "A", "L1", first, Injected, ""); err != nil {
		t.Error(err)
	}
	overdue(1) // the second
	if again, err := d.Named(ctx, "B", "L1", second); err != nil || again.IMEI != second {
		t.Error(again, err)
	}
	if err := d.Report(ctx, "A", "L1", second, Injected, ""); err == nil ||
		!strings.Contains(err.Error(), "by station B") {
		t.Errorf("a report about a device that another has now: %v", err)
	}
	if err := d.Report(ctx, "B", "L1", second, Injected, "\x1b[2J done\u202e\n"); err != nil {
		t.Error(err)
	}
	for line, err := range Report(ctx, s.State, s.manifest) { // at a terminal
		if err != nil || line.IMEI == second && line.Note != " [2J done  " {
			t.Errorf("%+v, %v", line, err)
		}
	}
	// What was out when the process ended has its full time again, and no more.
	must(d.Next(ctx, "A", "L1"))
	d.Close()
	d = s.open(t)
	overdue(1)
}

// Nothing is handed out but what is published, and what cannot be handed out is taken from nobody.
func TestOnlyPublished(t *testing.T) {
	s := newShop(t, 32)
	d := s.open(t)
	defer func() { d.Close() }()
	ctx := t.Context()
	path := filepath.Join(s.Injection, "L1", handover.InjectionFile(0))
	good := must(os.ReadFile(path))
	lines := strings.SplitAfter(string(good), "\n")
	key, wrapped := regexp.MustCompile(`"x":"[^"]*","y":"[^"]*"`), regexp.MustCompile(`"wrapped":"[^"]*"`)
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(path string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), path) ||
			!strings.Contains(err.Error(), "factory reconcile L1") {
			t.Error(err)
		}
	}
	// A line with the key of another device of ours, its public or its private one.
	for _, of := range []*regexp.Regexp{key, wrapped} {
		write(path, of.ReplaceAllString(lines[0], of.FindString(lines[1]))+strings.Join(lines[1:], ""))
		_, err := d.Next(ctx, "A", "L1")
		refused(path, err)
	}
	write(path, string(good))
	if ticket, err := d.Next(ctx, "A", "L1"); err != nil || ticket.IMEI != s.manifest.IMEI(0) {
		t.Errorf("once the package is back: %v, %v", ticket, err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := s.line.Revoke(ctx, "L1", []kme.IMEI{s.manifest.IMEI(1)}, "stolen", nil); err != nil {
		t.Fatal(err)
	}
	write(path, string(good))
	d.Close()
	d = s.open(t)
	ticket, err := d.Next(ctx, "A", "L1")
	if err != nil || ticket.IMEI != s.manifest.IMEI(0) || ticket.Manifest == "" {
		t.Fatal(ticket, err)
	}
	if err := d.Report(ctx, "A", "L1", ticket.IMEI, Injected, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Named(ctx, "A", "L1", s.manifest.IMEI(1)); err == nil || !strings.Contains(err.Error(), "revoked") {
		t.Errorf("a revoked device was handed out: %v", err)
	}
	if ticket, err = d.Next(ctx, "A", "L1"); err != nil || ticket.IMEI != s.manifest.IMEI(2) {
		t.Errorf("after a revoked one: %v, %v", ticket, err)
	}
	// Revoked while a station has it.
	if err := s.line.Revoke(ctx, "L1", []kme.IMEI{s.manifest.IMEI(2)}, "stolen", nil); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond)
	if _, err := d.Next(ctx, "A", "L1"); err == nil || !strings.Contains(err.Error(), "report it scrapped") {
		t.Errorf("revoked since: %v", err)
	}
	if err := d.Report(ctx, "A", "L1", ticket.IMEI, Scrapped, ""); err != nil {
		t.Error(err)
	}
	// The package of a new key.
	returned := s.manifest.IMEI(20)
	path = must(s.line.Reissue(ctx, "L1", returned, "return 1", "", s.Injection))
	good = must(os.ReadFile(path))
	write(path, wrapped.ReplaceAllString(string(good), wrapped.FindString(lines[1])))
	time.Sleep(1100 * time.Millisecond)
	_, err = d.Named(ctx, "A", "L1", returned)
	refused(path, err)
	write(path, string(good))
	if ticket, err := d.Named(ctx, "A", "L1", returned); err != nil || ticket.Issue != 1 {
		t.Errorf("once the package is back: %+v, %v", ticket, err)
	}
}

// What the database refuses says what was to be done.
func TestErrorsNameOperation(t *testing.T) {
	s := newShop(t, 1)
	d := s.open(t)
	imei := s.manifest.IMEI(0)
	d.unlock()
	d.read.Close()
	_, next := d.Next(t.Context(), "s1", "L1")
	_, status := d.Status(t.Context())
	d.write.Close()
	_, closed := d.claim(t.Context(), device{lot: "L1"}, "s1", Out, false)
	for operation, err := range map[string]error{
		"see what a station has": next, "report a device": d.Report(t.Context(), "s1", "L1", imei, Injected, ""),
		"count what became of the devices": status, "hand a device out": closed,
	} {
		if err == nil || !strings.HasPrefix(err.Error(), operation+": ") {
			t.Errorf("%s: %v", operation, err)
		}
	}
}

// A station that has a device can always report it, also when the device was issued another key meanwhile, which
// another station was handed: it gets no other device before.
func TestReissuedWhileOut(t *testing.T) {
	s := newShop(t, 4)
	d := s.open(t)
	defer d.Close()
	ctx := t.Context()
	imei := must(d.Next(ctx, "A", "L1")).IMEI
	must(s.line.Reissue(ctx, "L1", imei, "return 1", "", s.Injection))
	time.Sleep(1100 * time.Millisecond)
	if ticket, err := d.Named(ctx, "B", "L1", imei); err != nil || ticket.Issue != 1 {
		t.Fatal(ticket, err)
	}
	if _, err := d.Next(ctx, "A", "L1"); err == nil || !strings.Contains(err.Error(), "report it failed") {
		t.Error(err)
	}
	for range 2 { // A did not get the first answer
		if err := d.Report(ctx, "A", "L1", imei, Failed, ""); err != nil {
			t.Error(err)
		}
	}
	if err := d.Report(ctx, "A", "L1", imei, Injected, ""); err == nil ||
		!strings.Contains(err.Error(), "by station B") {
		t.Errorf("another report about a device that another has now: %v", err)
	}
	if ticket, err := d.Next(ctx, "A", "L1"); err != nil || ticket.IMEI == imei {
		t.Error(ticket, err)
	}
	if err := d.Report(ctx, "B", "L1", imei, Injected, ""); err != nil {
		t.Error(err)
	}
}

// Of a lot that is revoked no device is handed out, nor is each of them put down as revoked.
func TestRevokedLot(t *testing.T) {
	s, ctx := newShop(t, 32), t.Context()
	if err := s.line.RevokeLot(ctx, "L1", "its key has leaked"); err != nil {
		t.Fatal(err)
	}
	d := s.open(t) // now: a list that was read within a second is used
	defer d.Close()
	if _, err := d.Next(ctx, "A", "L1"); !errors.As(err, new(*RefusedError)) ||
		!strings.Contains(err.Error(), "lot L1 is revoked") {
		t.Error(err)
	}
	if _, err := d.Named(ctx, "A", "L1", s.manifest.IMEI(3)); !errors.As(err, new(*RefusedError)) ||
		!strings.Contains(err.Error(), "revoked") {
		t.Error(err)
	}
	if status := must(d.Status(ctx)); status.Lots[0].Waiting != 32 || status.Lots[0].Revoked != 0 {
		t.Errorf("%+v", status.Lots)
	}
}

// The wall screen, in a real browser.
func TestWallInBrowser(t *testing.T) {
	s := newShop(t, 40)
	s.Line, s.Stations = "Line 7", []string{"left", "right", "third"}
	d := s.open(t)
	defer d.Close()
	for i := range 12 {
		ticket := must(d.Next(t.Context(), "left", "L1"))
		state := Injected
		if i%4 == 3 {
			state = Failed
		}
		if err := d.Report(t.Context(), "left", "L1", ticket.IMEI, state, ""); err != nil {
			t.Fatal(err)
		}
	}
	held := must(d.Next(t.Context(), "right", "L1"))
	var mu sync.Mutex
	var asked []string
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		asked = append(asked, r.URL.Path)
		mu.Unlock()
		// A browser may need minutes to begin; then what the stations did would be of long ago.
		if err := d.write.Exec(t.Context(), "UPDATE event SET at = at + ? - (SELECT max(at) FROM event)",
			now()); err != nil {
			t.Error(err)
		}
		d.Handler().ServeHTTP(w, r)
	}))
	server.TLS = &tls.Config{ClientAuth: tls.VerifyClientCertIfGiven, NextProtos: []string{"http/1.1"}}
	// the browser tries, and then ignores the certificate as it is told
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	defer server.Close()

	page := browse(t, "--window-size=1280,720", "--dump-dom", server.URL+"/")
	for _, want := range []string{
		`data-state="running"`, `<b id="ready">27</b>`, `<b id="failed">3</b>`, `<b id="overdue">0</b>`,
		`▶ RUNNING`, `Line 7 · lot </span><span>L1</span>`, `<span class="clip">▶ </span><span>left</span>`,
		`<span class="injected">●9</span><span class="failed">▲3</span>`,
		`<span class="clip">▶ </span><span>right</span>`, held.IMEI.String(),
		`<span class="clip">■ </span><span>third</span></span></div><div><span class="dim">idle </span>`,
		`9 of 40</span>`, `27 ready`, `<rect class="injected"`, `<rect class="failed"`,
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page has no %s:\n%s", want, page)
		}
	}
	if rate := regexp.MustCompile(`<b id="rate">([0-9,]+)</b>`).FindStringSubmatch(page); rate == nil ||
		rate[1] == "0" {
		t.Errorf("the rate is %v", rate)
	}
	mu.Lock()
	seen := slices.Clone(asked)
	mu.Unlock()
	for _, path := range seen {
		if path != "/" && path != "/wall.js" && path != "/v1/status" {
			t.Errorf("the page asks for %s", path)
		}
	}
	for _, asset := range []string{"wall.html", "wall.js"} {
		text := strings.ReplaceAll(string(must(wall.ReadFile(asset))), "http://www.w3.org/2000/svg", "")
		if strings.Contains(text, "://") {
			t.Errorf("%s refers to something elsewhere", asset)
		}
	}
	// both are there, as was seen above
	if left, right := strings.Index(page, `▶ </span><span>left<`), strings.Index(page,
		`▶ </span><span>right<`); left > right {
		t.Error("the station whose devices fail does not come first")
	}
	// Without a certificate there are counts, and no device.
	for _, path := range []string{"/v1/lots/L1/next", "/v1/lots/L1/devices/" + held.IMEI.String()} {
		r, err := server.Client().Post(server.URL+path, "application/json", nil)
		if err != nil {
			t.Fatal(err)
		}
		var answer map[string]string
		if err := json.NewDecoder(r.Body).Decode(&answer); err != nil || r.StatusCode != http.StatusForbidden ||
			len(answer) != 1 {
			t.Errorf("%s: %s, %v, %v", path, r.Status, answer, err)
		}
		r.Body.Close()
	}
}
