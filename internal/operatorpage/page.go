// Package operatorpage is a page for the people on duty: the state of the service, its refusals of the last day, and
// the state of one subscription or device, in words. It only reads, and needs no script.
package operatorpage

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"html/template"
	"math"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/explain"
	"github.com/kmehsm/kmehsm/kme"
)

//go:embed page.html page.css
var files embed.FS

// Health is the state of a service at one moment.
type Health struct {
	Problem      string   // why it is not ready; empty if it is
	Warnings     []string // what it goes on without
	Tokens       []Token
	Store        Store
	Directories  []Directory
	Certificates []Certificate
	Lots         []Lot
}

// A Token is an HSM's.
type Token struct {
	Name     string
	Works    bool
	Sessions int
	Hung     int64 // calls that have not come back
	Reopened int64
}

// A Store is the service's database.
type Store struct {
	Kind     string
	Works    bool
	Entries  int64 // of the ledger
	Bindings map[binding.State]int64
	Counted  time.Time // when Bindings was; zero: not yet
}

// A Directory is a manufacturer's.
type Directory struct {
	Manufacturer string
	Works        bool
	Distrusted   bool // it is not asked
}

// A Certificate is one that the service shows, or a CA of its clients'.
type Certificate struct {
	For, Subject string
	Ends         time.Time
}

// A Lot is one that was imported.
type Lot struct {
	Manufacturer, Lot, IMEIs string
	Devices                  int
	Served                   bool
	Why                      string    // it is not served
	List                     int       // version of the list of revoked devices; 0: there is none
	Read                     time.Time // when that was last read
	Overdue                  string    // why there is no later one
}

// Options say what a page shows.
type Options struct {
	Service *binding.Service
	Health  func(context.Context) Health // it is asked every few seconds at most
	History *History
	Count   func()                                     // brings History up to now
	View    func(context.Context) binding.BindingQuery // what the caller may see
	Version string
}

// A page serves the operator page.
type page struct {
	Options
	mu    sync.Mutex
	last  Health    // guarded by mu
	found time.Time // guarded by mu: when last was
}

// healthFor is how long an answer about health is reused.
const healthFor = 3 * time.Second

// policy lets a browser load the page and its style, send its form back, and nothing else.
const policy = "default-src 'none'; style-src 'self'; img-src data:; form-action 'self'; base-uri 'none'; " +
	"frame-ancestors 'none'"

// New makes the page's handler. The caller decides who may see it.
func New(o Options) http.Handler {
	p := &page{Options: o}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", p.serve)
	mux.HandleFunc("GET /page.css", func(w http.ResponseWriter, r *http.Request) {
		http.ServeFileFS(w, r, files, "page.css")
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for name, value := range map[string]string{"Content-Security-Policy": policy, "Cache-Control": "no-store",
			"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
			"Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin"} {
			w.Header().Set(name, value)
		}
		mux.ServeHTTP(w, r)
	})
}

// health gives the state of the service. One request at a time finds it out.
func (p *page) health(ctx context.Context) (Health, time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.found) >= healthFor {
		// The next request gets the same answer.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		p.last, p.found = p.Health(ctx), time.Now()
		for _, c := range p.last.Certificates {
			if daysLeft(c.Ends) < soon {
				p.last.Warnings = append(p.last.Warnings, fmt.Sprintf("the certificate %s (%s): %s", c.Subject, c.For,
					left(c.Ends)))
			}
		}
	}
	return p.last, p.found
}

// soon is how many days before its end a certificate causes a warning.
const soon = 30

func daysLeft(t time.Time) int { return int(math.Floor(time.Until(t).Hours() / 24)) }

func left(t time.Time) string {
	switch n := daysLeft(t); {
	case n < 0:
		return "it has ended"
	case n == 0:
		return "less than a day left"
	case n == 1:
		return "1 day left"
	default:
		return fmt.Sprintf("%d days left", n)
	}
}

