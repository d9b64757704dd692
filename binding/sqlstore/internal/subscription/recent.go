package subscription

import (
	"sync"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/ledger"
	"github.com/kmehsm/kmehsm/hsmkeys"
)

// Recent is what SQLite's writer knows of its database inside a change, without asking it: what its last changes have
// left, while nobody else makes any. On PostgreSQL, where others change the database too, it knows of which IMSIs this
// process has left a pending binding, and nothing else.
type Recent struct {
	OnlyHints   bool
	mu          sync.Mutex         // only against has: changes are made one at a time
	version     int64              // see sqlconn.Tx
	subs, older map[string]*Stored // by a change's key, an IMSI: those whose binding is pending, and without attempts
	Heads       ledger.Heads
}

// maxRecent bounds the memory: there are subs and older, of so many each.
const maxRecent = 10_000

// Begin begins a change, and gives what is known of its key. From then on it is not known: the change changes it.
func (r *Recent) Begin(version int64, key string) *Stored {
	r.mu.Lock()
	defer r.mu.Unlock()
	if version != r.version {
		r.version, r.subs, r.older, r.Heads = version, nil, nil, ledger.Heads{}
	}
	if known := r.take(key); !r.OnlyHints {
		return known
	}
	return nil
}

func (r *Recent) take(key string) *Stored {
	sub := r.subs[key]
	if sub == nil {
		sub = r.older[key]
	}
	delete(r.subs, key)
	delete(r.older, key)
	return sub
}

// Forget is for a key that a change has beside its own.
func (r *Recent) Forget(key string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.take(key)
}

// Put notes what a change leaves, should it be durable. Subscriptions with attempts in rows are not noted.
func (r *Recent) Put(key string, sub *Stored) {
	if sub.HasRows {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.subs) >= maxRecent || r.subs == nil {
		r.older, r.subs = r.subs, map[string]*Stored{}
	}
	own := *sub
	own.Pending = copied(sub.Pending)
	r.subs[key] = &own
}

// Has says whether a change has left a pending binding of a key. It may be called outside of changes.
func (r *Recent) Has(key string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.subs[key] != nil || r.older[key] != nil
}

// hinted is for how long a binding that was established is asked for here: an attach is over by then. What it gives is
// sealed as it was, also if the storage key was rotated and the row sealed again by another process. The earlier key
// is destroyed at the earliest two LookAgain after nothing was left under it: one of them is for calls under way.
const hinted = hsmkeys.LookAgain

// Pending is the pending binding that vectors of q are made under, if a change has left it just now and q does not end
// it. It may be called outside of changes. Somebody else may have ended the binding since: the change that notes the
// vectors, before they leave, finds that out.
func (r *Recent) Pending(q binding.VectorRequest) *binding.Binding {
	r.mu.Lock()
	sub := r.subs[q.IMSI.String()]
	if sub == nil {
		sub = r.older[q.IMSI.String()]
	}
	r.mu.Unlock()
	if sub == nil || q.Now.Sub(sub.Pending.Established) > hinted || !sub.Pending.Expires.After(q.Now) ||
		len(sub.Pending.Sent) >= q.PendingVectors || sub.Under(q.Origin.Name) != sub.Pending {
		return nil
	}
	return copied(sub.Pending)
}

// At is what is stored of an IMSI with a pending binding at a time.
func (sub *Stored) At(now time.Time) *Stored {
	at := *sub
	at.Pending, at.Active, at.Revoked = copied(sub.Pending), copied(sub.Active), copied(sub.Revoked)
	if !at.Pending.Expires.After(now) {
		at.Expired, at.Pending = at.Pending, nil
	}
	return &at
}

// copied may be changed by whoever gets it, but not in its slices.
func copied(b *binding.Binding) *binding.Binding {
	if b != nil {
		own := *b
		b = &own
	}
	return b
}
