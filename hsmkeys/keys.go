package hsmkeys

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"sync/atomic"
	"time"

	"github.com/ThalesGroup/crypto11"
	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/kme"
)

type attributes = []*pkcs11.Attribute

// attr is pkcs11.NewAttribute by a name that leaves room for the rest of the line.
func attr(typ uint, value any) *pkcs11.Attribute { return pkcs11.NewAttribute(typ, value) }

// usages are all that a private or secret key can be for. Every key that we make has each of them set or cleared:
// what a template leaves out, tokens choose, and SoftHSM chooses true.
var usages = []uint{pkcs11.CKA_SIGN, pkcs11.CKA_VERIFY, pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT, pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP, pkcs11.CKA_DERIVE}

// privateUsages are the usages that a private key object has an attribute for.
var privateUsages = []uint{pkcs11.CKA_SIGN, pkcs11.CKA_DECRYPT, pkcs11.CKA_UNWRAP, pkcs11.CKA_DERIVE}

// use allows exactly the usages named, of those that the kind of object knows.
func use(known []uint, allowed ...uint) attributes {
	var a attributes
	for _, u := range known {
		on := false
		for _, w := range allowed {
			on = on || w == u
		}
		a = append(a, attr(u, on))
	}
	return a
}

// named makes a token object that is found again by its CKA_ID.
func named(k Key) attributes {
	return attributes{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_ID, k.ID()), attr(pkcs11.CKA_LABEL, k.Label())}
}

// guarded is common to all private and secret keys.
func guarded(extractable bool) attributes {
	return attributes{attr(pkcs11.CKA_PRIVATE, true), attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, extractable)}
}

// frozen makes a template of an object that nobody can change or copy. Without it, whoever has the user PIN could add
// DECRYPT to a key that only wraps, and decrypt with it what it wrapped. MODIFIABLE comes last: SoftHSM sets attributes
// in their order, and of an unwrapped key it sets none after that one.
func frozen(parts ...attributes) attributes {
	return append(join(parts...), attr(pkcs11.CKA_COPYABLE, false), attr(pkcs11.CKA_MODIFIABLE, false))
}

func join(parts ...attributes) attributes {
	var all attributes
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

func mechanism(m uint, param ...any) []*pkcs11.Mechanism {
	if len(param) == 1 {
		return []*pkcs11.Mechanism{pkcs11.NewMechanism(m, param[0])}
	}
	return []*pkcs11.Mechanism{pkcs11.NewMechanism(m, nil)}
}

// oaep is RSA-OAEP with SHA-1 and MGF1-SHA-1, JOSE's "RSA-OAEP" (RFC 7518 section 4.3): the one parameter set that
// every token has. OAEP does not rest on collision resistance, so SHA-1's weakness does not reach it (RFC 8017
// appendix B.1 keeps it for that reason). Its parameters are in direct.go.
const oaep = pkcs11.CKM_RSA_PKCS_OAEP

// wrappedRoom is more than any wrapped key of ours takes: an RSA-4096 key as PKCS #8 in AES-KWP has some 2,400 bytes.
const wrappedRoom = 4096

var (
	p256OID       = asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7}
	p256Params, _ = asn1.Marshal(p256OID)
	rsaExponent   = []byte{1, 0, 1} // kme.PublicExponent
)

// ensure finds a key or makes it, and says which. Two runs at once could both make it; find then refuses both, and
// init is no command that a machine repeats.
func (t *Token) ensure(ctx context.Context, side Side, class uint, k Key, generate func(*session) error) (created bool, err error) {
	return doAs(ctx, t, side, "make a key", func(s *session) (bool, error) {
		_, err := t.find(s, class, k)
		if !errors.Is(err, ErrNoKey) {
			return false, err
		}
		if err := generate(s); err != nil {
			return false, explain("make "+k.Label(), err)
		}
		return true, nil
	})
}

func (t *Token) ensureSecret(ctx context.Context, side Side, k Key, m uint, template attributes) (bool, error) {
	return t.ensure(ctx, side, pkcs11.CKO_SECRET_KEY, k, func(s *session) error {
		_, err := s.generate(m, frozen(named(k), attributes{attr(pkcs11.CKA_VALUE_LEN, 32)}, template))
		return err
	})
}

