package sqlstore

import (
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sightings"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/kme"
)

func TestEquipmentAttacks(t *testing.T) { attackEquipment(t, "sqlite:"+path(t)) }

func TestPostgresEquipmentAttacks(t *testing.T) { attackEquipment(t, pgtest.Start(t).Database(t)) }

// Whatever somebody else does to the operator's list or to a sighting is noticed.
func attackEquipment(t *testing.T, name string) {
	s := openPG(t, name)
	ctx := t.Context()
	list := func(prefix string, status binding.EquipmentStatus) {
		t.Helper()
		must(s.List(ctx, []binding.Listing{{Prefix: prefix, Status: status, Reason: "x", Listed: t0}}))
	}
	list("1", binding.Greylisted)
	list("2", binding.Blacklisted)
	db := stranger(t, name)
	run := func(text string) {
		t.Helper()
		if _, err := db.ExecContext(ctx, text); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
	}
	run("CREATE TABLE earlier AS SELECT * FROM equipment")
	list("1", binding.Blacklisted)
	list("2", "")
	b := newBinding(t, "001010000000001", "a")
	beginAttempt(t, s, b)
	must(0, s.Establish(ctx, b, []byte("a"), true, t0))
	seen := sightings.Sighting{IMSI: b.IMSI, IMEI: b.IMEI, Evidence: sightings.Asserted, First: t0, Last: t0}
	must(s.See(ctx, []sightings.Sighting{seen}))
	run("CREATE TABLE kept AS SELECT * FROM equipment")
	run("CREATE TABLE kept_sightings AS SELECT * FROM sightings")
	check := func() (wrong int) {
		t.Helper()
		for _, err := range []error{
			func() error { _, err := s.Listed(ctx, 0); return err }(),
			func() error { _, err := s.Sightings(ctx, b.IMSI, kme.IMEI{}); return err }(),
			func() error { _, _, err := s.Equipment(ctx, b.IMEI, kme.IMSI{}, t0); return err }(),
		} {
			if tables.IsDamaged(err) {
				wrong++
			} else if err != nil {
				t.Error(err)
			}
		}
		if report := must(s.Verify(ctx, func(int, int) {})); (len(report.Damaged) > 0) != (wrong > 0) {
			t.Errorf("verified: %+v; %d are damaged", report, wrong)
		}
		return wrong
	}
	if wrong := check(); wrong > 0 {
		t.Fatalf("at the beginning %d are damaged", wrong)
	}
	const back = "DELETE FROM equipment; INSERT INTO equipment SELECT * FROM kept"
	for _, a := range []struct{ name, do, undo string }{
		{"another status", `UPDATE equipment SET status = 'WHITELISTED' WHERE prefix = '1'`, back},
		{"another prefix", `UPDATE equipment SET prefix = '3' WHERE prefix = '1'`, back},
		{"an entry that is gone", `DELETE FROM equipment WHERE prefix = '1'`, back},
		{"one that was removed is gone", `DELETE FROM equipment WHERE prefix = '2'`, back},
		{"earlier ones", `DELETE FROM equipment; INSERT INTO equipment SELECT * FROM earlier`, back},
		{"an entry made up", `INSERT INTO equipment SELECT '9', status, reason, listed_at, 9, seq, mac FROM kept WHERE
			prefix = '1'`, back},
		{"a change that is hidden", `UPDATE equipment SET change = 0 WHERE prefix = '1'`, back},
		{"a sighting of another device", `UPDATE sightings SET imei = '35209900000099'`,
			`DELETE FROM sightings; INSERT INTO sightings SELECT * FROM kept_sightings`},
		{"a sighting of another time", `UPDATE sightings SET last_at = last_at + 1`,
			`UPDATE sightings SET last_at = last_at - 1`},
		{"another device bound", `UPDATE bindings SET imei = '35209900000099'`,
			`UPDATE bindings SET imei = '` + b.IMEI.String() + `'`},
		{"a binding of another entry",
			`CREATE TABLE kept_bindings AS SELECT * FROM bindings; UPDATE bindings SET seq = seq + 1`,
			`DELETE FROM bindings; INSERT INTO bindings SELECT * FROM kept_bindings`},
	} {
		t.Run(a.name, func(t *testing.T) {
			run(a.do)
			if wrong := check(); wrong != 1 {
				t.Errorf("%d are damaged", wrong)
			}
			run(a.undo)
			if wrong := check(); wrong > 0 {
				t.Fatalf("undone, %d are damaged", wrong)
			}
		})
	}

	// A sighting that somebody has changed is no sighting, and is replaced by the next.
	run(`UPDATE sightings SET last_at = last_at + 1000000`)
	seen.Last = t0.Add(time.Minute)
	if moves := must(s.See(ctx, []sightings.Sighting{seen})); len(moves) > 0 || check() > 0 {
		t.Errorf("moves %+v", moves)
	}
}

// A change that an earlier row, or one that is gone, would make none is refused: the service goes on by the last one.
func TestListOverAnotherRow(t *testing.T) {
	ctx, name := t.Context(), "sqlite:"+path(t)
	s := must(Open(ctx, name, rowKey))
	defer s.Close()
	list := func(status binding.EquipmentStatus) (int, error) {
		return s.List(ctx, []binding.Listing{{Prefix: "1", Status: status, Reason: "x", Listed: t0}})
	}
	must(list(binding.Blacklisted))
	db := stranger(t, name)
	must(db.Exec("CREATE TABLE earlier AS SELECT * FROM equipment"))
	must(list(binding.Whitelisted))
	must(db.Exec("DELETE FROM equipment"))
	if n, err := list(""); !tables.IsDamaged(err) {
		t.Errorf("of a row that is gone: %d changes, %v", n, err)
	}
	must(db.Exec("INSERT INTO equipment SELECT * FROM earlier"))
	if n, err := list(binding.Blacklisted); !tables.IsDamaged(err) {
		t.Errorf("of an earlier row: %d changes, %v", n, err)
	}
}
