package cmdline

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/kmehsm/kmehsm/internal/terminal"
)

// A Step says how far a piece of work is.
type Step struct {
	Done   int
	New    int    // of these, this run's own: what earlier runs did says nothing of its rate
	Begun  bool   // this run is at work, although nothing of it may be done yet
	Total  int    // of all; 0 if nobody knows
	Note   string // more for people
	Detail any    // more for programs: a struct, whose fields stand beside those of the JSON document
}

// Progress shows on standard error how far a command's work is. On a terminal, it is a line that changes, below all
// else that is written there. Elsewhere, it is a line every few seconds, which with --json is a JSON document. It may
// be used concurrently.
type Progress struct {
	w          io.Writer
	what, unit string
	json       bool
	terminal   bool
	began      time.Time
	ended      chan struct{}
	ticking    sync.WaitGroup

	mu    sync.Mutex
	step  Step      // guarded by mu
	since time.Time // guarded by mu: this run's work began then
}

const (
	sayEvery  = 5 * time.Second
	drawEvery = 200 * time.Millisecond
)

// NewProgress begins to show the progress of work, counted in a unit. Close ends it.
func NewProgress(c *cli.Context, what, unit string, total int) *Progress {
	p := newProgress(c.App.ErrWriter, what, unit, c.Bool("json"))
	p.step.Total = total
	p.show(map[bool]time.Duration{true: drawEvery, false: sayEvery}[p.terminal])
	return p
}

// Spin shows until stop is called that work of unknown length goes on, and since when.
func Spin(c *cli.Context, what string) (stop func()) { return NewProgress(c, what, "", 0).Close }

func newProgress(w io.Writer, what, unit string, asJSON bool) *Progress {
	w = onScreen(w)
	now := time.Now()
	return &Progress{w: w, what: what, unit: unit, json: asJSON, terminal: terminal.Is(w) && !asJSON,
		began: now, since: now, ended: make(chan struct{})}
}

func (p *Progress) show(every time.Duration) {
	p.ticking.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				p.say(time.Now())
			case <-p.ended:
				return
			}
		}
	})
}

// At says how much this run has done, of the total.
func (p *Progress) At(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.set(Step{Done: n, New: n, Total: p.step.Total})
}

// Set says how far the work is.
func (p *Progress) Set(s Step) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.set(s)
}

func (p *Progress) set(s Step) {
	if p.step = s; s.New == 0 && !s.Begun { // it still looks at what is there
		p.since = time.Now()
	}
}

// Close removes the line that changes, so that the next output begins a line.
func (p *Progress) Close() {
	close(p.ended)
	p.ticking.Wait()
	if s, ok := p.w.(*screen); ok {
		s.show("")
	}
}

func (p *Progress) say(now time.Time) {
	p.mu.Lock()
	s, since := p.step, p.since
	p.mu.Unlock()
	switch {
	case p.json:
		json.NewEncoder(p.w).Encode(p.document(s, since, now))
	case p.terminal:
		w := p.w.(*screen)
		w.show(p.drawn(s, since, now, w.columns()))
	default:
		fmt.Fprintf(p.w, "%s: %s\n", p.what, p.said(s, since, now))
	}
}

// pace is the rate of this run's work, and the time for the rest; zero if that is not known.
func (s Step) pace(since, now time.Time) (perSecond float64, left time.Duration) {
	if s.New == 0 || !now.After(since) {
		return 0, 0
	}
	perSecond = float64(s.New) / now.Sub(since).Seconds()
	rest := float64(max(0, s.Total-s.Done)) / perSecond
	return perSecond, time.Duration(rest * float64(time.Second)).Round(time.Second)
}

