package hsmkeys

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/kme"
)

// EnrollKey makes the key of an operator (RoleKEK: it carries lot keys) or of a fixture (RoleInjection: it carries
// device keys), AES-256, and takes in the RSA key that receives it. Only the security officer can make TRUSTED objects,
// and only at creation, so it logs in as the security officer, once: no Token of this token may be open in the process.
//
// Each key leaves the token only as far as it must. Both are WRAP_WITH_TRUSTED, as lot keys are: they leave under a
// TRUSTED key. The receiving key wraps, by its CKA_WRAP_TEMPLATE, nothing but its one key; a KEK wraps nothing but RSA
// private keys; an injection key nothing but private keys that are not WRAP_WITH_TRUSTED, as device keys are. Otherwise
// whoever has the user PIN could wrap a KEK for a fixture, whose key may be in software, and have every lot key that
// the KEK has carried. An injection key is TRUSTED so that it is known for the security officer's: see checkMaker.
func EnrollKey(ctx context.Context, tokenURI string, officer PIN, k Key, to *rsa.PublicKey) (created bool, err error) {
	if err := checkWrappingKey(to); err != nil {
		return false, err
	}
	// The security officer cannot see private objects, so all are made with PRIVATE=false.
	wraps := lotKeys
	if k.Role == RoleInjection {
		wraps = deviceKeys
	}
	template := join(attributes{attr(pkcs11.CKA_PRIVATE, false), attr(pkcs11.CKA_TRUSTED, true)}, leavesUnderTrusted,
		use(usages, pkcs11.CKA_WRAP), nested(pkcs11.CKA_WRAP_TEMPLATE, wraps))
	err = asOfficer(tokenURI, officer, func(t *Token) error {
		if err := t.checkRecipient(ctx, recipient(k), to); err != nil {
			return err
		}
		if created, err = t.ensureSecret(ctx, Factory, k, pkcs11.CKM_AES_KEY_GEN, template); err != nil {
			return err
		}
		return t.takeRecipient(ctx, Factory, recipient(k), to,
			attributes{attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_ID, k.ID())})
	})
	return created, err
}

// takeRecipient takes in an RSA key that wraps nothing but what fits a template, in the place of the one that was
// there: of an earlier enrolment, or of a run that was interrupted. The security officer is logged in.
func (t *Token) takeRecipient(ctx context.Context, side Side, r Key, to *rsa.PublicKey, wraps attributes) error {
	_, err := doAs(ctx, t, side, "take in a key that receives", func(s *session) (none struct{}, err error) {
		if err := t.destroy(s, pkcs11.CKO_PUBLIC_KEY, r); err != nil {
			return none, err
		}
		_, err = s.create(frozen(named(r), wrappingPublic(to), attributes{attr(pkcs11.CKA_TRUSTED, true)},
			nested(pkcs11.CKA_WRAP_TEMPLATE, wraps)))
		return none, explainIf("take the key that receives into the token", err)
	})
	return err
}

// lotKeys are all that a KEK wraps, and deviceKeys what an injection key wraps, which lot keys are not.
var (
	lotKeys    = attributes{attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA)}
	deviceKeys = attributes{attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), attr(pkcs11.CKA_WRAP_WITH_TRUSTED, false)}
)

// recipient is the RSA key that receives k.
func recipient(k Key) Key {
	r := Key{Role: RoleOperatorOutgoing, Manufacturer: k.Manufacturer, Name: k.Name}
	if k.Role == RoleInjection {
		r.Role = RoleFixture
	}
	return r
}

// receives are the RSA keys that the security officer took in.
var receives = attributes{
	attr(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_TRUSTED, true),
}

// checkRecipient refuses a key that is enrolled already for somebody else: a fixture's is never an operator's.
func (t *Token) checkRecipient(ctx context.Context, r Key, to *rsa.PublicKey) error {
	return t.with(ctx, "look at the keys that receive", func(s *session) error {
		trusted, err := s.findObjects(receives)
		if err != nil {
			return explain("look at the keys that receive", err)
		}
		for _, h := range trusted {
			a, err := s.GetAttributeValue(s.h, h, attributes{attr(pkcs11.CKA_ID, nil), attr(pkcs11.CKA_LABEL, nil)})
			if err != nil {
				return explain("look at the keys that receive", err)
			}
			if string(a[0].Value) == string(r.ID()) {
				continue
			}
			if have, err := readRSA(s, h); err != nil {
				return err
			} else if have.N.Cmp(to.N) == 0 {
				return fmt.Errorf("this key is enrolled already, as %q: whoever has its private half would have the one's keys and the other's; ask for a key of their own", a[1].Value)
			}
		}
		return nil
	})
}