// EnsureSigningKey makes the manufacturer's signing key, ECDSA P-256, unless the token has it.
func (t *Token) EnsureSigningKey(ctx context.Context, k Key) (created bool, err error) {
	return t.ensure(ctx, Factory, pkcs11.CKO_PRIVATE_KEY, k, func(s *session) error {
		public := frozen(named(k), attributes{attr(pkcs11.CKA_EC_PARAMS, p256Params), attr(pkcs11.CKA_PRIVATE, false), attr(pkcs11.CKA_VERIFY, true),
			attr(pkcs11.CKA_ENCRYPT, false), attr(pkcs11.CKA_WRAP, false)})
		private := frozen(named(k), guarded(false), use(privateUsages, pkcs11.CKA_SIGN))
		_, _, err := s.generatePair(pkcs11.CKM_EC_KEY_PAIR_GEN, public, private)
		return err
	})
}

// leavesUnderTrusted is common to keys that leave a token under a TRUSTED key, and under no other.
var leavesUnderTrusted = attributes{attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, true), attr(pkcs11.CKA_WRAP_WITH_TRUSTED, true)}

// The keys of an operator's token of which there is one each; of the storage key, one a generation.
var (
	storageKey = Key{Role: RoleStorage}
	ledgerKey  = Key{Role: RoleLedger}
)

// EnsureStorageKey makes the AES-256 key that seals KMEs, in its first generation, unless the token has one. Whoever
// unwraps a KME with it can have it as OpenPayload and EncryptRANDs have it, and in no other way. It can be backed up,
// under a TRUSTED key.
func (t *Token) EnsureStorageKey(ctx context.Context) (created bool, err error) {
	if has, err := t.hasStorage(ctx); err != nil || has {
		return false, err
	}
	return t.makeStorage(ctx, storageKey)
}

func (t *Token) makeStorage(ctx context.Context, k Key) (created bool, err error) {
	defer t.sealing.Store(nil)
	traits, err := t.learnt(ctx)
	if err != nil {
		return false, err
	}
	return t.ensureSecret(ctx, Operator, k, pkcs11.CKM_AES_KEY_GEN, storageTemplate(traits))
}

func storageTemplate(t traits) attributes {
	return join(attributes{attr(pkcs11.CKA_PRIVATE, true)}, t.leaves(), use(usages, pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP), t.unwraps(unsealed))
}

// What a key is that is unwrapped, and never leaves the token again: what whoever unwraps it may not have otherwise. In
// a KEK a template of its own is not possible.
var (
	unsealed    = unwrapped(pkcs11.CKO_SECRET_KEY, pkcs11.CKK_AES, use(usages, pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT))
	importedKEK = unwrapped(pkcs11.CKO_SECRET_KEY, pkcs11.CKK_AES, use(usages, pkcs11.CKA_UNWRAP))
	importedLot = unwrapped(pkcs11.CKO_PRIVATE_KEY, pkcs11.CKK_RSA, use(privateUsages, pkcs11.CKA_DECRYPT))
)

func unwrapped(class, kind uint, usage attributes) attributes {
	return join(usage, attributes{attr(pkcs11.CKA_CLASS, class), attr(pkcs11.CKA_KEY_TYPE, kind)}, unextractable)
}

// hasStorage says whether there is a storage key in any generation.
func (t *Token) hasStorage(ctx context.Context) (bool, error) {
	return do(ctx, t, "look for a key", func(s *session) (bool, error) {
		_, _, err := t.newestStorage(s)
		if errors.Is(err, ErrNoKey) {
			return false, nil
		}
		return err == nil, err
	})
}

// A sealing is the generation of the storage key that seals, for some time.
type sealing struct {
	generation int
	until      time.Time
}

// LookAgain is after how long a token is asked again whether there is a newer storage key: so long after one was made,
// and the calls then under way, nobody seals with an older one.
const LookAgain = 5 * time.Second

