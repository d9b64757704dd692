package sqlstore

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/mark"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/ledger"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/kme"
)

// stranger opens a database as whoever has it does: without the service.
func stranger(t *testing.T, name string) *sql.DB {
	t.Helper()
	driver := "pgx"
	if path, ok := strings.CutPrefix(name, "sqlite:"); ok {
		driver, name = "sqlite3", (&url.URL{Scheme: "file", OmitHost: true, Path: path,
			RawQuery: "_busy_timeout=10000"}).String()
	}
	db, err := sql.Open(driver, name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// An attack is what a stranger does to a database, and how it is undone; of these there are three bindings: 0 and 1
// active, 2 pending, each of its own device; and an opened attempt of 0.
var attacks = []struct {
	name, do, undo string
	imsis          []int // whose rows are damaged; a -1 stands for the registry
}{
	{"a KME in another row",
		`UPDATE bindings SET sealed = (SELECT sealed FROM bindings WHERE imsi = IMSI1) WHERE imsi = IMSI0`,
		`UPDATE bindings SET sealed = (SELECT sealed FROM kept_bindings WHERE imsi = IMSI0) WHERE imsi = IMSI0`,
		[]int{0}},
	{"a row of another subscription", `UPDATE bindings SET imsi = IMSI9 WHERE imsi = IMSI0`,
		`UPDATE bindings SET imsi = IMSI0 WHERE imsi = IMSI9`, []int{0, 9}},
	{"two rows swapped but for their names",
		`UPDATE bindings SET imei = k.imei, sealed = k.sealed, nw_sig = k.nw_sig, seq = k.seq, mac = k.mac, attempt_id
			= k.attempt_id
		FROM kept_bindings AS k WHERE bindings.imsi = IMSI0 AND k.imsi = IMSI1`,
		`DELETE FROM bindings; INSERT INTO bindings SELECT * FROM kept_bindings`, []int{0}},
	{"pending made active", `UPDATE bindings SET state = 'ACTIVE' WHERE imsi = IMSI2`,
		`UPDATE bindings SET state = 'PENDING' WHERE imsi = IMSI2`, []int{2}},
	{"a pending one that lives longer", `UPDATE bindings SET expires_at = expires_at + 1 WHERE imsi = IMSI2`,
		`UPDATE bindings SET expires_at = expires_at - 1 WHERE imsi = IMSI2`, []int{2}},
	{"another IMEI", `UPDATE bindings SET imei = '35209900000099' WHERE imsi = IMSI1`,
		`UPDATE bindings SET imei = '35209900000001' WHERE imsi = IMSI1`, []int{1}},
	{"a binding that is gone", `DELETE FROM bindings WHERE imsi = IMSI1`,
		`INSERT INTO bindings SELECT * FROM kept_bindings WHERE imsi = IMSI1`, []int{1}},
	{"a MAC of zeros", `UPDATE bindings SET mac = BYTES(00000000000000000000000000000000) WHERE imsi = IMSI1`,
		`UPDATE bindings SET mac = (SELECT mac FROM kept_bindings WHERE imsi = IMSI1) WHERE imsi = IMSI1`, []int{1}},
	{"no MAC", `UPDATE bindings SET mac = BYTES() WHERE imsi = IMSI1`,
		`UPDATE bindings SET mac = (SELECT mac FROM kept_bindings WHERE imsi = IMSI1) WHERE imsi = IMSI1`, []int{1}},
	{"an attempt for another subscription", `UPDATE attempts SET imsi = IMSI1 WHERE imsi = IMSI0`,
		`UPDATE attempts SET imsi = IMSI0 WHERE imsi = IMSI1`, []int{1}},
	{"an attempt that lives longer", `UPDATE attempts SET expires_at = expires_at + 1000`,
		`UPDATE attempts SET expires_at = expires_at - 1000`, []int{0}},
	{"an attempt made up", `INSERT INTO attempts SELECT IMSI2, 'x', origin, expires_at, seq, mac FROM attempts`,
		`DELETE FROM attempts WHERE id = 'x'`, []int{2}},
	{"an entry made up, as if there were a later one",
		`INSERT INTO ledger SELECT 99, 99, at, 'ACTIVATED', subject, '', NULL, actor, '', mac FROM ledger WHERE
			subject = IMSI1 AND event = 'ACTIVATED'`,
		`DELETE FROM ledger WHERE chain = 99`, []int{1}},
	{"a manufacturer's key", `UPDATE manufacturers SET pem = (SELECT pem FROM other)`,
		`UPDATE manufacturers SET pem = (SELECT pem FROM kept_manufacturers)`, []int{-1}},
	{"a verdict undone", `UPDATE manufacturers SET withdrawn = 1`, `UPDATE manufacturers SET withdrawn = 0`, []int{-1}},
	{"a directory elsewhere", `UPDATE manufacturers SET directory = 'file:/tmp/x'`,
		`UPDATE manufacturers SET directory = 'file:/srv'`, []int{-1}},
	{"a lot that is gone", `DELETE FROM lots`, `INSERT INTO lots SELECT * FROM kept_lots`, []int{-1}},
	{"a lot retired", `UPDATE lots SET withdrawn = 1`, `UPDATE lots SET withdrawn = 0`, []int{-1}},
	{"a lot under another name", `UPDATE lots SET lot = 'L2'`, `UPDATE lots SET lot = 'L1'`, []int{-1}},
}

func TestAttacks(t *testing.T) { attacked(t, "sqlite:"+path(t)) }

func TestPostgresAttacks(t *testing.T) { attacked(t, pgtest.Start(t).Database(t)) }

func attacked(t *testing.T, name string) {
	s, err := Open(t.Context(), name, rowKey)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx := t.Context()
	var all []*binding.Binding
	for n := range 3 {
		b := newBinding(t, fmt.Sprintf("00101000000000%d", n), fmt.Sprint("a", n))
		b.IMEI = must(kme.ParseIMEI(fmt.Sprintf("3520990000000%d", n)))
		beginAttempt(t, s, b)
		if err := s.Establish(ctx, b, []byte{byte(n)}, true, t0); err != nil {
			t.Fatal(err)
		}
		all = append(all, b)
		if n == 2 {
			break
		}
		q := request(b)
		q.Ready, q.RANDs[0][0] = b.AttemptID, 1
		must(s.Prepare(ctx, q))
		must(s.Report(ctx, b.IMSI, kme.Origin{}, true, t0))
	}
	if err := s.OpenAttempt(ctx, binding.Attempt{ID: "opened", IMSI: all[0].IMSI, Expires: t0.Add(time.Hour),
		Opened: true}); err != nil {
		t.Fatal(err)
	}
	enter(t, s)
	db := stranger(t, name)
	run := func(text string) {
		t.Helper()
		for n := range 10 {
			text = strings.ReplaceAll(text, fmt.Sprint("IMSI", n), fmt.Sprintf("'00101000000000%d'", n))
		}
		bytes := "X'$1'"
		if strings.HasPrefix(name, "postgres") {
			bytes = `'\x$1'::bytea`
		}
		for i := strings.Index(text, "BYTES("); i >= 0; i = strings.Index(text, "BYTES(") {
			end := i + strings.Index(text[i:], ")")
			text = text[:i] + strings.ReplaceAll(bytes, "$1", text[i+6:end]) + text[end+1:]
		}
		if _, err := db.ExecContext(ctx, text); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
	}
	for _, table := range []string{"bindings", "manufacturers", "lots"} {
		run("CREATE TABLE kept_" + table + " AS SELECT * FROM " + table)
	}
	run("CREATE TABLE other (pem TEXT)")
	if _, err := db.ExecContext(ctx, "INSERT INTO other VALUES ($1)", newPEM(t)); err != nil {
		t.Fatal(err)
	}
	// check looks at everything, and gives what is damaged.
	check := func() map[int]bool {
		t.Helper()
		wrong := map[int]bool{}
		note := func(n int, err error) {
			if tables.IsDamaged(err) {
				wrong[n] = true
			} else if err != nil && !errors.Is(err, binding.ErrNotBound) {
				t.Error(err)
			}
		}
		for n := range 10 {
			imsi := must(kme.ParseIMSI(fmt.Sprintf("00101000000000%d", n)))
			_, err := s.Subscription(ctx, imsi, t0)
			note(n, err)
			// What a service would do with it.
			for _, err := range []error{
				func() error {
					q := binding.VectorRequest{IMSI: imsi, Now: t0, RANDs: make([]hsmkeys.RAND, 1), Ready: "none",
						PendingVectors: 9}
					q.RANDs[0][0] = 9
					_, err := s.Prepare(ctx, q)
					return err
				}(),
				func() error {
					_, err := s.Report(ctx, imsi, must(kme.ParseOrigin("elsewhere")), true, t0)
					return err
				}(),
			} {
				if tables.IsDamaged(err) != wrong[n] {
					t.Errorf("IMSI %d: %v, and of its subscription damaged is %v", n, err, wrong[n])
				}
			}
		}
		_, err := s.Lots(ctx)
		note(-1, err)
		bound := wrong[0] || wrong[1] || wrong[2]
		all, err := s.Bindings(ctx, binding.BindingQuery{Limit: 10, Now: t0})
		if tables.IsDamaged(err) != bound || !bound &&
			len(all) != 3 {
			t.Errorf("listed: %d bindings, error %v; damaged are %v", len(all), err, wrong)
		}
		report, err := s.Verify(ctx, func(int, int) {})
		if err != nil || (len(report.Damaged) > 0) != (len(wrong) > 0) {
			t.Errorf("verified: %+v, error %v; damaged are %v", report, err, wrong)
		}
		return wrong
	}
	if wrong := check(); len(wrong) > 0 {
		t.Fatalf("at the beginning %v are damaged", wrong)
	}
	for _, a := range attacks {
		t.Run(a.name, func(t *testing.T) {
			run(a.do)
			wrong := check()
			if len(wrong) != len(a.imsis) {
				t.Errorf("damaged are %v, want %v", wrong, a.imsis)
			}
			for _, n := range a.imsis {
				if !wrong[n] {
					t.Errorf("%d is not damaged", n)
				}
			}
			run(a.undo)
			if wrong := check(); len(wrong) > 0 {
				t.Fatalf("after it was undone %v are damaged", wrong)
			}
		})
	}

	t.Run("an earlier row put back", func(t *testing.T) {
		must(s.Revoke(ctx, all[1].IMSI, t0))
		run(`DELETE FROM bindings WHERE imsi = IMSI1; INSERT INTO bindings SELECT * FROM kept_bindings WHERE imsi =
			IMSI1`)
		if wrong := check(); !wrong[1] {
			t.Error("a binding that was revoked is back")
		}
		must(s.Revoke(ctx, all[1].IMSI, t0))
		if wrong := check(); len(wrong) > 0 {
			t.Errorf("revoked again: %v", wrong)
		}
	})
	t.Run("a RAND made up", func(t *testing.T) {
		run(`INSERT INTO spent_rands SELECT IMSI7, rand, mac FROM spent_rands WHERE imsi = IMSI2`)
		if _, err := s.Spent(ctx, must(kme.ParseIMSI("001010000000007")), hsmkeys.RAND{0}); !tables.IsDamaged(err) {
			t.Error(err)
		}
		run(`DELETE FROM spent_rands WHERE imsi = IMSI7`)
	})
	// In the middle of a chain, at its end, and in an entry; each is accepted, and then the next.
	for _, text := range []string{
		`UPDATE ledger SET imei = '35209900000055' WHERE subject = IMSI0 AND event = 'ESTABLISHED'`,
		`UPDATE ledger SET actor = BYTES(00) WHERE subject = IMSI0 AND event = 'ACTIVATED'`,
		`DELETE FROM ledger WHERE subject = IMSI2 AND event = 'ESTABLISHED'`,
		`DELETE FROM ledger WHERE event = 'ACCEPTED' AND chain = 3 AND seq = (SELECT MAX(seq) FROM ledger WHERE chain
			= 3)`,
		`INSERT INTO ledger SELECT chain, seq + 1000, at, event, subject, '', NULL, actor, detail, mac FROM ledger
			WHERE chain = 5 AND seq = (SELECT MAX(seq) FROM ledger WHERE chain = 5)`,
		`UPDATE actors SET json = '{"client":"nobody"}'`,
		`DELETE FROM actors`,
	} {
		t.Run(text, func(t *testing.T) {
			mark, err := s.Check(ctx, new(binding.Mark))
			if err != nil {
				t.Fatal(err)
			}
			run(text)
			_, err = s.Check(ctx, mark)
			if seen := s.Seen(); strings.HasPrefix(text, "INSERT") && (err == nil || seen.Heads[5].Seq > 1000) {
				t.Errorf("what was made up counts: %v, %v", err, seen.Heads[5])
			}
			if _, verr := s.VerifyLedger(ctx); !errors.Is(errors.Join(err, verr), binding.ErrRolledBack) {
				t.Fatal("it was not noticed")
			}
			if _, err := s.Subscription(ctx, all[1].IMSI, t0); !errors.Is(err, binding.ErrRolledBack) {
				t.Errorf("it is served: %v", err)
			}
			must(s.Accept(ctx, mark, binding.Acceptance{Reason: "tried", Missing: new(binding.Missing)}))
			if n, err := s.VerifyLedger(ctx); err != nil {
				t.Errorf("after it was accepted: %d entries, %v", n, err)
			}
			// What is left can be read, and goes on.
			n := 0
			for _, err := range s.Entries(ctx) {
				if n++; err != nil {
					t.Fatalf("entry %d after it was accepted: %v", n, err)
				}
			}
			for i := range 3 {
				must(s.History(ctx, all[i].IMSI.String()))
			}
			if err := s.Note(ctx, "TRIED", "s", text); err != nil {
				t.Error(err)
			}
			if last, _, err := s.LastNote(ctx, "TRIED", "s"); err != nil || last != text {
				t.Errorf("a note after it was accepted: %q, %v", last, err)
			}
		})
	}
	t.Run("a KME hidden from the count", func(t *testing.T) { // by which storage keys are destroyed
		below := []byte{0xff, 0xff}
		n := must(s.CountSealed(ctx, below))
		for _, hide := range []string{"sealed = BYTES(ffffff)", "state = 'REVOKED'"} {
			run("DELETE FROM bindings WHERE imsi = IMSI0; INSERT INTO bindings SELECT * FROM kept_bindings WHERE " +
				"imsi = IMSI0")
			if again := must(s.CountSealed(ctx, below)); again != n {
				t.Fatalf("%d KMEs, and then %d", n, again)
			}
			run("UPDATE bindings SET " + hide + " WHERE imsi = IMSI0")
			if n, err := s.CountSealed(ctx, below); !tables.IsDamaged(err) {
				t.Errorf("%s: %d KMEs, %v", hide, n, err)
			}
		}
		run("DELETE FROM bindings WHERE imsi = IMSI0; INSERT INTO bindings SELECT * FROM kept_bindings WHERE imsi " +
			"= IMSI0")
	})
	t.Run("rows of no IMSI", func(t *testing.T) {
		before := must(s.Verify(ctx, func(int, int) {}))
		const columns = `state, imei, manufacturer, lot, device_key, sealed, nw_sig, attempt_id, payload_sha256,
			established_at, activated_at, revoked_at, origin, expires_at, sent, seq, mac FROM bindings WHERE imsi =
				IMSI0`
		made := []string{"'none'"}
		if strings.HasPrefix(name, "sqlite:") {
			made = append(made, "CAST(IMSI0 AS BLOB)", "CAST('x' AS BLOB)")
		}
		for _, imsi := range made {
			run("INSERT INTO bindings SELECT " + imsi + ", " + columns)
		}
		if r, err := s.Verify(ctx, func(int, int) {}); err != nil || len(r.Damaged) != len(before.Damaged)+len(made) {
			t.Errorf("of %d rows made up, verified: %+v, %v", len(made), r, err)
		}
	})
	// Another process, whose token has no mark.
	fresh, err := Open(ctx, name, rowKey)
	if err != nil {
		t.Fatal(err)
	}
	defer fresh.Close()
	if _, err := fresh.Check(ctx, nil); !errors.Is(err, binding.ErrRolledBack) {
		t.Errorf("a ledger that is not empty, of a token without a mark: %v", err)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func newPEM(t *testing.T) string {
	t.Helper()
	return string(must(pemkey.Encode(&must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)).PublicKey)))
}

// enter enters a manufacturer with a lot.
func enter(t *testing.T, s *Store) {
	t.Helper()
	signer := must(directory.NewSigner(must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))))
	m := &registry.Manufacturer{KeyID: signer.KeyID(), PEM: string(must(pemkey.Encode(signer.Public()))),
		Operator: "op", Directory: "file:/srv", Enrolled: t0}
	if err := s.PutManufacturer(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	n := make([]byte, 256)
	n[0], n[255] = 0x80, 1
	manifest := &directory.Manifest{
		Lot: "L1", Manufacturer: m.KeyID, Suite: kme.SuiteECDSA, N: n, E: kme.PublicExponent, Mechanism: "none",
		Ranges: []directory.Range{{TAC: must(kme.ParseTAC("35209900")), Count: 10}}, ShardSize: 10, Created: t0,
	}
	lot := &registry.Lot{Manufacturer: m.KeyID, Manifest: manifest,
		ManifestJWS: string(must(signer.Sign(directory.TypeManifest, manifest))), Imported: t0}
	if err := s.PutLot(t.Context(), lot, func([]*registry.Lot) error { return nil }); err != nil {
		t.Fatal(err)
	}
}

// An entry that says that something was forgotten hides no row that is gone, unless it is the service's own.
func TestForgottenByNobody(t *testing.T) {
	ctx, p := t.Context(), path(t)
	s := must(Open(ctx, "sqlite:"+p, rowKey))
	must(s.List(ctx, []binding.Listing{{Prefix: "35", Status: binding.Blacklisted, Reason: "x", Listed: t0}}))
	db := must(sql.Open("sqlite3", (&url.URL{Scheme: "file", OmitHost: true, Path: p}).String()))
	defer db.Close()
	must(db.Exec(`DELETE FROM equipment`))
	for _, chain := range []string{"chain", "99"} {
		must(db.Exec(`INSERT INTO ledger SELECT ` + chain + `, 1000000, at, 'FORGOTTEN', subject, imei, tag, actor,
			detail, mac FROM ledger WHERE event = 'LISTED'`))
		if all, err := s.Listed(ctx, 0); !tables.IsDamaged(err) {
			t.Errorf("a blacklisted device is not listed any more, and nobody notices: %v, %v", all, err)
		}
		must(db.Exec(`DELETE FROM ledger WHERE event = 'FORGOTTEN'`))
	}
}

// Entries in no chain of the ledger are found.
func TestStrays(t *testing.T) {
	ctx, p := t.Context(), path(t)
	s := open(t, p)
	done(t, s.Note(ctx, "TRIED", "s", ""))
	db := stranger(t, "sqlite:"+p)
	for _, chain := range []string{"16", "-1", "3.5"} {
		must(db.Exec(`INSERT INTO ledger SELECT ` + chain + `, 7, at, event, subject, imei, tag, actor, detail, mac
			FROM ledger WHERE seq = 1`))
	}
	var found []string
	for _, d := range must(s.Verify(ctx, func(int, int) {})).Damaged {
		found = append(found, d.Table+" "+d.Key)
	}
	if want := []string{"ledger -1 7", "ledger 16 7", "ledger 3.5 7"}; !slices.Equal(found, want) {
		t.Errorf("found %q, want %q", found, want)
	}
}

// SQLite takes a number that is not whole. The pages of the ledger go on behind it all the same.
func TestNumberThatIsNotWhole(t *testing.T) {
	p := path(t)
	s := must(Open(t.Context(), "sqlite:"+p, rowKey))
	for n := range 1010 { // more than a page, and the number is the page's last
		done(t, s.Note(t.Context(), "TRIED", "s", fmt.Sprint(n)))
	}
	db := must(sql.Open("sqlite3", (&url.URL{Scheme: "file", OmitHost: true, Path: p}).String()))
	defer db.Close()
	must(db.Exec(`INSERT INTO ledger SELECT chain, 999.5, at, event, subject, imei, tag, actor, detail, mac FROM ledger
		WHERE seq = 5`))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if n, err := s.VerifyLedger(ctx); !tables.IsDamaged(err) || ctx.Err() != nil {
		t.Errorf("%d entries, %v", n, err)
	}
}

// What was accepted is read as it is; what somebody makes up later, under a number that no entry has, is not.
func TestMadeUpBelowAcceptance(t *testing.T) {
	ctx, p := t.Context(), path(t)
	s, token := open(t, p), new(markToken)
	first, subject := "", "" // in the first chain, and in another one
	for n := 0; first == "" || subject == ""; n++ {
		if name := fmt.Sprint("s", n); ledger.ChainOf(name) == 0 {
			first = name
		} else {
			subject = name
		}
	}
	for range 10 {
		done(t, s.Note(ctx, "FILLED", first, ""))
	}
	for range 3 {
		done(t, s.Note(ctx, "TRIED", subject, "the last"))
	}
	for range 10 {
		done(t, s.Note(ctx, "FILLED", subject, ""))
	}
	done(t, mark.Raise(ctx, s, token))
	db := stranger(t, "sqlite:"+p)
	must(db.Exec(`DELETE FROM ledger WHERE seq = 13`))
	if _, _, err := mark.Accept(ctx, s, token, mark.AcceptOptions{Reason: "a restore",
		Agreed: func(*binding.Missing) error { return nil }}); err != nil {
		t.Fatal(err)
	}
	last := func() (string, error) {
		detail, _, err := s.LastNote(ctx, "TRIED", subject)
		return detail, err
	}
	if detail, err := last(); detail != "the last" || err != nil {
		t.Fatalf("%q, %v", detail, err)
	}
	for _, place := range []string{"chain, 3.5", "0.5, 5"} {
		must(db.Exec(`INSERT INTO ledger SELECT `+place+`, at, event, subject, imei, tag, actor, 'made up', mac
			FROM ledger WHERE subject = $1 AND seq = 3`, subject))
		if detail, err := last(); !tables.IsDamaged(err) {
			t.Errorf("%s: %q is believed, %v", place, detail, err)
		}
		must(db.Exec(`DELETE FROM ledger WHERE detail = 'made up'`))
	}
}
