package station

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// browse runs a headless browser.
func browse(t *testing.T, args ...string) string {
	t.Helper()
	browser, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatalf("%v: scripts/deps.sh test installs it", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, browser,
		append([]string{"--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
			"--ignore-certificate-errors", "--user-data-dir=" + t.TempDir(),
			"--virtual-time-budget=30000"}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v: %s %s", browser, err, errs.String(), out)
	}
	return string(out)
}

// line is what a line with so many stations and lots says, all of whose numbers and names are as long as they get.
func line(state LineState, stations, lots int) *Status {
	now := time.Now()
	s := &Status{Time: now, Line: "Line 7", State: state, PerHour: 1234, SecondsLeft: 98765, Lots: []Counts{},
		Stations: []Work{}}
	if state != Empty {
		at := now.Add(-10 * time.Second)
		if state == Stopped {
			at = now.Add(-25 * time.Minute)
		}
		s.Last = &at
	} else {
		lots, s.PerHour, s.SecondsLeft = 0, 0, 0
	}
	for i := range lots {
		s.Lots = append(s.Lots, Counts{Lot: fmt.Sprintf("ACME-2026-Q4-EUROPE-modem-revision-B-%07d", i),
			Devices: 1_000_000, Ready: 123_456,
			Waiting: 323_456, Out: 24,
			Results: Results{Injected: 654_321, Failed: 1234 * (i % 2), Scrapped: 123 * (i % 3),
				Overdue: 12 * (i % 2)}})
	}
	for i := range stations {
		w := Work{Station: fmt.Sprintf("hall-3-fixture-station-left-hand-side-%02d", i), Last: s.Last,
			Holds: []string{"", "35209900000017"}[i%2]}
		if w.Hour.Injected = 1234; i < stations/2 {
			w.Hour = Results{Injected: 1234, Failed: 123, Scrapped: 12, Overdue: 12}
		}
		s.Stations = append(s.Stations, w)
	}
	for i := range 60 {
		m := Minute{Start: now.Truncate(time.Minute).Add(time.Duration(i-59) * time.Minute)}
		if state == Running || state == Stopped && i < 35 {
			m.Injected, m.Failed, m.Scrapped, m.Overdue = 900+i, i%7, i%3, i%2
		}
		s.Hour = append(s.Hour, m)
	}
	return s
}

// wallOf serves the page below /STATE/STATIONS/LOTS/. A line that is stale answers once.
func wallOf(t *testing.T) *httptest.Server {
	mux := http.NewServeMux()
	page := http.FileServerFS(wall)
	asked := map[string]bool{}
	mux.HandleFunc("/{state}/{stations}/{lots}/", func(w http.ResponseWriter, r *http.Request) {
		base := strings.Join(strings.Split(r.URL.Path, "/")[:4], "/")
		if rest := strings.TrimPrefix(r.URL.Path, base); rest == "/" {
			http.ServeFileFS(w, r, wall, "wall.html")
		} else if rest != "/v1/status" {
			http.StripPrefix(base, page).ServeHTTP(w, r)
		} else {
			var stations, lots int
			fmt.Sscan(r.PathValue("stations"), &stations)
			fmt.Sscan(r.PathValue("lots"), &lots)
			state := LineState(r.PathValue("state"))
			if state == "new" { // a line whose lots are all there is
				s := line(Stopped, stations, lots)
				s.Last, s.PerHour, s.SecondsLeft = nil, 0, 0
				for i := range s.Hour {
					s.Hour[i] = Minute{Start: s.Hour[i].Start}
				}
				for i := range s.Lots {
					s.Lots[i] = Counts{Lot: s.Lots[i].Lot, Devices: 10, Ready: 10, Waiting: 10}
				}
				for i := range s.Stations {
					s.Stations[i] = Work{Station: s.Stations[i].Station}
				}
				json.NewEncoder(w).Encode(s)
				return
			}
			if state == "strange" { // an answer that this page cannot show, as of a later release
				if state = Running; asked[r.URL.Path+r.Referer()] {
					fmt.Fprint(w, "{}")
					return
				}
				asked[r.URL.Path+r.Referer()] = true
			}
			if state == "warned" {
				s := line(Running, stations, lots)
				s.Warnings = []string{"the list of L1 is overdue"}
				json.NewEncoder(w).Encode(s)
				return
			}
			if state == "stale" {
				if state = Running; asked[r.URL.Path+r.Referer()] {
					w.WriteHeader(http.StatusServiceUnavailable)
					return
				}
				asked[r.URL.Path+r.Referer()] = true
			}
			json.NewEncoder(w).Encode(line(state, stations, lots))
		}
	})
	mux.HandleFunc("/moment", func(http.ResponseWriter, *http.Request) { time.Sleep(20 * time.Millisecond) })
	mux.HandleFunc("/layout.html", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		fmt.Fprintf(w, "<!doctype html><meta charset=utf-8><pre id=result></pre><script>%s</script>", layout)
	})
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	return server
}

