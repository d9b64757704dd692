// Package binding is the operator's service: it opens attempts, takes a device's KME, binds it to IMSI and IMEI, and
// processes RANDs under it. Packages imports, tokenkeys and mark below it are for its administrators.
//
// The order of EstablishKME is the guarantee: everything that a caller may learn is checked before the token is
// asked, everything about the payload's content after it, with one answer; and NW_SIG leaves only after the commit.
package binding

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// A State is where a binding stands in its life. See docs/protocol.md.
type State string

const (
	Pending State = "PENDING" // NW_SIG was answered; the device has not shown yet that it has the KME
	Active  State = "ACTIVE"  // a pre-processed authentication has succeeded
	Revoked State = "REVOKED" // an administrator has ended it; its KME is forgotten
)

// A Binding ties a KME to a subscription and a device. An IMSI has at most one of each State.
type Binding struct {
	IMSI         kme.IMSI
	IMEI         kme.IMEI
	Manufacturer string // RFC 7638 thumbprint of the manufacturer's signing key
	Lot          string
	DeviceKey    int // which key of the device signed the KME: 0 for its first, 1 for the next one that it was issued
	State        State
	Sealed       []byte // the KME under the token's storage key
	Established  time.Time
	Activated    time.Time // zero if it was never active
	Revoked      time.Time // zero if it was not

	Origin  kme.Origin   // from where it was established
	Expires time.Time    // when it ends by itself, while it is pending
	Sent    []kme.Origin // who was sent vectors under it while it was pending: an entry for each PrepareVector

	// What recognises a retransmission: the same attempt and payload get the same NW_SIG.
	AttemptID     string
	PayloadSHA256 []byte
	NWSig         []byte
}

// Basis is the device's key that the binding rests on.
func (b *Binding) Basis() registry.Basis {
	return registry.Basis{IMSI: b.IMSI, IMEI: b.IMEI, Manufacturer: b.Manufacturer, Lot: b.Lot, DeviceKey: b.DeviceKey}
}

// SentTo says whether an origin was sent a vector under the binding while it was pending.
func (b *Binding) SentTo(o kme.Origin) bool { return slices.Contains(b.Sent, o) }

// An Attempt allows one EstablishKME for its IMSI from its origin, until it expires. An opened one allows that also
// while another binding is active. The attempt of an administrator has the zero Origin, and lets origins open attempts
// of their own. Attempts that are not opened are in no store: their ID has their content, under a MAC.
type Attempt struct {
	ID      string // base64url, with 128 bits that nobody can guess: whoever does not have it cannot use it up
	IMSI    kme.IMSI
	Origin  kme.Origin
	Expires time.Time
	Opened  bool // by an administrator
}

// A VectorRequest is what a Store is asked before vectors are processed.
type VectorRequest struct {
	IMSI           kme.IMSI
	Origin         Origin
	RANDs          []hsmkeys.RAND
	Now            time.Time
	AttemptTTL     time.Duration // the life of an attempt, should one be opened
	PendingVectors int           // how many requests a pending binding answers before it ends
	// AttemptID of the pending binding that the vectors are encrypted under; empty at first
	Ready string
}

// A Decision is what the vectors of a VectorRequest are processed with: either a Binding or an Attempt.
type Decision struct {
	Binding *Binding
	Attempt *Attempt
	Ended   *Binding // a pending one that had answered too many requests, or had expired
}

// Errors of a Store that the service tells apart.
var (
	ErrNotBound  = errors.New("the IMSI has no binding")
	ErrNoAttempt = errors.New("no such attempt is open")
	ErrUsed      = errors.New("the KME was used before")
	ErrSpent     = errors.New("the IMSI was sent this RAND in clear before")
	ErrNotGood   = errors.New("the KME is not good")
	ErrBound     = errors.New("the IMSI has an active binding, and no administrator has opened provisioning for it")
)

// A Store keeps what the service must not forget. All methods may be called concurrently, by several processes, and a
// change is durable when its method returns. They return only what a service wrote last, and fail with a *DamagedRow if
// there is anything else. Who made a change is the Actor in the context.
type Store interface {
	Ledger
	// Soon takes a ticket: its holder will soon make a change, and waits for nothing but the HSM until then. done gives
	// the ticket back, after the change or without one. Other changes may wait for the ones that are announced so, to
	// share a commit.
	Soon() (done func())
	// Subscription is what there is of an IMSI.
	Subscription(ctx context.Context, imsi kme.IMSI, now time.Time) (*Subscription, error)
	// Prepare decides what vectors are processed with, and notes what is sent: RANDs in clear as spent, and the origin
	// in a pending binding, but only when vectors are Ready under it: an origin that gets no vector was sent none. An
	// attempt that an administrator has opened comes before a binding. Fails with ErrNotBound where there is no binding
	// and the origin may not provision, and with ErrSpent if a RAND would leave under a KME after it has left in clear.
	Prepare(ctx context.Context, q VectorRequest) (Decision, error)
	// Attempt gives the attempt of an id that is open, and an origin's; it fails with ErrNoAttempt if there is none.
	Attempt(ctx context.Context, imsi kme.IMSI, o kme.Origin, id string, now time.Time) (*Attempt, error)
	// Spent says whether an IMSI was sent a RAND in clear.
	Spent(ctx context.Context, imsi kme.IMSI, rand hsmkeys.RAND) (bool, error)
	// OpenAttempt opens an administrator's attempt, and closes the IMSI's others.
	OpenAttempt(ctx context.Context, a Attempt) error
	// Establish, in one step: uses up b's attempt, which is b.Origin's, and closes the IMSI's others, enters the tag
	// into the ledger, and makes b the pending binding. Fails with ErrNoAttempt, ErrBound or ErrUsed, looked for in
	// this order, and then changes nothing. If the KME is not good, it fails with ErrUsed or ErrNotGood, after the same
	// steps as with ErrUsed: the time of a refusal does not say which one it is.
	Establish(ctx context.Context, b *Binding, tag []byte, good bool, now time.Time) error
	// Settle fails unless what was read is durable. A change whose result is unknown, because its standby is away, can
	// be read before it is on the standby's disk.
	Settle(ctx context.Context) error
	// Report does what Subscription.Ends says: the pending binding becomes the active one, or is dropped. Gives the
	// subscription as it is then, or fails with ErrNotBound if it had no binding to begin with.
	Report(ctx context.Context, imsi kme.IMSI, o kme.Origin, ok bool, now time.Time) (*Subscription, error)
	// Equipment returns the subscription of an IMSI, unless that is zero, and the active bindings of a device, both as
	// of one moment.
	Equipment(ctx context.Context, imei kme.IMEI, imsi kme.IMSI, now time.Time) (*Subscription, []*Binding, error)
	// Bindings gives Subscription.Latest of each IMSI that is asked for, in their order.
	Bindings(ctx context.Context, q BindingQuery) ([]*Binding, error)
	// Revoke ends an IMSI's bindings and attempts, and forgets the KME. It gives the binding as it is then, also if it
	// was revoked before, or fails with ErrNotBound if there was none; attempts end all the same. Damaged rows are
	// ended, too; then the binding that it gives has only IMSI and IMEI.
	Revoke(ctx context.Context, imsi kme.IMSI, now time.Time) (*Binding, error)
	// DropExpired removes attempts that have expired.
	DropExpired(ctx context.Context, now time.Time) error
}
