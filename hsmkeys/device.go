package hsmkeys

import (
	"context"
	"crypto"
	"errors"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/keyop"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/kme"
)

// MakeDeviceKey makes a device's key pair and gives its public key, and its private key under the injection key: PKCS
// #8 in AES-KWP (RFC 5649). The pair is made as session objects, which are gone when this returns. Before it is
// wrapped, it signs a challenge, and the signature is verified in software.
func (t *FactoryToken) MakeDeviceKey(
	ctx context.Context, suite kme.Suite, injection Key,
) (pub crypto.PublicKey, wrapped []byte, err error) {
	type pair struct {
		public  crypto.PublicKey
		wrapped []byte
	}
	made, err := p11.Do(ctx, t.hsm, "make a device key", func(s *p11.Session) (p pair, err error) {
		w, err := t.find(s, pkcs11.CKO_SECRET_KEY, injection)
		if err != nil {
			return p, err
		}
		m, public := uint(pkcs11.CKM_EC_KEY_PAIR_GEN), keyspec.DevicePublic
		if suite == kme.SuiteRSA {
			m, public = pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, keyspec.RSAPublic(2048)
		}
		hp, h, err := s.GeneratePair(m, public, keyspec.DevicePrivate)
		if err != nil {
			return p, p11.Explain("make a device key", err)
		}
		defer func() {
			for _, o := range []pkcs11.ObjectHandle{hp, h} {
				if derr := s.Destroy(o); err == nil {
					err = p11.Explain("destroy a device key", derr)
				}
			}
		}()
		if suite == kme.SuiteRSA {
			p.public, err = keyspec.ReadRSA(s, hp)
		} else {
			p.public, err = keyspec.ReadP256(s, hp)
		}
		if err != nil {
			return p, err
		}
		challenge := kme.RandomSecret().Bytes() // in the place of a KME
		sig, err := keyop.SignKME(s, h, suite, challenge)
		if err != nil {
			return p, err
		}
		if !suite.Verify(p.public, challenge, sig) {
			return p, errors.New("the token made a device key whose signature its public key does not verify: " +
				"do not use this token")
		}
		p.wrapped, err = s.Wrap(t.hsm.KWP(), w, h, make([]byte, keyspec.WrappedRoom))
		return p, p11.Explain("wrap a device key", err)
	})
	if err != nil {
		return nil, nil, err
	}
	return made.public, made.wrapped, nil
}

// EnsureSigningKey makes the manufacturer's signing key, ECDSA P-256, unless the token has it.
func (t *FactoryToken) EnsureSigningKey(ctx context.Context, k Key) (created bool, err error) {
	return t.ensure(ctx, Factory, pkcs11.CKO_PRIVATE_KEY, k, func(s *p11.Session) error {
		_, _, err := s.GeneratePair(pkcs11.CKM_EC_KEY_PAIR_GEN, keyspec.SigningPublic(k), keyspec.SigningPrivate(k))
		return err
	})
}

// Signer is the signing key k as a crypto.Signer, good for as long as the token is open.
func (t *FactoryToken) Signer(k Key) (crypto.Signer, error) { return keyop.Signer(t.hsm, k) }
