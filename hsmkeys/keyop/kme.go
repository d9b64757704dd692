// Package keyop uses our keys on one session of a token: it has the operations of payloads, sealed KMEs and device
// keys, and finds keys.
package keyop

import (
	"crypto"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"fmt"
	"math/big"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/kme"
)

// SealedSize is the length of a sealed KME: the generation of the storage key, a byte, and AES key wrap.
const SealedSize = 1 + kme.SecretSize + 8

// HMAC is HMAC-SHA-256.
func HMAC(s *p11.Session, key pkcs11.ObjectHandle, data []byte) ([]byte, error) {
	tag, err := s.Sign(pkcs11.CKM_SHA256_HMAC, key, data, make([]byte, sha256.Size))
	if err == nil && len(tag) != sha256.Size {
		err = fmt.Errorf("the token's HMAC-SHA-256 has %d bytes: do not use this token", len(tag))
	}
	return tag, p11.Explain("make an HMAC", err)
}

// Seal wraps a KME under a generation of the storage key. C_WrapKey takes a key object, so it makes the KME an object,
// and leaves that in the session.
func Seal(s *p11.Session, generation int, storage pkcs11.ObjectHandle, secret kme.Secret) (sealed []byte, err error) {
	h, err := s.Create(append(keyspec.SealableKME[:len(keyspec.SealableKME):len(keyspec.SealableKME)],
		&pkcs11.Attribute{Type: pkcs11.CKA_VALUE, Value: secret.Bytes()}))
	if err != nil {
		return nil, p11.Explain("seal a KME", err)
	}
	s.Leave(h)
	return SealObject(s, generation, storage, h)
}

// SealObject wraps a KME that is an object.
func SealObject(s *p11.Session, generation int, storage, h pkcs11.ObjectHandle) ([]byte, error) {
	sealed := make([]byte, SealedSize)
	sealed[0] = byte(generation)
	wrapped, err := s.Wrap(pkcs11.CKM_AES_KEY_WRAP, storage, h, sealed[1:])
	if err == nil && len(wrapped) != SealedSize-1 {
		err = fmt.Errorf("the token's AES key wrap of a KME has %d bytes: do not use this token", len(wrapped))
	}
	return sealed, p11.Explain("seal a KME", err)
}

// Unseal makes a sealed KME an object of the session. The caller destroys it, or leaves it there.
func Unseal(s *p11.Session, storage pkcs11.ObjectHandle, sealed []byte, template ck.Attributes) (
	pkcs11.ObjectHandle, error) {
	h, err := s.Unwrap(pkcs11.CKM_AES_KEY_WRAP, storage, sealed[1:], template)
	return h, p11.Explain("unseal a KME", err)
}

// kmeSignature gives the mechanism of KME_SIG and its input. ECDSA gets the digest, since many tokens, SoftHSM among
// them, have no CKM_ECDSA_SHA256.
func kmeSignature(suite kme.Suite, signed []byte) (m uint, data []byte) {
	if suite == kme.SuiteRSA {
		return pkcs11.CKM_SHA256_RSA_PKCS, signed
	}
	digest := sha256.Sum256(signed)
	return pkcs11.CKM_ECDSA, digest[:]
}

// SignKME makes KME_SIG.
func SignKME(s *p11.Session, h pkcs11.ObjectHandle, suite kme.Suite, signed []byte) ([]byte, error) {
	m, data := kmeSignature(suite, signed)
	sig, err := s.Sign(m, h, data, make([]byte, suite.SignatureSize()))
	return sig, p11.Explain("sign with a device key", err)
}

// WellFormed says whether the values in a signature are in their ranges: 0 < r, s < n of P-256 (FIPS 186-4 section
// 6.4.2), or below the modulus (RFC 8017 section 5.2.2).
func WellFormed(device crypto.PublicKey, sig []byte) bool {
	if k, ok := device.(*rsa.PublicKey); ok {
		return new(big.Int).SetBytes(sig).Cmp(k.N) < 0
	}
	order := elliptic.P256().Params().N
	for _, half := range [][]byte{sig[:len(sig)/2], sig[len(sig)/2:]} {
		if v := new(big.Int).SetBytes(half); v.Sign() == 0 || v.Cmp(order) >= 0 {
			return false
		}
	}
	return true
}

// StandIn is a well-formed signature that is valid for nobody's key.
func StandIn(suite kme.Suite) []byte {
	sig := make([]byte, suite.SignatureSize())
	sig[0], sig[len(sig)/2] = 1, 1
	return sig
}

// VerifyKME validates KME_SIG in the token: C_Verify with the public key as a session object, which is left there.
func VerifyKME(s *p11.Session, suite kme.Suite, pub crypto.PublicKey, signed, sig []byte) (ok bool, err error) {
	template, err := keyspec.Verifying(pub)
	if err != nil {
		return false, err
	}
	h, err := s.Create(template)
	if err != nil {
		return false, p11.Explain("import a device's public key into the token", err)
	}
	s.Leave(h)
	m, data := kmeSignature(suite, signed)
	ok, err = s.Verify(m, h, data, sig)
	return ok, p11.Explain("verify KME_SIG", err)
}