// A found is the answer to a search.
type found struct {
	Asked        string
	Error        string // instead of all that follows
	Kind         string // IMSI or IMEI
	Is           string
	Subscription *explain.Subscription // of an IMSI
	Device       *explain.Device       // of an IMEI
}

// lookUp explains an IMSI or IMEI.
func (p *page) lookUp(ctx context.Context, kind, text string) *found {
	f := &found{Asked: strings.TrimSpace(text), Kind: kind}
	fail := func(err error) *found {
		f.Error = err.Error()
		if r, ok := errors.AsType[*binding.Refusal](err); ok {
			f.Error = fmt.Sprintf("%s: %s. The service's log has the cause.", r.Reason, r.Message)
		}
		return f
	}
	view := p.View(ctx)
	switch kind {
	case "IMSI":
		imsi, perr := kme.ParseIMSI(f.Asked)
		if perr != nil {
			return fail(perr)
		}
		if f.Is = imsi.String(); !view.Has(f.Is) {
			return fail(errors.New("this IMSI is of a PLMN that you may not see: plmns in the configuration says " +
				"which you may"))
		}
		k, err := p.Service.Known(ctx, imsi)
		if err != nil {
			return fail(err)
		}
		f.Subscription = explain.OfSubscription(k)
	case "IMEI":
		imei, perr := kme.ParseIMEI(f.Asked)
		if perr != nil {
			return fail(perr)
		}
		f.Is = imei.String()
		k, err := p.Service.KnownDevice(ctx, imei, view)
		if err != nil {
			return fail(err)
		}
		f.Device = explain.OfDevice(k)
	default:
		return fail(errors.New("say whether it is an IMSI or an IMEI"))
	}
	return f
}

// bars is how many bars a plot has: one for each quarter of an hour.
const bars = 96

