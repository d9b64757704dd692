package sqlstore

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/ledger"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/kme"
)

// A Report is what Verify has found.
type Report struct {
	Rows    int                   `json:"rows"`
	Entries int                   `json:"entries"` // of the ledger, which are rows too
	Damaged []*binding.DamagedRow `json:"damaged"` // maxDamaged at most
}

// maxDamaged bounds a Report: where there are more, it is not rows that are damaged.
const maxDamaged = 1000

// Verify reads everything: whether each row and each entry of the ledger is what a service wrote, and the last that it
// wrote. report is called with the rows read so far.
func (s *Store) Verify(ctx context.Context, report func(rows int)) (*Report, error) {
	r := &Report{Damaged: []*binding.DamagedRow{}}
	read := func() { r.Rows++; report(r.Rows) }
	// found takes a damage in, and gives any other error.
	found := func(err error) error {
		var d *binding.DamagedRow
		if errors.As(err, &d) && len(r.Damaged) < maxDamaged {
			r.Damaged = append(r.Damaged, d)
			return nil
		}
		return err
	}
	q := s.chains.Reads("verify")
	for chain := range int64(binding.Chains) {
		n, _, err := s.chains.Verify(ctx, q, chain, func(tables.Row) error { read(); return nil }, nil)
		if r.Entries += n; found(err) != nil {
			return r, err
		}
	}
	if err := ledger.Strays(ctx, q, func(d error) error { read(); return found(d) }); err != nil {
		return r, err
	}
	for _, t := range tables.All {
		err := tables.Scan(ctx, q, len(t.Columns)+1, func(values tables.Row) error {
			read()
			return found(s.macs.Check(t, values))
		}, t.SelectAll)
		if err != nil {
			return r, err
		}
	}
	err := s.settled(ctx, "verify", "registry", func(q sqlconn.Conn) error { _, err := s.imported(ctx, q); return err })
	if found(err) != nil {
		return r, err
	}
	err = s.settled(ctx, "verify", changing, func(q sqlconn.Conn) error { _, err := s.listed(ctx, q, 0); return err })
	if found(err) != nil {
		return r, err
	}
	return r, imsis(ctx, q, func(page []kme.IMSI) error {
		for _, err := range s.currentOfAll(ctx, page) {
			var d *binding.DamagedRow
			if errors.As(err, &d) && d.What == tables.Changed { // it is in the report
				continue
			}
			if err := found(err); err != nil {
				return err
			}
		}
		return nil
	})
}

// currentOfAll gives the error of current of each of some IMSIs. Most of the time that Verify takes is here, so that it
// uses all cores, and sends PostgreSQL many at a time.
func (s *Store) currentOfAll(ctx context.Context, page []kme.IMSI) []error {
	errs, workers := make([]error, len(page)), 4*runtime.GOMAXPROCS(0)
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			for i := w; i < len(page); i += workers {
				_, errs[i] = s.current(ctx, "verify", page[i], time.Now())
			}
		})
	}
	all.Wait()
	return errs
}

// imsis calls each with all IMSIs of which there is anything, many at a time, in their order.
func imsis(ctx context.Context, q sqlconn.Conn, each func([]kme.IMSI) error) error {
	const page = "1000"
	for after := ""; ; {
		var texts []string
		err := q.Each(ctx, func(scan func(...any) error) error {
			texts = append(texts, "")
			return scan(&texts[len(texts)-1])
		}, `SELECT imsi FROM (
			SELECT * FROM (SELECT DISTINCT subject AS imsi FROM ledger WHERE subject > $1 AND subject < ':' ORDER BY
				subject LIMIT `+page+`) AS a UNION
			SELECT * FROM (SELECT DISTINCT imsi FROM bindings WHERE imsi > $1 ORDER BY imsi LIMIT `+page+`) AS b UNION
			SELECT * FROM (SELECT DISTINCT imsi FROM attempts WHERE imsi > $1 ORDER BY imsi LIMIT `+page+
			`) AS c) AS d ORDER BY imsi LIMIT `+page, after)
		if err != nil || len(texts) == 0 {
			return err
		}
		var all []kme.IMSI
		for _, text := range texts {
			// A text that is none is of a row that the service did not write, and whose MAC says so.
			if imsi, err := kme.ParseIMSI(text); err == nil {
				all = append(all, imsi)
			}
		}
		if err := each(all); err != nil {
			return err
		}
		last := texts[len(texts)-1]
		if last <= after { // SQLite sorts a BLOB, which the service did not write either, behind all texts
			return nil
		}
		after = last
	}
}
