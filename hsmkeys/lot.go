package hsmkeys

import (
	"context"
	"crypto/rsa"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyop"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/internal/weakkey"
)

// Primes says how a lot's P and Q are to be found.
type Primes string

const (
	// PrimesAuto takes the conditions of ANSI X9.31 where the token has them, and the token's own otherwise.
	PrimesAuto Primes = "auto"
	// PrimesX931 insists on ANSI X9.31, which TR 33.868 names.
	PrimesX931 Primes = "x931"
)

// EnsureLotKey makes a lot's RSA key unless the token has it, and names the mechanism that made it. What it returns
// is checked: see weakkey.Check and the known answers of ProveLotKey. A key that fails the checks is removed.
func (t *FactoryToken) EnsureLotKey(
	ctx context.Context, k Key, bits int, primes Primes,
) (pub *rsa.PublicKey, mech string, err error) {
	m, mech := uint(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN), "CKM_RSA_PKCS_KEY_PAIR_GEN"
	x931, err := p11.Do(ctx, t.hsm, "ask for mechanisms", func(*p11.Session) (bool, error) {
		return t.hsm.Can(pkcs11.CKM_RSA_X9_31_KEY_PAIR_GEN, 0)
	})
	if err != nil {
		return nil, "", err
	} else if x931 {
		m, mech = pkcs11.CKM_RSA_X9_31_KEY_PAIR_GEN, "CKM_RSA_X9_31_KEY_PAIR_GEN"
	} else if primes == PrimesX931 {
		return nil, "", fmt.Errorf("%s has no CKM_RSA_X9_31_KEY_PAIR_GEN, so primes by ANSI X9.31 cannot be had from "+
			"it: use a token that has it, or primes auto", t)
	}
	created, err := t.ensure(ctx, Factory, pkcs11.CKO_PRIVATE_KEY, k, func(s *p11.Session) error {
		public, _, err := s.GeneratePair(m, keyspec.RSAPublic(bits), ck.Join(keyspec.Named(k), keyspec.Lot))
		if err != nil {
			return err
		}
		return s.Destroy(public)
	})
	if err != nil {
		return nil, "", err
	}
	if !created {
		if err = t.checkOrigin(ctx, k); err != nil {
			return nil, "", err
		}
	}
	if pub, err = t.rsaPublicKey(ctx, k); err != nil {
		return nil, "", err
	}
	if got := pub.N.BitLen(); !created && got != bits {
		return nil, "", fmt.Errorf("%s already holds a key of %d bits for this lot, from a run that did not finish: "+
			"ask for %d bits", t, got, got)
	}
	if err = weakkey.Check(ctx, pub, bits); err != nil {
		err = fmt.Errorf("%w: do not use this token for lots", err)
	} else {
		err = t.ProveLotKey(ctx, k, pub)
	}
	if err != nil {
		if created {
			err = errors.Join(err, t.RemoveLotKey(context.WithoutCancel(ctx), k))
		}
		return nil, "", err
	}
	return pub, mech, nil
}

// checkOrigin refuses a lot key that this token has not made, or that was readable at some time: with the user PIN,
// somebody can import one whose P and Q they know.
func (t *FactoryToken) checkOrigin(ctx context.Context, k Key) error {
	return t.hsm.With(ctx, "look at a lot key", func(s *p11.Session) error {
		h, err := t.find(s, pkcs11.CKO_PRIVATE_KEY, k)
		if err != nil {
			return err
		}
		a, err := s.Get(h, pkcs11.CKA_LOCAL, pkcs11.CKA_ALWAYS_SENSITIVE, pkcs11.CKA_WRAP_WITH_TRUSTED)
		if err != nil {
			return p11.Explain("look at "+k.Label(), err)
		}
		if !ck.IsTrue(a[0]) || !ck.IsTrue(a[1]) || !ck.IsTrue(a[2]) {
			return fmt.Errorf("%s has a key %q that no run of this command has made: others may know its P and Q; "+
				"find out who put it there, and remove it with the token's own tool", t, k.Label())
		}
		return nil
	})
}