// newestStorage finds the storage key that seals. A generation that is not used any more is gone, so the first that is
// there need not be 1; after it, none is left out.
func (t *Token) newestStorage(s *session) (generation int, h pkcs11.ObjectHandle, err error) {
	if known := t.sealing.Load(); known != nil && time.Now().Before(known.until) {
		h, err = t.find(s, pkcs11.CKO_SECRET_KEY, storageGeneration(known.generation))
		return known.generation, h, err
	}
	for g := range storageKey.Generations() {
		next, err := t.find(s, pkcs11.CKO_SECRET_KEY, g)
		if errors.Is(err, ErrNoKey) {
			if generation > 0 {
				break
			}
			continue
		}
		if err != nil {
			return 0, 0, err
		}
		generation, h = g.Generation, next
	}
	if generation == 0 {
		return 0, 0, fmt.Errorf("%s: %w", storageKey.Label(), ErrNoKey)
	}
	t.sealing.Store(&sealing{generation, time.Now().Add(LookAgain)})
	return generation, h, nil
}

func storageGeneration(n int) Key {
	k := storageKey
	k.Generation = n
	return k
}

// EnsureLedgerKey makes the HMAC key that tags KMEs for the one-use ledger, unless the token has it. It can be backed
// up as the storage key can.
func (t *Token) EnsureLedgerKey(ctx context.Context) (created bool, err error) {
	traits, err := t.learnt(ctx)
	if err != nil {
		return false, err
	}
	return t.ensureSecret(ctx, Operator, ledgerKey, pkcs11.CKM_GENERIC_SECRET_KEY_GEN, ledgerTemplate(traits))
}

func ledgerTemplate(t traits) attributes {
	return join(attributes{attr(pkcs11.CKA_PRIVATE, true)}, t.leaves(), use(usages, pkcs11.CKA_SIGN))
}

// rsaPublic is the template of a public key object that lives until it has been read: the private object has the
// modulus too, and a second object of each key would be one more thing to keep in step.
func rsaPublic(bits int) attributes {
	return attributes{
		attr(pkcs11.CKA_TOKEN, false), attr(pkcs11.CKA_PRIVATE, false),
		attr(pkcs11.CKA_MODULUS_BITS, bits), attr(pkcs11.CKA_PUBLIC_EXPONENT, rsaExponent),
	}
}

func (t *Token) rsaPublicKey(ctx context.Context, k Key) (pub *rsa.PublicKey, err error) {
	return do(ctx, t, "read a public key", func(s *session) (*rsa.PublicKey, error) {
		h, err := t.find(s, pkcs11.CKO_PRIVATE_KEY, k)
		if err != nil {
			return nil, err
		}
		return readRSA(s, h)
	})
}

func readRSA(s *session, h pkcs11.ObjectHandle) (*rsa.PublicKey, error) {
	a, err := s.GetAttributeValue(s.h, h, attributes{attr(pkcs11.CKA_MODULUS, nil), attr(pkcs11.CKA_PUBLIC_EXPONENT, nil)})
	if err != nil {
		return nil, explain("read a public key", err)
	}
	e := new(big.Int).SetBytes(a[1].Value)
	if !e.IsInt64() || e.Int64() != kme.PublicExponent {
		return nil, fmt.Errorf("the token made a key with public exponent %v; only %d is accepted", e, kme.PublicExponent)
	}
	n := new(big.Int).SetBytes(a[0].Value)
	if n.Sign() == 0 {
		return nil, errors.New("the token has an RSA key without a modulus: do not use this token")
	}
	return &rsa.PublicKey{N: n, E: kme.PublicExponent}, nil
}

func readP256(s *session, h pkcs11.ObjectHandle) (*ecdsa.PublicKey, error) {
	a, err := s.GetAttributeValue(s.h, h, attributes{attr(pkcs11.CKA_EC_POINT, nil)})
	if err != nil {
		return nil, explain("read a public key", err)
	}
	// CKA_EC_POINT is the point in a DER OCTET STRING (PKCS #11 v2.40 mechanisms, 2.3.3).
	var point []byte
	if rest, err := asn1.Unmarshal(a[0].Value, &point); err != nil || len(rest) != 0 {
		return nil, errors.New("the token's CKA_EC_POINT is not a DER OCTET STRING")
	}
	return ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
}

