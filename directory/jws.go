package directory

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/cryptosigner"

	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/internal/strict"
)

// A Type is the typ header of a signed object. It prevents that an object of one kind is taken for another. Types of
// objects outside of the directory are declared where those are made.
type Type string

const (
	TypeManifest       Type = "kme-lot-manifest+jws"
	TypeShard          Type = "kme-key-shard+jws"
	TypeRevocations    Type = "kme-revocations+jws"
	TypeRevocationPart Type = "kme-revocations-part+jws"
	TypeSuccession     Type = "kme-key-succession+jws" // in the header of objects that a later key has signed
)

// A RefusedError says which object is refused, and why.
type RefusedError struct {
	Object, Reason string
	Rollback       bool // a later version was seen before, or a different one of the same version
}

func (e *RefusedError) Error() string { return fmt.Sprintf("%s is refused: %s", e.Object, e.Reason) }

func refused(object, format string, args ...any) error {
	return &RefusedError{Object: object, Reason: fmt.Sprintf(format, args...)}
}

// A Signer signs objects with the manufacturer's key. It may be used concurrently if its crypto.Signer may.
type Signer struct {
	signer crypto.Signer
	public *ecdsa.PublicKey
	root   *ecdsa.PublicKey // the manufacturer's first key, which readers pin
	chain  []string         // the statements that lead from root to public
}

// succession is the JWS header with the statements that lead from the pinned key to the one that signed the object.
// Since they are in the object itself, a reader needs nothing else after a rotation.
const succession = "succession"

// A Succession is the statement that introduces a manufacturer's next signing key, signed by the one before. The
// manufacturer keeps its name, the thumbprint of its first key.
type Succession struct {
	Manufacturer string          `json:"manufacturer"`
	Generation   int             `json:"generation"` // of the key introduced; 2 for the first that is
	Key          jose.JSONWebKey `json:"key"`
}

// NewSigner takes an ECDSA P-256 key.
func NewSigner(s crypto.Signer) (*Signer, error) {
	pub, ok := s.Public().(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return nil, errors.New("the signing key is not an ECDSA key on P-256")
	}
	return &Signer{signer: s, public: pub, root: pub}, nil
}

// Succeed gives the signer with the manufacturer's next key, introduced by a statement that this one signs.
func (s *Signer) Succeed(next crypto.Signer) (*Signer, error) {
	n, err := NewSigner(next)
	if err != nil {
		return nil, err
	}
	// The chain before the statement vouches for the key that signs it, so the statement has no chain of its own.
	alone := &Signer{signer: s.signer, public: s.public, root: s.root}
	statement, err := alone.Sign(TypeSuccession, Succession{
		Manufacturer: s.KeyID(), Generation: len(s.chain) + 2,
		Key: jose.JSONWebKey{Key: n.public, KeyID: pemkey.Thumbprint(n.public)},
	})
	if err != nil {
		return nil, err
	}
	n.root, n.chain = s.root, append(slices.Clip(s.chain), string(statement))
	return n, nil
}

// KeyID is the RFC 7638 thumbprint of the manufacturer's first key, which names the manufacturer.
func (s *Signer) KeyID() string { return pemkey.Thumbprint(s.root) }

// SigningKeyID is the thumbprint of the key that signs now. Until the first rotation it is KeyID.
func (s *Signer) SigningKeyID() string { return pemkey.Thumbprint(s.public) }

// Public is the manufacturer's first key, which readers pin.
func (s *Signer) Public() *ecdsa.PublicKey { return s.root }

// Sign makes the compact JWS of a payload. It verifies the signature first: a wrong one, by a fault of the token, must
// not be published.
func (s *Signer) Sign(typ Type, payload any) ([]byte, error) {
	data, err := json.Marshal(payload)
	if err != nil {
		return nil, err
	}
	key := jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: cryptosigner.Opaque(s.signer),
		KeyID: s.SigningKeyID()}}
	options := (&jose.SignerOptions{}).WithType(jose.ContentType(typ))
	if len(s.chain) > 0 {
		options = options.WithHeader(succession, s.chain)
	}
	signer, err := jose.NewSigner(key, options)
	if err != nil {
		return nil, err
	}
	object, err := signer.Sign(data)
	if err != nil {
		return nil, fmt.Errorf("sign a %s: %w", typ, err)
	}
	if _, err := object.Verify(s.public); err != nil {
		return nil, fmt.Errorf("sign a %s: the token's signature does not verify: do not use this token", typ)
	}
	compact, err := object.CompactSerialize()
	return []byte(compact), err
}

