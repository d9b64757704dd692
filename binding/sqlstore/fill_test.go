package sqlstore

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/ledger"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/kme"
)

// fill brings a store to so many active bindings, each with what a whole attach leaves: its RAND that left in clear,
// and its two entries of the ledger. All rows are good. report is called with the bindings so far.
func fill(ctx context.Context, s *Store, bindings int, report func(n int)) error {
	var have int
	if _, err := s.chains.Reads("fill").One(ctx, []any{&have}, `SELECT COUNT(*) FROM bindings`); err != nil {
		return err
	}
	const together = 20_000 // in one commit
	for ; have < bindings; have += together {
		n := min(together, bindings-have)
		err := s.change(ctx, "fill", "fill", func(ctx context.Context, tx *txn) error {
			actor, err := s.enterActor(ctx, tx)
			if err != nil || s.recent.OnlyHints {
				return err
			}
			return s.fillFrom(ctx, tx.Conn, actor, have, n, func(t *tables.Table, row []any) error {
				return tx.Do(ctx, t.Insert, row...)
			})
		})
		if err == nil && s.recent.OnlyHints {
			err = s.copyFrom(ctx, have, n)
		}
		if err != nil {
			return err
		}
		report(have + n)
	}
	return nil
}

// actorOf is the row of whom the context's work is done for.
func (s *Store) actorOf(ctx context.Context) (id []byte, text string, err error) {
	b, err := json.Marshal(binding.ActorOf(ctx))
	return s.macs.Of("actors", string(b)), string(b), err
}

func (s *Store) enterActor(ctx context.Context, tx *txn) ([]byte, error) {
	id, text, err := s.actorOf(ctx)
	if err != nil {
		return nil, err
	}
	return id, tx.Do(ctx, `INSERT INTO actors (actor, json) VALUES ($1, $2) ON CONFLICT DO NOTHING`, id, text)
}

// copyFrom is fillFrom for PostgreSQL, by COPY: it is ten times as fast as statements.
func (s *Store) copyFrom(ctx context.Context, from, n int) error {
	id, _, err := s.actorOf(ctx)
	if err != nil {
		return err
	}
	rows := map[*tables.Table][][]any{}
	err = s.fillFrom(ctx, s.chains.Reads("fill"), id, from, n, func(t *tables.Table, row []any) error {
		rows[t] = append(rows[t], row)
		return nil
	})
	if err != nil {
		return err
	}
	conn, err := s.read.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	return conn.Raw(func(driver any) error {
		return pgx.BeginFunc(ctx, driver.(*stdlib.Conn).Conn(), func(tx pgx.Tx) error {
			for t, all := range rows {
				columns := append(slices.Clone(t.Columns), "mac")
				if _, err := tx.CopyFrom(ctx, pgx.Identifier{t.Name}, columns, pgx.CopyFromRows(all)); err != nil {
					return err
				}
			}
			return nil
		})
	})
}

// room is for other subscriptions, between two that are filled in.
const room = 1000

// filledIMSI and filledIMEI are those of binding i.
func filledIMSI(i int) (imsi kme.IMSI) {
	return parsed(&imsi, fmt.Sprintf("00101%010d", room*i))
}

func filledIMEI(i int) (imei kme.IMEI) {
	return parsed(&imei, fmt.Sprint(35209900000000+i))
}

// parsed is what a text stands for, which is known to be good.
func parsed[T any, P interface {
	*T
	UnmarshalText([]byte) error
}](into P, text string) T {
	if err := into.UnmarshalText([]byte(text)); err != nil {
		panic(err)
	}
	return *into
}

// fillFrom makes the rows of n bindings, each with its MAC.
func (s *Store) fillFrom(
	ctx context.Context, q sqlconn.Conn, actor []byte, from, n int, add func(t *tables.Table, row []any) error,
) error {
	var heads [binding.Chains]binding.Head
	for i := range heads {
		var err error
		if heads[i], err = s.chains.Head(ctx, q, int64(i)); err != nil {
			return err
		}
	}
	at := time.Now()
	note := func(e ledger.Entry) (seq int64, err error) {
		chain := ledger.ChainOf(e.Subject)
		head := &heads[chain]
		values := []any{chain, head.Seq + 1, at.UnixMilli(), string(e.Event), e.Subject, e.IMEI, e.Tag, actor, ""}
		*head = binding.Head{Seq: head.Seq + 1, MAC: s.macs.Of(tables.Ledger.Name, append(slices.Clip(values),
			[]byte(head.MAC))...)}
		return head.Seq, add(tables.Ledger, append(values, []byte(head.MAC)))
	}
	for i := from; i < from+n; i++ {
		imsi, imei, sum := filledIMSI(i), filledIMEI(i), sha256.Sum256(strconv.AppendInt(nil, int64(i), 10))
		if _, err := note(ledger.Entry{Event: binding.EventEstablished, Subject: imsi.String(), IMEI: imei.String(),
			Tag: sum[:]}); err != nil {
			return err
		}
		seq, err := note(ledger.Entry{Event: binding.EventActivated, Subject: imsi.String()})
		if err != nil {
			return err
		}
		row := tables.OfBinding(&binding.Binding{
			IMSI: imsi, IMEI: imei, Manufacturer: "uogvGY7XcA_OB_9takJbeRvZ4FEM767Bc3xPYsO5e-Q", Lot: "L1",
			State: binding.Active, Sealed: sum[:], NWSig: sum[:], AttemptID: "AAECAwQFBgcICQoLDA0ODw",
			PayloadSHA256: sum[:], Established: at, Activated: at,
		}, seq)
		if err := add(tables.Bindings, append(row, s.macs.Of(tables.Bindings.Name, row...))); err != nil {
			return err
		}
		rand := sum[:len(hsmkeys.RAND{})]
		spent := []any{imsi.String(), rand}
		if err := add(tables.SpentRANDs, append(spent, s.macs.Of(tables.SpentRANDs.Name, spent...))); err != nil {
			return err
		}
	}
	return nil
}