// SealLotKey makes a lot key non-extractable for good: it can be granted to nobody any more. A second call changes
// nothing.
func (t *FactoryToken) SealLotKey(ctx context.Context, k Key) error {
	return t.hsm.With(ctx, "seal a lot key", func(s *p11.Session) error {
		h, sealed, err := t.findSealed(s, k)
		if err != nil || sealed {
			return err
		}
		return p11.Explain("seal "+k.Label(), s.Set(h, ck.Attr(pkcs11.CKA_EXTRACTABLE, false)))
	})
}

// LotKeySealed says whether a lot key is sealed.
func (t *FactoryToken) LotKeySealed(ctx context.Context, k Key) (sealed bool, err error) {
	return p11.Do(ctx, t.hsm, "look at a lot key", func(s *p11.Session) (bool, error) {
		_, sealed, err := t.findSealed(s, k)
		return sealed, err
	})
}

func (t *FactoryToken) findSealed(s *p11.Session, k Key) (h pkcs11.ObjectHandle, sealed bool, err error) {
	if h, err = t.find(s, pkcs11.CKO_PRIVATE_KEY, k); err != nil {
		return 0, false, err
	}
	a, err := s.Get(h, pkcs11.CKA_EXTRACTABLE)
	if err != nil {
		return 0, false, p11.Explain("read "+k.Label(), err)
	}
	return h, !ck.IsTrue(a[0]), nil
}

// WrapLotKey wraps a lot key, as PKCS #8, under an operator's KEK by AES-KWP (RFC 5649). The token refuses it under any
// key that the security officer has not made TRUSTED.
func (t *FactoryToken) WrapLotKey(ctx context.Context, lot, kek Key) (wrapped []byte, err error) {
	return doAs(ctx, t.base, Factory, "wrap a lot key", func(s *p11.Session) ([]byte, error) {
		h, err := t.find(s, pkcs11.CKO_PRIVATE_KEY, lot)
		if err != nil {
			return nil, err
		}
		w, err := t.find(s, pkcs11.CKO_SECRET_KEY, kek)
		if err != nil {
			return nil, err
		}
		wrapped, err := s.Wrap(t.hsm.KWP(), w, h, make([]byte, keyspec.WrappedRoom))
		return wrapped, p11.Explain("wrap "+lot.Label(), err)
	})
}

// KeyWrapMechanism names the mechanism by which the token does AES-KWP (RFC 5649).
func (t *FactoryToken) KeyWrapMechanism() string {
	if t.hsm.KWP() == p11.AESKWP {
		return "CKM_AES_KEY_WRAP_KWP"
	}
	return "CKM_AES_KEY_WRAP_PAD"
}

// ProveLotKey shows that the private key in the token is the one of pub: it decrypts, raw, what was encrypted here.
// One of the messages has leading zero bytes, which some tokens strip.
func (b *base) ProveLotKey(ctx context.Context, k Key, pub *rsa.PublicKey) error {
	return b.hsm.With(ctx, "prove a lot key", func(s *p11.Session) error {
		h, err := b.find(s, pkcs11.CKO_PRIVATE_KEY, k)
		if err != nil {
			return err
		}
		return keyop.Prove(s, h, pub)
	})
}

// RemoveLotKey destroys a lot key for good.
func (b *base) RemoveLotKey(ctx context.Context, k Key) error {
	return b.hsm.With(ctx, "remove a lot key", func(s *p11.Session) error {
		return b.destroy(s, pkcs11.CKO_PRIVATE_KEY, k)
	})
}

// RememberLotKeys finds the keys of all lots at once, and says how many there are. It saves the search at each lot's
// first payload, and changes nothing else.
func (t *OperatorToken) RememberLotKeys(ctx context.Context) (n int, err error) {
	n, err = keyop.RememberPrivateKeys(ctx, t.hsm)
	return n, p11.Explain("look for the keys of all lots", err)
}
