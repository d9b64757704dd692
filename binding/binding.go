// Package binding is the operator's service: it opens attempts, takes a device's KME, binds it to IMSI and IMEI, and
// processes RANDs under it. It also takes in what manufacturers hand over: enrolments and lot keys.
//
// The order of EstablishKME is the guarantee: everything that a caller may learn is checked before the token is
// asked, everything about the payload's content after it, with one answer; and NW_SIG leaves only after the commit.
package binding

import (
	"context"
	"errors"
	"time"

	"github.com/kmehsm/kmehsm/directory"
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
	State        State
	Sealed       []byte // the KME under the token's storage key
	Established  time.Time
	Activated    time.Time // zero if it was never active
	Revoked      time.Time // zero if it was not

	// What recognises a retransmission: the same attempt and payload get the same NW_SIG.
	AttemptID     string
	PayloadSHA256 []byte
	NWSig         []byte
}

// An Attempt allows one EstablishKME for its IMSI, until it expires; one that an administrator has opened, also while another
// binding is active.
type Attempt struct {
	ID      string // 128 random bits, base64url: whoever does not have it cannot use it up
	IMSI    kme.IMSI
	Expires time.Time
	Opened  bool // by an administrator
}

// A Manufacturer is one whose enrolment this operator has taken.
type Manufacturer struct {
	KeyID     string // RFC 7638 thumbprint of its signing key, which names it everywhere
	PEM       string // the signing key itself, pinned
	Operator  string // the name that it knows this operator by
	Directory string // where its public keys are, as --directory has it; empty for the service's default
	Enrolled  time.Time
}

// A Lot is one whose private key is in the operator's token.
type Lot struct {
	Manufacturer string
	Manifest     *directory.Manifest
	ManifestJWS  string
	Imported     time.Time
}

// Errors of a Store that the service tells apart.
var (
	ErrNotBound  = errors.New("the IMSI has no binding")
	ErrNoAttempt = errors.New("no such attempt is open")
	ErrUsed      = errors.New("the KME was used before")
	ErrNotGood   = errors.New("the KME is not good")
	ErrBound     = errors.New("the IMSI has an active binding, and no administrator has opened provisioning for it")
)

// A Store keeps what the service must not forget. All methods may be called concurrently, by several processes, and a
// change is durable when its method returns.
type Store interface {
	// Prepare gives the binding that an IMSI's next vector is processed with: the pending one before the active.
	// Without one it gives an open attempt of the IMSI that lives until reuse at least, or opens fresh. An attempt that an
	// administrator has opened comes before a binding.
	Prepare(ctx context.Context, fresh Attempt, now, reuse time.Time) (*Binding, *Attempt, error)
	// Attempt finds an attempt of an IMSI that is open at the time now, or fails with ErrNoAttempt.
	Attempt(ctx context.Context, imsi kme.IMSI, id string, now time.Time) (*Attempt, error)
	// OpenAttempt opens an administrator's attempt, and closes the IMSI's others.
	OpenAttempt(ctx context.Context, a Attempt) error
	// Establish, in one step: uses up b's attempt and closes the IMSI's others, enters the tag into the ledger, and
	// makes b the pending binding. Fails with ErrNoAttempt, ErrBound or ErrUsed, looked for in this order, and then changes nothing.
	// Of a KME that is not good it fails with ErrUsed or ErrNotGood after the same steps as with ErrUsed: who waits for a refusal cannot tell
	// one from the other.
	Establish(ctx context.Context, b *Binding, tag []byte, good bool, now time.Time) error
	// Report ends the pending binding's wait: it becomes the active one, or is dropped. Gives the binding that
	// stands then, or fails with ErrNotBound if there was none to begin with; nil if none is left.
	Report(ctx context.Context, imsi kme.IMSI, ok bool, now time.Time) (*Binding, error)
	// Binding finds an IMSI's binding, the pending one before the active, and that before the revoked one, or fails with
	// ErrNotBound.
	Binding(ctx context.Context, imsi kme.IMSI) (*Binding, error)
	// Bindings gives what Binding gives of each IMSI that sorts behind after, in their order, limit at most; only those of a
	// device, unless imei is zero.
	Bindings(ctx context.Context, after string, imei kme.IMEI, limit int) ([]*Binding, error)
	// Revoke ends an IMSI's bindings and attempts, and forgets the KME. It gives the binding as it is then, also if it was revoked
	// before, or fails with ErrNotBound.
	Revoke(ctx context.Context, imsi kme.IMSI, now time.Time) (*Binding, error)
	// DropExpired removes attempts that have expired.
	DropExpired(ctx context.Context, now time.Time) error
}

// A Registry keeps which manufacturers and lots the operator has taken in.
type Registry interface {
	// PutManufacturer enters or replaces a manufacturer.
	PutManufacturer(ctx context.Context, m *Manufacturer) error
	Manufacturers(ctx context.Context) ([]*Manufacturer, error)
	// PutLot enters a lot; entering it again changes nothing. check is called with all lots entered before, in the
	// same transaction, and its error prevents it.
	PutLot(ctx context.Context, lot *Lot, check func([]*Lot) error) error
	Lots(ctx context.Context) ([]*Lot, error)
}
