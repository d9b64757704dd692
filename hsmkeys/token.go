package hsmkeys

import (
	"context"
	"crypto/rsa"
	"errors"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyop"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
)

// A base is what a factory's and an operator's token have in common.
type base struct {
	hsm       *p11.Token
	dedicated atomic.Pointer[Dedication]     // once it is known
	traits    atomic.Pointer[keyspec.Traits] // once they are learnt
}

// A FactoryToken is a manufacturer's token, open and logged in. All methods of it may be called concurrently.
type FactoryToken struct{ *base }

// An OperatorToken is an operator's token, open and logged in. All methods of it may be called concurrently.
type OperatorToken struct {
	*base
	verifyInSoftware bool
	// the newest generation of the storage key; nil while it is to be looked for
	sealing atomic.Pointer[sealing]
}

// Options say how a token is used. The zero value is right for a command.
type Options struct {
	// HangTimeout is after how long a call is given up. 0 stands for a time in which a lot key can be made, the slowest
	// call.
	HangTimeout time.Duration
	// Observer is told of operations; it may be nil.
	Observer Observer
	// Changed is told how a token was and is, when its circuit breaker changes its state, when a call hangs or comes
	// back, and of each panic; it may be nil. It must return at once, and make no call to the token.
	Changed func(token string, was, is Health)
	// VerifyInSoftware validates KME_SIG in this process, for operators' tokens without the mechanism. That needs no
	// secret, and changes no answer.
	VerifyInSoftware bool
	// Sessions is how many operations may be in the token at once; 0 for a number by its distance and its limits.
	Sessions int

	renewAfter int64 // see p11.Options
}

// OpenFactory opens the token that an RFC 7512 URI names and logs in, once, with the PIN of its pin-source.
func OpenFactory(ctx context.Context, tokenURI string, o Options) (*FactoryToken, error) {
	b, err := openBase(ctx, tokenURI, o)
	if err != nil {
		return nil, err
	}
	return &FactoryToken{base: b}, nil
}

// OpenOperator is OpenFactory for an operator's token.
func OpenOperator(ctx context.Context, tokenURI string, o Options) (*OperatorToken, error) {
	b, err := openBase(ctx, tokenURI, o)
	if err != nil {
		return nil, err
	}
	return &OperatorToken{base: b, verifyInSoftware: o.VerifyInSoftware}, nil
}

func openBase(ctx context.Context, tokenURI string, o Options) (*base, error) {
	hsm, err := p11.OpenUser(ctx, tokenURI, p11.Options{
		HangTimeout: o.HangTimeout, Observer: o.Observer, Changed: o.Changed, RenewAfter: o.renewAfter,
		Sessions: o.Sessions,
	})
	if err != nil {
		return nil, err
	}
	return &base{hsm: hsm}, nil
}

// asOfficer runs f while the security officer is logged in, once. No token of the URI may be open in the process.
func asOfficer(tokenURI string, pin PIN, f func(*base) error) error {
	return p11.AsOfficer(tokenURI, pin, func(hsm *p11.Token) error { return f(&base{hsm: hsm}) })
}

// Close ends all sessions and the login. No other method may be running or be called afterwards.
func (b *base) Close() error { return b.hsm.Close() }

// String names the token by label and serial number.
func (b *base) String() string { return b.hsm.String() }

// Serial is the token's serial number.
func (b *base) Serial() string { return b.hsm.Serial() }

// Sessions is how many operations can be in the token at once.
func (b *base) Sessions() int { return b.hsm.Sessions() }

// SeesLate is p11.Token's.
func (b *base) SeesLate() bool { return b.hsm.SeesLate() }

// Health may be asked at any time.
func (b *base) Health() Health { return b.hsm.Health() }

// Has says whether the token has a private or secret key k.
func (b *base) Has(ctx context.Context, k Key) (has bool, err error) {
	class := uint(pkcs11.CKO_SECRET_KEY)
	if k.Role == RoleSigning || k.Role == RoleLot {
		class = pkcs11.CKO_PRIVATE_KEY
	}
	return p11.Do(ctx, b.hsm, "look for a key", func(s *p11.Session) (bool, error) {
		_, err := b.find(s, class, k)
		if errors.Is(err, ErrNoKey) {
			return false, nil
		}
		return err == nil, err
	})
}

// find is keyop.Find.
func (b *base) find(s *p11.Session, class uint, k Key) (pkcs11.ObjectHandle, error) {
	return keyop.Find(b.hsm, s, class, k)
}

// destroy is keyop.Destroy.
func (b *base) destroy(s *p11.Session, class uint, k Key) error {
	return keyop.Destroy(b.hsm, s, class, k)
}

// ensure finds a key or makes it, and says which. Two runs at once could both make it: then find refuses both.
func (b *base) ensure(
	ctx context.Context, side Side, class uint, k Key, generate func(*p11.Session) error,
) (created bool, err error) {
	return doAs(ctx, b, side, "make a key", func(s *p11.Session) (bool, error) {
		_, err := b.find(s, class, k)
		if !errors.Is(err, ErrNoKey) {
			return false, err
		}
		if err := generate(s); err != nil {
			return false, p11.Explain("make "+k.Label(), err)
		}
		return true, nil
	})
}

func (b *base) ensureSecret(ctx context.Context, side Side, k Key, m uint, template ck.Attributes) (bool, error) {
	return b.ensure(ctx, side, pkcs11.CKO_SECRET_KEY, k, func(s *p11.Session) error {
		_, err := s.Generate(m, ck.Frozen(keyspec.Named(k), ck.Attributes{ck.Attr(pkcs11.CKA_VALUE_LEN, 32)},
			template))
		return err
	})
}

func (b *base) rsaPublicKey(ctx context.Context, k Key) (pub *rsa.PublicKey, err error) {
	return p11.Do(ctx, b.hsm, "read a public key", func(s *p11.Session) (*rsa.PublicKey, error) {
		h, err := b.find(s, pkcs11.CKO_PRIVATE_KEY, k)
		if err != nil {
			return nil, err
		}
		return keyspec.ReadRSA(s, h)
	})
}
