package kme

import (
	"crypto/rand"
	"crypto/subtle"
	"fmt"
	"io"
	"log/slog"
)

// SecretSize is the length of a KME and of an RME, in bytes.
const SecretSize = 32

// A Secret is a KME or an RME. It cannot be printed, logged or marshalled by accident, whatever the verb:
// all that comes out is "[secret]". Only Bytes gives it.
type Secret struct{ b *[SecretSize]byte }

// NewSecret copies a secret of exactly SecretSize bytes. It is not inlined, since its copy could be on the caller's
// stack then: a stack that grows or shrinks is moved, and leaves its contents behind.
//
//go:noinline
func NewSecret(b []byte) (Secret, error) {
	if len(b) != SecretSize {
		return Secret{}, fmt.Errorf("a KME or RME has %d bytes, not %d", SecretSize, len(b))
	}
	return Secret{b: (*[SecretSize]byte)(append([]byte(nil), b...))}, nil
}

// RandomSecret is a fresh KME or RME. It is not inlined for the same reason as NewSecret.
//
//go:noinline
func RandomSecret() Secret {
	var b [SecretSize]byte
	rand.Read(b[:]) // never fails since Go 1.24
	return Secret{b: &b}
}

// Bytes is the secret itself, not a copy: Wipe clears it too. Nil for the zero Secret.
func (s Secret) Bytes() []byte {
	if s.b == nil {
		return nil
	}
	return s.b[:]
}

// Wipe overwrites the secret in all copies of s.
func (s Secret) Wipe() { clear(s.Bytes()) }

// Equal compares in constant time.
func (s Secret) Equal(o Secret) bool {
	return s.b != nil && o.b != nil && subtle.ConstantTimeCompare(s.b[:], o.b[:]) == 1
}

const redacted = "[secret]"

func (Secret) String() string               { return redacted }
func (Secret) GoString() string             { return redacted }
func (Secret) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
func (Secret) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// Format keeps %x, %d and the other verbs from reaching the bytes.
func (Secret) Format(f fmt.State, _ rune) { io.WriteString(f, redacted) }
