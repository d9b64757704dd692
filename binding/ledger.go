package binding

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/kme"
)

// An Event is what an entry of the ledger says has happened.
type Event string

// About a subscription; the subject is its IMSI.
const (
	EventEstablished Event = "ESTABLISHED" // a KME was accepted: a pending binding
	EventActivated   Event = "ACTIVATED"
	EventRevoked     Event = "REVOKED" // all that it had, by an administrator
	EventClosed      Event = "CLOSED"  // its attempts, by an administrator: nothing was bound
	EventOpened      Event = "OPENED"  // to another device, by an administrator
	EventExported    Event = "EXPORTED"
)

// About a manufacturer, see ManufacturerSubject; a lot, see LotSubject; its list of revoked devices, see
// RevocationsSubject; an entry of the operator's list of devices, see ListingSubject; or the store itself,
// StoreSubject.
const (
	EventEnrolled   Event = "ENROLLED"
	EventDistrusted Event = "DISTRUSTED"
	EventTrusted    Event = "TRUSTED"

	EventImported   Event = "IMPORTED"
	EventRetired    Event = "RETIRED"
	EventReinstated Event = "REINSTATED"

	// EventRevocations is a list of revoked devices that was believed for the first time; see package revocations.
	EventRevocations Event = "REVOCATIONS"

	// About an entry of the operator's own list of devices, see ListingSubject.
	EventListed   Event = "LISTED"
	EventUnlisted Event = "UNLISTED"

	EventMigrated Event = "MIGRATED" // the store was copied from another one
	EventAccepted Event = "ACCEPTED" // although the store is an earlier one than the service wrote

	// EventForgotten is about a manufacturer or a lot that an earlier database, which was accepted, does not have.
	EventForgotten Event = "FORGOTTEN"
)

// StoreSubject is the subject of an entry about the store.
const StoreSubject = "store"

// ManufacturerSubject is the subject of an entry about a manufacturer.
func ManufacturerSubject(id string) string { return "manufacturer " + id }

// LotSubject is the subject of an entry about a lot.
func LotSubject(manufacturer, lot string) string { return "lot " + manufacturer + " " + lot }

// RevocationsSubject is the subject of an entry about a lot's list of revoked devices.
func RevocationsSubject(manufacturer, lot string) string {
	return "revocations " + manufacturer + " " + lot
}

// An Entry of the ledger.
type Entry struct {
	Chain   int       `json:"chain"`
	Seq     int64     `json:"seq"` // counts up from 1 in each chain
	Time    time.Time `json:"time"`
	Event   Event     `json:"event"`
	Subject string    `json:"subject"`
	IMEI    string    `json:"imei,omitempty"` // of the device whose KME was accepted
	Actor   Actor     `json:"actor"`
	Detail  string    `json:"detail,omitempty"`
}

// A Line is an entry with all that its MAC is over: the audit log has it outside of the database.
type Line struct {
	Entry
	Tag     strict.Base64 `json:"tag,omitempty"` // of the KME that was accepted
	ActorID strict.Base64 `json:"actor_id"`
	MAC     strict.Base64 `json:"mac"` // over all of this, and the MAC of the entry before it
}

// Chains is how many chains the ledger has: entries of one follow each other, and those of several can be written at
// the same time. A subject's are all in one.
const Chains = 16

// A Head is the last entry of a chain; zero of one that has none.
type Head struct {
	Seq int64         `json:"seq"`
	MAC strict.Base64 `json:"mac,omitempty"`
}

// A Mark is the ledger's high-water mark: how far it had come.
type Mark struct {
	Epoch int          `json:"epoch"` // how often an administrator has accepted a ledger that was behind its mark
	Heads [Chains]Head `json:"heads"`
}

// Entries is how many entries the ledger has.
func (m *Mark) Entries() (n int64) {
	for _, h := range m.Heads {
		n += h.Seq
	}
	return n
}

// Missing is what was decided since the moment to which a database was set back.
type Missing struct {
	Lost  int64  // entries that the mark counts, or that Lines has, and that the database does not have
	Lines []Line // of an audit log: each follows the last entry of its chain in the database, or the one before it here
	// Unknown has, of each chain, how many entries are lost that are not among Lines.
	Unknown [Chains]int64
}

// Unknowns is the sum of Unknown.
func (m *Missing) Unknowns() (n int64) {
	for _, u := range m.Unknown {
		n += u
	}
	return n
}

// An Acceptance is what an administrator accepts.
type Acceptance struct {
	Reason        string
	Missing       *Missing // whose Lines become entries again
	RevokeUnknown bool     // revokes the bindings of chains with Unknown entries
}

