package keyspec

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/kme"
)

// RSAPublic is the template of a public key object, which is read and then destroyed: the private object has the
// modulus, too, and two objects could come to differ.
func RSAPublic(bits int) ck.Attributes {
	return ck.Attributes{
		ck.Attr(pkcs11.CKA_TOKEN, false), ck.Attr(pkcs11.CKA_PRIVATE, false),
		ck.Attr(pkcs11.CKA_MODULUS_BITS, bits), ck.Attr(pkcs11.CKA_PUBLIC_EXPONENT, rsaExponent),
	}
}

// Wrapping is an RSA key that wraps, as an object.
func Wrapping(pub *rsa.PublicKey) ck.Attributes {
	return append(ck.Attributes{
		ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), ck.Attr(pkcs11.CKA_PRIVATE, false),
		ck.Attr(pkcs11.CKA_WRAP, true), ck.Attr(pkcs11.CKA_ENCRYPT, false), ck.Attr(pkcs11.CKA_VERIFY, false),
	}, ck.Join(ByOAEP, rsaValue(pub))...)
}

func rsaValue(pub *rsa.PublicKey) ck.Attributes {
	return ck.Attributes{
		ck.Attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA),
		ck.Attr(pkcs11.CKA_MODULUS, pub.N.Bytes()), ck.Attr(pkcs11.CKA_PUBLIC_EXPONENT, rsaExponent),
	}
}

// Verifying is a device's public key as a session object that verifies.
func Verifying(pub crypto.PublicKey) (ck.Attributes, error) {
	var value ck.Attributes
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		point, err := k.Bytes()
		if err != nil {
			return nil, err
		}
		// CKA_EC_POINT is the point in a DER OCTET STRING (PKCS #11 v2.40 mechanisms, 2.3.3).
		der, err := asn1.Marshal(point)
		if err != nil {
			return nil, err
		}
		value = ck.Attributes{
			ck.Attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC), ck.Attr(pkcs11.CKA_EC_PARAMS, P256Params),
			ck.Attr(pkcs11.CKA_EC_POINT, der),
		}
	case *rsa.PublicKey:
		value = rsaValue(k)
	default:
		return nil, fmt.Errorf("a device key is ECDSA or RSA, not %T", pub)
	}
	return ck.Join(verifying, value), nil
}

var verifying = ck.Attributes{
	ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
	ck.Attr(pkcs11.CKA_TOKEN, false), ck.Attr(pkcs11.CKA_PRIVATE, false),
	ck.Attr(pkcs11.CKA_VERIFY, true), ck.Attr(pkcs11.CKA_ENCRYPT, false), ck.Attr(pkcs11.CKA_WRAP, false),
}

// ReadRSA reads the public key of an RSA key object, of either half.
func ReadRSA(s *p11.Session, h pkcs11.ObjectHandle) (*rsa.PublicKey, error) {
	a, err := s.Get(h, pkcs11.CKA_MODULUS, pkcs11.CKA_PUBLIC_EXPONENT)
	if err != nil {
		return nil, p11.Explain("read a public key", err)
	}
	e := new(big.Int).SetBytes(a[1])
	if !e.IsInt64() || e.Int64() != kme.PublicExponent {
		return nil, fmt.Errorf("the token made a key with public exponent %v; only %d is accepted", e,
			kme.PublicExponent)
	}
	n := new(big.Int).SetBytes(a[0])
	if n.Sign() == 0 {
		return nil, errors.New("the token has an RSA key without a modulus: do not use this token")
	}
	return &rsa.PublicKey{N: n, E: kme.PublicExponent}, nil
}

// ReadP256 reads a public key object on P-256.
func ReadP256(s *p11.Session, h pkcs11.ObjectHandle) (*ecdsa.PublicKey, error) {
	a, err := s.Get(h, pkcs11.CKA_EC_POINT)
	if err != nil {
		return nil, p11.Explain("read a public key", err)
	}
	// CKA_EC_POINT is the point in a DER OCTET STRING (PKCS #11 v2.40 mechanisms, 2.3.3).
	var point []byte
	if rest, err := asn1.Unmarshal(a[0], &point); err != nil || len(rest) != 0 {
		return nil, errors.New("the token's CKA_EC_POINT is not a DER OCTET STRING")
	}
	return ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
}
