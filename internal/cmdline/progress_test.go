package cmdline

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/pty"
)

// onTerminal has a terminal of so many columns. read gives what was written there so far.
func onTerminal(t *testing.T, columns uint16) (tty *os.File, read func() string) {
	t.Helper()
	t.Setenv("TERM", "xterm")
	t.Setenv("NO_COLOR", "")
	person, tty, err := pty.Open(columns)
	must.Do(t, err)
	t.Cleanup(func() { person.Close() })
	return tty, func() string {
		tty.Close()
		text, _ := io.ReadAll(person) // it ends with EIO when nobody has the other end any more
		return string(text)
	}
}

// looks gives the lines that somebody sees in the end: a carriage return goes back to the first column, and what was
// there is written over or cleared.
func looks(text string) (lines []string) {
	for line := range strings.SplitSeq(strings.ReplaceAll(text, "\r\n", "\n"), "\n") {
		var seen []rune
		at := 0
		for i := 0; i < len(line); {
			switch {
			case line[i] == '\r':
				at = 0
				i++
			case strings.HasPrefix(line[i:], "\x1b[K"):
				seen = seen[:at]
				i += 3
			default:
				r := []rune(line[i:])[0]
				seen = append(seen[:at], append([]rune{r}, seen[min(at+1, len(seen)):]...)...)
				at++
				i += len(string(r))
			}
		}
		lines = append(lines, string(seen))
	}
	return lines
}

// After a resume, what earlier runs did says nothing of how long the rest takes.
func TestPaceAfterResume(t *testing.T) {
	began := time.Unix(1000, 0)
	s := Step{Done: 10_100, New: 100, Total: 20_000}
	rate, left := s.pace(began, began.Add(10*time.Second))
	if rate != 10 || left != 990*time.Second {
		t.Errorf("%g a second, %s left", rate, left)
	}
	if rate, left := (Step{Done: 10_000, Total: 20_000}).pace(began, began.Add(time.Second)); rate != 0 || left != 0 {
		t.Errorf("nothing is done yet, and it says %g a second, %s left", rate, left)
	}
}

// The time that a run looks at what is there is none of its work.
func TestPaceBeginsWithTheWork(t *testing.T) {
	p := newProgress(new(bytes.Buffer), "L1", "devices", false)
	p.since = time.Unix(0, 0)
	p.Set(Step{Done: 100, Total: 200})
	if time.Since(p.since) > time.Hour {
		t.Error("the time before the work counts")
	}
	p.since = time.Unix(0, 0)
	p.Set(Step{Done: 100, Total: 200, Begun: true})
	if time.Since(p.since) < time.Hour {
		t.Error("the time of the first work does not count")
	}
}

// On a terminal an error has a line of its own, and the bar is gone in the end; the bar fits the terminal.
func TestProgressOnTerminal(t *testing.T) {
	const columns = 80
	tty, read := onTerminal(t, columns)
	app := &cli.App{Name: "prog", Writer: io.Discard, ErrWriter: tty, Commands: []*cli.Command{{Name: "work",
		Action: func(c *cli.Context) error {
			p := NewProgress(c, "L1", "devices", 200)
			defer p.Close()
			p.At(50)
			p.say(time.Now())
			fmt.Fprintln(c.App.ErrWriter, "a warning")
			p.Set(Step{Done: 100, New: 100, Total: 200, Note: strings.Repeat("x", 100)})
			p.say(time.Now())
			return errors.New("it failed")
		}}}}
	if code := (Program{App: app}).Run(t.Context(), []string{"prog", "work"}); code != exitFailed {
		t.Error(code)
	}
	text := read()
	for _, want := range []string{"L1 [#####---------------]  25%  50 of 200 devices", "[##########----------]  50%"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in %q", want, text)
		}
	}
	if got := strings.Join(looks(text), "\n"); got != "a warning\nprog: it failed\n" {
		t.Errorf("what one sees: %q", got)
	}
	for part := range strings.SplitSeq(text, clearLine) {
		if line, _, _ := strings.Cut(part, "\n"); len(line) >= columns {
			t.Errorf("%q does not fit", line)
		}
	}
}