func (p *Progress) document(s Step, since, now time.Time) map[string]any {
	doc := map[string]any{}
	if text, err := json.Marshal(s.Detail); err == nil {
		json.Unmarshal(text, &doc)
	}
	if doc == nil { // no Detail
		doc = map[string]any{}
	}
	doc["what"], doc["seconds"] = p.what, now.Sub(p.began).Seconds()
	if p.unit != "" {
		rate, left := s.pace(since, now)
		doc["unit"], doc["done"], doc["per_second"] = p.unit, s.Done, rate
		if s.Total > 0 {
			doc["total"], doc["seconds_left"] = s.Total, left.Seconds()
		}
	}
	return doc
}

func (p *Progress) said(s Step, since, now time.Time) string {
	if p.unit == "" {
		return now.Sub(p.began).Round(time.Second).String()
	}
	text := fmt.Sprintf("%d %s", s.Done, p.unit)
	if s.Total > 0 {
		text = fmt.Sprintf("%d of %d %s", s.Done, s.Total, p.unit)
	}
	if rate, left := s.pace(since, now); rate > 0 {
		text += fmt.Sprintf(", %.0f/s", rate)
		if s.Total > 0 {
			text += fmt.Sprintf(", %s left", left)
		}
	}
	if s.Note != "" {
		text += "; " + s.Note
	}
	return text
}

// drawn is a line of at most so many columns, but for the note at its end. Where a terminal is narrow the bar is
// shorter, or left out: the time that is left matters more.
func (p *Progress) drawn(s Step, since, now time.Time, columns int) string {
	if s.Total == 0 {
		const spinner = `|/-\`
		return fmt.Sprintf("%c %s: %s", spinner[now.Sub(p.began)/drawEvery%time.Duration(len(spinner))], p.what,
			p.said(s, since, now))
	}
	share := min(float64(s.Done)/float64(s.Total), 1)
	percent := fmt.Sprintf("%3d%%  ", int(100*share))
	bare := s
	bare.Note = ""
	bar := ""
	const widest, narrowest = 20, 5
	free := columns - len([]rune(p.what+" [] "+percent+p.said(bare, since, now)))
	if width := min(free, widest); width >= narrowest {
		full := int(share * float64(width))
		bar = "[" + strings.Repeat("#", full) + strings.Repeat("-", width-full) + "] "
	}
	return p.what + " " + bar + percent + p.said(s, since, now)
}

// A screen is a terminal with a line at the end that changes. What else is written has lines of its own above it.
type screen struct {
	f     *os.File
	mu    sync.Mutex
	line  string // guarded by mu: what is shown; empty for nothing
	ended bool   // guarded by mu: nothing is shown any more
}

// onScreen gives w a line that changes, if it is a terminal.
func onScreen(w io.Writer) io.Writer {
	if f, ok := w.(*os.File); ok && terminal.Is(f) {
		return &screen{f: f}
	}
	return w
}

func (s *screen) Fd() uintptr { return s.f.Fd() }

const clearLine = "\r\x1b[K"

func (s *screen) Write(text []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.line == "" {
		return s.f.Write(text)
	}
	s.line = "" // the next show brings it back
	if _, err := s.f.WriteString(clearLine); err != nil {
		return 0, err
	}
	return s.f.Write(text)
}

// columns are those that a line may have: not the last one, where some terminals begin a new line.
func (s *screen) columns() int {
	width, _, err := term.GetSize(int(s.f.Fd()))
	if err != nil || width < 2 {
		width = 80
	}
	return width - 1
}

// show replaces the line at the end by another one, or removes it if that is empty.
func (s *screen) show(line string) {
	if runes, n := []rune(line), s.columns(); len(runes) > n {
		line = string(runes[:n])
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if line != s.line && !s.ended {
		s.line = line
		s.f.WriteString(clearLine + line)
	}
}

// end removes the line that changes for good, so that a second signal, which kills, leaves none behind.
func (s *screen) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.line != "" {
		s.f.WriteString(clearLine + "interrupted: what has begun is finished; Ctrl-C again ends it at once\n")
	}
	s.line, s.ended = "", true
}
