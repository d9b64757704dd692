package hsmkeys

import (
	"context"
	"crypto/rsa"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/keyop"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
)

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
