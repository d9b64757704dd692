package terminal

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"time"
)

// NewLog logs lines of text for people where w is a terminal, else lines of JSON.
func NewLog(w io.Writer, o slog.HandlerOptions) *slog.Logger {
	if !Is(w) {
		return slog.New(slog.NewJSONHandler(w, &o))
	}
	h := &humanLog{out: &humanOut{w: w}}
	replace := o.ReplaceAttr
	o.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && (a.Key == slog.LevelKey || a.Key == slog.MessageKey) {
			return slog.Attr{} // Handle writes them
		}
		if replace != nil {
			a = replace(groups, a)
		}
		return a
	}
	h.Handler = slog.NewTextHandler(&h.out.attrs, &o)
	return slog.New(h)
}

// A humanLog writes the time of the day, the level and the message, and then the attributes as a TextHandler does.
type humanLog struct {
	slog.Handler
	out *humanOut
}

type humanOut struct {
	mu    sync.Mutex
	w     io.Writer
	attrs bytes.Buffer // guarded by mu: what the TextHandler has written
}

func (h *humanLog) Handle(ctx context.Context, r slog.Record) error {
	o, when, level := h.out, r.Time, fmt.Sprintf("%-5s", r.Level)
	if r.Level >= slog.LevelError {
		level = Paint(o.w, Red, level)
	} else if r.Level >= slog.LevelWarn {
		level = Paint(o.w, Yellow, level)
	}
	r.Time = time.Time{}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.attrs.Reset()
	if err := h.Handler.Handle(ctx, r); err != nil {
		return err
	}
	_, err := fmt.Fprintf(o.w, "%s %s %s\n", when.Format(time.TimeOnly), level,
		strings.TrimSpace(r.Message+"  "+o.attrs.String()))
	return err
}

func (h *humanLog) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &humanLog{Handler: h.Handler.WithAttrs(attrs), out: h.out}
}
func (h *humanLog) WithGroup(name string) slog.Handler {
	return &humanLog{Handler: h.Handler.WithGroup(name), out: h.out}
}
