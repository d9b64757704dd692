package directory

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/cryptosigner"

	"github.com/kmehsm/kmehsm/internal/pemkey"
)

// A Type is the typ header of a signed object: an object of one kind never passes for another.
type Type string

const (
	TypeManifest    Type = "kme-lot-manifest+jws"
	TypeShard       Type = "kme-key-shard+jws"
	TypeRevocations Type = "kme-revocations+jws"
	TypeEnrolment   Type = "kme-operator-enrolment+jws"
	TypeGrant       Type = "kme-lot-grant+jws"
	TypeLogHead     Type = "kme-audit-log-head+jws" // of the manufacturer's own audit log; not in the directory
)

// A RefusedError says which object is not believed, and why.
type RefusedError struct{ Object, Reason string }

func (e *RefusedError) Error() string { return fmt.Sprintf("%s is refused: %s", e.Object, e.Reason) }

func refused(object, format string, args ...any) error {
	return &RefusedError{object, fmt.Sprintf(format, args...)}
}

func thumbprint(key any) string {
	t, err := (&jose.JSONWebKey{Key: key}).Thumbprint(crypto.SHA256)
	if err != nil {
		return "" // of a key of no kind that JOSE has; the callers' are P-256 and RSA
	}
	return base64.RawURLEncoding.EncodeToString(t)
}

// RSAThumbprint names an RSA key (RFC 7638, SHA-256, base64url).
func RSAThumbprint(pub *rsa.PublicKey) string { return thumbprint(pub) }

// A Signer signs objects with the manufacturer's key. It may be used concurrently if its crypto.Signer may.
type Signer struct {
	signer crypto.Signer
	public *ecdsa.PublicKey
	keyID  string
}

// NewSigner takes an ECDSA P-256 key.
func NewSigner(s crypto.Signer) (*Signer, error) {
	pub, ok := s.Public().(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return nil, errors.New("the signing key is not an ECDSA key on P-256")
	}
	return &Signer{s, pub, thumbprint(pub)}, nil
}

// KeyID is the RFC 7638 thumbprint of the key, which names the manufacturer.
func (s *Signer) KeyID() string { return s.keyID }

// Public is the key that readers pin.
func (s *Signer) Public() *ecdsa.PublicKey { return s.public }

// Sign makes the compact JWS of a payload. The signature is verified before it is given out: a fault in a token must
// not be published.
func (s *Signer) Sign(typ Type, payload any) ([]byte, error) {
	data, err := json.Marshal(payload)
	if err != nil {
		return nil, err
	}
	key := jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: cryptosigner.Opaque(s.signer), KeyID: s.keyID}}
	signer, err := jose.NewSigner(key, (&jose.SignerOptions{}).WithType(jose.ContentType(typ)))
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

// A Verifier believes what one manufacturer's key has signed. It may be used concurrently.
type Verifier struct {
	public *ecdsa.PublicKey
	keyID  string
}

// NewVerifier pins a manufacturer's key.
func NewVerifier(pub *ecdsa.PublicKey) *Verifier { return &Verifier{pub, thumbprint(pub)} }

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

// SignerOf says which key a JWS claims to be signed with, to find its Verifier by. Nothing is verified.
func SignerOf(jws []byte) (keyID string, err error) {
	object, err := parseJWS(jws)
	if err != nil {
		return "", err
	}
	return object.Signatures[0].Protected.KeyID, nil
}

func parseJWS(jws []byte) (*jose.JSONWebSignature, error) {
	object, err := jose.ParseSignedCompact(string(jws), []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return nil, fmt.Errorf("it is no compact JWS signed with ES256: %w", err)
	}
	return object, nil
}

// Verify refuses a JWS that is not this manufacturer's, of this type, with exactly the headers alg, kid and typ, and
// parses its payload strictly. object is the name for errors, which are *RefusedErrors.
func (v *Verifier) Verify(typ Type, object string, jws []byte, into any) error {
	_, err := v.verify(typ, object, jws, into)
	return err
}

func (v *Verifier) verify(typ Type, object string, jws []byte, into any) (payload []byte, err error) {
	parsed, err := parseJWS(jws)
	if err != nil {
		return nil, refused(object, "%v", err)
	}
	header := parsed.Signatures[0].Protected
	switch {
	case header.KeyID != v.keyID:
		return nil, refused(object, "it is signed with key %q, not with the manufacturer's pinned %q", header.KeyID, v.keyID)
	case header.ExtraHeaders["typ"] != string(typ):
		return nil, refused(object, "its type is %q, not %q", header.ExtraHeaders["typ"], typ)
	case len(header.ExtraHeaders) != 1 || header.JSONWebKey != nil || header.Nonce != "":
		return nil, refused(object, "it has other headers than alg, kid and typ")
	}
	if payload, err = parsed.Verify(v.public); err != nil {
		return nil, refused(object, "its signature does not verify")
	}
	if err := ParseStrict(payload, into); err != nil {
		return nil, refused(object, "its payload cannot be parsed: %v", err)
	}
	return payload, nil
}

// Manifest verifies a lot's manifest.
func (v *Verifier) Manifest(lot string, jws []byte) (*Manifest, error) {
	object := ManifestPath(lot)
	m := new(Manifest)
	if err := v.Verify(TypeManifest, object, jws, m); err != nil {
		return nil, err
	}
	if m.Lot != lot {
		return nil, refused(object, "it is the manifest of lot %q", m.Lot)
	}
	if m.Manufacturer != v.keyID {
		return nil, refused(object, "it names manufacturer %q, and is signed by %q", m.Manufacturer, v.keyID)
	}
	if err := m.Validate(); err != nil {
		return nil, refused(object, "%v", err)
	}
	return m, nil
}

// Publish signs an object and creates it in the store, as PublishSigned does.
func Publish(ctx context.Context, store Store, path string, s *Signer, typ Type, payload any) error {
	jws, err := s.Sign(typ, payload)
	if err != nil {
		return err
	}
	return PublishSigned(ctx, store, path, NewVerifier(s.public), typ, jws)
}

// PublishSigned creates a signed object in the store. An ECDSA signature is another each time, so where the store has an
// object already, it is verified, and the same payload is success; any other is the *ConflictError.
func PublishSigned(ctx context.Context, store Store, path string, v *Verifier, typ Type, jws []byte) error {
	err := store.Create(ctx, path, jws)
	if !errors.As(err, new(*ConflictError)) {
		return err
	}
	if same, serr := Published(ctx, store, path, v, typ, jws); serr != nil {
		return errors.Join(err, serr)
	} else if !same {
		return err
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
