// Package ledger keeps the chains of the store's ledger: it adds entries, verifies them, and knows how far each
// chain had come.
package ledger

import (
	"context"
	"database/sql"
	"sync"
	"sync/atomic"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
)

// A Tx is a transaction in which entries may be added.
type Tx struct {
	sqlconn.Conn
	After []func() // to be called when it is durable
	Heads *Heads
}

// Heads are the last entries of the ledger's chains in a transaction; nil: not read yet.
type Heads [binding.Chains]*binding.Head

// Read notes the head that was read of a chain, unless another change of the transaction has added to it meanwhile.
func (h *Heads) Read(chain int64, head binding.Head) {
	if h[chain] == nil {
		h[chain] = &head
	}
}

// Chains are those of a ledger.
type Chains struct {
	macs   tables.Key
	db     *sql.DB // to read
	settle func(context.Context) error

	moved   chan struct{}
	refused atomic.Pointer[error] // the ledger is behind its mark: see Refusal
	broken  atomic.Pointer[error] // an entry of it is not what it was
	actors  sync.Map              // binding.Actor to []byte, of those that are entered
	known   atomic.Int64          // how many

	accepted sync.Map // chain to the number of its last entry ACCEPTED, where what it accepts is as it was

	mu    sync.Mutex
	epoch int                          // of seen; guarded by mu
	seen  [binding.Chains]binding.Head // how far this process knows that the ledger had come; guarded by mu
}

// New is for a database that Chains only read outside of a Tx. settle fails unless what was read there is durable.
func New(macs tables.Key, db *sql.DB, settle func(context.Context) error) *Chains {
	return &Chains{macs: macs, db: db, settle: settle, moved: make(chan struct{}, 1)}
}

// A Ledger is the part of a binding.Ledger that changes nothing.
type Ledger struct{ chains *Chains }

// Ledger is that of the chains.
func (c *Chains) Ledger() Ledger { return Ledger{chains: c} }

// Reading is for what only reads, and not while the ledger is rolled back.
func (c *Chains) Reading(operation string) (sqlconn.Conn, error) {
	return c.Reads(operation), c.Refusal()
}

// Reads is for what reads also while the ledger is rolled back.
func (c *Chains) Reads(operation string) sqlconn.Conn {
	return sqlconn.Conn{Operation: operation, DB: sqlconn.SQL{DB: c.db}}
}
