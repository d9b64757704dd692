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

// NewTransportKey makes an RSA-3072 key that receives one KEK. Its CKA_UNWRAP_TEMPLATE makes that a key that unwraps
// and never leaves the token; but a template cannot nest, so it would make the KEK without one of its own, too:
// DestroyTransportKey ends it when the KEK is there.
func (t *OperatorToken) NewTransportKey(ctx context.Context) (*rsa.PublicKey, error) {
	return t.newReceiver(ctx, keyspec.TransportLabel, keyspec.ImportedKEK)
}

// newReceiver makes an RSA-3072 key, with a label that begins so, under which keys come into the token as template has
// them.
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

// DestroyTransportKey ends a transport key for good. Of one that is gone, it changes nothing.
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

// UnwrapKEK takes an operator KEK, wrapped under a transport key, into the token, for unwrapping lot keys only and
// never to be extracted: by its CKA_UNWRAP_TEMPLATE, lot keys are as UnwrapLotKey makes them, whoever unwraps them. An
// earlier KEK of the same name and generation is replaced, once the new one has been shown to unwrap.
func (t *OperatorToken) UnwrapKEK(ctx context.Context, kek Key, transport *rsa.PublicKey, wrapped []byte) error {
	if len(wrapped) == 0 {
		return errors.New("the enrolment holds no wrapped key")
	}
	_, err := doAs(ctx, t.base, Operator, "unwrap a KEK", func(s *p11.Session) (none struct{}, err error) {
		h, err := keyop.Receiver(s, keyspec.TransportLabel, transport)
		if err != nil {
			return none, err
		}
		traits, err := t.learn(s)
		if err != nil {
			return none, err
		}
		template := ck.Join(keyspec.ImportedKEK, ck.Attributes{ck.Attr(pkcs11.CKA_PRIVATE, true)},
			traits.Unwraps(keyspec.ImportedLot))
		unwrap := func(where ck.Attributes) (pkcs11.ObjectHandle, error) {
			h, err := s.Unwrap(keyspec.OAEP, h, wrapped, ck.Frozen(template, where))
			return h, p11.Explain("unwrap the KEK with the transport key: it was made for another key, or damaged", err)
		}
		trial, err := unwrap(ck.Attributes{ck.Attr(pkcs11.CKA_TOKEN, false)})
		if err != nil {
			return none, err
		}
		if err := s.Destroy(trial); err != nil {
			return none, p11.Explain("drop the trial key", err)
		}
		if err := t.destroy(s, pkcs11.CKO_SECRET_KEY, kek); err != nil {
			return none, err
		}
		_, err = unwrap(keyspec.Named(kek))
		return none, err
	})
	return err
}

// UnwrapLotKey takes a lot key, wrapped under the KEK, into the token, for decryption only and never to be extracted.
// The key is proved to be that of pub before it becomes a token object, so that a wrong one leaves nothing behind;
// a lot key that the token already has is proved in its stead, and then none is taken.
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
				ck.Frozen(keyspec.ImportedLot, ck.Attributes{ck.Attr(pkcs11.CKA_PRIVATE, true)}, where))
			return h, p11.Explain("unwrap "+lot.Label(), err)
		}
		trial, err := unwrap(ck.Attributes{ck.Attr(pkcs11.CKA_TOKEN, false)})
		if err != nil {
			return false, err
		}
		err = keyop.Prove(s, trial, pub)
		if derr := s.Destroy(trial); err == nil {
			err = p11.Explain("drop the trial key", derr)
		}
		if err != nil {
			return false, err
		}
		_, err = unwrap(keyspec.Named(lot))
		return err == nil, err
	})
}