//go:embed testdata/layout.js
var layout string

// On screens of four sizes, with 1 to 24 stations and 1 to 12 lots, and in every state: nothing is cut off or runs into
// something else, nothing is too small to be read from afar, hardly anything of the height is left empty, and each text
// has its contrast.
func TestWallLayoutInBrowser(t *testing.T) {
	server := wallOf(t)
	page := browse(t, "--virtual-time-budget=600000", "--dump-dom", server.URL+"/layout.html")
	result := regexp.MustCompile(`(?s)<pre id="result">(.*?)</pre>`).FindStringSubmatch(page)
	if result == nil || !strings.HasSuffix(result[1], "pages looked at\n") {
		t.Fatalf("the browser did not come to the end:\n%s", page)
	}
	if !strings.HasPrefix(result[1], "144 pages") {
		t.Error(result[1])
	}
}

// A screen that cannot show what the line says is as stale as one without an answer.
func TestWallStaleInBrowser(t *testing.T) {
	page := browse(t, "--window-size=1280,720", "--dump-dom", wallOf(t).URL+"/strange/2/1/")
	if !strings.Contains(page, `data-state="stale"`) || !strings.Contains(page, "⚠ STALE") ||
		!strings.Contains(page, "no answer since") {
		t.Errorf("it does not say that it is stale:\n%s", page)
	}
}

// What is wrong with the line is on the screen, whatever its stations do.
func TestWallWarnedInBrowser(t *testing.T) {
	page := browse(t, "--window-size=1280,720", "--dump-dom", wallOf(t).URL+"/warned/2/1/")
	if !strings.Contains(page, `data-state="running"`) || !strings.Contains(page, "⚠ the list of L1 is overdue<") {
		t.Errorf("it does not show the warning:\n%s", page)
	}
}

// Each state looks like no other: the picture is wide and full of its colour above.
func TestWallScreenshotsInBrowser(t *testing.T) {
	server := wallOf(t)
	dir := os.Getenv("WALL_SCREENSHOTS") // to look at them
	if dir == "" {
		dir = t.TempDir()
	}
	for state, want := range map[string]color.RGBA{
		"running": {0x5f, 0xd3, 0x8d, 0xff}, "stopped": {0xff, 0x8f, 0x87, 0xff}, "empty": {0xa9, 0xb4, 0xc0, 0xff},
		"stale": {0xf2, 0xc1, 0x4e, 0xff},
	} {
		path := filepath.Join(dir, state+".png")
		browse(t, "--window-size=1280,720", "--screenshot="+path, server.URL+"/"+state+"/12/3/")
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		picture, err := png.Decode(f)
		f.Close()
		if err != nil || picture.Bounds() != image.Rect(0, 0, 1280, 720) {
			t.Fatalf("%s: %v", path, err)
		}
		n := 0
		for x := range 1280 {
			for y := range 90 {
				if r, g, b, _ := picture.At(x, y).RGBA(); (color.RGBA{uint8(r >> 8), uint8(g >> 8), uint8(b >> 8),
					0xff}) == want {
					n++
				}
			}
		}
		if share := float64(n) / (1280 * 90); share < 0.25 {
			t.Errorf("%s: only %.0f%% of the picture's top have its colour", path, 100*share)
		}
	}
}

