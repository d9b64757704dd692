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
	"os"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/internal/sqlite"
)

// publishedFile is in the line's own folder: what a new lot is compared with, of each lot whose manifest was verified
// once. A manifest never changes, and to verify a hundred thousand takes 20 s of CPU.
const publishedFile = "published.db"

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
	known, write, err := l.state.knownLots(ctx, l.Manufacturer())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, write.Close()) }()
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

// Lots names the lots that the folder remembers of a manufacturer: all that were made here, and those that others had
// made before the last of these.
func (s State) Lots(ctx context.Context, manufacturer string) ([]string, error) {
	if _, err := os.Stat(s.path(publishedFile)); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	known, write, err := s.knownLots(ctx, manufacturer)
	if err != nil {
		return nil, err
	}
	return slices.Sorted(maps.Keys(known)), write.Close()
}

// knownLots are those that the folder remembers of a manufacturer, by their names.
func (s State) knownLots(ctx context.Context, manufacturer string) (
	known map[string]publishedLot, write *sqlite.Writer, err error,
) {
	read, write, err := sqlite.Open(ctx, s.path(publishedFile), sqlconn.First(publishedSchema))
	if err != nil {
		return nil, nil, fmt.Errorf("the line's memory of its lots: %w: bring it back from a backup, or, if the "+
			"directory has all lots, remove it", err)
	}
	known = map[string]publishedLot{}
	db := sqlconn.Conn{Operation: "the line's memory of its lots: read it", DB: sqlconn.SQL{DB: read}}
	err = errors.Join(db.Each(ctx, func(scan func(...any) error) error {
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
	}, `SELECT lot, ranges, modulus FROM lot WHERE manufacturer = ?`, manufacturer), read.Close())
	if err != nil {
		return nil, nil, errors.Join(err, write.Close())
	}
	return known, write, nil
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