// A signer signs with a key of a token, and finds it again when the module was initialised anew.
type signer struct {
	t      *Token
	k      Key
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
	// crypto11 has sessions of its own; ours is held so that the module stays.
	return do(context.Background(), s.t, "sign", func(in *session) ([]byte, error) {
		f, err := s.current(in)
		if err != nil {
			return nil, err
		}
		signature, err := f.Sign(random, digest, o)
		return signature, explainIf("sign with "+s.k.Label(), err)
	})
}

// current finds the key again if need be; two at once may both do.
func (s *signer) current(in *session) (*found, error) {
	if f := s.found.Load(); f != nil && f.under == s.t.signers {
		return f, nil
	}
	if _, err := s.t.find(in, pkcs11.CKO_PRIVATE_KEY, s.k); err != nil {
		return nil, err
	}
	if s.t.signers == nil {
		return nil, fmt.Errorf("%s signs for no manufacturer: its module wants %s, which crypto11 cannot give", s.t, initReserved)
	}
	signers, err := s.t.signers.FindKeyPairs(s.k.ID(), nil)
	if err != nil {
		return nil, explain("look for "+s.k.Label(), err)
	}
	if len(signers) != 1 {
		return nil, fmt.Errorf("%s has %d key pairs %q: only one of them can be ours; remove the others with the token's own tool", s.t, len(signers), s.k.Label())
	}
	public, ok := signers[0].Public().(*ecdsa.PublicKey)
	if !ok || s.public != nil && !public.Equal(s.public) {
		return nil, fmt.Errorf("%s has another key in the place of %q", s.t, s.k.Label())
	}
	// Whoever has no PIN could have put another public key there, which operators would pin.
	digest := kme.RandomSecret().Bytes()
	sig, err := signers[0].Sign(nil, digest, crypto.SHA256)
	if err != nil {
		return nil, explain("sign with "+s.k.Label(), err)
	}
	if !ecdsa.VerifyASN1(public, digest, sig) {
		return nil, fmt.Errorf("the object %q in %s is not its public key: find out who put it there, and bring back the token from a backup", s.k.Label(), s.t)
	}
	f := &found{signers[0], s.t.signers}
	s.found.Store(f)
	return f, nil
}

// Signer is the signing key k as a crypto.Signer, good for as long as the token is open.
func (t *Token) Signer(k Key) (crypto.Signer, error) {
	s := &signer{t: t, k: k}
	f, err := do(context.Background(), t, "find a signer", s.current)
	if err != nil {
		return nil, err
	}
	s.public = f.Public().(*ecdsa.PublicKey)
	return s, nil
}

// Has says whether the token has a private or secret key k.
func (t *Token) Has(ctx context.Context, k Key) (has bool, err error) {
	class := uint(pkcs11.CKO_SECRET_KEY)
	switch k.Role {
	case RoleSigning, RoleLot:
		class = pkcs11.CKO_PRIVATE_KEY
	}
	return do(ctx, t, "look for a key", func(s *session) (bool, error) {
		_, err := t.find(s, class, k)
		if errors.Is(err, ErrNoKey) {
			return false, nil
		}
		return err == nil, err
	})
}

func explainIf(what string, err error) error {
	if err == nil {
		return nil
	}
	return explain(what, err)
}

// Derive makes a key of the ledger key for a purpose: HMAC-SHA-256 of its name, made in the token. No name has as many
// bytes as a KME, so that no key is the tag of one. It is as secret as what it is for; the caller wipes it.
func (t *Token) Derive(ctx context.Context, purpose string) (kme.Secret, error) {
	name := []byte("kme derived key " + purpose)
	if len(name) == kme.SecretSize {
		return kme.Secret{}, errors.New("the name of a derived key has the length of a KME")
	}
	return do(ctx, t, "derive a key", func(s *session) (kme.Secret, error) {
		h, err := t.find(s, pkcs11.CKO_SECRET_KEY, ledgerKey)
		if err != nil {
			return kme.Secret{}, err
		}
		tag, err := hmac(s, h, name)
		if err != nil {
			return kme.Secret{}, err
		}
		defer clear(tag)
		return kme.NewSecret(tag)
	})
}
