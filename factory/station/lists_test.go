package station

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// hiding is a directory that may answer something else for the list of revoked devices of L1.
type hiding struct {
	directory.Store
	mu      sync.Mutex
	instead func(context.Context) ([]byte, string, error) // guarded by mu
}

func (h *hiding) Read(ctx context.Context, path string) ([]byte, string, error) {
	h.mu.Lock()
	instead := h.instead
	h.mu.Unlock()
	if instead != nil && path == directory.RevocationsPath("L1") {
		return instead(ctx)
	}
	return h.Store.Read(ctx, path)
}

func (h *hiding) answer(instead func(context.Context) ([]byte, string, error)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.instead = instead
}

func (h *hiding) hides() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.instead != nil
}

func get(d *Desk, path string) string {
	w := httptest.NewRecorder()
	d.Handler().ServeHTTP(w, httptest.NewRequest("GET", path, nil))
	return w.Body.String()
}

// stale is how old a list is that the desk reads again.
const stale = 1100 * time.Millisecond

// A device that was revoked goes to no station, whatever the directory shows instead of the list that says so: the line
// has seen that list, or the desk itself. This is logged, counted and shown, and is over when the list is back.
func TestListNotTheLast(t *testing.T) {
	s := newShop(t, 32)
	store, logged, seen := &hiding{Store: s.Store}, new(testproc.Log), 0
	s.Store, s.Log = store, slog.New(slog.NewJSONHandler(logged, nil))
	d := s.open(t)
	defer func() { d.Close() }()
	take := func() string { // what was logged since
		from := seen
		all := logged.String()
		seen = len(all)
		return all[from:]
	}
	next := 0
	device := func() kme.IMEI { next++; return s.manifest.IMEI(next - 1) }
	injected := func(imei kme.IMEI) {
		t.Helper()
		if _, err := d.Named(t.Context(), "A", "L1", imei); err != nil {
			t.Fatal(err)
		}
		if err := d.Report(t.Context(), "A", "L1", imei, Injected, ""); err != nil {
			t.Fatal(err)
		}
	}
	revoked := func(imei kme.IMEI) bool {
		_, err := d.Named(t.Context(), "A", "L1", imei)
		return errors.As(err, new(*RefusedError)) && strings.Contains(err.Error(), "is revoked")
	}
	shown := func(why directory.Why) {
		t.Helper()
		// The read may end after the call that has waited for it.
		counter := fmt.Sprintf(`kme_station_revocations_overdue_total{why="%s"} [1-9]`, why)
		testproc.Await(t, counter, func() bool {
			return regexp.MustCompile(counter).MatchString(get(d, "/metrics"))
		})
		line := fmt.Sprintf(`"msg":"a list of revoked devices is overdue","lot":"L1","why":"%s"`, why)
		log := ""
		testproc.Await(t, line, func() bool { log += take(); return strings.Contains(log, line) })
		warning := fmt.Sprintf("the list of revoked devices of lot L1 is overdue (%s)", why)
		testproc.Await(t, warning, func() bool { return strings.HasPrefix(get(d, "/healthz"), "ok\nbut "+warning) })
		testproc.Await(t, "the wall screen says so", func() bool {
			var status struct{ Warnings []string }
			return json.Unmarshal([]byte(get(d, "/v1/status")), &status) == nil && len(status.Warnings) == 1 &&
				strings.HasPrefix(status.Warnings[0], warning)
		})
	}
	type answer = func(ctx context.Context, earlier []byte) ([]byte, string, error)
	answers := func(jws string, err error) answer {
		return func(context.Context, []byte) ([]byte, string, error) { return []byte(jws), "1", err }
	}
	putBack := func(_ context.Context, earlier []byte) ([]byte, string, error) { return earlier, "1", nil }
	silent := func(ctx context.Context, _ []byte) ([]byte, string, error) { <-ctx.Done(); return nil, "", ctx.Err() }
	// As a network file system, which cannot be interrupted.
	deaf := func(context.Context, []byte) ([]byte, string, error) {
		for store.hides() {
			time.Sleep(10 * time.Millisecond)
		}
		return nil, "", errors.New("too late")
	}
	for name, c := range map[string]struct {
		list answer
		why  directory.Why
		seen bool // by the desk, and the line has lost its copy
	}{
		"withheld":               {list: answers("", directory.ErrNotFound), why: directory.Rollback},
		"put back":               {list: putBack, why: directory.Rollback},
		"forged":                 {list: answers("x", nil), why: directory.Rollback},
		"away":                   {list: answers("", errors.New("away")), why: directory.Failed},
		"silent":                 {list: silent, why: directory.Failed},
		"deaf":                   {list: deaf, why: directory.Failed},
		"seen by the desk alone": {list: putBack, why: directory.Rollback, seen: true},
	} {
		injected(device())
		stolen, good := device(), device()
		earlier, _, err := store.Read(t.Context(), directory.RevocationsPath("L1"))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.line.Revoke(t.Context(), "L1", []kme.IMEI{stolen}, "stolen", nil); err != nil {
			t.Fatal(err)
		}
		if c.seen {
			time.Sleep(stale)
			if !revoked(stolen) {
				t.Fatal("the desk has not seen it")
			}
			if err := os.RemoveAll(filepath.Join(s.State, "lots")); err != nil {
				t.Fatal(err)
			}
		}
		take()
		store.answer(func(ctx context.Context) ([]byte, string, error) { return c.list(ctx, earlier) })
		time.Sleep(stale)
		for _, when := range []string{"at once", "after a restart"} {
			if ticket, err := d.Named(t.Context(), "A", "L1", stolen); err == nil {
				t.Fatalf("%s, %s: a revoked device was handed out: %+v", name, when, ticket)
			}
			if _, err := d.Named(t.Context(), "A", "L1", good); !errors.Is(err, directory.ErrNotCurrent) &&
				!errors.Is(err, directory.ErrUnavailable) {
				t.Errorf("%s, %s: %v", name, when, err)
			}
			shown(c.why)
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			d = s.open(t)
		}
		if _, err := os.Stat(filepath.Join(s.State, "lots")); c.seen && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the desk has written to the line's folder: %v", err)
		}
		store.answer(nil)
		testproc.Await(t, name+" is over", func() bool {
			return revoked(stolen) && get(d, "/healthz") == "ok\n"
		})
	}
	// A list that is only late says who was revoked.
	if _, err := s.line.Refresh(t.Context(), "L1", time.Second, false); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * stale)
	injected(device())
	shown(directory.Late)
}
