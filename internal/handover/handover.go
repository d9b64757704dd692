// Package handover has the files that pass between the parties: enrolments and grants from the manufacturer to an
// operator, transport keys from an operator to the manufacturer, enrolments and injection packages from the line to a
// fixture. What is published is in package directory. It needs no token.
package handover

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/internal/strict"
)

// The types of the files that the manufacturer signs.
const (
	TypeEnrolment directory.Type = "kme-operator-enrolment+jws"
	TypeGrant     directory.Type = "kme-lot-grant+jws"
)

// The algorithms of wrapped keys, by their JOSE names where there is one.
const (
	RSAOAEP = "RSA-OAEP" // RFC 7518 section 4.3: SHA-1 and MGF1 with SHA-1
	A256KWP = "A256KWP"  // AES-256 key wrap with padding, RFC 5649
)

// An Enrolment carries an operator's KEK from a manufacturer to the operator, under the operator's transport key.
type Enrolment struct {
	Manufacturer string        `json:"manufacturer"`
	Operator     string        `json:"operator"`
	TransportKey string        `json:"transport_key"` // RFC 7638 thumbprint
	KEK          string        `json:"kek"`           // the KEK's CKA_ID, hex
	Algorithm    string        `json:"alg"`
	Wrapped      strict.Base64 `json:"wrapped"`
}

// Validate refuses an enrolment whose parts do not fit one another.
func (e *Enrolment) Validate() error {
	if err := directory.CheckName(e.Operator); err != nil {
		return fmt.Errorf("the operator: %w", err)
	}
	if e.Manufacturer == "" || e.TransportKey == "" || e.KEK == "" || len(e.Wrapped) == 0 {
		return errors.New("a part of the enrolment is missing")
	}
	return checkAlgorithm(e.Algorithm, RSAOAEP)
}

// A Grant carries a lot's private key from a manufacturer to an operator, under the operator's KEK.
type Grant struct {
	Operator  string        `json:"operator"`
	KEK       string        `json:"kek"` // the KEK's CKA_ID, hex
	Lot       string        `json:"lot"`
	Algorithm string        `json:"alg"`
	Wrapped   strict.Base64 `json:"wrapped"`  // PKCS #8
	Manifest  string        `json:"manifest"` // the lot's signed manifest, a compact JWS
}

// Validate refuses a grant whose parts do not fit one another.
func (g *Grant) Validate() error {
	if err := directory.CheckName(g.Operator); err != nil {
		return fmt.Errorf("the operator: %w", err)
	}
	if err := directory.CheckName(g.Lot); err != nil {
		return fmt.Errorf("the lot: %w", err)
	}
	if g.KEK == "" || len(g.Wrapped) == 0 || g.Manifest == "" {
		return errors.New("a part of the grant is missing")
	}
	return checkAlgorithm(g.Algorithm, A256KWP)
}

func checkAlgorithm(have, want string) error {
	if have != want {
		return fmt.Errorf("its key is wrapped by %q, not by %s", have, want)
	}
	return nil
}

// A TransportKey is the public key of an operator's that receives one KEK, in the file that the operator gives to the
// manufacturer. Nothing in it proves whose it is: that is for the thumbprint, read aloud by one to the other.
type TransportKey struct {
	Type    string          `json:"typ"`   // TypeTransportKey
	Token   string          `json:"token"` // the serial number of the operator's token
	Created time.Time       `json:"created"`
	Key     jose.JSONWebKey `json:"key"`
}

// The types of files that nobody signs.
const (
	TypeTransportKey = "kme-transport-key"
	// as a TransportKey; it receives the keys of another token of the operator's
	TypeRestoreKey       = "kme-restore-key"
	TypeFixtureEnrolment = "kme-fixture-enrolment"
)

// NewReceiver makes the file of a TransportKey, of one of its two types.
func NewReceiver(typ string, pub *rsa.PublicKey, token string) ([]byte, error) {
	return marshalFile(&TransportKey{
		Type: typ, Token: token, Created: time.Now().UTC().Truncate(time.Second),
		Key: jose.JSONWebKey{Key: pub, KeyID: pemkey.Thumbprint(pub), Use: "enc", Algorithm: RSAOAEP},
	})
}

