package hsmkeys

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"

	"github.com/tink-crypto/tink-go/v2/kwp/subtle"

	"github.com/kmehsm/kmehsm/kme"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/internal/softhsmtest"
)

// NSS softoken has no place for some attributes in token objects. That is learnt from it, once, and leaves nothing there; what is left of the
// templates, its keys have.
func TestNSSTemplates(t *testing.T) {
	ctx := t.Context()
	tok := softhsmtest.NSS(t)
	token := open(t, tok)
	if lacks := token.lacks.Load(); lacks != 0 {
		t.Errorf("lacks %b before anything was made", lacks)
	}
	weak := slices.Repeat([]string{"it does not do what it should, and says so at some length"}, 30)
	must[bool](t)(token.Dedicate(ctx, Dedication{Side: Operator, Weak: weak}))
	if lacks := token.lacks.Load(); lacks != 1<<len(optional)-1 {
		t.Errorf("lacks %b", lacks)
	}
	must[bool](t)(token.EnsureStorageKey(ctx))
	must[bool](t)(token.EnsureLedgerKey(ctx))
	if n := countObjects(t, token, nil); n != 3 {
		t.Errorf("%d objects of a dedication and two keys", n)
	}
	storage := token.mustFind(t, pkcs11.CKO_SECRET_KEY, storageKey)
	for attribute, want := range map[uint]bool{
		pkcs11.CKA_TOKEN: true, pkcs11.CKA_PRIVATE: true, pkcs11.CKA_SENSITIVE: true, pkcs11.CKA_MODIFIABLE: false, pkcs11.CKA_WRAP: true, pkcs11.CKA_UNWRAP: true,
		pkcs11.CKA_ENCRYPT: false, pkcs11.CKA_DECRYPT: false, pkcs11.CKA_SIGN: false, pkcs11.CKA_VERIFY: false, pkcs11.CKA_DERIVE: false,
	} {
		err := token.with(ctx, "test", func(s *session) error {
			a, err := s.GetAttributeValue(s.h, storage, attributes{attr(attribute, nil)})
			if err == nil && isTrue(a[0]) != want {
				t.Errorf("attribute %#x is %v", attribute, a[0].Value)
			}
			return err
		})
		if err != nil {
			t.Errorf("attribute %#x: %v", attribute, err)
		}
	}
	again := open(t, tok) // of the same module, beside the first
	if got := must[[]string](t)(again.Weak(ctx)); !slices.Equal(got, weak) {
		t.Errorf("weak: %q", got)
	}
	if created := must[bool](t)(again.EnsureStorageKey(ctx)); created {
		t.Error("a second storage key was made")
	}
}

// The keys of an operator's token as NSS has them, read back. Where it does not keep WRAP_WITH_TRUSTED, storage and ledger key never leave. It says LOCAL
// of no key, and lets every RSA private key that it unwraps sign and unwrap, whatever the template says.
func TestNSSAttributes(t *testing.T) {
	ctx := t.Context()
	token := newOperatorOn(t, softhsmtest.NSS(t))
	transport := must[*rsa.PublicKey](t)(token.NewTransportKey(ctx))
	var receiver pkcs11.ObjectHandle
	if err := token.with(ctx, "test", func(s *session) (err error) { receiver, err = token.receiver(s, transportLabel, transport); return err }); err != nil {
		t.Fatal(err)
	}
	value := kme.RandomSecret().Bytes()
	if err := token.UnwrapKEK(ctx, testKEK, transport, must[[]byte](t)(rsa.EncryptOAEP(sha1.New(), rand.Reader, transport, value, nil))); err != nil {
		t.Fatal(err)
	}
	lot := must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048))
	grant := must[[]byte](t)(must[*subtle.KWP](t)(subtle.NewKWP(value)).Wrap(must[[]byte](t)(x509.MarshalPKCS8PrivateKey(lot))))
	must[bool](t)(token.UnwrapLotKey(ctx, testLot, testKEK, grant, &lot.PublicKey))
	for _, c := range []struct {
		name string
		h    pkcs11.ObjectHandle
		want string
	}{
		{"transport key", receiver, "TOKEN PRIVATE SENSITIVE ALWAYS_SENSITIVE NEVER_EXTRACTABLE UNWRAP"},
		{"KEK", token.mustFind(t, pkcs11.CKO_SECRET_KEY, testKEK), "TOKEN PRIVATE SENSITIVE UNWRAP"},
		{"lot key", token.mustFind(t, pkcs11.CKO_PRIVATE_KEY, testLot), "TOKEN PRIVATE SENSITIVE SIGN DECRYPT UNWRAP"},
		{"storage key", token.mustFind(t, pkcs11.CKO_SECRET_KEY, storageKey), "TOKEN PRIVATE SENSITIVE ALWAYS_SENSITIVE NEVER_EXTRACTABLE WRAP UNWRAP"},
		{"ledger key", token.mustFind(t, pkcs11.CKO_SECRET_KEY, ledgerKey), "TOKEN PRIVATE SENSITIVE ALWAYS_SENSITIVE NEVER_EXTRACTABLE SIGN"},
	} {
		if got := trueAttributes(t, token, c.h); got != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.name, got, c.want)
		}
	}
}

