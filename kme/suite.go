package kme

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

// A Suite says how KME_SIG is made and which lengths follow. Only the constants below are valid.
type Suite string

const (
	// SuiteECDSA signs SHA-256(KME) with ECDSA on P-256; KME_SIG is r || s, 64 bytes (IEEE P1363). DER
	// is refused: its length varies, and with it every length that the layout depends on.
	SuiteECDSA Suite = "tr33868-ecdsa-p256"
	// SuiteRSA signs with RSASSA-PKCS1-v1_5, SHA-256 and a 2048-bit device key; KME_SIG has 256 bytes.
	SuiteRSA Suite = "tr33868-rsa2048"
	// SuiteBound signs as SuiteECDSA does, but everything that the attempt is about, and encrypts by
	// RSA-OAEP. It departs from the text.
	SuiteBound Suite = "bound-ecdsa-p256-oaep"
)

// Suites lists the valid suites, the default first.
var Suites = []Suite{SuiteECDSA, SuiteRSA, SuiteBound}

const (
	// PublicExponent is the e of every lot. See the package comment.
	PublicExponent = 65537

	ecdsaHalf   = 32
	rsaKeyBits  = 2048
	rsaSigBytes = rsaKeyBits / 8
)

// ParseSuite accepts the name of a suite.
func ParseSuite(s string) (Suite, error) {
	if suite := Suite(s); slices.Contains(Suites, suite) {
		return suite, nil
	}
	return "", fmt.Errorf("there is no suite %q; there are %v", s, Suites)
}

func (s *Suite) UnmarshalText(b []byte) error { return unmarshal(s, b, ParseSuite) }

// SignatureSize is the length of KME_SIG, in bytes.
func (s Suite) SignatureSize() int {
	if s == SuiteRSA {
		return rsaSigBytes
	}
	return 2 * ecdsaHalf
}

// PlaintextSize is the length of KME || KME_SIG || RME, in bytes.
func (s Suite) PlaintextSize() int { return 2*SecretSize + s.SignatureSize() }

// ModulusBits lists the lengths that a lot modulus of this suite may have. The RSA suite's plaintext, 320
// bytes, does not fit below a 2048-bit modulus.
func (s Suite) ModulusBits() []int {
	if s == SuiteRSA {
		return []int{3072, 4096}
	}
	return []int{2048, 3072, 4096}
}

// CheckLot refuses a lot's public key that does not go with the suite: its exact length, and e = 65537.
func (s Suite) CheckLot(lot *rsa.PublicKey) error {
	if lot.E != PublicExponent {
		return fmt.Errorf("the public exponent is %d; only %d is accepted", lot.E, PublicExponent)
	}
	if !slices.Contains(s.ModulusBits(), lot.N.BitLen()) {
		return fmt.Errorf("a modulus of %d bits does not go with suite %s: it takes %v", lot.N.BitLen(), s,
			s.ModulusBits())
	}
	return nil
}

// CheckDevice refuses a device key that does not go with the suite: a point on P-256, or an RSA key of
// exactly 2048 bits with e = 65537.
func (s Suite) CheckDevice(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if s != SuiteRSA && k.Curve == elliptic.P256() {
			_, err := k.ECDH() // refuses points that are not on the curve
			return err
		}
	case *rsa.PublicKey:
		if s == SuiteRSA && k.N.BitLen() == rsaKeyBits && k.E == PublicExponent {
			return nil
		}
	}
	return fmt.Errorf("the device key does not go with suite %s", s)
}

// Sign makes KME_SIG over what Signed gives, on the ME's side.
func (s Suite) Sign(device crypto.Signer, signed []byte) ([]byte, error) {
	if err := s.CheckDevice(device.Public()); err != nil {
		return nil, err
	}
	digest := sha256.Sum256(signed)
	sig, err := device.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil || s == SuiteRSA {
		return sig, err
	}
	return fixedECDSA(sig)
}

// fixedECDSA turns the DER of crypto.Signer into r || s.
func fixedECDSA(der []byte) ([]byte, error) {
	var r, s = new(big.Int), new(big.Int)
	var seq cryptobyte.String
	in := cryptobyte.String(der)
	if !in.ReadASN1(&seq, asn1.SEQUENCE) || !in.Empty() || !seq.ReadASN1Integer(r) || !seq.ReadASN1Integer(s) ||
		!seq.Empty() ||
		r.Sign() <= 0 || s.Sign() <= 0 || r.BitLen() > 8*ecdsaHalf || s.BitLen() > 8*ecdsaHalf {
		return nil, errors.New("the device key's signature is not an ECDSA signature on P-256")
	}
	out := make([]byte, 2*ecdsaHalf)
	r.FillBytes(out[:ecdsaHalf])
	s.FillBytes(out[ecdsaHalf:])
	return out, nil
}

// Verify checks KME_SIG in software. keysvc does it in its token; this is for the factory's check of a key
// that it has just made, and for tests.
func (s Suite) Verify(pub crypto.PublicKey, signed, sig []byte) bool {
	if s.CheckDevice(pub) != nil || len(sig) != s.SignatureSize() {
		return false
	}
	digest := sha256.Sum256(signed)
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.Verify(k, digest[:], new(big.Int).SetBytes(sig[:ecdsaHalf]),
			new(big.Int).SetBytes(sig[ecdsaHalf:]))
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(k, crypto.SHA256, digest[:], sig) == nil
	}
	return false
}