// On a narrow terminal the bar makes room for the time that is left; the note is what is cut off.
func TestProgressOnNarrowTerminal(t *testing.T) {
	p := newProgress(new(bytes.Buffer), "L1", "devices", false)
	s := Step{Done: 500, New: 100, Total: 1000, Note: "token busy 90%"}
	for columns, want := range map[int]string{
		80: "L1 [##########----------]  50%  500 of 1000 devices, 10/s, 50s left; token busy 90%",
		56: "L1 [####-----]  50%  500 of 1000 devices, 10/s, 50s left; token busy 90%",
		48: "L1  50%  500 of 1000 devices, 10/s, 50s left; token busy 90%",
		20: "L1  50%  500 of 1000 devices, 10/s, 50s left; token busy 90%",
	} {
		if got := p.drawn(s, p.since, p.since.Add(10*time.Second), columns); got != want {
			t.Errorf("%d columns: %q", columns, got)
		}
	}
}

// A key of an HSM takes minutes: the spinner turns by itself, and shows the time.
func TestSpin(t *testing.T) {
	tty, read := onTerminal(t, 80)
	app := &cli.App{Name: "prog", Writer: io.Discard, ErrWriter: tty, Commands: []*cli.Command{{Name: "work",
		Action: func(c *cli.Context) error {
			stop := Spin(c, "making a key")
			time.Sleep(2 * time.Second)
			stop()
			return nil
		}}}}
	synctest.Test(t, func(t *testing.T) { Program{App: app}.Run(t.Context(), []string{"prog", "work"}) })
	text := read()
	if !strings.Contains(text, "making a key: 0s") || !regexp.MustCompile("making a key: [1-9]").MatchString(text) {
		t.Errorf("%q", text)
	}
	if got := strings.Join(looks(text), ""); got != "" {
		t.Errorf("it leaves %q", got)
	}
}

// Ctrl-C takes the line away at once, so that a second one, which kills, leaves none; and nothing brings it back.
func TestInterrupted(t *testing.T) {
	tty, read := onTerminal(t, 80)
	var interrupt func()
	var p *Progress
	app := &cli.App{Name: "prog", Writer: io.Discard, ErrWriter: tty, Commands: []*cli.Command{{Name: "work",
		Action: func(c *cli.Context) error {
			p = NewProgress(c, "L1", "devices", 10)
			p.say(time.Now())
			interrupt()
			time.Sleep(4 * drawEvery)
			return fmt.Errorf("nothing was changed: %w", c.Context.Err()) // as if killed: it is not closed
		}}}}
	synctest.Test(t, func(t *testing.T) {
		var ctx context.Context
		ctx, interrupt = context.WithCancel(t.Context())
		Program{App: app}.Run(ctx, []string{"prog", "work"})
		p.Close() // nothing draws on a terminal that is gone
	})
	want := []string{"interrupted: what has begun is finished; Ctrl-C again ends it at once",
		"prog: nothing was changed: interrupted", ""}
	if got := looks(read()); !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

// Elsewhere than on a terminal there are whole lines, and with --json each is a document with the fields of the detail.
func TestProgressElsewhere(t *testing.T) {
	var out bytes.Buffer
	p := newProgress(&out, "L1", "devices", false)
	p.Set(Step{Done: 15, New: 5, Total: 20, Note: "token busy 90%"})
	p.say(p.since.Add(5 * time.Second))
	if got := out.String(); got != "L1: 15 of 20 devices, 1/s, 5s left; token busy 90%\n" {
		t.Errorf("%q", got)
	}
	out.Reset()
	p = newProgress(&out, "L1", "devices", true)
	p.Set(Step{Done: 15, New: 5, Total: 20, Detail: struct {
		Lot string `json:"lot"`
	}{"L1"}})
	p.say(p.since.Add(5 * time.Second))
	var doc map[string]any
	if err := json.Unmarshal(out.Bytes(), &doc); err != nil || doc["lot"] != "L1" || doc["done"] != 15.0 ||
		doc["per_second"] != 1.0 || doc["seconds_left"] != 5.0 {
		t.Errorf("%v %s", err, &out)
	}
}