// ParseReceiver reads the file. It refuses another type, and a key without the thumbprint that its owner has read out.
func ParseReceiver(typ string, data []byte, thumbprint string) (*rsa.PublicKey, error) {
	otherwise := map[string]string{
		TypeTransportKey: "it is no transport key, as keysvc transport new writes it",
		TypeRestoreKey:   "it is no restore key, as keysvc backup prepare writes it",
	}[typ]
	k := new(TransportKey)
	if err := strict.Parse(data, k); err != nil {
		return nil, fmt.Errorf("%s: %w", otherwise, err)
	}
	pub, ok := k.Key.Key.(*rsa.PublicKey)
	if k.Type != typ || !ok || k.Key.Use != "enc" || k.Key.Algorithm != RSAOAEP ||
		k.Key.KeyID != pemkey.Thumbprint(pub) {
		return nil, errors.New(otherwise)
	}
	return pub, CheckThumbprint(k.Key.KeyID, thumbprint)
}

// CheckThumbprint refuses a key that is not the one whose thumbprint was read out.
func CheckThumbprint(have, readOut string) error {
	if have != readOut {
		return fmt.Errorf("the key's thumbprint is %s, and the one given is %s: ask its owner to read it out again, "+
			"and if it differs, do not use this file: it was swapped on its way", have, readOut)
	}
	return nil
}

func marshalFile(v any) ([]byte, error) {
	b, err := json.MarshalIndent(v, "", "  ")
	return append(b, '\n'), err
}

// A FixtureEnrolment carries a fixture's injection key to it, under the fixture's RSA key, and the manufacturer's
// public key, which vouches for the modulus that the fixture injects.
type FixtureEnrolment struct {
	Type         string          `json:"typ"` // TypeFixtureEnrolment
	Fixture      string          `json:"fixture"`
	KeyID        string          `json:"kid"` // the injection key's CKA_ID, hex
	Algorithm    string          `json:"alg"`
	Wrapped      strict.Base64   `json:"wrapped"`
	Manufacturer jose.JSONWebKey `json:"manufacturer"`
}

// NewFixtureEnrolment makes one of a key wrapped by RSA-OAEP.
func NewFixtureEnrolment(fixture, keyID string, wrapped []byte, manufacturer *ecdsa.PublicKey) *FixtureEnrolment {
	return &FixtureEnrolment{
		Type: TypeFixtureEnrolment, Fixture: fixture, KeyID: keyID, Algorithm: RSAOAEP, Wrapped: wrapped,
		Manufacturer: jose.JSONWebKey{Key: manufacturer, KeyID: directory.NewVerifier(manufacturer).KeyID()},
	}
}

// Marshal is the file.
func (e *FixtureEnrolment) Marshal() ([]byte, error) { return marshalFile(e) }

// ParseFixtureEnrolment reads the file.
func ParseFixtureEnrolment(data []byte) (*FixtureEnrolment, error) {
	e := new(FixtureEnrolment)
	if err := strict.Parse(data, e); err != nil {
		return nil, err
	}
	if e.Type != TypeFixtureEnrolment {
		return nil, fmt.Errorf("it is a %q, not a %s", e.Type, TypeFixtureEnrolment)
	}
	if err := directory.CheckName(e.Fixture); err != nil {
		return nil, fmt.Errorf("the fixture: %w", err)
	}
	if e.KeyID == "" || len(e.Wrapped) == 0 {
		return nil, errors.New("a part of the enrolment is missing")
	}
	if _, err := e.Verifier(); err != nil {
		return nil, err
	}
	return e, checkAlgorithm(e.Algorithm, RSAOAEP)
}

// Verifier pins the manufacturer's key.
func (e *FixtureEnrolment) Verifier() (*directory.Verifier, error) {
	pub, ok := e.Manufacturer.Key.(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return nil, errors.New("the manufacturer's key is not an ECDSA public key on P-256")
	}
	return directory.NewVerifier(pub), nil
}
