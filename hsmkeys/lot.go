package hsmkeys

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"math/big"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/kme"
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
// is checked: see CheckLotKey and the known answers of ProveLotKey. A key that fails the checks is removed.
func (t *Token) EnsureLotKey(ctx context.Context, k Key, bits int, primes Primes) (pub *rsa.PublicKey, mech string, err error) {
	m, mech := uint(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN), "CKM_RSA_PKCS_KEY_PAIR_GEN"
	x931, err := do(ctx, t, "ask for mechanisms", func(*session) (bool, error) {
		return t.can(pkcs11.CKM_RSA_X9_31_KEY_PAIR_GEN, 0)
	})
	if err != nil {
		return nil, "", err
	} else if x931 {
		m, mech = pkcs11.CKM_RSA_X9_31_KEY_PAIR_GEN, "CKM_RSA_X9_31_KEY_PAIR_GEN"
	} else if primes == PrimesX931 {
		return nil, "", fmt.Errorf("%s has no CKM_RSA_X9_31_KEY_PAIR_GEN, so primes by ANSI X9.31 cannot be had from it: use a token that has it, or --primes auto", t)
	}
	created, err := t.ensure(ctx, Factory, pkcs11.CKO_PRIVATE_KEY, k, func(s *session) error {
		public, _, err := s.generatePair(m, rsaPublic(bits), join(named(k), lotTemplate))
		if err != nil {
			return err
		}
		return s.DestroyObject(s.h, public)
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
		return nil, "", fmt.Errorf("%s already holds a key of %d bits for this lot, from a run that did not finish: ask for --bits %d", t, got, got)
	}
	if err = CheckLotKey(ctx, pub, bits); err == nil {
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

// lotTemplate is what a lot key is in a factory's token. It is not frozen: sealing it is a change of the object. WRAP_WITH_TRUSTED holds it until then.
var lotTemplate = join(guarded(true), use(privateUsages, pkcs11.CKA_DECRYPT),
	attributes{attr(pkcs11.CKA_WRAP_WITH_TRUSTED, true), attr(pkcs11.CKA_COPYABLE, false)})

// checkOrigin refuses a lot key that this token has not made, or that was open at some time: whoever has the user PIN can put one there whose P and Q
// they know.
func (t *Token) checkOrigin(ctx context.Context, k Key) error {
	return t.with(ctx, "look at a lot key", func(s *session) error {
		h, err := t.find(s, pkcs11.CKO_PRIVATE_KEY, k)
		if err != nil {
			return err
		}
		a, err := s.GetAttributeValue(s.h, h, attributes{attr(pkcs11.CKA_LOCAL, nil), attr(pkcs11.CKA_ALWAYS_SENSITIVE, nil), attr(pkcs11.CKA_WRAP_WITH_TRUSTED, nil)})
		if err != nil {
			return explain("look at "+k.Label(), err)
		}
		if !isTrue(a[0]) || !isTrue(a[1]) || !isTrue(a[2]) {
			return fmt.Errorf("%s has a key %q that no run of this command has made: others may know its P and Q; find out who put it there, and remove it with the token's own tool", t, k.Label())
		}
		return nil
	})
}

// RemoveLotKey destroys a lot key for good.
func (t *Token) RemoveLotKey(ctx context.Context, k Key) error {
	return t.with(ctx, "remove a lot key", func(s *session) error { return t.destroy(s, pkcs11.CKO_PRIVATE_KEY, k) })
}

// ProveLotKey shows that the private key in the token is the one of pub: it decrypts, raw, what was encrypted here.
// One of the messages has leading zero bytes, which some tokens strip.
func (t *Token) ProveLotKey(ctx context.Context, k Key, pub *rsa.PublicKey) error {
	return t.with(ctx, "prove a lot key", func(s *session) error {
		h, err := t.find(s, pkcs11.CKO_PRIVATE_KEY, k)
		if err != nil {
			return err
		}
		return prove(s, h, pub)
	})
}

func prove(s *session, h pkcs11.ObjectHandle, pub *rsa.PublicKey) error {
	notIts := errors.New("the private key in the token does not decrypt what was encrypted to the modulus: it is not this modulus's key")
	if have, err := readRSA(s, h); err != nil {
		return err
	} else if !have.Equal(pub) { // a ciphertext may be above another modulus, and the token then says something else
		return notIts
	}
	size := kme.PayloadSize(pub)
	full, short := make([]byte, size), make([]byte, size)
	rand.Read(full)
	full[0] = 0 // below N
	rand.Read(short[size-16:])
	for _, m := range [][]byte{full, short} {
		c := new(big.Int).Exp(new(big.Int).SetBytes(m), big.NewInt(int64(pub.E)), pub.N)
		got, err := rawDecrypt(s, h, c.FillBytes(make([]byte, size)))
		if err != nil {
			return err
		}
		if !bytes.Equal(padLeft(got, size), m) {
			return notIts
		}
	}
	return nil
}

// padLeft restores leading zero bytes that a token has left out.
func padLeft(b []byte, size int) []byte {
	if len(b) >= size {
		return b
	}
	return append(make([]byte, size-len(b)), b...)
}

// rawDecrypt is c^d mod N. c has as many bytes as N and is below it.
func rawDecrypt(s *session, h pkcs11.ObjectHandle, c []byte) ([]byte, error) {
	out := make([]byte, len(c))
	m, err := s.decrypt(pkcs11.CKM_RSA_X_509, h, c, out)
	if err != nil {
		return nil, explain("decrypt", err)
	}
	if lead := len(c) - len(m); lead > 0 { // a token may leave out leading zero bytes, which PKCS #11 forbids for CKM_RSA_X_509
		copy(out[lead:], m)
		clear(out[:lead])
	}
	return out, nil
}

// SealLotKey makes a lot key non-extractable for good: from then on it cannot be granted to anybody any more. Doing it
// again changes nothing.
func (t *Token) SealLotKey(ctx context.Context, k Key) error {
	return t.with(ctx, "seal a lot key", func(s *session) error {
		h, sealed, err := t.findSealed(s, k)
		if err != nil || sealed {
			return err
		}
		return explainIf("seal "+k.Label(), s.SetAttributeValue(s.h, h, attributes{attr(pkcs11.CKA_EXTRACTABLE, false)}))
	})
}

// LotKeySealed says whether SealLotKey has been done.
func (t *Token) LotKeySealed(ctx context.Context, k Key) (sealed bool, err error) {
	return do(ctx, t, "look at a lot key", func(s *session) (bool, error) {
		_, sealed, err := t.findSealed(s, k)
		return sealed, err
	})
}

func (t *Token) findSealed(s *session, k Key) (h pkcs11.ObjectHandle, sealed bool, err error) {
	if h, err = t.find(s, pkcs11.CKO_PRIVATE_KEY, k); err != nil {
		return 0, false, err
	}
	a, err := s.GetAttributeValue(s.h, h, attributes{attr(pkcs11.CKA_EXTRACTABLE, nil)})
	if err != nil {
		return 0, false, explain("read "+k.Label(), err)
	}
	return h, !isTrue(a[0]), nil
}

func isTrue(a *pkcs11.Attribute) bool { return len(a.Value) == 1 && a.Value[0] == 1 }

// WrapLotKey is a lot key under an operator's KEK, by AES-KWP (RFC 5649) around PKCS #8. The token refuses it under
// any key that the security officer has not made TRUSTED.
func (t *Token) WrapLotKey(ctx context.Context, lot, kek Key) (wrapped []byte, err error) {
	return doAs(ctx, t, Factory, "wrap a lot key", func(s *session) ([]byte, error) {
		h, err := t.find(s, pkcs11.CKO_PRIVATE_KEY, lot)
		if err != nil {
			return nil, err
		}
		w, err := t.find(s, pkcs11.CKO_SECRET_KEY, kek)
		if err != nil {
			return nil, err
		}
		wrapped, err := s.wrap(t.kwp, w, h, make([]byte, wrappedRoom))
		return wrapped, explainIf("wrap "+lot.Label(), err)
	})
}

// UnwrapLotKey takes a lot key, wrapped under the KEK, into the token, for decryption only and never to be extracted.
// The key is proved to be that of pub before it becomes a token object, so that a wrong one leaves nothing behind;
// a lot key that the token already has is proved in its stead, and then none is taken.
func (t *Token) UnwrapLotKey(ctx context.Context, lot, kek Key, wrapped []byte, pub *rsa.PublicKey) (taken bool, err error) {
	if len(wrapped) < 16 || len(wrapped)%8 != 0 {
		return false, fmt.Errorf("the wrapped lot key has %d bytes: no AES-KWP ciphertext (RFC 5649) has", len(wrapped))
	}
	return doAs(ctx, t, Operator, "unwrap a lot key", func(s *session) (taken bool, err error) {
		if h, err := t.find(s, pkcs11.CKO_PRIVATE_KEY, lot); err == nil {
			return false, prove(s, h, pub)
		} else if !errors.Is(err, ErrNoKey) {
			return false, err
		}
		w, err := t.find(s, pkcs11.CKO_SECRET_KEY, kek)
		if err != nil {
			return false, err
		}
		unwrap := func(where attributes) (pkcs11.ObjectHandle, error) {
			h, err := s.unwrap(t.kwp, w, wrapped, frozen(importedLot, attributes{attr(pkcs11.CKA_PRIVATE, true)}, where))
			return h, explainIf("unwrap "+lot.Label(), err)
		}
		trial, err := unwrap(attributes{attr(pkcs11.CKA_TOKEN, false)})
		if err != nil {
			return false, err
		}
		err = prove(s, trial, pub)
		if derr := s.DestroyObject(s.h, trial); err == nil {
			err = explainIf("drop the trial key", derr)
		}
		if err != nil {
			return false, err
		}
		_, err = unwrap(named(lot))
		return err == nil, err
	})
}
