package keyspec

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"iter"
	"strconv"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/p11"
)

// A Side says whose a token is. A token has keys of one side only. If it had both, the user of one side's keys could
// wrap the other side's keys and take them away.
type Side string

const (
	Factory  Side = "factory"  // the manufacturer's
	Operator Side = "operator" // the operator's
)

// A Key names a key by what it is for. Its CKA_ID and label are derived from that.
type Key struct {
	Role         Role
	Manufacturer string // RFC 7638 thumbprint of the manufacturer's signing key; empty for keys that are a token's own
	Name         string // the lot or the operator; empty for keys of which there is one
	Generation   int    // of a key that is rotated; 0 and 1 are the first
}

// MaxGenerations is how many generations a key can have.
const MaxGenerations = 64

// Generations are those that a key can have, in their order.
func (k Key) Generations() iter.Seq[Key] {
	return func(yield func(Key) bool) {
		for k.Generation = 1; k.Generation <= MaxGenerations && yield(k); k.Generation++ {
		}
	}
}

// Named finds the generation of a key whose HexID is in a file.
func (k Key) Named(id string) (Key, bool) {
	for g := range k.Generations() {
		if g.HexID() == id {
			return g, true
		}
	}
	return Key{}, false
}

// A Role says what a key does. Each has its row in the table of docs/security.md.
type Role string

const (
	RoleSigning          Role = "signing"
	RoleInjection        Role = "injection"
	RoleLot              Role = "lot"
	RoleKEK              Role = "kek"
	RoleTransport        Role = "transport"
	RoleFixture          Role = "fixture"            // a fixture's public key, TRUSTED, on a factory token
	RoleOperatorOutgoing Role = "operator-transport" // an operator's public transport key, TRUSTED, on a factory token
	RoleStorage          Role = "storage"
	RoleLedger           Role = "ledger"
	// a public key, TRUSTED, that receives storage and ledger key while a backup is made
	RoleBackup Role = "backup"
)

// ID is the CKA_ID: 20 bytes, the same on every token.
func (k Key) ID() []byte {
	parts := []string{"kmehsm key 1", string(k.Role), k.Manufacturer, k.Name}
	if k.Generation > 1 {
		parts = append(parts, strconv.Itoa(k.Generation))
	}
	h := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return h[:20]
}

// HexID is the ID as files name it.
func (k Key) HexID() string { return hex.EncodeToString(k.ID()) }

// Label is the CKA_LABEL, for people who list a token's objects.
func (k Key) Label() string {
	label := anyLabel + string(k.Role)
	if k.Name != "" {
		label += " " + k.Name
	}
	if k.Manufacturer != "" {
		label += " of " + k.Manufacturer
	}
	if k.Generation > 1 {
		label += fmt.Sprintf(" (%d)", k.Generation)
	}
	return label
}

// ParseLabel is the key that has this label.
func ParseLabel(label string) (k Key, ok bool) {
	rest, ok := strings.CutPrefix(label, anyLabel)
	if at := strings.LastIndex(rest, " ("); at > 0 && strings.HasSuffix(rest, ")") {
		if k.Generation, _ = strconv.Atoi(rest[at+2 : len(rest)-1]); k.Generation > 1 {
			rest = rest[:at]
		}
	}
	if at := strings.LastIndex(rest, " of "); at > 0 {
		rest, k.Manufacturer = rest[:at], rest[at+4:]
	}
	role, name, _ := strings.Cut(rest, " ")
	k.Role, k.Name = Role(role), name
	return k, ok && k.Label() == label
}

func (k Key) String() string { return k.Label() }

// Labels of objects that have no Key. Those of keys that receive others are followed by a part of their CKA_ID.
const (
	anyLabel        = "kme "
	DedicationLabel = "kme token role"
	MarkLabel       = "kme high-water mark"
	TransportLabel  = "kme transport " // receives a KEK: see NewTransportKey
	RestoreLabel    = "kme restore "   // receives a backup: see NewRestoreKey
	RotationLabel   = "kme rotation "  // receives earlier storage keys: see OpenRotation
)

// The keys of an operator's token. There is one of each; of the storage key, one of each generation.
var (
	Storage = Key{Role: RoleStorage}
	Ledger  = Key{Role: RoleLedger}
)

// StorageGeneration is a generation of the storage key.
func StorageGeneration(n int) Key { return Key{Role: RoleStorage, Generation: n} }

// Backup is the recipient of a backup, in the token that is backed up.
var Backup = Key{Role: RoleBackup}

// Recipient is the RSA key that receives k.
func Recipient(k Key) Key {
	r := Key{Role: RoleOperatorOutgoing, Manufacturer: k.Manufacturer, Name: k.Name}
	if k.Role == RoleInjection {
		r.Role = RoleFixture
	}
	return r
}

// ReceiverLabel is the label of a key that receives others, made of the label's beginning and the CKA_ID.
func ReceiverLabel(begins string, id []byte) string { return begins + hex.EncodeToString(id[:4]) }

// IsOurs says whether a label is one of this project's keys.
func IsOurs(label string) bool { return strings.HasPrefix(label, anyLabel) && label != DedicationLabel }

// Whose says which key of ours an object is, by its label and CKA_ID: the zero Key if it is none.
func Whose(s *p11.Session, h pkcs11.ObjectHandle) (k Key, label string, err error) {
	a, err := s.Get(h, pkcs11.CKA_LABEL, pkcs11.CKA_ID)
	if err != nil {
		return Key{}, "", p11.Explain("look at a key", err)
	}
	label, id := string(a[0]), a[1]
	if k, ok := ParseLabel(label); ok && string(id) == string(k.ID()) {
		return k, label, nil
	}
	if len(id) >= 4 && label == ReceiverLabel(TransportLabel, id) {
		return Key{Role: RoleTransport}, label, nil
	}
	return Key{}, label, nil
}
