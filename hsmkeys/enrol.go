package hsmkeys

import (
	"context"
	"crypto/rsa"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/internal/weakkey"
)

// EnrollKey makes the key of an operator (RoleKEK: it carries lot keys) or of a fixture (RoleInjection: it carries
// device keys), AES-256, and imports the RSA key that receives it. Only the security officer can make TRUSTED objects,
// and only at creation, so it logs in as the security officer, once: no token of the URI may be open in the process.
//
// Both are WRAP_WITH_TRUSTED, and leave under a TRUSTED key only. By their CKA_WRAP_TEMPLATEs, the receiving key wraps
// nothing but its one key, a KEK nothing but RSA private keys, and an injection key nothing but device keys. See
// docs/decisions/0022-keys-go-where-they-belong.md.
func EnrollKey(ctx context.Context, tokenURI string, officer PIN, k Key, to *rsa.PublicKey) (created bool, err error) {
	if err := weakkey.CheckWrapping(to); err != nil {
		return false, err
	}
	// The security officer cannot see private objects, so all are made with PRIVATE=false.
	wraps := keyspec.LotKeys
	if k.Role == RoleInjection {
		wraps = keyspec.DeviceKeys
	}
	template := ck.Join(ck.Attributes{ck.Attr(pkcs11.CKA_PRIVATE, false), ck.Attr(pkcs11.CKA_TRUSTED, true)},
		keyspec.LeavesUnderTrusted,
		ck.Use(ck.Usages, pkcs11.CKA_WRAP), keyspec.ByKWP, ck.Nested(pkcs11.CKA_WRAP_TEMPLATE, wraps))
	err = asOfficer(tokenURI, officer, func(b *base) error {
		if err := b.checkRecipient(ctx, keyspec.Recipient(k), to); err != nil {
			return err
		}
		if created, err = b.ensureSecret(ctx, Factory, k, pkcs11.CKM_AES_KEY_GEN, template); err != nil {
			return err
		}
		return b.importRecipient(ctx, Factory, keyspec.Recipient(k), to,
			ck.Attributes{ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), ck.Attr(pkcs11.CKA_ID, k.ID())})
	})
	return created, err
}

// importRecipient imports an RSA key that wraps only keys of a template. It replaces the one of an earlier enrolment,
// or of a run that was interrupted. The security officer is logged in.
func (b *base) importRecipient(ctx context.Context, side Side, r Key, to *rsa.PublicKey, wraps ck.Attributes) error {
	return b.as(ctx, side, "import a key that receives", func(s *p11.Session) error {
		if err := b.destroy(s, pkcs11.CKO_PUBLIC_KEY, r); err != nil {
			return err
		}
		_, err := s.Create(ck.Frozen(keyspec.Named(r), keyspec.Wrapping(to),
			ck.Attributes{ck.Attr(pkcs11.CKA_TRUSTED, true)},
			ck.Nested(pkcs11.CKA_WRAP_TEMPLATE, wraps)))
		return p11.Explain("import the public key that receives into the token", err)
	})
}

// receives gives the RSA keys that the security officer has imported.
var receives = ck.Attributes{
	ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), ck.Attr(pkcs11.CKA_TOKEN, true),
	ck.Attr(pkcs11.CKA_TRUSTED, true),
}

// checkRecipient refuses a key that is enrolled already for somebody else: a fixture's is never an operator's.
func (b *base) checkRecipient(ctx context.Context, r Key, to *rsa.PublicKey) error {
	return b.hsm.With(ctx, "look at the keys that receive", func(s *p11.Session) error {
		trusted, err := s.Find(receives)
		if err != nil {
			return p11.Explain("look at the keys that receive", err)
		}
		for _, h := range trusted {
			a, err := s.Get(h, pkcs11.CKA_ID, pkcs11.CKA_LABEL)
			if err != nil {
				return p11.Explain("look at the keys that receive", err)
			}
			if string(a[0]) == string(r.ID()) {
				continue
			}
			if have, err := keyspec.ReadRSA(s, h); err != nil {
				return err
			} else if have.N.Cmp(to.N) == 0 {
				return fmt.Errorf("this key is enrolled already, as %q: whoever has its private half could open "+
					"what is for either; ask for another key", a[1])
			}
		}
		return nil
	})
}

// WrapEnrolled wraps a key of EnrollKey under the RSA key that receives it, by RSA-OAEP (see keyspec.OAEP).
func (t *FactoryToken) WrapEnrolled(ctx context.Context, k Key) (wrapped []byte, err error) {
	return doAs(ctx, t.base, Factory, "wrap an enrolled key", func(s *p11.Session) ([]byte, error) {
		h, err := t.find(s, pkcs11.CKO_SECRET_KEY, k)
		if err != nil {
			return nil, err
		}
		pub, err := t.find(s, pkcs11.CKO_PUBLIC_KEY, keyspec.Recipient(k))
		if err != nil {
			return nil, err
		}
		wrapped, err := s.Wrap(keyspec.OAEP, pub, h, make([]byte, keyspec.WrappedRoom))
		return wrapped, p11.Explain("wrap "+k.Label(), err)
	})
}

// Fixtures are the names of a manufacturer's fixtures that are enrolled in the token, in no order.
func (t *FactoryToken) Fixtures(ctx context.Context, manufacturer string) (names []string, err error) {
	return doAs(ctx, t.base, Factory, "look for fixtures", func(s *p11.Session) (names []string, err error) {
		found, err := s.Find(receives)
		if err != nil {
			return nil, p11.Explain("look for fixtures", err)
		}
		for _, h := range found {
			k, _, err := keyspec.Whose(s, h)
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