// filled is a store with so many bindings, in the folder dir. Where KMEHSM_TOKEN names a token, its rows have their
// MACs from there: it is one that keysvc serves.
func filled(t testing.TB, dir string, bindings int) *Store {
	t.Helper()
	return filledAs(t, InFolder(dir), bindings)
}

func filledAs(t testing.TB, name string, bindings int) *Store {
	t.Helper()
	ctx, key := t.Context(), rowKey
	if uri := os.Getenv("KMEHSM_TOKEN"); uri != "" {
		token, err := hsmkeys.OpenOperator(ctx, uri, hsmkeys.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer token.Close()
		if key, err = token.Derive(ctx, RowKey); err != nil {
			t.Fatal(err)
		}
	}
	s, err := Open(ctx, name, key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	began, said := time.Now(), time.Now()
	err = fill(ctx, s, bindings, func(n int) {
		if took := time.Since(began); time.Since(said) > 30*time.Second || n%1_000_000 == 0 {
			said = time.Now()
			t.Logf("%d of %d bindings in %s, some %s to go", n, bindings, took.Round(time.Second),
				(time.Duration(float64(took) * float64(bindings-n) / float64(n))).Round(time.Second))
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// large says how many bindings a large database is to have, KMEHSM_ROWS, and in which folder it is kept: KMEHSM_FILLED.
func large(t testing.TB, otherwise int) (dir string, bindings int) {
	t.Helper()
	dir = cmp.Or(os.Getenv("KMEHSM_FILLED"), t.TempDir())
	bindings, err := strconv.Atoi(cmp.Or(os.Getenv("KMEHSM_ROWS"), strconv.Itoa(otherwise)))
	if err != nil {
		t.Fatalf("KMEHSM_ROWS: %v", err)
	}
	return dir, bindings
}

// TestFill fills the store that KMEHSM_STORE names with KMEHSM_ROWS bindings: for the soak in internal/proof.
func TestFill(t *testing.T) {
	name := os.Getenv("KMEHSM_STORE")
	if name == "" {
		t.Skip("KMEHSM_STORE names no store")
	}
	_, bindings := large(t, 0)
	filledAs(t, name, bindings)
}

// All that is filled in is good.
func TestFilled(t *testing.T) {
	dir, n := large(t, 3000)
	allGood(t, filled(t, dir, n), n)
}

func TestPostgresFilled(t *testing.T) {
	allGood(t, filledAs(t, pgtest.Start(t).Database(t), 3000), 3000)
}

func allGood(t *testing.T, s *Store, n int) {
	t.Helper()
	r, err := s.Verify(t.Context(), func(int, int) {})
	if err != nil {
		t.Fatal(err)
	}
	if text, _ := json.Marshal(r.Damaged); len(r.Damaged) > 0 || r.Entries != 2*n || r.Rows != 4*n {
		t.Errorf("%d rows, %d entries, damaged: %s", r.Rows, r.Entries, text)
	}
	for _, i := range []int{0, n / 2, n - 1} {
		sub, err := s.Subscription(t.Context(), filledIMSI(i), t0)
		if err != nil || sub.Active == nil || sub.Active.IMEI != filledIMEI(i) {
			t.Errorf("binding %d: %+v, %v", i, sub, err)
		}
	}
}

// BenchmarkVerify verifies stores of KMEHSM_ROWS bindings.
func BenchmarkVerify(b *testing.B) { verifies(b, func(dir string) string { return InFolder(dir) }) }
func BenchmarkPostgresVerify(b *testing.B) {
	verifies(b, func(string) string { return pgtest.Start(b).Database(b) })
}

func verifies(b *testing.B, name func(dir string) string) {
	dir, n := large(b, 20_000)
	s := filledAs(b, name(dir), n)
	for b.Loop() {
		if r, err := s.Verify(b.Context(), func(int, int) {}); err != nil || len(r.Damaged) > 0 || r.Rows != 4*n {
			b.Fatalf("%+v, %v", r, err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*n), "us/binding")
}
