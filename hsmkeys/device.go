package hsmkeys

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/kme"
)

// The two templates of a device's key pair on P-256; the private one does for RSA too. As kmeObject, it is not PRIVATE.
var (
	devicePublic  = attributes{attr(pkcs11.CKA_TOKEN, false), attr(pkcs11.CKA_PRIVATE, false), attr(pkcs11.CKA_EC_PARAMS, p256Params)}
	devicePrivate = join(use(privateUsages, pkcs11.CKA_SIGN), attributes{attr(pkcs11.CKA_TOKEN, false), attr(pkcs11.CKA_PRIVATE, false), attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, true),
		attr(pkcs11.CKA_WRAP_WITH_TRUSTED, false)})
)

// MakeDeviceKey makes a device's key pair and gives its public key, and its private key under the injection key:
// PKCS #8 in AES-KWP (RFC 5649). The pair is a session object, gone when this returns; before it is wrapped it has
// signed a challenge that the public key verifies, in software.
func (t *Token) MakeDeviceKey(ctx context.Context, suite kme.Suite, injection Key) (pub crypto.PublicKey, wrapped []byte, err error) {
	type pair struct {
		public  crypto.PublicKey
		wrapped []byte
	}
	made, err := do(ctx, t, "make a device key", func(s *session) (p pair, err error) {
		w, err := t.find(s, pkcs11.CKO_SECRET_KEY, injection)
		if err != nil {
			return p, err
		}
		m, public := uint(pkcs11.CKM_EC_KEY_PAIR_GEN), devicePublic
		if suite == kme.SuiteRSA {
			m, public = pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, rsaPublic(2048)
		}
		hp, h, err := s.generatePair(m, public, devicePrivate)
		if err != nil {
			return p, explain("make a device key", err)
		}
		defer func() {
			for _, o := range []pkcs11.ObjectHandle{hp, h} {
				if derr := s.DestroyObject(s.h, o); err == nil {
					err = explainIf("destroy a device key", derr)
				}
			}
		}()
		if suite == kme.SuiteRSA {
			p.public, err = readRSA(s, hp)
		} else {
			p.public, err = readP256(s, hp)
		}
		if err != nil {
			return p, err
		}
		challenge := kme.RandomSecret().Bytes() // in the place of a KME
		sig, err := signKME(s, h, suite, challenge)
		if err != nil {
			return p, err
		}
		if !suite.Verify(p.public, challenge, sig) {
			return p, errors.New("the token made a device key whose signature its public key does not verify: " +
				"do not use this token")
		}
		p.wrapped, err = s.wrap(t.kwp, w, h, make([]byte, wrappedRoom))
		return p, explainIf("wrap a device key", err)
	})
	if err != nil {
		return nil, nil, err
	}
	return made.public, made.wrapped, nil
}

// kmeSignature is the mechanism of KME_SIG and what it is given. ECDSA gets the digest, since many tokens, SoftHSM
// among them, have no CKM_ECDSA_SHA256.
func kmeSignature(suite kme.Suite, signed []byte) (m uint, data []byte) {
	if suite == kme.SuiteRSA {
		return pkcs11.CKM_SHA256_RSA_PKCS, signed
	}
	digest := sha256.Sum256(signed)
	return pkcs11.CKM_ECDSA, digest[:]
}

func signKME(s *session, h pkcs11.ObjectHandle, suite kme.Suite, signed []byte) ([]byte, error) {
	m, data := kmeSignature(suite, signed)
	sig, err := s.sign(m, h, data, make([]byte, suite.SignatureSize()))
	return sig, explainIf("sign with a device key", err)
}

// verifying is a public key as a session object that verifies, without the key.
var verifying = attributes{
	attr(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), attr(pkcs11.CKA_TOKEN, false), attr(pkcs11.CKA_PRIVATE, false),
	attr(pkcs11.CKA_VERIFY, true), attr(pkcs11.CKA_ENCRYPT, false), attr(pkcs11.CKA_WRAP, false),
}

// verifyKME validates KME_SIG in the token: the public key as a session object, C_Verify, and gone.
func verifyKME(s *session, suite kme.Suite, pub crypto.PublicKey, signed, sig []byte) (ok bool, err error) {
	key, err := publicKeyValue(pub)
	if err != nil {
		return false, err
	}
	h, err := s.create(join(verifying, key))
	if err != nil {
		return false, explain("take a device's public key into the token", err)
	}
	defer func() {
		if derr := s.DestroyObject(s.h, h); err == nil {
			err = explainIf("drop a device's public key", derr)
		}
	}()
	m, data := kmeSignature(suite, signed)
	if err := s.VerifyInit(s.h, mechanism(m), h); err != nil {
		return false, explain("verify KME_SIG", err)
	}
	switch err := s.Verify(s.h, data, sig); {
	case err == nil:
		return true, nil
	case isCKR(err, pkcs11.CKR_SIGNATURE_INVALID, pkcs11.CKR_SIGNATURE_LEN_RANGE):
		return false, nil
	default:
		return false, explain("verify KME_SIG", err)
	}
}

// publicKeyValue is the part of a public key object's template that holds the key.
func publicKeyValue(pub crypto.PublicKey) (attributes, error) {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		point, err := k.Bytes()
		if err != nil {
			return nil, err
		}
		// CKA_EC_POINT is the point in a DER OCTET STRING (PKCS #11 v2.40 mechanisms, 2.3.3).
		value, err := asn1.Marshal(point)
		return attributes{attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC), attr(pkcs11.CKA_EC_PARAMS, p256Params), attr(pkcs11.CKA_EC_POINT, value)}, err
	case *rsa.PublicKey:
		return attributes{attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA), attr(pkcs11.CKA_MODULUS, k.N.Bytes()), attr(pkcs11.CKA_PUBLIC_EXPONENT, rsaExponent)}, nil
	}
	return nil, fmt.Errorf("a device key is ECDSA or RSA, not %T", pub)
}
