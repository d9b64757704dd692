// Package pemkey reads and writes public keys as PEM files of type PUBLIC KEY (SubjectPublicKeyInfo, RFC 5280), and
// names them.
package pemkey

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"

	"github.com/go-jose/go-jose/v4"
)

// Encode is a public key as PEM.
func Encode(pub any) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}

// Thumbprint names a public key by RFC 7638: SHA-256, base64url. It is empty for other keys than EC and RSA.
func Thumbprint(pub any) string {
	t, err := (&jose.JSONWebKey{Key: pub}).Thumbprint(crypto.SHA256)
	if err != nil {
		return ""
	}
	return base64.RawURLEncoding.EncodeToString(t)
}

// RSA reads an RSA public key.
func RSA(data []byte) (*rsa.PublicKey, error) {
	key, err := parse(data)
	if err != nil {
		return nil, err
	}
	if k, ok := key.(*rsa.PublicKey); ok {
		return k, nil
	}
	return nil, fmt.Errorf("the file holds a key of another kind (%T), not an RSA public key", key)
}

// P256 reads an ECDSA public key on P-256.
func P256(data []byte) (*ecdsa.PublicKey, error) {
	key, err := parse(data)
	if err != nil {
		return nil, err
	}
	if k, ok := key.(*ecdsa.PublicKey); ok && k.Curve == elliptic.P256() {
		return k, nil
	}
	return nil, fmt.Errorf("the file holds a key of another kind (%T), not an ECDSA public key on P-256", key)
}

func parse(data []byte) (any, error) {
	block, rest := pem.Decode(data)
	switch {
	case block == nil:
		return nil, errors.New("the file is no PEM file: it must hold one PUBLIC KEY")
	case strings.Contains(block.Type, "PRIVATE"):
		return nil, errors.New("the file holds a private key: give its public half, and keep this one to yourself")
	case block.Type != "PUBLIC KEY":
		return nil, fmt.Errorf("the file holds a %s: it must hold a PUBLIC KEY", block.Type)
	case len(strings.TrimSpace(string(rest))) != 0:
		return nil, errors.New("the file holds more than one PUBLIC KEY")
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("the PUBLIC KEY cannot be parsed: %w", err)
	}
	return key, nil
}
