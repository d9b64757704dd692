package sqlstore

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/binding/tokenkeys"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/kme"
)

// Whoever owns a database also says what its names mean. This one answers questions about one subscription with the
// rows of another one, each with its own MAC. On SQLite a view computes its random column twice, to compare it and to
// show it: in a part of all cases, the two differ. On PostgreSQL, text has another operator =.
func TestAnotherSubscriptionsRows(t *testing.T) {
	asked, others := "001010000000001", "001010000000002"
	views := func(table, column string, columns []string) string {
		list := strings.Join(append(columns[:len(columns):len(columns)], "mac"), ", ")
		shown := strings.Replace(list, column, fmt.Sprintf("CASE WHEN %[1]s = '%[2]s' AND random() %% 2 = 0 "+
			"THEN '%[3]s' ELSE %[1]s END AS %[1]s", column, others, asked), 1)
		return fmt.Sprintf("ALTER TABLE %[1]s RENAME TO own_%[1]s; CREATE VIEW %[1]s AS SELECT %[2]s FROM own_%[1]s "+
			"WHERE %[3]s <> '%[4]s';", table, shown, column, asked)
	}
	answersForOthers(t, "sqlite:"+path(t), asked, others, "DROP INDEX ledger_by_kme; DROP INDEX ledger_by_subject;"+
		views("bindings", "imsi", tables.Bindings.Columns)+views("ledger", "subject", tables.Ledger.Columns))
}

func TestPostgresAnotherSubscriptionsRows(t *testing.T) {
	asked, others := "001010000000001", "001010000000002"
	answersForOthers(t, pgtest.Start(t).Database(t), asked, others, equal(asked, others))
}

// equal has PostgreSQL give others' rows where asked's are asked for.
func equal(asked, others string) string {
	return fmt.Sprintf(`
		CREATE FUNCTION same(a text, b text) RETURNS boolean IMMUTABLE LANGUAGE sql AS
			$$SELECT a OPERATOR(pg_catalog.=) replace(b, '%s', '%s')$$;
		CREATE OPERATOR public.= (LEFTARG = text, RIGHTARG = text, FUNCTION = same);
		ALTER ROLE CURRENT_USER SET search_path = public, pg_catalog;`, asked, others)
}

// No row gets another one's KME when KMEs are sealed again.
func TestPostgresResealAnothersRow(t *testing.T) {
	ctx, name := t.Context(), pgtest.Start(t).Database(t)
	s := must(Open(ctx, name, rowKey))
	var all []*binding.Binding
	for n := range 2 {
		b := newBinding(t, fmt.Sprint("00101000000000", n+1), fmt.Sprint(n))
		beginAttempt(t, s, b)
		done(t, s.Establish(ctx, b, []byte{byte(n)}, true, t0))
		all = append(all, b)
	}
	done(t, s.Close())
	db := stranger(t, name)
	must(db.ExecContext(ctx, equal(all[0].IMSI.String(), all[1].IMSI.String())+`
		CREATE FUNCTION same(a bytea, b bytea) RETURNS boolean IMMUTABLE LANGUAGE sql AS 'SELECT true';
		CREATE OPERATOR public.= (LEFTARG = bytea, RIGHTARG = bytea, FUNCTION = same)`))

	s = must(Open(ctx, name, rowKey))
	defer s.Close()
	if _, err := s.Reseal(ctx, []tokenkeys.Resealed{{Sealed: tokenkeys.Sealed{IMSI: all[0].IMSI, State: binding.Pending,
		KME: all[0].Sealed}, Again: []byte("again")}}); !tables.IsDamaged(err) {
		t.Error(err)
	}
	must(db.ExecContext(ctx, `ALTER ROLE CURRENT_USER RESET search_path`))
	again := must(Open(ctx, name, rowKey))
	defer again.Close()
	checkBinding(t, again, all[1])
}

// Nothing is decided about a device or a manufacturer by another one's row.
func TestPostgresAnothersVerdict(t *testing.T) {
	ctx, server := t.Context(), pgtest.Start(t)
	name := server.Named(t, "listed")
	s := must(Open(ctx, name, rowKey))
	listed := binding.Listing{Prefix: "35209900000002", Status: binding.Blacklisted, Reason: "stolen", Listed: t0}
	must(s.List(ctx, []binding.Listing{listed}))
	done(t, s.Close())
	must(stranger(t, name).ExecContext(ctx, equal("35209900000001", listed.Prefix)))
	s = must(Open(ctx, name, rowKey))
	defer s.Close()
	listed.Prefix = "35209900000001"
	if n, err := s.List(ctx, []binding.Listing{listed}); !tables.IsDamaged(err) {
		t.Errorf("a device that is not listed counts as listed: %d changed, %v", n, err)
	}

	name = server.Named(t, "enrolled")
	s = must(Open(ctx, name, rowKey))
	enter(t, s)
	known := must(s.Manufacturers(ctx))[0].KeyID
	done(t, s.Note(ctx, "TRIED", known, ""))
	done(t, s.Close())
	must(stranger(t, name).ExecContext(ctx, equal("another", known)))
	s = must(Open(ctx, name, rowKey))
	defer s.Close()
	var change *binding.Change
	done(t, s.change(ctx, "try", everything, func(ctx context.Context, tx *txn) (err error) {
		change, err = s.followVerdict(ctx, tx, tables.Manufacturers, 6, "", []binding.Line{{Entry: binding.Entry{
			Event: binding.EventDistrusted, Subject: binding.ManufacturerSubject("another")}}}, "another")
		return err
	}))
	if change.Now != "DAMAGED" {
		t.Errorf("another manufacturer is %s", change.Now)
	}
	if _, found, err := s.LastNote(ctx, "TRIED", "another"); !tables.IsDamaged(err) {
		t.Errorf("a note about another subject: %v, %v", found, err)
	}
	if all, err := s.History(ctx, "another"); !tables.IsDamaged(err) {
		t.Errorf("the history of another subject: %v, %v", all, err)
	}
}

