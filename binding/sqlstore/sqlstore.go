// Package sqlstore keeps the service's state: in SQLite, the embedded default, or in PostgreSQL, for several instances.
//
// Both get the same statements: SQLite takes $1, too, if parameters appear in order.
package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"sync"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/sightings"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/ledger"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/subscription"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/binding/tokenkeys"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/kme"
)

// A Store implements binding.Store, registry.Store and binding.Ledger.
type Store struct {
	ledger.Ledger
	chains *ledger.Chains

	read   *sql.DB
	lookUp sqlconn.Statements // reads a few rows
	// begin makes a change durably and alone: no other with the same key is under way.
	begin    func(ctx context.Context, key string, f begun) error
	close    func() error
	soon     func() (done func()) // groupcommit.Writer's
	warnings func(context.Context) ([]string, error)
	inPlace  func() error                                  // of SQLite: see sqlite.Writer
	writable func(context.Context) error                   // likewise
	schema   func(context.Context) (number int, err error) // of the database

	recent *subscription.Recent

	key  kme.Secret // of the MACs
	macs tables.Key

	manifests sync.Map // of lots, by what is verified: see manifest
}

// begun makes a change in a transaction. h and known are the heads and the rows of the key, as far as they are known.
type begun = func(ctx context.Context, db sqlconn.Statements, h *ledger.Heads, known *subscription.Stored) error

var (
	_ binding.Store         = (*Store)(nil)
	_ registry.Store        = (*Store)(nil)
	_ tokenkeys.SealedStore = (*Store)(nil)
	_ binding.Listings      = (*Store)(nil)
	_ sightings.Store       = (*Store)(nil)
)

// Close ends all connections.
func (s *Store) Close() error {
	err := errors.Join(s.read.Close(), s.close())
	s.key.Wipe()
	return err
}

func (s *Store) Soon() (done func()) { return s.soon() }

// Ping says whether the store can be read; SQLite's, whether it can be written to. (Its driver would say so of every
// open database.)
func (s *Store) Ping(ctx context.Context) error {
	var n int
	_, err := s.chains.Reads("ping").One(ctx, []any{&n}, "SELECT COUNT(*) FROM manufacturers")
	if err == nil && s.writable != nil {
		err = s.writable(ctx)
	}
	return err
}
