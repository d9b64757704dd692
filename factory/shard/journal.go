package shard

import (
	"context"
	"database/sql"
	_ "embed"
	"errors"

	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/internal/sqlite"
)

//go:embed journal.sql
var journalSchema string

//go:embed reissue.sql
var reissueSchema string

// A State is how far a shard is.
type State int

const (
	Planned      State = iota // its keys were made, and its injection package may be on disk; nothing was published
	Generated                 // its injection package is whole and on disk, and the journal has what is to be published
	Published                 // the directory has taken it
	Acknowledged              // it was read back from the directory, byte for byte
)

// A Journal is the line's memory of the shards of one manufacturer. It may be used concurrently.
type Journal struct {
	read         *sql.DB
	write        *sqlite.Writer
	manufacturer string
}

// OpenJournal opens the database at path, which it makes if there is none.
func OpenJournal(ctx context.Context, path, manufacturer string) (*Journal, error) {
	read, write, err := sqlite.Open(ctx, path,
		sqlconn.Schema{Migrations: []string{journalSchema, reissueSchema}, Least: 1})
	if err != nil {
		return nil, err
	}
	return &Journal{read: read, write: write, manufacturer: manufacturer}, nil
}

// Close may be called when no other call is under way.
func (j *Journal) Close() error { return errors.Join(j.read.Close(), j.write.Close()) }

// to makes a connection for an operation, which errors name.
func (j *Journal) to(operation string) sqlconn.Conn {
	return sqlconn.Conn{Operation: "the line's journal: " + operation, DB: sqlconn.SQL{DB: j.read}}
}

// exec ignores cancellation: a shard that was begun is finished.
func (j *Journal) exec(operation, query string, args ...any) error {
	conn := sqlconn.Conn{Operation: "the journal cannot be written: " + operation}
	return conn.Named(j.write.Exec(context.Background(), query, args...))
}

// An Entry is what the journal has of a shard. The zero Entry means that it was never begun.
type Entry struct {
	Begun   bool
	State   State
	Package []byte // SHA-256 of its injection package
}

// Entries gives those of a lot's shards that have been begun.
func (j *Journal) Entries(ctx context.Context, lot string) (map[int]Entry, error) {
	all := map[int]Entry{}
	return all, j.to("read a lot's shards").Each(ctx, func(scan func(...any) error) error {
		n, e := 0, Entry{Begun: true}
		err := scan(&n, &e.State, &e.Package)
		all[n] = e
		return err
	}, "SELECT number, state, package FROM shard WHERE manufacturer = ? AND lot = ?", j.manufacturer, lot)
}

// Plan notes the SHA-256 of a shard's package, before the package is on disk. So a package that the journal does not
// know was not made by the line.
func (j *Journal) Plan(lot string, n int, pkg []byte) error {
	return j.exec("plan a shard", `INSERT INTO shard (manufacturer, lot, number, state, package) VALUES (?, ?, ?, ?, ?)
		ON CONFLICT DO UPDATE SET package = excluded.package`, j.manufacturer, lot, n, Planned, pkg)
}

// PlanReissue is Plan for the package of a reissued key; file is its name.
func (j *Journal) PlanReissue(lot, file string, pkg []byte) error {
	return j.exec("plan a reissue", `INSERT INTO reissue (manufacturer, lot, file, package) VALUES (?, ?, ?, ?)
		ON CONFLICT DO UPDATE SET package = excluded.package`, j.manufacturer, lot, file, pkg)
}

// Reissue gives what PlanReissue noted; nil if it noted nothing.
func (j *Journal) Reissue(ctx context.Context, lot, file string) (pkg []byte, err error) {
	err = j.read.QueryRowContext(ctx, "SELECT package FROM reissue WHERE manufacturer = ? AND lot = ? AND file = ?",
		j.manufacturer, lot, file).Scan(&pkg)
	if errors.Is(err, sql.ErrNoRows) {
		err = nil
	}
	return pkg, j.to("read a reissue").Named(err)
}

// Generated notes the SHA-256 of a shard's package, which is on disk, and the signed object to be published.
func (j *Journal) Generated(lot string, n int, pkg, jws []byte) error {
	return j.exec("note a shard as generated", `INSERT INTO shard (manufacturer, lot, number, state, package, jws)
		VALUES (?, ?, ?, ?, ?, ?)
		ON CONFLICT DO UPDATE SET state = excluded.state, package = excluded.package, jws = excluded.jws`,
		j.manufacturer, lot, n, Generated, pkg, jws)
}

// Published notes that a shard is in the directory.
func (j *Journal) Published(lot string, n int) error {
	return j.exec("note a shard as published", "UPDATE shard SET state = ? WHERE manufacturer = ? AND lot = ? AND "+
		"number = ?", Published, j.manufacturer, lot, n)
}

// Acknowledged notes that a shard was read back from the directory, and the SHA-256 of its package unless that is nil.
func (j *Journal) Acknowledged(lot string, n int, pkg []byte) error {
	return j.exec("note a shard as acknowledged", `INSERT INTO shard (manufacturer, lot, number, state, package)
		VALUES (?, ?, ?, ?, ?)
		ON CONFLICT DO UPDATE SET state = excluded.state, package = coalesce(excluded.package, package), jws = NULL`,
		j.manufacturer, lot, n, Acknowledged, pkg)
}

// Signed is the signed object to be published of a shard; nil if the journal does not have it any more.
func (j *Journal) Signed(ctx context.Context, lot string, n int) (jws []byte, err error) {
	err = j.read.QueryRowContext(ctx, "SELECT jws FROM shard WHERE manufacturer = ? AND lot = ? AND number = ?",
		j.manufacturer, lot, n).Scan(&jws)
	return jws, j.to("read what is to be published of a shard").Named(err)
}
