package sqlstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/ledger"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/subscription"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
)

// A Report is what Verify has found.
type Report struct {
	Rows    int                   `json:"rows"`
	Entries int                   `json:"entries"` // of the ledger, which are rows too
	Damaged []*binding.DamagedRow `json:"damaged"` // maxDamaged at most, by their tables and keys
}

// maxDamaged bounds a Report.
const maxDamaged = 1000

// A verification is under way.
type verification struct {
	report            func(rows, of int)
	rows, entries, of atomic.Int64

	mu      sync.Mutex
	damaged []*binding.DamagedRow // guarded by mu
}

// read counts a row.
func (v *verification) read() {
	if n := v.rows.Add(1); n%1000 == 0 {
		v.report(int(n), int(v.of.Load()))
	}
}

// found notes damage, and returns any other error.
func (v *verification) found(err error) error {
	d, ok := errors.AsType[*binding.DamagedRow](err)
	if !ok {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.damaged) == maxDamaged {
		return err
	}
	v.damaged = append(v.damaged, d)
	return nil
}

// row counts a row. err says whether the service wrote it.
func (v *verification) row(err error) error {
	v.read()
	return v.found(err)
}

// Verify reads everything, and checks that each row and each entry of the ledger is what a service wrote last. report
// is called with the rows read so far, and with how many there are, 0 until that is known; concurrently, since Verify
// uses all cores.
func (s *Store) Verify(ctx context.Context, report func(rows, of int)) (*Report, error) {
	v := &verification{report: report}
	q := s.chains.Reads("verify")
	works, ctx := errgroup.WithContext(ctx)
	works.SetLimit(2 * runtime.GOMAXPROCS(0))
	works.Go(func() error { return s.countRows(ctx, q, v) })
	for chain := range int64(binding.Chains) {
		works.Go(func() error {
			n, _, err := s.chains.Verify(ctx, q, chain, func(tables.Row) error { v.read(); return nil }, nil)
			v.entries.Add(int64(n))
			return v.found(err)
		})
	}
	works.Go(func() error { return ledger.Strays(ctx, q, v.row) })
	for _, t := range tables.All {
		all := []string{""}
		if t == tables.Bindings || t == tables.Attempts { // in no page: SQLite sorts a BLOB behind all texts
			all = []string{"WHERE imsi <= ''", "WHERE imsi >= ':'"}
		}
		for _, where := range all {
			works.Go(func() error { return s.verifyRows(ctx, q, v, t, where) })
		}
	}
	works.Go(func() error {
		return v.found(s.settled(ctx, "verify", "registry", func(q sqlconn.Conn) error {
			_, err := s.imported(ctx, q)
			return err
		}))
	})
	works.Go(func() error {
		return v.found(s.settled(ctx, "verify", changing, func(q sqlconn.Conn) error {
			_, err := s.listed(ctx, q, 0)
			return err
		}))
	})
	err := pages(ctx, q, func(after, upTo string) {
		works.Go(func() error { return s.verifyRange(ctx, q, v, after, upTo) })
	})
	works.Go(func() error { return err })
	err = works.Wait()
	report(int(v.rows.Load()), int(v.of.Load()))
	slices.SortFunc(v.damaged, func(a, b *binding.DamagedRow) int {
		return cmp.Or(cmp.Compare(a.Table, b.Table), cmp.Compare(a.Key, b.Key), cmp.Compare(a.What, b.What))
	})
	return &Report{Rows: int(v.rows.Load()), Entries: int(v.entries.Load()),
		Damaged: append([]*binding.DamagedRow{}, v.damaged...)}, err
}

// countRows says how many rows there are: of the ledger, by its heads.
func (s *Store) countRows(ctx context.Context, q sqlconn.Conn, v *verification) error {
	heads, err := s.chains.Heads(ctx, q)
	if err != nil {
		return err
	}
	var of int64
	for _, h := range heads {
		of += h.Seq
	}
	for _, t := range tables.All {
		var n int64
		if _, err := q.One(ctx, []any{&n}, "SELECT COUNT(*) FROM "+t.Name); err != nil {
			return err
		}
		of += n
	}
	v.of.Store(of)
	return nil
}

// verifyRows verifies rows of a table by their MACs.
func (s *Store) verifyRows(
	ctx context.Context, q sqlconn.Conn, v *verification, t *tables.Table, where string,
) error {
	return tables.Scan(ctx, q, len(t.Columns)+1, func(values tables.Row) error {
		return v.row(s.macs.Check(t, values))
	}, t.SelectAll+where)
}

// verifyRange verifies the bindings and attempts of a page. What has changed between its statements is read again.
func (s *Store) verifyRange(ctx context.Context, q sqlconn.Conn, v *verification, after, upTo string) error {
	wrong, err := subscription.Range(ctx, s.macs, q, after, upTo, time.Now(), v.row)
	for _, imsi := range wrong {
		if err == nil {
			_, err = s.current(ctx, "verify", imsi, time.Now())
			err = v.found(err)
		}
	}
	return err
}

// pages calls each for all texts before ':', as IMSIs are, many at a time, in their order: for those behind one up to
// another one.
func pages(ctx context.Context, q sqlconn.Conn, each func(after, upTo string)) error {
	for after := ""; ; {
		var upTo string
		if _, err := q.One(ctx, []any{&upTo}, nextPage, after); err != nil || upTo == "" {
			return err
		}
		each(after, upTo)
		after = upTo
	}
}

// nextPage is up to where no table has more than a page of rows behind $1, but for those of the last IMSI. It asks for
// no distinct ones: without statistics PostgreSQL takes it that a table has 200 of them, and would read all of it for
// more.
var nextPage = func() string {
	page := func(column, table string) string {
		return fmt.Sprintf(`SELECT COUNT(*) AS n, MAX(imsi) AS upto FROM (SELECT %[1]s AS imsi FROM %[2]s WHERE
			%[1]s > $1 AND %[1]s < ':' ORDER BY %[1]s LIMIT 1000) AS %[2]s_page`, column, table)
	}
	return `SELECT COALESCE(MIN(CASE WHEN n = 1000 THEN upto END), MAX(upto), '') FROM (` + page("subject", "ledger") +
		` UNION ALL ` + page("imsi", "bindings") + ` UNION ALL ` + page("imsi", "attempts") + `) AS pages`
}()