func answersForOthers(t *testing.T, name, asked, others, do string) {
	ctx := t.Context()
	s := must(Open(ctx, name, rowKey))
	bind := func(imsi string) *binding.Binding {
		b := newBinding(t, imsi, imsi)
		beginAttempt(t, s, b)
		done(t, s.Establish(ctx, b, []byte(imsi), true, t0))
		q := request(b)
		q.Ready, q.RANDs[0][0] = b.AttemptID, 1
		must(s.Prepare(ctx, q))
		must(s.Report(ctx, b.IMSI, kme.Origin{}, true, t0))
		return b
	}
	own, other := bind(asked), bind(others)
	done(t, s.Close())
	must(stranger(t, name).ExecContext(ctx, do))

	s = must(Open(ctx, name, rowKey))
	defer s.Close()
	damaged := 0
	for range 200 {
		q := binding.VectorRequest{IMSI: own.IMSI, Now: t0, RANDs: make([]hsmkeys.RAND, 1), PendingVectors: 3}
		q.RANDs[0][0] = 2
		d, err := s.Prepare(ctx, q)
		if d.Binding != nil && string(d.Binding.Sealed) == string(other.Sealed) {
			t.Fatal("a subscription's vectors are made under another one's KME")
		}
		if tables.IsDamaged(err) {
			damaged++
		}
	}
	if damaged == 0 {
		t.Error("nobody noticed")
	}
}

// An entry that a stranger has added with a number that its chain has not reached keeps no attempt open.
func TestAttemptKeptOpen(t *testing.T) {
	ctx, p := t.Context(), path(t)
	s := open(t, p)
	db := stranger(t, "sqlite:"+p)
	done(t, s.Note(ctx, "TRIED", "s", ""))
	must(db.Exec(`INSERT INTO ledger SELECT 99, 1000, at, 'CLOSED', '001010000000001', '', NULL, actor, '', mac FROM
		ledger`))
	b := newBinding(t, "001010000000001", "")
	beginAttempt(t, s, b)
	var times int
	for tag := range byte(2) {
		if s.Establish(ctx, b, []byte{tag}, true, t0) == nil {
			times++
		}
	}
	if times > 1 {
		t.Error("an attempt was used twice")
	}
}

// A trigger that takes what is entered has the service fail, not wait.
func TestActorsTaken(t *testing.T) {
	for what, do := range map[string]string{
		"taken":   `CREATE TRIGGER take BEFORE INSERT ON actors BEGIN SELECT RAISE(IGNORE); END`,
		"changed": `CREATE TRIGGER change AFTER INSERT ON actors BEGIN UPDATE actors SET json = 'x'; END`,
	} {
		t.Run(what, func(t *testing.T) {
			p := path(t)
			s := open(t, p)
			must(stranger(t, "sqlite:"+p).Exec(do))
			ended := make(chan error, 1)
			go func() {
				ended <- s.Note(binding.WithActor(context.Background(), binding.Actor{Client: "hss"}), "TRIED", "s", "")
			}()
			select {
			case err := <-ended:
				if !tables.IsDamaged(err) {
					t.Error(err)
				}
			case <-time.After(time.Minute):
				t.Fatal("it does not end")
			}
		})
	}
}

// What a stranger calls a row does nothing to the terminal of whoever has it listed.
func TestHostileNames(t *testing.T) {
	ctx, p := t.Context(), path(t)
	s := open(t, p)
	must(stranger(t, "sqlite:"+p).Exec(`INSERT INTO attempts VALUES ($1, '', '', 0, 0, X'')`,
		"1\n0 are damaged\x1b[8m\u202e"))
	damaged := must(s.Verify(ctx, func(int, int) {})).Damaged
	if len(damaged) != 1 || !strings.Contains(damaged[0].Line(), "are damaged") ||
		strings.ContainsFunc(damaged[0].Line()+damaged[0].Error(), strict.Hidden) {
		t.Errorf("%q", damaged)
	}
}
