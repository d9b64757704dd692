package factory

import (
	"context"
	"database/sql"
	_ "embed"
	"errors"

	"github.com/kmehsm/kmehsm/internal/sqlite"
)

//go:embed journal.sql
var journalSchema string

// A state is how far a shard is.
type state int

const (
	planned      state = iota // keys may have been made; none of them was published
	generated                 // its injection package is whole and on disk, and the journal has what is to be published
	published                 // the directory has taken it
	acknowledged              // it was read back from the directory, byte for byte
)

// A journal is the line's memory in its state folder. It may be used concurrently.
type journal struct {
	read         *sql.DB
	write        *sqlite.Writer
	manufacturer string
}

func (s State) journal(ctx context.Context, manufacturer string) (*journal, error) {
	read, write, err := sqlite.Open(ctx, s.path("journal.db"), journalSchema)
	if err != nil {
		return nil, err
	}
	return &journal{read: read, write: write, manufacturer: manufacturer}, nil
}

// close may be called when no other call is under way.
func (j *journal) close() error { return errors.Join(j.read.Close(), j.write.Close()) }

// exec is not ended by a context: a shard in flight is finished.
func (j *journal) exec(query string, args ...any) error {
	return j.write.Exec(context.Background(), query, args...)
}

// An entry is what the journal has of a shard; the zero entry, that it was never begun.
type entry struct {
	begun bool
	state state
	pkg   string // SHA-256 of its injection package; empty before generated
}

// entries gives those of a lot's shards that have been begun.
func (j *journal) entries(ctx context.Context, lot string) (map[int]entry, error) {
	rows, err := j.read.QueryContext(ctx, "SELECT number, state, package FROM shard WHERE manufacturer = ? AND lot = ?", j.manufacturer, lot)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	all := map[int]entry{}
	for rows.Next() {
		var n int
		e := entry{begun: true}
		var pkg []byte
		if err := rows.Scan(&n, &e.state, &pkg); err != nil {
			return nil, err
		}
		e.pkg = string(pkg)
		all[n] = e
	}
	return all, rows.Err()
}

// plan remembers shards as begun, before the first key of them is made.
func (j *journal) plan(lot string, from, to int) error {
	return j.exec(`WITH RECURSIVE n(i) AS (SELECT ?3 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?4)
		INSERT INTO shard (manufacturer, lot, number, state) SELECT ?1, ?2, i, 0 FROM n WHERE true ON CONFLICT DO NOTHING`, j.manufacturer, lot, from, to)
}

func (j *journal) generated(lot string, n int, pkg, jws []byte) error {
	return j.exec(`INSERT INTO shard (manufacturer, lot, number, state, package, jws) VALUES (?, ?, ?, ?, ?, ?)
		ON CONFLICT DO UPDATE SET state = excluded.state, package = excluded.package, jws = excluded.jws`, j.manufacturer, lot, n, generated, pkg, jws)
}

func (j *journal) published(lot string, n int) error {
	return j.exec("UPDATE shard SET state = ? WHERE manufacturer = ? AND lot = ? AND number = ?", published, j.manufacturer, lot, n)
}

// acknowledged remembers a shard as read back from the directory.
func (j *journal) acknowledged(lot string, n int, pkg []byte) error {
	return j.exec(`INSERT INTO shard (manufacturer, lot, number, state, package) VALUES (?, ?, ?, ?, ?)
		ON CONFLICT DO UPDATE SET state = excluded.state, package = coalesce(excluded.package, package), jws = NULL`, j.manufacturer, lot, n, acknowledged, pkg)
}

// signed is what is to be published of a shard; nil if the journal has it no more.
func (j *journal) signed(ctx context.Context, lot string, n int) (jws []byte, err error) {
	err = j.read.QueryRowContext(ctx, "SELECT jws FROM shard WHERE manufacturer = ? AND lot = ? AND number = ?", j.manufacturer, lot, n).Scan(&jws)
	return jws, err
}