// WrapEnrolled is a key of EnrollKey under the RSA key that receives it, by RSA-OAEP (see oaep).
func (t *Token) WrapEnrolled(ctx context.Context, k Key) (wrapped []byte, err error) {
	return doAs(ctx, t, Factory, "wrap an enrolled key", func(s *session) ([]byte, error) {
		h, err := t.find(s, pkcs11.CKO_SECRET_KEY, k)
		if err != nil {
			return nil, err
		}
		pub, err := t.find(s, pkcs11.CKO_PUBLIC_KEY, recipient(k))
		if err != nil {
			return nil, err
		}
		wrapped, err := s.wrap(oaep, pub, h, make([]byte, wrappedRoom))
		return wrapped, explainIf("wrap "+k.Label(), err)
	})
}

// Fixtures are the names of a manufacturer's fixtures that are enrolled in the token, in no order.
func (t *Token) Fixtures(ctx context.Context, manufacturer string) (names []string, err error) {
	return doAs(ctx, t, Factory, "look for fixtures", func(s *session) (names []string, err error) {
		found, err := s.findObjects(receives)
		if err != nil {
			return nil, explain("look for fixtures", err)
		}
		for _, h := range found {
			k, _, err := s.whose(h)
			if err != nil {
				return nil, err
			}
			if k.Role == RoleFixture && k.Manufacturer == manufacturer {
				names = append(names, k.Name)
			}
		}
		return names, nil
	})
}

// transportLabel is in the labels of an operator's transport keys. They are found by their modulus.
const transportLabel = "kme transport "

// NewTransportKey makes an RSA-3072 key that receives one KEK. Its CKA_UNWRAP_TEMPLATE makes that a key that unwraps
// and never leaves the token; but a template cannot nest, so it would make the KEK without one of its own, too:
// DestroyTransportKey ends it when the KEK is there.
func (t *Token) NewTransportKey(ctx context.Context) (*rsa.PublicKey, error) {
	return t.newReceiver(ctx, transportLabel, importedKEK)
}

// newReceiver makes an RSA-3072 key, with a label that begins so, under which keys come into the token as template has
// them.
func (t *Token) newReceiver(ctx context.Context, label string, template attributes) (*rsa.PublicKey, error) {
	return doAs(ctx, t, Operator, "make a transport key", func(s *session) (*rsa.PublicKey, error) {
		traits, err := t.learn(s)
		if err != nil {
			return nil, err
		}
		id := make([]byte, 20)
		rand.Read(id)
		private := frozen(attributes{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_ID, id), attr(pkcs11.CKA_LABEL, label+hex.EncodeToString(id[:4]))},
			guarded(false), use(privateUsages, pkcs11.CKA_UNWRAP), traits.unwraps(template))
		public, h, err := s.generatePair(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, rsaPublic(3072), private)
		if err != nil {
			return nil, explain("make a transport key", err)
		}
		pub, err := readRSA(s, h)
		return pub, errors.Join(err, explainIf("drop the public half of a transport key", s.DestroyObject(s.h, public)))
	})
}

// TransportKeys are the public halves of the transport keys that the token has, in no order.
func (t *Token) TransportKeys(ctx context.Context) ([]*rsa.PublicKey, error) {
	return t.receivers(ctx, transportLabel)
}

func (t *Token) receivers(ctx context.Context, label string) ([]*rsa.PublicKey, error) {
	return doAs(ctx, t, Operator, "look for transport keys", func(s *session) (all []*rsa.PublicKey, err error) {
		return all, t.eachReceiver(s, label, func(_ pkcs11.ObjectHandle, pub *rsa.PublicKey) { all = append(all, pub) })
	})
}

func (t *Token) eachReceiver(s *session, label string, f func(pkcs11.ObjectHandle, *rsa.PublicKey)) error {
	found, err := s.findObjects(attributes{attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_UNWRAP, true)})
	if err != nil {
		return explain("look for transport keys", err)
	}
	for _, h := range found {
		a, err := s.GetAttributeValue(s.h, h, attributes{attr(pkcs11.CKA_LABEL, nil)})
		if err != nil {
			return explain("look for transport keys", err)
		}
		if !strings.HasPrefix(string(a[0].Value), label) {
			continue
		}
		pub, err := readRSA(s, h)
		if err != nil {
			return err
		}
		f(h, pub)
	}
	return nil
}

