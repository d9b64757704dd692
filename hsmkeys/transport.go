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
)

// NewTransportKey makes an RSA-3072 key that receives one KEK. By its CKA_UNWRAP_TEMPLATE, the KEK can only unwrap, and
// never leaves the token. But templates cannot nest: the transport key could also unwrap the KEK without the KEK's own
// template. So DestroyTransportKey destroys it when the KEK is there.
func (t *OperatorToken) NewTransportKey(ctx context.Context) (*rsa.PublicKey, error) {
	return t.newReceiver(ctx, keyspec.TransportLabel, keyspec.ImportedKEK)
}

// newReceiver makes an RSA-3072 key that unwraps keys by a template. label is how its label begins.
func (t *OperatorToken) newReceiver(
	ctx context.Context, label string, template ck.Attributes,
) (*rsa.PublicKey, error) {
	return doAs(ctx, t.base, Operator, "make a transport key", func(s *p11.Session) (*rsa.PublicKey, error) {
		traits, err := t.learn(s)
		if err != nil {
			return nil, err
		}
		return keyop.NewReceiver(s, label, traits.Unwraps(template))
	})
}

// TransportKeys are the public halves of the transport keys that the token has, in no order.
func (t *OperatorToken) TransportKeys(ctx context.Context) ([]*rsa.PublicKey, error) {
	return t.receivers(ctx, keyspec.TransportLabel)
}

func (t *OperatorToken) receivers(ctx context.Context, label string) ([]*rsa.PublicKey, error) {
	return doAs(ctx, t.base, Operator, "look for transport keys", func(s *p11.Session) ([]*rsa.PublicKey, error) {
		return keyop.Receivers(s, label)
	})
}

// DestroyTransportKey destroys a transport key. If it is gone already, nothing changes.
func (t *OperatorToken) DestroyTransportKey(ctx context.Context, pub *rsa.PublicKey) error {
	return t.destroyReceiver(ctx, keyspec.TransportLabel, pub)
}

func (t *OperatorToken) destroyReceiver(ctx context.Context, label string, pub *rsa.PublicKey) error {
	return t.hsm.With(ctx, "destroy a transport key", func(s *p11.Session) error {
		h, err := keyop.Receiver(s, label, pub)
		if errors.Is(err, ErrNoKey) {
			return nil
		}
		if err != nil {
			return err
		}
		return p11.Explain("destroy a transport key", s.Destroy(h))
	})
}

// UnwrapKEK imports an operator's KEK, wrapped under a transport key. The KEK is never extractable and only unwraps lot
// keys, which always get the attributes that UnwrapLotKey gives them, by its CKA_UNWRAP_TEMPLATE. It replaces an
// earlier KEK of the same name and generation, after the new one was shown to unwrap.
func (t *OperatorToken) UnwrapKEK(ctx context.Context, kek Key, transport *rsa.PublicKey, wrapped []byte) error {
	if len(wrapped) == 0 {
		return errors.New("the enrolment holds no wrapped key")
	}
	return t.as(ctx, Operator, "unwrap a KEK", func(s *p11.Session) error {
		h, err := keyop.Receiver(s, keyspec.TransportLabel, transport)
		if err != nil {
			return err
		}
		traits, err := t.learn(s)
		if err != nil {
			return err
		}
		template := ck.Join(keyspec.ImportedKEK, ck.Attributes{ck.Attr(pkcs11.CKA_PRIVATE, true)},
			keyspec.ByKWP, traits.Unwraps(keyspec.ImportedLot))
		unwrap := func(where ck.Attributes) (pkcs11.ObjectHandle, error) {
			h, err := s.Unwrap(keyspec.OAEP, h, wrapped, ck.Frozen(template, where))
			return h, p11.Explain("unwrap the KEK with the transport key: it was made for another key, or damaged", err)
		}
		if err := try(s, unwrap, func(pkcs11.ObjectHandle) error { return nil }); err != nil {
			return err
		}
		if err := t.destroy(s, pkcs11.CKO_SECRET_KEY, kek); err != nil {
			return err
		}
		_, err = unwrap(keyspec.Named(kek))
		return err
	})
}

// try unwraps a key as a session object, checks it, and destroys it.
func try(
	s *p11.Session, unwrap func(where ck.Attributes) (pkcs11.ObjectHandle, error),
	check func(pkcs11.ObjectHandle) error,
) error {
	h, err := unwrap(ck.Attributes{ck.Attr(pkcs11.CKA_TOKEN, false)})
	if err != nil {
		return err
	}
	err = check(h)
	if derr := s.Destroy(h); err == nil {
		err = p11.Explain("drop the trial key", derr)
	}
	return err
}

// UnwrapLotKey imports a lot key, wrapped under the KEK. The key only decrypts, and is never extractable. It is proved
// to be the key of pub before it becomes a token object, so a wrong one leaves nothing behind. If the token has the lot
// key already, that one is proved, and nothing is imported.
func (t *OperatorToken) UnwrapLotKey(
	ctx context.Context, lot, kek Key, wrapped []byte, pub *rsa.PublicKey,
) (taken bool, err error) {
	if len(wrapped) < 16 || len(wrapped)%8 != 0 {
		return false, fmt.Errorf("the wrapped lot key has %d bytes: no AES-KWP ciphertext (RFC 5649) has", len(wrapped))
	}
	return doAs(ctx, t.base, Operator, "unwrap a lot key", func(s *p11.Session) (taken bool, err error) {
		if h, err := t.find(s, pkcs11.CKO_PRIVATE_KEY, lot); err == nil {
			return false, keyop.Prove(s, h, pub)
		} else if !errors.Is(err, ErrNoKey) {
			return false, err
		}
		w, err := t.find(s, pkcs11.CKO_SECRET_KEY, kek)
		if err != nil {
			return false, err
		}
		unwrap := func(where ck.Attributes) (pkcs11.ObjectHandle, error) {
			h, err := s.Unwrap(t.hsm.KWP(), w, wrapped,
				ck.Frozen(keyspec.ImportedLot, keyspec.ByRawRSA, ck.Attributes{ck.Attr(pkcs11.CKA_PRIVATE, true)},
					where))
			return h, p11.Explain("unwrap "+lot.Label(), err)
		}
		err = try(s, unwrap, func(h pkcs11.ObjectHandle) error { return keyop.Prove(s, h, pub) })
		if err == nil {
			_, err = unwrap(keyspec.Named(lot))
		}
		return err == nil, err
	})
}