// A Verifier accepts what one manufacturer's key has signed, or one that succeeded it. It may be used concurrently.
type Verifier struct {
	public *ecdsa.PublicKey
	keyID  string
	later  *sync.Map // of *ecdsa.PublicKey by key ID: the successors seen so far
}

// NewVerifier pins a manufacturer's key.
func NewVerifier(pub *ecdsa.PublicKey) *Verifier {
	return &Verifier{public: pub, keyID: pemkey.Thumbprint(pub), later: new(sync.Map)}
}

// ParseVerifier pins a manufacturer's key that a PEM file holds.
func ParseVerifier(pem []byte) (*Verifier, error) {
	pub, err := pemkey.P256(pem)
	if err != nil {
		return nil, err
	}
	return NewVerifier(pub), nil
}

// KeyID is the RFC 7638 thumbprint of the key.
func (v *Verifier) KeyID() string { return v.keyID }

// SignerOf says which manufacturer a JWS claims to be from, so that its Verifier can be found. It verifies nothing.
func SignerOf(jws []byte) (manufacturer string, err error) {
	object, err := parseJWS(jws)
	if err != nil {
		return "", err
	}
	header := object.Signatures[0].Protected
	chain, err := chainOf(header)
	if err != nil || len(chain) == 0 {
		return header.KeyID, err
	}
	if object, err = parseJWS([]byte(chain[0])); err != nil {
		return "", err
	}
	return object.Signatures[0].Protected.KeyID, nil
}

// chainOf is the succession header; empty if there is none.
func chainOf(header jose.Header) (chain []string, err error) {
	have, ok := header.ExtraHeaders[succession]
	if !ok {
		return nil, nil
	}
	list, ok := have.([]any)
	for _, e := range list {
		statement, isText := e.(string)
		ok = ok && isText
		chain = append(chain, statement)
	}
	if !ok || len(chain) == 0 || len(chain) >= maxSuccession {
		return nil, errors.New("its header succession is no list of statements")
	}
	return chain, nil
}

// maxSuccession bounds the work for one object.
const maxSuccession = 64

// key gives the key that an object with this header was signed with, if the manufacturer vouches for it.
func (v *Verifier) key(object string, header jose.Header) (*ecdsa.PublicKey, error) {
	chain, err := chainOf(header)
	if err != nil {
		return nil, refused(object, "%v", err)
	}
	if len(chain) == 0 && header.KeyID == v.keyID {
		return v.public, nil
	}
	if known, ok := v.later.Load(header.KeyID); ok && len(chain) > 0 {
		return known.(*ecdsa.PublicKey), nil
	}
	pub := v.public
	for i, statement := range chain {
		var s Succession
		step := fmt.Sprintf("%s: statement %d of its succession", object, i+1)
		if _, err := NewVerifier(pub).verify(TypeSuccession, step, []byte(statement), &s); err != nil {
			return nil, err
		}
		next, ok := s.Key.Key.(*ecdsa.PublicKey)
		if !ok || next.Curve != elliptic.P256() || s.Manufacturer != v.keyID || s.Generation != i+2 {
			return nil, refused(step, "it does not introduce key %d of manufacturer %s", i+2, v.keyID)
		}
		pub = next
	}
	if header.KeyID != pemkey.Thumbprint(pub) {
		return nil, refused(object, "it is signed with key %q, not with the manufacturer's pinned %q or one that "+
			"succeeded it", header.KeyID, v.keyID)
	}
	v.later.Store(header.KeyID, pub)
	return pub, nil
}