// Accepted is what an Acceptance has led to.
type Accepted struct {
	Mark    *Mark    // to be set
	Changes []Change // of the subjects of what was missing
	Revoked []string // IMSIs whose bindings were, because of what is unknown
	LeftOut int      // lines that were not entered again: their KME is in a row that the service did not write
}

// A Change says how a subject stands about which the database had lost decisions.
type Change struct {
	Subject string `json:"subject"`
	IMEI    string `json:"imei,omitempty"`  // with an IMSI: of the device that the last decision was about
	Event   Event  `json:"event"`           // what was decided last
	Now     string `json:"now"`             // what the database has
	ToDo    string `json:"to_do,omitempty"` // by an administrator
}

// A DamagedRow is a row that the service did not write.
type DamagedRow struct {
	Table string `json:"table"`
	Key   string `json:"key"`
	What  string `json:"what"`
}

func (e *DamagedRow) Error() string {
	return fmt.Sprintf("the database is damaged: %s; keysvc store verify lists all that is", e.Line())
}

// Line is for people: a key is in quotes if it would do something to a terminal. Somebody else may have chosen it.
func (e *DamagedRow) Line() string {
	key := e.Key
	if strings.ContainsFunc(key, strict.Hidden) {
		key = strconv.Quote(key)
	}
	return fmt.Sprint(e.Table, " ", key, " ", e.What)
}

// IsDamaged says whether an error is a *DamagedRow.
func IsDamaged(err error) bool { return errors.As(err, new(*DamagedRow)) }

// ErrRolledBack: the ledger is behind its high-water mark.
var ErrRolledBack = errors.New("the database is an earlier one than the service has written: bring back the last " +
	"one; or, if there is no other, accept this one with keysvc store accept-rollback")

// A Ledger is the part of a Store that remembers for ever. While it is rolled back, every method of the Store but
// Check, Heads, Missing, Accept, VerifyLedger and Entries fails with ErrRolledBack.
type Ledger interface {
	// Note adds an entry, of the Actor in the context.
	Note(ctx context.Context, event Event, subject, detail string) error
	// LastNote gives the detail of the last entry of an event about a subject.
	LastNote(ctx context.Context, event Event, subject string) (detail string, found bool, err error)
	// History gives the entries about a subject, in their order.
	History(ctx context.Context, subject string) ([]Entry, error)
	// Check fails with ErrRolledBack if the ledger is behind the mark, or behind what this Store has seen under the
	// same Epoch. It gives how far the ledger is now. The mark of a token that has none is nil: then the ledger must be
	// empty.
	Check(ctx context.Context, mark *Mark) (*Mark, error)
	// Seen is how far this Store has seen the ledger come.
	Seen() *Mark
	// Heads are the last entries of the chains.
	Heads(ctx context.Context) (*Mark, error)
	// Lines gives entries behind those of a mark, at most so many of each chain. If a chain differs from the mark
	// there, or is shorter, its lines begin with the last entry that accepted it.
	Lines(ctx context.Context, behind *Mark, most int) ([]Line, error)
	// Missing finds what is lost up to a mark, in lines of a copy: by chain and number, several where a chain was
	// accepted after it had lost a part.
	Missing(ctx context.Context, mark *Mark, copied func(chain int, seq int64) []Line) (*Missing, error)
	// Accept adds the entries that are missing, and notes in each chain that it is accepted as it is. Rows that do not
	// agree with the ledger afterwards become what its last entry says, or are revoked.
	Accept(ctx context.Context, mark *Mark, a Acceptance) (*Accepted, error)
	// Moved is sent something after entries were added.
	Moved() <-chan struct{}
	// VerifyLedger reads all entries in order. It fails with ErrRolledBack and a *DamagedRow for the first one that is
	// missing or changed; from then on the Store refuses, too.
	VerifyLedger(ctx context.Context) (entries int, err error)
}

// A BindingQuery says which bindings a list has.
type BindingQuery struct {
	After   string   // the IMSI behind which it begins; empty for the first
	IMEI    kme.IMEI // only those of a device; zero for all
	Within  []string // only IMSIs that begin with one of these; nil for all
	Without []string // and with none of these
	Limit   int
	Now     time.Time
}

// Has says whether an IMSI is one that the query asks for.
func (q *BindingQuery) Has(imsi string) bool {
	begins := func(with []string) bool {
		return slices.ContainsFunc(with, func(p string) bool { return strings.HasPrefix(imsi, p) })
	}
	return (q.After == "" || imsi > q.After) && (q.Within == nil || begins(q.Within)) && !begins(q.Without)
}
