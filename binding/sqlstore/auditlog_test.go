package sqlstore

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/mark"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/internal/sqlite"
)

// keepOnce is a service that ends at once: it copies what there is to an audit log.
func keepOnce(t *testing.T, store *Store, dir string) {
	t.Helper()
	var log bytes.Buffer
	ended, end := context.WithCancel(t.Context())
	end()
	mark.KeepAuditLog(ended, store, dir, new(atomic.Bool), slog.New(slog.NewTextHandler(&log, nil)))
	if log.Len() > 0 {
		t.Errorf("%s", &log)
	}
}

// An audit log goes on where it was, whatever its last writer has left of it, and after a database was accepted without
// it.
func TestAuditLogGoesOn(t *testing.T) {
	ctx := t.Context()
	s, token, dir := open(t, path(t)), new(markToken), filepath.Join(t.TempDir(), "audit [1]*")
	note := func(detail string) { t.Helper(); done(t, s.Note(ctx, "TRIED", "s", detail)) }
	keep := func(store *Store) { t.Helper(); keepOnce(t, store, dir) }
	note("before there was a log")
	keep(s)
	for n := range 3 {
		note(fmt.Sprint("entry ", n))
		keep(s)
	}
	files := must(os.ReadDir(dir))
	f := must(os.OpenFile(filepath.Join(dir, files[len(files)-1].Name()), os.O_APPEND|os.O_WRONLY, 0))
	must(f.WriteString(strings.Repeat("x", 3<<20) + "\n" + `{"chain":3,"seq":`)) // and then its machine lost power
	done(t, f.Close())
	note("entry 3")
	keep(s)
	done(t, mark.Raise(ctx, s, token))
	var text strings.Builder
	for _, file := range must(os.ReadDir(dir)) {
		text.Write(must(os.ReadFile(filepath.Join(dir, file.Name()))))
	}
	for n := range 4 {
		if got := strings.Count(text.String(), fmt.Sprintf(`"entry %d"`, n)); got != 1 {
			t.Errorf("entry %d is there %d times", n, got)
		}
	}
	if strings.Contains(text.String(), "before") {
		t.Error("what was decided before is in it")
	}

	// Another history of the same chains.
	fork := open(t, path(t))
	done(t, fork.Note(ctx, "TRIED", "s", "another history"))
	if _, _, err := mark.Accept(ctx, fork, token, mark.AcceptOptions{Reason: "x",
		Agreed: func(*binding.Missing) error { return nil }}); err != nil {
		t.Fatal(err)
	}
	keep(fork)
	done(t, fork.Note(ctx, "TRIED", "s", "after it"))
	keep(fork)
	data := must(os.ReadFile(filepath.Join(dir, files[len(files)-1].Name())))
	if !strings.Contains(string(data), "after it") || strings.Count(string(data), "ACCEPTED") != binding.Chains {
		t.Errorf("the log has not what came after: %s", data)
	}
	if !reflect.DeepEqual(must(fork.Heads(ctx)).Heads, fork.Seen().Heads) {
		t.Error("heads")
	}
}

// A backup that was accepted without the audit log begins a second history. Brought back again, with the log, it goes
// on with that one: what was decided in it stands, not what was given up. One that was accepted with the log goes on
// with the only history.
func TestRestoredTwice(t *testing.T) {
	for _, withLog := range []bool{false, true} {
		restoredTwice(t, withLog)
	}
}

func restoredTwice(t *testing.T, withLog bool) {
	ctx, p := t.Context(), path(t)
	token, dir := new(markToken), filepath.Join(t.TempDir(), "audit")
	keep := func(store *Store) {
		t.Helper()
		keepOnce(t, store, dir)
		done(t, mark.Raise(ctx, store, token))
	}
	accept := func(store *Store, logs ...string) {
		t.Helper()
		_, _, err := mark.Accept(ctx, store, token, mark.AcceptOptions{Reason: "lost", AuditLogs: logs,
			Agreed: func(*binding.Missing) error { return nil }})
		done(t, err)
	}
	s := must(Open(ctx, "sqlite:"+p, rowKey))
	keep(s)
	h := &history{t: t, s: s, token: token, audit: dir}
	h.bind(stays, stays)
	keep(s)
	done(t, s.Close())
	backup := must(os.ReadFile(p))
	restored := func() *Store {
		q := filepath.Join(t.TempDir(), "restored.db")
		done(t, os.WriteFile(q, backup, 0o600))
		return must(Open(ctx, "sqlite:"+q, rowKey))
	}
	s = must(Open(ctx, "sqlite:"+p, rowKey))
	done(t, mark.Check(ctx, s, token))
	done(t, s.Note(ctx, "TRIED", imsiNo(t, stays).String(), "the first history"))
	keep(s)
	done(t, s.Close())
	s = restored()
	if withLog {
		accept(s, dir)
	} else {
		accept(s)
	}
	must(s.Revoke(ctx, imsiNo(t, stays), t0))
	keep(s)
	done(t, s.Close())
	s = restored()
	accept(s, dir)
	if sub := must(s.Subscription(ctx, imsiNo(t, stays), t0)); sub.Standing() != nil {
		t.Errorf("what was revoked stands, although the audit log has the revocation: %+v", sub.Standing())
	}
	first := 0
	for _, e := range must(s.History(ctx, imsiNo(t, stays).String())) {
		if e.Detail == "the first history" {
			first++
		}
	}
	if (first == 1) != withLog || first > 1 {
		t.Errorf("with the log at first: %v; the first history's entry is there %d times", withLog, first)
	}
	if d := must(s.Verify(ctx, func(int, int) {})).Damaged; len(d) > 0 {
		t.Errorf("damaged: %v", d)
	}
	done(t, mark.Check(ctx, s, token))
}

// Who has decided something is not believed of an audit log either, unless it is the entry's own actor.
func TestAuditLogsActor(t *testing.T) {
	for written, want := range map[string]string{"alice": "alice", "mallory": "unknown"} {
		ctx, p := t.Context(), path(t)
		dir, copied := t.TempDir(), filepath.Join(t.TempDir(), "copy.db")
		s, token := open(t, p), new(markToken)
		enter(t, s)
		keepOnce(t, s, dir)
		done(t, sqlite.Backup(ctx, p, copied, func(int, int) {}, func(string) error { return nil }))
		who := binding.WithActor(ctx, binding.Actor{Client: "keysvc manufacturer distrust", User: "alice"})
		maker := must(s.Manufacturers(ctx))[0].KeyID
		must(s.Decide(who, maker, "", registry.Verdict{Withdrawn: true, By: "alice", Reason: "x", Time: t0},
			func([]*registry.Lot) error { return nil }))
		keepOnce(t, s, dir)
		done(t, mark.Raise(ctx, s, token))
		for _, file := range must(os.ReadDir(dir)) {
			name := filepath.Join(dir, file.Name())
			text := strings.ReplaceAll(string(must(os.ReadFile(name))), `"user":"alice"`, `"user":"`+written+`"`)
			done(t, os.WriteFile(name, []byte(text), 0o600))
		}
		restored := open(t, copied)
		_, _, err := mark.Accept(ctx, restored, token, mark.AcceptOptions{Reason: "a restore", AuditLogs: []string{dir},
			Agreed: func(*binding.Missing) error { return nil }})
		done(t, err)
		if v := must(restored.Manufacturers(ctx))[0].Verdict; !v.Withdrawn || v.By != want {
			t.Errorf("of %q: %+v, want it by %q", written, v, want)
		}
	}
}