// parseJWS takes the one form that an object has: one that was changed in a byte is not the same object.
func parseJWS(jws []byte) (*jose.JSONWebSignature, error) {
	for part := range bytes.SplitSeq(jws, []byte(".")) {
		if err := new(strict.Base64).UnmarshalText(part); err != nil {
			return nil, fmt.Errorf("it is no compact JWS: a part of it is %w", err)
		}
	}
	object, err := jose.ParseSignedCompact(string(jws), []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return nil, fmt.Errorf("it is no compact JWS signed with ES256: %w", err)
	}
	return object, nil
}

// Verify refuses a JWS unless it is this manufacturer's, of this type, and has exactly the headers alg, kid and typ,
// and after a rotation succession. It parses the payload strictly. object is the name for errors, which are
// *RefusedErrors.
func (v *Verifier) Verify(typ Type, object string, jws []byte, into any) error {
	_, err := v.verify(typ, object, jws, into)
	return err
}

// checked gives an object that Verify and check take.
func checked[T any](v *Verifier, typ Type, object string, jws []byte, check func(*T) error) (*T, error) {
	of := new(T)
	if err := v.Verify(typ, object, jws, of); err != nil {
		return nil, err
	}
	if err := check(of); err != nil {
		return nil, refused(object, "%v", err)
	}
	return of, nil
}

func (v *Verifier) verify(typ Type, object string, jws []byte, into any) (payload []byte, err error) {
	parsed, err := parseJWS(jws)
	if err != nil {
		return nil, refused(object, "%v", err)
	}
	header, headers := parsed.Signatures[0].Protected, 1
	key, err := v.key(object, header)
	if _, ok := header.ExtraHeaders[succession]; ok {
		headers = 2
	}
	switch {
	case err != nil:
		return nil, err
	case header.ExtraHeaders["typ"] != string(typ):
		return nil, refused(object, "its type is %q, not %q", header.ExtraHeaders["typ"], typ)
	case len(header.ExtraHeaders) != headers || header.JSONWebKey != nil || header.Nonce != "":
		return nil, refused(object, "it has other headers than alg, kid, typ and succession")
	}
	if payload, err = parsed.Verify(key); err != nil {
		return nil, refused(object, "its signature does not verify")
	}
	if err := strict.Parse(payload, into); err != nil {
		return nil, refused(object, "its payload cannot be parsed: %v", err)
	}
	return payload, nil
}

// Manifest verifies a lot's manifest.
func (v *Verifier) Manifest(lot string, jws []byte) (*Manifest, error) {
	return checked(v, TypeManifest, ManifestPath(lot), jws, func(m *Manifest) error {
		if m.Lot != lot {
			return fmt.Errorf("it is the manifest of lot %q", m.Lot)
		}
		if m.Manufacturer != v.keyID {
			return fmt.Errorf("it names manufacturer %q, and is signed by %q", m.Manufacturer, v.keyID)
		}
		return m.Validate()
	})
}

// Publish signs an object and creates it in the store, as PublishSigned does.
func Publish(ctx context.Context, store Store, path string, s *Signer, typ Type, payload any) error {
	jws, err := s.Sign(typ, payload)
	if err != nil {
		return err
	}
	return PublishSigned(ctx, store, path, NewVerifier(s.root), typ, jws)
}

// PublishSigned creates a signed object in the store. ECDSA signatures differ each time. So if the store has an object
// already, that is verified: the same payload is a success, another one a *ConflictError.
func PublishSigned(ctx context.Context, store Store, path string, v *Verifier, typ Type, jws []byte) error {
	err := store.Create(ctx, path, jws)
	if !errors.As(err, new(*ConflictError)) {
		return err
	}
	if same, serr := Published(ctx, store, path, v, typ, jws); serr != nil || !same {
		return errors.Join(err, serr)
	}
	return nil
}

// Published says whether the store has an object with the payload of jws.
func Published(ctx context.Context, store Store, path string, v *Verifier, typ Type, jws []byte) (bool, error) {
	have, _, err := store.Read(ctx, path)
	if err != nil || bytes.Equal(have, jws) {
		return err == nil, err
	}
	was, err := v.verify(typ, path, have, new(json.RawMessage))
	if err != nil {
		return false, err
	}
	now, err := v.verify(typ, path, jws, new(json.RawMessage))
	return bytes.Equal(was, now), err
}