// A line runs if a station did something in the last minute, and has stopped if none did; that a device became overdue
// is nothing that a station did.
func TestLineState(t *testing.T) {
	s := newShop(t, 4)
	d := s.open(t)
	defer d.Close()
	is := func(want LineState, when string) {
		t.Helper()
		d.mu.Lock()
		d.status = nil // which is remembered for a second
		d.mu.Unlock()
		if got := must(d.Status(t.Context())).State; got != want {
			t.Errorf("%s: %s, want %s", when, got, want)
		}
	}
	is(Stopped, "nobody has asked for a device")
	must(d.Next(t.Context(), "A", "L1"))
	// half a minute ago, and a machine that is slow still has half a minute
	if err := d.write.Exec(t.Context(), "UPDATE event SET at = at - 30000"); err != nil {
		t.Fatal(err)
	}
	is(Running, "a station has asked")
	if err := d.write.Exec(t.Context(), "UPDATE event SET at = at - 30000"); err != nil {
		t.Fatal(err)
	}
	is(Stopped, "a minute later")
	if err := d.write.Exec(t.Context(),
		"INSERT INTO event SELECT at + 60000, lot, position, issue, station, 'overdue' FROM event"); err != nil {
		t.Fatal(err)
	}
	is(Stopped, "the device is overdue now")
}

// A line without a lot is empty, and says so to its wall screen: without an answer it would be stale.
func TestEmptyLine(t *testing.T) {
	s := newShop(t, 4)
	whole := s.Injection
	s.Injection = t.TempDir()
	d := s.open(t)
	defer d.Close()
	is := func(want LineState, lots int) {
		t.Helper()
		d.mu.Lock()
		d.status = nil // which is remembered for a second
		d.mu.Unlock()
		w := httptest.NewRecorder()
		d.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/v1/status", nil))
		var got Status
		if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || w.Code != http.StatusOK {
			t.Fatalf("%d, %v: %s", w.Code, err, w.Body)
		}
		if got.State != want || got.Lots == nil || len(got.Lots) != lots || got.Stations == nil || got.Last != nil ||
			got.PerHour != 0 || got.SecondsLeft != 0 || len(got.Hour) != 60 {
			t.Errorf("want %s with %d lots: %s", want, lots, w.Body)
		}
	}
	is(Empty, 0)
	if err := os.Mkdir(filepath.Join(s.Injection, "no-lot"), 0o700); err != nil {
		t.Fatal(err)
	}
	is(Empty, 0)
	if err := os.Rename(filepath.Join(whole, "L1"), filepath.Join(s.Injection, "L1")); err != nil {
		t.Fatal(err)
	}
	is(Stopped, 1) // at the first package, without a restart
	if err := os.RemoveAll(s.Injection); err != nil {
		t.Fatal(err)
	}
	is(Empty, 0) // no lot was ever made: there is no folder yet
}

// Whoever runs the line sees what it refused, in the log and as a count, and whether it works.
func TestRefusalsAreSeen(t *testing.T) {
	s := newShop(t, 20)
	var log bytes.Buffer
	s.Log = slog.New(slog.NewTextHandler(&log, nil))
	d := s.open(t)
	h := d.Handler()
	ask := func(method, path string) (int, string) {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
		return w.Code, w.Body.String()
	}
	ask("POST", "/v1/lots/"+strings.Repeat("x", 20_000)+"/next")
	if log.Len() > 2000 {
		t.Errorf("a line has %d bytes", log.Len())
	}
	for range 29 {
		if code, _ := ask("POST", "/v1/lots/L1/next"); code != http.StatusForbidden {
			t.Fatal(code)
		}
	}
	if n := strings.Count(log.String(), "msg=refused"); n < 1 || n > 25 || !strings.Contains(log.String(),
		"path=/v1/lots/L1/next") || !strings.Contains(log.String(), "client certificate") {
		t.Errorf("%d lines: %s", n, log.String())
	}
	if err := d.Report(t.Context(), "A", "L1", must(d.Next(t.Context(), "A", "L1")).IMEI, Failed, ""); err != nil {
		t.Fatal(err)
	}
	code, metrics := ask("GET", "/metrics")
	for _, want := range []string{`kme_station_refusals_total{code="403"} 30`,
		`kme_station_refusals_total{code="409"} 0`,
		`kme_station_devices{lot="L1",state="waiting"} 19`,
		`kme_station_results_total{result="failed",station="A"} 1`} {
		if code != http.StatusOK || !strings.Contains(metrics, want) {
			t.Errorf("%d, without %s:\n%s", code, want, metrics)
		}
	}
	if code, _ := ask("GET", "/healthz"); code != http.StatusOK {
		t.Error(code)
	}
	d.Close()
	if code, _ := ask("GET", "/healthz"); code != http.StatusServiceUnavailable {
		t.Error(code)
	}
}
