package keyop

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/ThalesGroup/crypto11"
	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/kme"
)

// Signer is the ECDSA P-256 key k as a crypto.Signer, good for as long as the token is open.
func Signer(t *p11.Token, k keyspec.Key) (crypto.Signer, error) {
	s := &signer{t: t, k: k}
	f, err := p11.Do(context.Background(), t, "find a signer", s.current)
	if err != nil {
		return nil, err
	}
	s.public = f.Public().(*ecdsa.PublicKey)
	return s, nil
}

// A signer signs with a key of a token, and finds it again when the module was reinitialised.
type signer struct {
	t      *p11.Token
	k      keyspec.Key
	public *ecdsa.PublicKey
	found  atomic.Pointer[found]
}

// A found signer is one of crypto11, good for as long as the module stays initialised.
type found struct {
	crypto.Signer
	under *crypto11.Context
}

func (s *signer) Public() crypto.PublicKey { return s.public }

// Sign gives an ASN.1 signature, as crypto.Signer says of ECDSA.
func (s *signer) Sign(random io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	// crypto11 uses sessions of its own. Ours is held so that the module is not finalised meanwhile.
	return p11.Do(context.Background(), s.t, "sign", func(in *p11.Session) ([]byte, error) {
		f, err := s.current(in)
		if err != nil {
			return nil, err
		}
		signature, err := f.Sign(random, digest, o)
		return signature, p11.Explain("sign with "+s.k.Label(), err)
	})
}

// current finds the key again if the module was reinitialised. Two callers at once may both do that.
func (s *signer) current(in *p11.Session) (*found, error) {
	under := s.t.Signers(in)
	if f := s.found.Load(); f != nil && f.under == under {
		return f, nil
	}
	if _, err := Find(s.t, in, pkcs11.CKO_PRIVATE_KEY, s.k); err != nil {
		return nil, err
	}
	if under == nil {
		return nil, fmt.Errorf("%s cannot sign for a manufacturer: its module needs x-init-reserved, which crypto11 "+
			"cannot pass on", s.t)
	}
	signers, err := under.FindKeyPairs(s.k.ID(), nil)
	if err != nil {
		return nil, p11.Explain("look for "+s.k.Label(), err)
	}
	if len(signers) != 1 {
		return nil, fmt.Errorf("%s has %d key pairs %q: only one of them can be ours; remove the others with the "+
			"token's own tool", s.t, len(signers), s.k.Label())
	}
	public, ok := signers[0].Public().(*ecdsa.PublicKey)
	if !ok || s.public != nil && !public.Equal(s.public) {
		return nil, fmt.Errorf("%s has another key in the place of %q", s.t, s.k.Label())
	}
	// Without a PIN, somebody could have put another public key there, which operators would then pin.
	digest := kme.RandomSecret().Bytes()
	sig, err := signers[0].Sign(nil, digest, crypto.SHA256)
	if err != nil {
		return nil, p11.Explain("sign with "+s.k.Label(), err)
	}
	if !ecdsa.VerifyASN1(public, digest, sig) {
		return nil, fmt.Errorf("the object %q in %s is not its public key: find out who put it there, and bring back "+
			"the token from a backup", s.k.Label(), s.t)
	}
	f := &found{Signer: signers[0], under: under}
	s.found.Store(f)
	return f, nil
}
