package factory

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"maps"
	"math/big"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/internal/sqlite"
)

// publishedSchema is that of published.db, in the line's own folder: what a new lot is compared with, of each lot whose
// manifest was verified once. A manifest never changes, and to verify a hundred thousand takes 20 s of CPU.
const publishedSchema = `CREATE TABLE lot (
	manufacturer TEXT NOT NULL,
	lot          TEXT NOT NULL,
	ranges       TEXT NOT NULL, -- the manifest's, in JSON
	modulus      BLOB NOT NULL,
	PRIMARY KEY (manufacturer, lot)
) WITHOUT ROWID`

// A publishedLot is what a new lot is compared with.
type publishedLot struct {
	lot     string
	ranges  []directory.Range
	modulus *big.Int
}

// moduli are the moduli of lots, with their names.
func moduli(lots []publishedLot) iter.Seq2[string, *big.Int] {
	return func(yield func(string, *big.Int) bool) {
		for _, l := range lots {
			if !yield(l.lot, l.modulus) {
				return
			}
		}
	}
}

// publishedLots gives all lots of the directory, and those that the line remembers and that are not there: otherwise,
// with a wrong directory, their IMEIs would be given out twice. It reads only manifests that were not verified before.
func (l *Line) publishedLots(ctx context.Context) (all []publishedLot, err error) {
	read, write, err := sqlite.Open(ctx, l.state.path("published.db"), sqlconn.First(publishedSchema))
	if err != nil {
		return nil, fmt.Errorf("the line's memory of its lots: %w", err)
	}
	defer func() { err = errors.Join(err, read.Close(), write.Close()) }()
	known, err := l.knownLots(ctx, sqlconn.Conn{Operation: "the line's memory of its lots: read it",
		DB: sqlconn.SQL{DB: read}})
	if err != nil {
		return nil, err
	}
	names, err := l.store.List(ctx, "lots")
	if errors.Is(err, fs.ErrNotExist) && len(known) == 0 {
		err = nil // the directory is made with the line's first lot
	}
	if err != nil {
		return nil, err
	}
	all = make([]publishedLot, len(names))
	fresh := make([]*directory.Manifest, len(names))
	reading, rctx := errgroup.WithContext(ctx)
	reading.SetLimit(publishers)
	for i, name := range names {
		if lot, ok := known[name]; ok {
			all[i] = lot
			continue
		}
		reading.Go(func() error {
			m, err := l.reader.Manifest(rctx, name)
			if errors.Is(err, directory.ErrNotFound) {
				return nil // its folder exists, but its manifest was never published
			}
			if fresh[i] = m; err == nil {
				all[i] = publishedLot{lot: name, ranges: m.Ranges, modulus: m.PublicKey().N}
			}
			return err
		})
	}
	if err := reading.Wait(); err != nil {
		return nil, err
	}
	if err := l.remember(ctx, write, fresh); err != nil {
		return nil, fmt.Errorf("the line's memory of its lots: add those that were read: %w", err)
	}
	for _, name := range names {
		delete(known, name)
	}
	all = slices.DeleteFunc(all, func(lot publishedLot) bool { return lot.lot == "" })
	return slices.AppendSeq(all, maps.Values(known)), nil
}

func (l *Line) knownLots(ctx context.Context, db sqlconn.Conn) (map[string]publishedLot, error) {
	known := map[string]publishedLot{}
	return known, db.Each(ctx, func(scan func(...any) error) error {
		var lot publishedLot
		var ranges, modulus sql.RawBytes
		if err := scan(&lot.lot, &ranges, &modulus); err != nil {
			return err
		}
		if err := json.Unmarshal(ranges, &lot.ranges); err != nil {
			return fmt.Errorf("the line's memory of lot %s: %w", lot.lot, err)
		}
		lot.modulus = new(big.Int).SetBytes(modulus)
		known[lot.lot] = lot
		return nil
	}, `SELECT lot, ranges, modulus FROM lot WHERE manufacturer = ?`, l.Manufacturer())
}

// remember keeps manifests that were verified; some are nil.
func (l *Line) remember(ctx context.Context, db *sqlite.Writer, manifests []*directory.Manifest) error {
	manufacturer := l.Manufacturer()
	return db.Do(ctx, func(ctx context.Context, tx *sqlconn.Tx) error {
		for _, m := range manifests {
			if m == nil {
				continue
			}
			ranges, err := json.Marshal(m.Ranges)
			if err != nil {
				return err
			}
			if _, err := tx.ExecContext(ctx, `INSERT INTO lot (manufacturer, lot, ranges, modulus) VALUES (?, ?, ?, ?)
				ON CONFLICT DO NOTHING`, manufacturer, m.Lot, string(ranges), []byte(m.N)); err != nil {
				return err
			}
		}
		return nil
	})
}