// What keeps a key is left out for no less than a token that never takes it: not for a fault that passes, and not for a refusal of something else.
func TestNothingIsLeftOutInVain(t *testing.T) {
	for name, token := range map[string]*Token{"SoftHSM": newOperatorOn(t, softhsmtest.Token(t)), "NSS": newOperatorOn(t, softhsmtest.NSS(t))} {
		t.Run(name, func(t *testing.T) {
			lacks, objects := token.lacks.Load(), countObjects(t, token, nil)
			for _, refusal := range append(refusedTemplate, pkcs11.CKR_MECHANISM_INVALID) {
				var asked []attributes
				err := token.with(t.Context(), "test", func(s *session) error {
					_, err := s.fitting(frozen(guarded(false)), func(a attributes) (pkcs11.ObjectHandle, error) {
						asked = append(asked, a)
						return 0, refusal
					})
					if !isCKR(err, refusal) {
						t.Errorf("%v: %v", refusal, err)
					}
					return nil
				})
				if err != nil || len(asked) != 1 {
					t.Errorf("%v: asked %d times, %v", refusal, len(asked), err)
				}
			}
			if now, left := token.lacks.Load(), countObjects(t, token, nil); now != lacks || left != objects {
				t.Errorf("lacks %b, before %b; %d objects, before %d", now, lacks, left, objects)
			}
		})
	}
	if lacks := newOperatorOn(t, softhsmtest.Token(t)).lacks.Load(); lacks != 0 {
		t.Errorf("SoftHSM lacks %b", lacks)
	}
}

// A module has one C_Initialize, and with it one string of its own, for as long as it is in use.
func TestInitReserved(t *testing.T) {
	tok, other := softhsmtest.NSS(t), softhsmtest.NSS(t)
	elsewhere := strings.ReplaceAll(other.URI, other.Module, tok.Module) // the other's database in the first's module
	token := must[*Token](t)(Open(t.Context(), tok.URI))
	if _, err := Open(t.Context(), elsewhere); err == nil || !strings.Contains(err.Error(), "x-init-reserved") {
		t.Errorf("a second string: %v", err)
	}
	bare, pin, _ := strings.Cut(tok.URI, "&x-init-reserved=")
	_, pin, _ = strings.Cut(pin, "&")
	if _, err := Open(t.Context(), bare+"&"+pin); err == nil {
		t.Error("a second opening without the string worked")
	}
	must[bool](t)(token.Dedicate(t.Context(), Dedication{Side: Operator}))
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	token = must[*Token](t)(Open(t.Context(), elsewhere))
	if _, err := token.Weak(t.Context()); err == nil {
		t.Error("the other database is the first")
	}
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), bare+"&"+pin); err == nil || !strings.Contains(err.Error(), "CKR_ARGUMENTS_BAD") || !strings.Contains(err.Error(), "x-init-reserved") {
		t.Errorf("NSS without its string: %v", err)
	}
	if _, err := Open(t.Context(), bare+"&x-init-reserved=a%00b&"+pin); err == nil || !strings.Contains(err.Error(), "zero byte") {
		t.Errorf("a zero byte: %v", err)
	}
}
