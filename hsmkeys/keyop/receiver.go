package keyop

import (
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
)

// NewReceiver makes an RSA-3072 key under which keys are imported. label is how its label begins, and unwraps the part
// of its template that says what it unwraps.
func NewReceiver(s *p11.Session, label string, unwraps ck.Attributes) (*rsa.PublicKey, error) {
	id := make([]byte, 20)
	rand.Read(id)
	private := ck.Frozen(ck.Attributes{ck.Attr(pkcs11.CKA_TOKEN, true), ck.Attr(pkcs11.CKA_ID, id),
		ck.Attr(pkcs11.CKA_LABEL, keyspec.ReceiverLabel(label, id))},
		ck.Guarded(false), ck.Use(ck.PrivateUsages, pkcs11.CKA_UNWRAP), keyspec.ByOAEP, unwraps)
	public, h, err := s.GeneratePair(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, keyspec.RSAPublic(3072), private)
	if err != nil {
		return nil, p11.Explain("make a transport key", err)
	}
	pub, err := keyspec.ReadRSA(s, h)
	return pub, errors.Join(err, p11.Explain("drop the public half of a transport key", s.Destroy(public)))
}

// Receivers gives the public halves of the keys of NewReceiver whose labels begin so.
func Receivers(s *p11.Session, label string) (all []*rsa.PublicKey, err error) {
	err = eachReceiver(s, label, func(_ pkcs11.ObjectHandle, pub *rsa.PublicKey) { all = append(all, pub) })
	return all, err
}

func eachReceiver(s *p11.Session, label string, f func(pkcs11.ObjectHandle, *rsa.PublicKey)) error {
	found, err := s.Find(ck.Attributes{ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
		ck.Attr(pkcs11.CKA_TOKEN, true), ck.Attr(pkcs11.CKA_UNWRAP, true)})
	if err != nil {
		return p11.Explain("look for transport keys", err)
	}
	for _, h := range found {
		a, err := s.Get(h, pkcs11.CKA_LABEL)
		if err != nil {
			return p11.Explain("look for transport keys", err)
		}
		if !strings.HasPrefix(string(a[0]), label) {
			continue
		}
		pub, err := keyspec.ReadRSA(s, h)
		if err != nil {
			return err
		}
		f(h, pub)
	}
	return nil
}

// Receiver finds the private half of a key of NewReceiver. It fails with p11.ErrNoKey if the token does not have it any
// more.
func Receiver(s *p11.Session, label string, pub *rsa.PublicKey) (found pkcs11.ObjectHandle, err error) {
	err = eachReceiver(s, label, func(h pkcs11.ObjectHandle, have *rsa.PublicKey) {
		if have.Equal(pub) {
			found = h
		}
	})
	if err == nil && found == 0 {
		err = fmt.Errorf("the transport key: %w", p11.ErrNoKey)
	}
	return found, err
}