func (p *page) serve(w http.ResponseWriter, r *http.Request) {
	health, when := p.health(r.Context())
	p.Count()
	var reasons []string
	for _, reason := range kme.Reasons() {
		reasons = append(reasons, string(reason))
	}
	data := struct {
		Health
		Now, Begun time.Time
		Version    string
		Found      *found
		Plots      []plot
		Refusals   []plot
		Hours      []hour
		HourNames  []string
		States     []binding.State
		Verdict    verdict
	}{
		Health: health, Now: when, Begun: p.History.begun, Version: p.Version,
		States: []binding.State{binding.Active, binding.Pending, binding.Revoked}, Verdict: verdictOf(health),
	}
	if q := r.URL.Query(); q.Has("number") {
		data.Found = p.lookUp(r.Context(), q.Get("kind"), q.Get("number"))
	}
	now := time.Now()
	for i, s := range p.History.Day(bars, binding.CountAttaches, binding.CountEstablished) {
		data.Plots = append(data.Plots, newPlot(s, []string{"Attaches", "Devices bound"}[i], "up", now))
	}
	for _, s := range most(p.History.Day(bars, reasons...)) {
		data.Refusals = append(data.Refusals, newPlot(s, s.Name, "down", now))
	}
	data.HourNames, data.Hours = p.hours(reasons, now)
	var out bytes.Buffer
	if err := parsed.Execute(&out, data); err != nil {
		p.Service.Broken(r.Context(), err, "path", r.URL.Path)
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Write(out.Bytes())
}

// An hour is a row of the table with the figures of the plots.
type hour struct {
	Begins time.Time
	Counts []float64
}

// hours are those of the last day in which something was counted, the last one first.
func (p *page) hours(reasons []string, now time.Time) (names []string, all []hour) {
	series := p.History.Day(24, binding.CountAttaches, binding.CountEstablished)
	series = append(series, most(p.History.Day(24, reasons...))...)
	for i := 23; i >= 0; i-- {
		row, some := hour{Begins: now.Add(-time.Duration(24-i) * time.Hour)}, false
		for _, s := range series {
			row.Counts = append(row.Counts, s.Steps[i])
			some = some || s.Steps[i] > 0
		}
		if some {
			all = append(all, row)
		}
	}
	for _, s := range series {
		names = append(names, s.Name)
	}
	return names, all
}

// A verdict is the service's health in a word, with a shape beside its colour.
type verdict struct{ Class, Shape, Says string }

func verdictOf(h Health) verdict {
	switch n := len(h.Warnings); {
	case h.Problem != "":
		return verdict{Class: "bad", Shape: "■", Says: "Not ready: " + h.Problem}
	case n == 1:
		return verdict{Class: "warn", Shape: "▲", Says: "Works, with a warning"}
	case n > 1:
		return verdict{Class: "warn", Shape: "▲", Says: fmt.Sprintf("Works, with %d warnings", n)}
	}
	return verdict{Class: "good", Shape: "●", Says: "Everything works"}
}

// A plot is one of bars over the last day. Lengths are in units of its view box.
type plot struct {
	Title  string
	Class  string // up or down: of its bars
	ID     string
	Total  float64
	Top    float64 // what the highest line stands for
	Peak   string  // in words
	Bars   []bar
	Ticks  []tick
	Width  int
	Height int
}

type bar struct{ X, Y, Height float64 }

type tick struct {
	X    float64
	Text string
}

const (
	barWidth   = 6
	plotHeight = 60
)

func newPlot(s Series, title, class string, now time.Time) plot {
	p := plot{Title: title, Class: class, ID: "plot-" + s.Name, Total: s.Total, Width: bars * barWidth,
		Height: plotHeight}
	peak := slices.Max(s.Steps)
	p.Top, p.Peak = roundUp(peak), "none"
	begins := func(step int) time.Time {
		return now.Add(-time.Duration(bars-step) * 24 * time.Hour / bars)
	}
	if peak > 0 {
		p.Peak = fmt.Sprintf("the most in a quarter of an hour %s, from %s UTC", number(peak),
			begins(slices.Index(s.Steps, peak)).UTC().Format("15:04"))
	}
	for i, n := range s.Steps {
		if n > 0 {
			height := max(n/p.Top*plotHeight, 1)
			p.Bars = append(p.Bars, bar{X: float64(i*barWidth) + .5, Y: plotHeight - height, Height: height})
		}
	}
	for hours := 24; hours >= 0; hours -= 6 {
		x := float64(24-hours) / 24 * bars * barWidth
		p.Ticks = append(p.Ticks, tick{X: x, Text: now.Add(-time.Duration(hours) * time.Hour).UTC().Format("15:04")})
	}
	return p
}

// roundUp gives the next 1, 2 or 5 times a power of ten.
func roundUp(n float64) float64 {
	if n <= 1 {
		return 1
	}
	power := math.Pow(10, math.Floor(math.Log10(n)))
	for _, times := range []float64{1, 2, 5} {
		if n <= times*power {
			return times * power
		}
	}
	return 10 * power
}

var parsed = template.Must(template.New("page.html").Funcs(template.FuncMap{
	"time": func(t time.Time) string {
		if t.IsZero() {
			return "never"
		}
		return t.UTC().Format("2006-01-02 15:04 UTC")
	},
	"clock":  func(t time.Time) string { return t.UTC().Format("15:04") },
	"number": number[float64], "integer": number[int64], "int": number[int],
	"days": daysLeft, "left": left, "soon": func() int { return soon },
	"ago": func(t time.Time) string {
		if t.IsZero() {
			return "never"
		}
		return time.Since(t).Round(time.Second).String() + " ago"
	},
}).ParseFS(files, "page.html"))

// number writes a number with spaces between thousands.
func number[N int | int64 | float64](n N) string {
	digits := fmt.Sprintf("%.0f", float64(n))
	var out []byte
	for i := range len(digits) {
		if i > 0 && (len(digits)-i)%3 == 0 && digits[i-1] != '-' {
			out = append(out, "\u202f"...)
		}
		out = append(out, digits[i])
	}
	return string(out)
}
