// Package memory is what a line remembers of its lots, in its own folder: what a new lot is compared with. So a wrong
// directory, or one that is not mounted, is noticed.
package memory

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"slices"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/internal/sqlite"
)

// A manifest never changes, and to verify a hundred thousand takes 20 s of CPU.
const schema = `CREATE TABLE lot (
	manufacturer TEXT NOT NULL,
	lot          TEXT NOT NULL,
	ranges       TEXT NOT NULL, -- the manifest's, in JSON
	modulus      BLOB NOT NULL,
	PRIMARY KEY (manufacturer, lot)
) WITHOUT ROWID`

const (
	file      = "published.db"
	operation = "the line's memory of its lots"
)

// A Lot is what a new lot is compared with, of one whose manifest was verified once.
type Lot struct {
	Name    string
	Ranges  []directory.Range
	Modulus *big.Int
}

// A Memory has a manufacturer's lots, by their names, as they were when it was opened.
type Memory struct {
	Lots         map[string]Lot
	manufacturer string
	write        *sqlite.Writer
}

// Open reads the memory in a line's folder, or makes one.
func Open(ctx context.Context, dir, manufacturer string) (*Memory, error) {
	read, write, err := sqlite.Open(ctx, filepath.Join(dir, file), sqlconn.First(schema))
	if err != nil {
		return nil, fmt.Errorf("%s: %w: if it is damaged, bring it back from a backup, or, if the directory has "+
			"all lots, remove it", operation, err)
	}
	m := &Memory{Lots: map[string]Lot{}, manufacturer: manufacturer, write: write}
	db := sqlconn.Conn{Operation: operation + ": read it", DB: sqlconn.SQL{DB: read}}
	err = errors.Join(db.Each(ctx, func(scan func(...any) error) error {
		var lot Lot
		var ranges, modulus sql.RawBytes
		if err := scan(&lot.Name, &ranges, &modulus); err != nil {
			return err
		}
		if err := json.Unmarshal(ranges, &lot.Ranges); err != nil {
			return fmt.Errorf("the line's memory of lot %s: %w", lot.Name, err)
		}
		lot.Modulus = new(big.Int).SetBytes(modulus)
		m.Lots[lot.Name] = lot
		return nil
	}, `SELECT lot, ranges, modulus FROM lot WHERE manufacturer = ?`, manufacturer), read.Close())
	if err != nil {
		return nil, errors.Join(err, write.Close())
	}
	return m, nil
}

// Close ends the use of the memory.
func (m *Memory) Close() error { return m.write.Close() }

// Add remembers manifests that were verified; some are nil.
func (m *Memory) Add(ctx context.Context, manifests []*directory.Manifest) error {
	err := m.write.Do(ctx, func(ctx context.Context, tx *sqlconn.Tx) error {
		for _, one := range manifests {
			if one == nil {
				continue
			}
			ranges, err := json.Marshal(one.Ranges)
			if err != nil {
				return err
			}
			if _, err := tx.ExecContext(ctx, `INSERT INTO lot (manufacturer, lot, ranges, modulus) VALUES (?, ?, ?, ?)
				ON CONFLICT DO NOTHING`, m.manufacturer, one.Lot, string(ranges), []byte(one.N)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		err = fmt.Errorf("%s: add those that were read: %w", operation, err)
	}
	return err
}

// Names are those of the lots that a line's folder remembers, sorted: the lots that were made with this folder, and all
// others that the directory had when the last of them was made. If the folder has no memory, there are none, and no
// memory is made.
func Names(ctx context.Context, dir, manufacturer string) ([]string, error) {
	if _, err := os.Stat(filepath.Join(dir, file)); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	m, err := Open(ctx, dir, manufacturer)
	if err != nil {
		return nil, err
	}
	return slices.Sorted(maps.Keys(m.Lots)), m.Close()
}

// Missing gives an error for each lot that was made and is not among those of the directory.
func Missing(made, published []string) (missing []error) {
	there := map[string]bool{}
	for _, lot := range published {
		there[lot] = true
	}
	for _, lot := range made {
		if !there[lot] {
			missing = append(missing, fmt.Errorf("lot %s was made, and the directory does not have it: check "+
				"the directory's name, and whether it is mounted", lot))
		}
	}
	return missing
}
