package hsmkeys

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"
	"github.com/tink-crypto/tink-go/v2/kwp/subtle"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyop"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// NSS softoken has no place for some attributes in token objects. That is learnt from it, once, and leaves nothing
// there; what is left of the templates, its keys have.
func TestNSSTemplates(t *testing.T) {
	ctx := t.Context()
	tok := softhsmtest.NSS(t)
	token := open(t, tok)
	weak := slices.Repeat([]string{"it does not do what it should, and says so at some length"}, 30)
	must[bool](t)(token.Dedicate(ctx, Dedication{Side: Operator, Weak: weak}))
	must[bool](t)(token.EnsureStorageKey(ctx))
	must[bool](t)(token.EnsureLedgerKey(ctx))
	if n := countObjects(t, token, nil); n != 3 {
		t.Errorf("%d objects of a dedication and two keys", n)
	}
	storage := token.mustFind(t, pkcs11.CKO_SECRET_KEY, keyspec.Storage)
	for attribute, want := range map[uint]bool{
		pkcs11.CKA_TOKEN: true, pkcs11.CKA_PRIVATE: true, pkcs11.CKA_SENSITIVE: true, pkcs11.CKA_MODIFIABLE: false,
		pkcs11.CKA_WRAP: true, pkcs11.CKA_UNWRAP: true, pkcs11.CKA_ENCRYPT: false, pkcs11.CKA_DECRYPT: false,
		pkcs11.CKA_SIGN: false, pkcs11.CKA_VERIFY: false, pkcs11.CKA_DERIVE: false,
	} {
		err := token.hsm.With(ctx, "test", func(s *p11.Session) error {
			a, err := s.Get(storage, attribute)
			if err == nil && ck.IsTrue(a[0]) != want {
				t.Errorf("attribute %#x is %v", attribute, a[0])
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

// The keys of an operator's token as NSS has them, read back. Where it does not keep WRAP_WITH_TRUSTED, storage and
// ledger key never leave. It says LOCAL of no key, and lets every RSA private key that it unwraps sign and unwrap,
// whatever the template says.
func TestNSSAttributes(t *testing.T) {
	ctx := t.Context()
	token := newOperatorOn(t, softhsmtest.NSS(t))
	transport := must[*rsa.PublicKey](t)(token.NewTransportKey(ctx))
	var receiver pkcs11.ObjectHandle
	if err := token.hsm.With(ctx, "test", func(s *p11.Session) (err error) {
		receiver, err = keyop.Receiver(s, keyspec.TransportLabel, transport)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	value := kme.RandomSecret().Bytes()
	if err := token.UnwrapKEK(ctx, testKEK, transport,
		must[[]byte](t)(rsa.EncryptOAEP(sha1.New(), rand.Reader, transport, value, nil))); err != nil {
		t.Fatal(err)
	}
	lot := must[*rsa.PrivateKey](t)(testkeys.RSA(2048))
	grant := must[[]byte](t)(must[*subtle.KWP](t)(subtle.NewKWP(value)).
		Wrap(must[[]byte](t)(x509.MarshalPKCS8PrivateKey(lot))))
	must[bool](t)(token.UnwrapLotKey(ctx, testLot, testKEK, grant, &lot.PublicKey))
	for _, c := range []struct {
		name string
		h    pkcs11.ObjectHandle
		want string
	}{
		{"transport key", receiver, "TOKEN PRIVATE SENSITIVE ALWAYS_SENSITIVE NEVER_EXTRACTABLE UNWRAP"},
		{"KEK", token.mustFind(t, pkcs11.CKO_SECRET_KEY, testKEK), "TOKEN PRIVATE SENSITIVE UNWRAP"},
		{"lot key", token.mustFind(t, pkcs11.CKO_PRIVATE_KEY, testLot), "TOKEN PRIVATE SENSITIVE SIGN DECRYPT UNWRAP"},
		{"storage key", token.mustFind(t, pkcs11.CKO_SECRET_KEY, keyspec.Storage),
			"TOKEN PRIVATE SENSITIVE ALWAYS_SENSITIVE NEVER_EXTRACTABLE WRAP UNWRAP"},
		{"ledger key", token.mustFind(t, pkcs11.CKO_SECRET_KEY, keyspec.Ledger),
			"TOKEN PRIVATE SENSITIVE ALWAYS_SENSITIVE NEVER_EXTRACTABLE SIGN"},
	} {
		if got := trueAttributes(t, token, c.h); got != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.name, got, c.want)
		}
	}
}

// A module has one C_Initialize, and with it one string of its own, for as long as it is in use.
func TestInitReserved(t *testing.T) {
	tok, other := softhsmtest.NSS(t), softhsmtest.NSS(t)
	elsewhere := strings.ReplaceAll(other.URI, other.Module, tok.Module) // the other's database in the first's module
	token := must[*OperatorToken](t)(OpenOperator(t.Context(), tok.URI, Options{}))
	if _, err := OpenOperator(t.Context(), elsewhere, Options{}); err == nil ||
		!strings.Contains(err.Error(), "x-init-reserved") {
		t.Errorf("a second string: %v", err)
	}
	bare, pin, _ := strings.Cut(tok.URI, "&x-init-reserved=")
	_, pin, _ = strings.Cut(pin, "&")
	if _, err := OpenOperator(t.Context(), bare+"&"+pin, Options{}); err == nil {
		t.Error("a second opening without the string worked")
	}
	must[bool](t)(token.Dedicate(t.Context(), Dedication{Side: Operator}))
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	token = must[*OperatorToken](t)(OpenOperator(t.Context(), elsewhere, Options{}))
	if _, err := token.Weak(t.Context()); err == nil {
		t.Error("the other database is the first")
	}
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenOperator(t.Context(), bare+"&"+pin, Options{}); err == nil ||
		!strings.Contains(err.Error(), "CKR_ARGUMENTS_BAD") || !strings.Contains(err.Error(), "x-init-reserved") {
		t.Errorf("NSS without its string: %v", err)
	}
	if _, err := OpenOperator(t.Context(), bare+"&x-init-reserved=a%00b&"+pin, Options{}); err == nil ||
		!strings.Contains(err.Error(), "zero byte") {
		t.Errorf("a zero byte: %v", err)
	}
}