// receiver finds the private half of a key of newReceiver's; ErrNoKey if the token has it no more.
func (t *Token) receiver(s *session, label string, pub *rsa.PublicKey) (found pkcs11.ObjectHandle, err error) {
	err = t.eachReceiver(s, label, func(h pkcs11.ObjectHandle, have *rsa.PublicKey) {
		if have.Equal(pub) {
			found = h
		}
	})
	if err == nil && found == 0 {
		err = fmt.Errorf("the transport key: %w", ErrNoKey)
	}
	return found, err
}

// DestroyTransportKey ends a transport key for good. Of one that is gone, it changes nothing.
func (t *Token) DestroyTransportKey(ctx context.Context, pub *rsa.PublicKey) error {
	return t.destroyReceiver(ctx, transportLabel, pub)
}

func (t *Token) destroyReceiver(ctx context.Context, label string, pub *rsa.PublicKey) error {
	return t.with(ctx, "destroy a transport key", func(s *session) error {
		h, err := t.receiver(s, label, pub)
		if errors.Is(err, ErrNoKey) {
			return nil
		}
		if err != nil {
			return err
		}
		return explainIf("destroy a transport key", s.DestroyObject(s.h, h))
	})
}

// UnwrapKEK takes an operator KEK, wrapped under a transport key, into the token, for unwrapping lot keys only and
// never to be extracted: by its CKA_UNWRAP_TEMPLATE, lot keys are as UnwrapLotKey makes them, whoever unwraps them. An
// earlier KEK of the same name and generation is replaced, once the new one has been shown to unwrap.
func (t *Token) UnwrapKEK(ctx context.Context, kek Key, transport *rsa.PublicKey, wrapped []byte) error {
	if len(wrapped) == 0 {
		return errors.New("the enrolment holds no wrapped key")
	}
	_, err := doAs(ctx, t, Operator, "unwrap a KEK", func(s *session) (none struct{}, err error) {
		h, err := t.receiver(s, transportLabel, transport)
		if err != nil {
			return none, err
		}
		traits, err := t.learn(s)
		if err != nil {
			return none, err
		}
		template := join(importedKEK, attributes{attr(pkcs11.CKA_PRIVATE, true)}, traits.unwraps(importedLot))
		unwrap := func(where attributes) (pkcs11.ObjectHandle, error) {
			h, err := s.unwrap(oaep, h, wrapped, frozen(template, where))
			return h, explainIf("unwrap the KEK with the transport key: it was made for another key, or damaged", err)
		}
		trial, err := unwrap(attributes{attr(pkcs11.CKA_TOKEN, false)})
		if err != nil {
			return none, err
		}
		if err := s.DestroyObject(s.h, trial); err != nil {
			return none, explain("drop the trial key", err)
		}
		if err := t.destroy(s, pkcs11.CKO_SECRET_KEY, kek); err != nil {
			return none, err
		}
		_, err = unwrap(named(kek))
		return none, err
	})
	return err
}

// checkWrappingKey refuses a public key too weak to carry an AES-256 key.
func checkWrappingKey(pub *rsa.PublicKey) error {
	if bits := pub.N.BitLen(); bits < 3072 || bits > 8192 {
		return fmt.Errorf("the RSA key has %d bits; it must have 3072 at least, to carry an AES-256 key", bits)
	}
	if pub.E != kme.PublicExponent {
		return fmt.Errorf("the RSA key's public exponent is %d; only %d is accepted", pub.E, kme.PublicExponent)
	}
	if err := checkModulus(pub.N); err != nil {
		return fmt.Errorf("the RSA key's modulus is weak: %w: it needs to be made anew, by another generator", err)
	}
	return nil
}

func wrappingPublic(pub *rsa.PublicKey) attributes {
	return attributes{
		attr(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA), attr(pkcs11.CKA_PRIVATE, false),
		attr(pkcs11.CKA_MODULUS, pub.N.Bytes()), attr(pkcs11.CKA_PUBLIC_EXPONENT, rsaExponent),
		attr(pkcs11.CKA_WRAP, true), attr(pkcs11.CKA_ENCRYPT, false), attr(pkcs11.CKA_VERIFY, false),
	}
}
