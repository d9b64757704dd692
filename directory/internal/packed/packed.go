// Package packed keeps device keys in as little memory as possible.
package packed

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"math/big"
	"slices"

	"github.com/kmehsm/kmehsm/kme"
)

// Key packs a device key that CheckDevice of its suite has accepted: the point without its prefix, or the modulus.
func Key(key crypto.PublicKey) []byte {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if b, err := k.Bytes(); err == nil {
			return b[1:]
		}
	case *rsa.PublicKey:
		return k.N.Bytes()
	}
	return nil
}

// Keys are packed keys of one suite, one after the other, all of the same size.
type Keys struct {
	row  []byte
	size int // bytes a key
}

// Join packs n keys.
func Join(n int, key func(i int) crypto.PublicKey) (k Keys) {
	for i := range n {
		packed := Key(key(i))
		k.row, k.size = append(k.row, packed...), len(packed)
	}
	k.row = slices.Clip(k.row)
	return k
}

// Bytes is how much memory they take; 0 if there are none.
func (k Keys) Bytes() int { return len(k.row) }

// At gives key i.
func (k Keys) At(i int, suite kme.Suite) (crypto.PublicKey, error) {
	key := k.row[i*k.size : (i+1)*k.size]
	if suite == kme.SuiteRSA {
		return &rsa.PublicKey{N: new(big.Int).SetBytes(key), E: kme.PublicExponent}, nil
	}
	return ecdsa.ParseUncompressedPublicKey(elliptic.P256(), append([]byte{4}, key...))
}
