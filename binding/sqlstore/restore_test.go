package sqlstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/mark"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/ledger"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/internal/sqlite"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// A markToken keeps marks as an HSM does.
type markToken struct{ marks [][]byte }

func (m *markToken) Marks(context.Context) ([][]byte, error) { return m.marks, nil }

func (m *markToken) SetMark(_ context.Context, mark []byte, _ [][]byte) error {
	m.marks = [][]byte{mark}
	return nil
}

func done(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// afterwards is who decides after the backup.
var afterwards = binding.Actor{Client: "ops", Role: "admin"}

// A history is of a store that is lost.
type history struct {
	t     *testing.T
	s     *Store
	token *markToken
	audit string
}

func imsiNo(t *testing.T, n int) kme.IMSI { return imsi(t, fmt.Sprintf("00101000000%04d", n)) }

// establish has a device send a KME; activate shows it.
func (h *history) establish(n, device int) *binding.Binding {
	h.t.Helper()
	b := newBinding(h.t, imsiNo(h.t, n).String(), "a")
	b.IMEI = must(kme.ParseIMEI(fmt.Sprintf("3520990000%04d", device)))
	beginAttempt(h.t, h.s, b)
	done(h.t, h.s.Establish(h.t.Context(), b, fmt.Append(nil, "tag ", n, device), true, t0))
	return b
}

func (h *history) activate(b *binding.Binding) {
	h.t.Helper()
	q := request(b)
	q.Ready, q.RANDs[0][0] = b.AttemptID, 1
	must(h.s.Prepare(h.t.Context(), q))
	must(h.s.Report(h.t.Context(), b.IMSI, kme.Origin{}, true, t0))
}

func (h *history) bind(n, device int) { h.t.Helper(); h.activate(h.establish(n, device)) }

func (h *history) open(n int) {
	h.t.Helper()
	done(h.t, h.s.OpenAttempt(h.t.Context(), binding.Attempt{ID: fmt.Sprint("opened ", n), IMSI: imsiNo(h.t, n),
		Expires: t0.Add(time.Hour), Opened: true}))
}

// What subscriptions are for, each with a device of its number.
const (
	stays        = iota // bound, and nothing else
	revoked             // bound, and revoked after the backup
	rebound             // bound, and bound to another device after it
	later               // bound after it
	shown               // sent a KME before it, and shown after it
	opened              // bound, and opened after it
	sent                // bound, opened, and a KME sent after it, which was never shown
	replaced            // a KME sent before it; after it, another one, which was shown
	closed              // bound, opened before it, and closed after it
	shownAndSent        // as shown; then opened, and another KME sent, which was never shown
	lastBound    = 100  // from here on: bound before it, so that every chain has entries
	others       = 64
)

// lose decides much, has a backup made of a half of it, and gives the audit log of both.
func (h *history) lose(backup func()) (makers []*registry.Manufacturer) {
	t, ctx := h.t, h.t.Context()
	t.Helper()
	working, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	var log bytes.Buffer
	go func() {
		defer close(ended)
		mark.KeepAuditLog(working, h.s, h.audit, new(atomic.Bool), slog.New(slog.NewTextHandler(&log, nil)))
	}()
	testproc.Await(t, "the audit log begins", func() bool {
		files, err := os.ReadDir(h.audit)
		return err == nil && len(files) > 0
	})
	for _, n := range []int{stays, revoked, rebound, opened, sent, closed} {
		h.bind(n, n)
	}
	for n := range others {
		h.bind(lastBound+n, lastBound+n)
	}
	pending := h.establish(shown, shown)
	pendingToo := h.establish(shownAndSent, shownAndSent)
	h.establish(replaced, replaced)
	h.open(closed)
	enter(t, h.s)
	must(h.s.List(ctx, []binding.Listing{{Prefix: "35", Status: binding.Whitelisted, Reason: "ours",
		Listed: t0}}))
	makers = must(h.s.Manufacturers(ctx))
	backup()
	ctx = binding.WithActor(ctx, afterwards)
	must(h.s.Revoke(ctx, imsiNo(t, revoked), t0))
	h.open(rebound)
	h.bind(rebound, 50)
	h.bind(later, later)
	h.activate(pending)
	h.activate(pendingToo)
	h.open(shownAndSent)
	h.establish(shownAndSent, 80)
	h.open(opened)
	h.open(sent)
	h.establish(sent, 60)
	must(h.s.Revoke(ctx, imsiNo(t, replaced), t0))
	h.bind(replaced, 70)
	must(h.s.Revoke(ctx, imsiNo(t, closed), t0))
	must(h.s.Decide(ctx, makers[0].KeyID, "", registry.Verdict{Withdrawn: true,
		Reason: "stolen", Time: t0}, func([]*registry.Lot) error { return nil }))
	enter(t, h.s) // another manufacturer
	must(h.s.List(ctx, []binding.Listing{{Prefix: "35", Reason: "no more"},
		{Prefix: "36", Status: binding.Blacklisted, Reason: "theirs", Listed: t0}}))
	done(t, mark.Raise(ctx, h.s, h.token))
	stop()
	<-ended
	if log.Len() > 0 {
		t.Errorf("the audit log: %s", &log)
	}
	done(t, h.s.Close())
	return makers
}

func TestRestored(t *testing.T) {
	path, copied := path(t), filepath.Join(t.TempDir(), "copy.db")
	nothing := func(int, int) {}
	restored(t, "sqlite:"+path, func() func() string {
		done(t, sqlite.Backup(t.Context(), path, copied, nothing, func(string) error { return nil }))
		return func() string { return "sqlite:" + copied }
	})
}

func TestPostgresRestored(t *testing.T) {
	server := pgtest.StartArchiving(t)
	url := server.Database(t)
	base := server.Base(t)
	restored(t, url, func() func() string {
		time.Sleep(10 * time.Millisecond) // what came before was committed before the moment
		moment := time.Now()
		time.Sleep(10 * time.Millisecond)
		return func() string {
			server.At(t, base, moment)
			return pgtest.Either(t, url, base)
		}
	})
}

// A database that is brought back from a backup is noticed; with the audit log, nothing is served that was revoked or
// replaced since, no KME is accepted again, and everything that is lost is named. What was bound before, and still
// was, is bound.
func restored(t *testing.T, name string, backup func() (restore func() string)) {
	ctx := binding.WithActor(t.Context(), binding.Actor{Client: "tester", User: "u@h"})
	h := &history{t: t, s: must(Open(ctx, name, rowKey)), token: new(markToken),
		audit: filepath.Join(t.TempDir(), "audit")}
	var restore func() string
	makers := h.lose(func() { restore = backup() })
	lost := must(mark.Read(ctx, h.token))

	name = restore()
	s := must(Open(ctx, name, rowKey))
	defer s.Close()
	if err := mark.Check(ctx, s, h.token); !errors.Is(err, binding.ErrRolledBack) {
		t.Fatalf("the earlier database: %v", err)
	}
	refused := errors.New("no")
	var before binding.Missing
	options := mark.AcceptOptions{Reason: "the disk", AuditLogs: []string{h.audit},
		Agreed: func(m *binding.Missing) error { before = *m; return refused }}
	if _, _, err := mark.Accept(ctx, s, h.token, options); !errors.Is(err, refused) {
		t.Fatalf("nobody agreed: %v", err)
	}
	if err := mark.Check(ctx, s, h.token); !errors.Is(err, binding.ErrRolledBack) {
		t.Fatalf("nobody agreed, and it is served: %v", err)
	}
	options.Agreed = func(*binding.Missing) error { return nil }
	missing, accepted, err := mark.Accept(ctx, s, h.token, options)
	if err != nil {
		t.Fatal(err)
	}
	if missing.Unknowns() != 0 || missing.Lost == 0 || int64(len(missing.Lines)) != missing.Lost ||
		before.Lost != missing.Lost {
		t.Errorf("lost %d, before %d, restored %d, unknown %d", missing.Lost, before.Lost, len(missing.Lines),
			missing.Unknowns())
	}

	report := must(s.Verify(ctx, func(int, int) {}))
	for _, d := range report.Damaged {
		t.Errorf("damaged: %v", d)
	}
	done(t, mark.Check(ctx, s, h.token))
	for i, had := range lost.Heads { // the ledger has all that it had
		if same, err := s.chains.Has(ctx, int64(i), had); !same || err != nil {
			t.Errorf("chain %d has not come as far as it had, %v", i, err)
		}
	}
	now := func(n int) string {
		t.Helper()
		sub, err := s.Subscription(ctx, imsiNo(t, n), t0)
		if err != nil {
			return err.Error()
		}
		text := "unbound"
		if b := sub.Standing(); b != nil {
			text = fmt.Sprint(b.State, " ", b.IMEI)
		}
		if len(sub.Attempts) > 0 {
			text += ", opened"
		}
		return text
	}
	changes := map[string]binding.Change{}
	for _, c := range accepted.Changes {
		changes[c.Subject] = c
	}
	who := must(s.History(ctx, imsiNo(t, revoked).String()))
	if len(who) != 4 || who[2].Event != binding.EventRevoked || who[2].Actor != afterwards ||
		who[3].Event != binding.EventRevoked || who[3].Actor.Client != "tester" {
		t.Errorf("who revoked it: %+v", who)
	}
	for n, want := range map[int]struct {
		now, imei string
		event     binding.Event
		toDo      bool
	}{
		stays:        {now: "ACTIVE 35209900000000"},
		revoked:      {"unbound", "35209900000001", binding.EventRevoked, false},
		rebound:      {"unbound", "35209900000050", binding.EventActivated, true},
		later:        {"unbound", "35209900000003", binding.EventActivated, true},
		shown:        {"ACTIVE 35209900000004", "35209900000004", binding.EventActivated, false},
		opened:       {"ACTIVE 35209900000005", "", binding.EventOpened, true},
		sent:         {"ACTIVE 35209900000006", "35209900000060", binding.EventEstablished, true},
		replaced:     {"unbound", "35209900000070", binding.EventActivated, true},
		closed:       {"unbound", "35209900000008", binding.EventRevoked, false},
		shownAndSent: {"ACTIVE 35209900000009", "35209900000009", binding.EventActivated, true},
	} {
		c := changes[imsiNo(t, n).String()]
		if now(n) != want.now || c.IMEI != want.imei || c.Event != want.event || (c.ToDo != "") != want.toDo {
			t.Errorf("subscription %d is %s, and was named %+v, want %+v", n, now(n), c, want)
		}
	}
	for n := range others {
		if want := fmt.Sprintf("ACTIVE 3520990000%04d", lastBound+n); now(lastBound+n) != want {
			t.Errorf("subscription %d is %s", lastBound+n, now(lastBound+n))
		}
	}

	// A KME that was used since is used; the subscription is bound anew with another one.
	again := newBinding(t, imsiNo(t, later).String(), "a")
	again.IMEI = must(kme.ParseIMEI("35209900000003"))
	beginAttempt(t, s, again)
	if err := s.Establish(ctx, again, fmt.Append(nil, "tag ", later, later), true, t0); err != binding.ErrUsed {
		t.Errorf("a KME that was used since: %v", err)
	}
	h.s = s
	h.bind(later, 99)

	// The registry and the operator's list.
	makersNow := must(s.Manufacturers(ctx))
	if len(makersNow) != 1 || makersNow[0].KeyID != makers[0].KeyID || !makersNow[0].Verdict.Withdrawn ||
		makersNow[0].Verdict.Reason != "stolen" {
		t.Errorf("manufacturers %+v", makersNow)
	}
	forgotten := 0
	for _, c := range accepted.Changes {
		if c.Now == string(binding.EventForgotten) {
			forgotten++
		}
	}
	if forgotten != 2 { // the other manufacturer, and its lot
		t.Errorf("%d are forgotten: %+v", forgotten, accepted.Changes)
	}
	enter(t, s)
	listed := must(s.Listed(ctx, 0))
	if len(listed) != 2 || listed[0].Prefix != "35" || listed[0].Status != "" || listed[1].Prefix != "36" ||
		listed[1].Status != binding.Blacklisted || listed[1].Reason != "theirs" {
		t.Errorf("listed %+v", listed)
	}
	if _, _, err := mark.Accept(ctx, s, h.token, options); err == nil {
		t.Error("it is accepted twice")
	}
}

// A token that was in a safe does not know how far the ledger had come; the audit log does.
func TestRestoredWithASpareToken(t *testing.T) {
	ctx := t.Context()
	path, copied := path(t), filepath.Join(t.TempDir(), "copy.db")
	h := &history{t: t, s: must(Open(ctx, "sqlite:"+path, rowKey)), token: new(markToken),
		audit: filepath.Join(t.TempDir(), "audit")}
	h.lose(func() {
		done(t, sqlite.Backup(ctx, path, copied, func(int, int) {}, func(string) error { return nil }))
	})
	s, spare := must(Open(ctx, "sqlite:"+copied, rowKey)), new(markToken)
	defer s.Close()
	done(t, mark.RaiseTo(ctx, spare, must(s.Heads(ctx))))
	done(t, mark.Check(ctx, s, spare))
	options := mark.AcceptOptions{Reason: "the machine", AuditLogs: []string{h.audit},
		Agreed: func(*binding.Missing) error { return nil }}
	missing, _, err := mark.Accept(ctx, s, spare, options)
	if err != nil || missing.Lost == 0 || missing.Unknowns() != 0 {
		t.Fatalf("%+v, %v", missing, err)
	}
	done(t, mark.Check(ctx, s, h.token)) // the lost one's mark, too, which is of an earlier epoch
	done(t, mark.Check(ctx, s, spare))
	if sub := must(s.Subscription(ctx, imsiNo(t, revoked), t0)); sub.Standing() != nil {
		t.Errorf("what was revoked since is %+v", sub.Standing())
	}
	if _, _, err := mark.Accept(ctx, s, spare, options); err == nil {
		t.Error("it is accepted twice")
	}
}

// Without an audit log, or with one that has a gap, what was decided since is not known: that is said, and bindings
// stand, unless they are to be revoked.
func TestRestoredWithout(t *testing.T) {
	for name, c := range map[string]struct {
		lose func(lines []string) []string // of the audit log's lines
		some bool                          // entries come back all the same
	}{
		"none":     {func([]string) []string { return nil }, false},
		"a gap":    {func(all []string) []string { return dropped(t, all, imsiNo(t, later).String()) }, true},
		"a forger": {func(all []string) []string { return forged(t, all, imsiNo(t, later).String()) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			for _, revoke := range []bool{false, true} {
				withoutAll(t, c.lose, c.some, revoke)
			}
		})
	}
}

func dropped(t *testing.T, all []string, what string) (left []string) {
	for _, line := range all {
		if !strings.Contains(line, what) {
			left = append(left, line)
		}
	}
	if len(left) == len(all) {
		t.Errorf("no line has %s", what)
	}
	return left
}

// forged has lines that say that something else was done.
func forged(t *testing.T, all []string, what string) (left []string) {
	for _, line := range all {
		if strings.Contains(line, what) {
			line = strings.ReplaceAll(line, what, imsiNo(t, stays).String())
		}
		left = append(left, line)
	}
	return left
}

func withoutAll(t *testing.T, lose func([]string) []string, some, revoke bool) {
	ctx := t.Context()
	path, copied := path(t), filepath.Join(t.TempDir(), "copy.db")
	h := &history{t: t, s: must(Open(ctx, "sqlite:"+path, rowKey)), token: new(markToken),
		audit: filepath.Join(t.TempDir(), "audit")}
	h.lose(func() {
		done(t, sqlite.Backup(ctx, path, copied, func(int, int) {}, func(string) error { return nil }))
	})
	files := must(filepath.Glob(filepath.Join(h.audit, "*")))
	for _, f := range files {
		lines := lose(strings.Split(string(must(os.ReadFile(f))), "\n"))
		done(t, os.WriteFile(f, []byte(strings.Join(lines, "\n")), 0o600))
	}
	s := must(Open(ctx, "sqlite:"+copied, rowKey))
	defer s.Close()
	options := mark.AcceptOptions{Reason: "the disk", AuditLogs: []string{h.audit}, RevokeUnknown: revoke,
		Agreed: func(*binding.Missing) error { return nil }}
	missing, accepted, err := mark.Accept(ctx, s, h.token, options)
	if err != nil {
		t.Fatal(err)
	}
	if missing.Unknowns() == 0 || missing.Unknowns()+int64(len(missing.Lines)) != missing.Lost ||
		(len(missing.Lines) > 0) != some {
		t.Errorf("lost %d, restored %d, unknown %d", missing.Lost, len(missing.Lines), missing.Unknowns())
	}
	report := must(s.Verify(ctx, func(int, int) {}))
	if len(report.Damaged) > 0 {
		t.Errorf("damaged: %v", report.Damaged)
	}
	ended := 0
	for n := range others {
		id := imsiNo(t, lastBound+n)
		sub := must(s.Subscription(ctx, id, t0))
		unknown := missing.Unknown[ledger.ChainOf(id.String())] > 0
		if (sub.Standing() == nil) != (unknown && revoke) {
			t.Errorf("%s, of a chain that is not known: %v, to be revoked: %v: %+v", id, unknown, revoke, sub)
		}
		if sub.Standing() == nil {
			ended++
		}
	}
	if revoke != (ended > 0) || (len(accepted.Revoked) > 0) != revoke {
		t.Errorf("%d are revoked, and %q were named", ended, accepted.Revoked)
	}
	for _, text := range accepted.Revoked {
		if sub := must(s.Subscription(ctx, imsi(t, text), t0)); sub.Standing() != nil ||
			missing.Unknown[ledger.ChainOf(text)] == 0 {
			t.Errorf("%s was named as revoked: %+v", text, sub)
		}
	}
}

// A stranger's rows do not keep a restored database from being accepted: a subscription whose line has no place is
// revoked and named, and a manufacturer whose row is damaged is named, and stays what it is.
func TestRestoredBesideStrangersRows(t *testing.T) {
	ctx := t.Context()
	path, copied := path(t), filepath.Join(t.TempDir(), "copy.db")
	h := &history{t: t, s: must(Open(ctx, "sqlite:"+path, rowKey)), token: new(markToken),
		audit: filepath.Join(t.TempDir(), "audit")}
	makers := h.lose(func() {
		done(t, sqlite.Backup(ctx, path, copied, func(int, int) {}, func(string) error { return nil }))
	})
	db := stranger(t, "sqlite:"+copied)
	for _, s := range []struct{ subscription, device int }{{later, later}, {shownAndSent, 80}} {
		must(db.Exec(`INSERT INTO ledger SELECT 99, $1, at, event, subject, $2, $3, actor, detail, mac FROM ledger
			WHERE event = 'ESTABLISHED' LIMIT 1`, s.subscription, fmt.Sprintf("3520990000%04d", s.device),
			fmt.Append(nil, "tag ", s.subscription, s.device)))
	}
	must(db.Exec(`UPDATE manufacturers SET tacs = '01234567'`))
	s := must(Open(ctx, "sqlite:"+copied, rowKey))
	defer s.Close()
	options := mark.AcceptOptions{Reason: "the disk", AuditLogs: []string{h.audit},
		Agreed: func(*binding.Missing) error { return nil }}
	_, accepted, err := mark.Accept(ctx, s, h.token, options)
	if err != nil {
		t.Fatal(err)
	}
	if accepted.LeftOut != 2 {
		t.Errorf("%d lines were left out", accepted.LeftOut)
	}
	want := map[string]string{imsiNo(t, later).String(): "REVOKED", imsiNo(t, shownAndSent).String(): "ACTIVE",
		binding.ManufacturerSubject(makers[0].KeyID): "DAMAGED"}
	for _, c := range accepted.Changes {
		if now := want[c.Subject]; now != "" && (c.Now != now || c.ToDo == "") {
			t.Errorf("%+v", c)
		}
		delete(want, c.Subject)
	}
	if len(want) > 0 {
		t.Errorf("%v were not named", want)
	}
	for n, bound := range map[int]bool{later: false, shownAndSent: true} {
		if sub, err := s.Subscription(ctx, imsiNo(t, n), t0); err != nil || (sub.Standing() != nil) != bound {
			t.Errorf("subscription %d: %+v, %v", n, sub, err)
		}
	}
	done(t, mark.Check(ctx, s, h.token))
	if _, err := s.VerifyLedger(ctx); err != nil {
		t.Error(err)
	}
	for _, d := range must(s.Verify(ctx, func(int, int) {})).Damaged {
		if d.Table != "manufacturers" && !strings.HasPrefix(d.Key, "99 ") {
			t.Errorf("damaged: %v", d)
		}
	}
}
