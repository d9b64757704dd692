package terminal

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"os"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/pty"
)

// Nobody sits at /dev/null, which is a character device as a terminal is.
func TestIs(t *testing.T) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if Is(null) {
		t.Error("/dev/null is taken for a terminal")
	}
}

// People read a log at a terminal, with colours unless NO_COLOR is set; programs read one elsewhere.
func TestLogFormat(t *testing.T) {
	write := func(w io.Writer) {
		log := NewLog(w, slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == "imsi" {
				a.Value = slog.StringValue("hashed")
			}
			return a
		}})
		log.With("token", "a b").WithGroup("g").Warn("refused", "imsi", "001010000000001")
	}
	var out bytes.Buffer
	write(&out)
	var doc map[string]any
	if err := json.Unmarshal(out.Bytes(), &doc); err != nil || doc["msg"] != "refused" {
		t.Error(err, out.String())
	}
	onTerminal := func() string {
		person, tty, err := pty.Open(80)
		must.Do(t, err)
		defer person.Close()
		write(tty)
		must.Do(t, tty.Close())
		text, _ := io.ReadAll(person) // it ends with EIO when nobody has the other end any more
		return string(text)
	}
	t.Setenv("TERM", "xterm")
	t.Setenv("NO_COLOR", "")
	want := " \x1b[33mWARN \x1b[0m refused  token=\"a b\" g.imsi=hashed\r\n"
	if text := onTerminal(); !strings.HasSuffix(text, want) {
		t.Errorf("%q", text)
	}
	t.Setenv("NO_COLOR", "1")
	if text := onTerminal(); strings.Contains(text, "\x1b") || !strings.Contains(text, "WARN  refused") {
		t.Errorf("%q", text)
	}
}
