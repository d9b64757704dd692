package hsmkeys

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testkeys"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// trueAttributes names those of an object that are true. One that this kind of object, or the token, does not have is
// not.
func trueAttributes(t *testing.T, token holder, h pkcs11.ObjectHandle) string {
	t.Helper()
	var is []string
	for _, e := range readBack {
		err := token.held().hsm.With(t.Context(), "test", func(s *p11.Session) error {
			a, err := s.Get(h, e.typ)
			if err == nil && ck.IsTrue(a[0]) {
				is = append(is, e.name)
			}
			return err
		})
		if err != nil && !ck.IsCKR(err, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID) {
			t.Fatalf("%s: %v", e.name, err)
		}
	}
	return strings.Join(is, " ")
}

// What DESIGN calls the attributes that matter, read back from the token.
func TestAttributes(t *testing.T) {
	ctx := t.Context()
	operator, factory, transport, pub := newSides(t)
	if err := operator.UnwrapKEK(ctx, testKEK, transport,
		must[[]byte](t)(factory.WrapEnrolled(ctx, testKEK))); err != nil {
		t.Fatal(err)
	}
	if _, err := operator.UnwrapLotKey(ctx, testLot, testKEK,
		must[[]byte](t)(factory.WrapLotKey(ctx, testLot, testKEK)), pub); err != nil {
		t.Fatal(err)
	}

	for _, c := range []struct {
		name  string
		token *base
		class uint
		key   Key
		want  string        // the attributes that are true
		by    ck.Attributes // what it allows
	}{
		{"lot key", factory.base, pkcs11.CKO_PRIVATE_KEY, testLot,
			"TOKEN PRIVATE SENSITIVE EXTRACTABLE MODIFIABLE ALWAYS_SENSITIVE LOCAL DECRYPT WRAP_WITH_TRUSTED",
			keyspec.ByRawRSA},
		{"signing key", factory.base, pkcs11.CKO_PRIVATE_KEY, testSigning,
			"TOKEN PRIVATE SENSITIVE ALWAYS_SENSITIVE NEVER_EXTRACTABLE LOCAL SIGN",
			ck.Mechanisms(pkcs11.CKM_ECDSA)},
		{"injection key", factory.base, pkcs11.CKO_SECRET_KEY, testInjection,
			"TOKEN SENSITIVE EXTRACTABLE ALWAYS_SENSITIVE LOCAL WRAP WRAP_WITH_TRUSTED TRUSTED",
			keyspec.ByKWP},
		{"KEK at the factory", factory.base, pkcs11.CKO_SECRET_KEY, testKEK,
			"TOKEN SENSITIVE EXTRACTABLE ALWAYS_SENSITIVE LOCAL WRAP WRAP_WITH_TRUSTED TRUSTED",
			keyspec.ByKWP},
		{"KEK at the operator", operator.base, pkcs11.CKO_SECRET_KEY, testKEK, "TOKEN PRIVATE SENSITIVE UNWRAP",
			keyspec.ByKWP},
		{"lot key at the operator", operator.base, pkcs11.CKO_PRIVATE_KEY, testLot, "TOKEN PRIVATE SENSITIVE DECRYPT",
			keyspec.ByRawRSA},
		{"storage key", operator.base, pkcs11.CKO_SECRET_KEY, keyspec.Storage,
			"TOKEN PRIVATE SENSITIVE EXTRACTABLE ALWAYS_SENSITIVE LOCAL WRAP UNWRAP WRAP_WITH_TRUSTED",
			keyspec.BySealing},
		{"ledger key", operator.base, pkcs11.CKO_SECRET_KEY, keyspec.Ledger,
			"TOKEN PRIVATE SENSITIVE EXTRACTABLE ALWAYS_SENSITIVE LOCAL SIGN WRAP_WITH_TRUSTED",
			ck.Mechanisms(pkcs11.CKM_SHA256_HMAC)},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := trueAttributes(t, c.token, c.token.mustFind(t, c.class, c.key)); got != c.want {
				t.Errorf("\n got %s\nwant %s", got, c.want)
			}
			if err := c.token.hsm.With(ctx, "test", func(s *p11.Session) error {
				got, err := s.Get(c.token.mustFind(t, c.class, c.key), pkcs11.CKA_ALLOWED_MECHANISMS)
				if err == nil && !bytes.Equal(got[0], c.by[0].Value) {
					err = fmt.Errorf("allows % X, want % X", got[0], c.by[0].Value)
				}
				return err
			}); err != nil {
				t.Error(err)
			}
		})
		// Nobody gets at what is secret, nor changes what the key may do.
		t.Run(c.name+" keeps its secret", func(t *testing.T) {
			h := c.token.mustFind(t, c.class, c.key)
			values := []uint{pkcs11.CKA_VALUE}
			if c.class == pkcs11.CKO_PRIVATE_KEY && c.key.Role != RoleSigning {
				values = []uint{pkcs11.CKA_PRIVATE_EXPONENT, pkcs11.CKA_PRIME_1, pkcs11.CKA_PRIME_2,
					pkcs11.CKA_EXPONENT_1, pkcs11.CKA_EXPONENT_2, pkcs11.CKA_COEFFICIENT}
			}
			for _, typ := range values {
				err := c.token.hsm.With(ctx, "test", func(s *p11.Session) error {
					_, err := s.Get(h, typ)
					return err
				})
				if !ck.IsCKR(err, pkcs11.CKR_ATTRIBUTE_SENSITIVE) {
					t.Errorf("attribute 0x%X: %v", typ, err)
				}
			}
			// The lot key may be sealed, so it may be changed; the token still holds what matters about it.
			changes := []ck.Attributes{{ck.Attr(pkcs11.CKA_SENSITIVE, false)},
				{ck.Attr(pkcs11.CKA_WRAP_WITH_TRUSTED, false)}}
			if c.name != "lot key" {
				changes = append(changes, ck.Attributes{ck.Attr(pkcs11.CKA_DECRYPT, true)},
					ck.Attributes{ck.Attr(pkcs11.CKA_EXTRACTABLE, true)},
					ck.Attributes{ck.Attr(pkcs11.CKA_SIGN, true)})
			}
			for _, change := range changes {
				err := c.token.hsm.With(ctx, "test", func(s *p11.Session) error {
					return s.Ctx.SetAttributeValue(s.ID, h, change)
				})
				if err == nil {
					t.Errorf("attribute 0x%X was changed", change[0].Type)
				}
			}
			err := c.token.hsm.With(ctx, "test", func(s *p11.Session) error {
				_, err := s.Copy(h, ck.Attributes{ck.Attr(pkcs11.CKA_TOKEN, false)})
				return err
			})
			if err == nil {
				t.Error("the key was copied")
			}
		})
	}
}

// A template with more attributes than C has room for is refused: cut short, it would make a key without the attributes
// that protect it.
func TestTemplateRoom(t *testing.T) {
	token := newOperator(t)
	_, sealed, err := token.sample(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	storage := token.mustFind(t, pkcs11.CKO_SECRET_KEY, keyspec.Storage)
	// fill repeats one attribute of a template until there are n.
	fill := func(a ck.Attributes, n int) ck.Attributes {
		for a = slices.Clone(a); len(a) < n; {
			a = append(a, a[len(a)-1])
		}
		return a
	}
	value := &pkcs11.Attribute{Type: pkcs11.CKA_VALUE, Value: make([]byte, 32)}
	for name, take := range map[string]func(*p11.Session, int) (pkcs11.ObjectHandle, error){
		"create": func(s *p11.Session, n int) (pkcs11.ObjectHandle, error) {
			return s.Create(append(fill(keyspec.SealableKME, n-1), value))
		},
		"unwrap": func(s *p11.Session, n int) (pkcs11.ObjectHandle, error) {
			return s.Unwrap(pkcs11.CKM_AES_KEY_WRAP, storage, sealed[1:], fill(keyspec.UsableKME, n))
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, n := range []int{28, 32, 33, 1000} {
				before := countObjects(t, token, nil)
				err := token.hsm.With(t.Context(), "test", func(s *p11.Session) error {
					h, err := take(s, n)
					if err == nil {
						err = s.Destroy(h)
					} else if strings.Contains(err.Error(), "there is room for 32") {
						err = errRoom
					}
					return err
				})
				if (n > 32) != (err == errRoom) || n == 28 && err != nil { // of 32, SoftHSM wants some itself
					t.Errorf("%d attributes: %v", n, err)
				}
				if objects := countObjects(t, token, nil); objects > before { // what sample left may go
					t.Errorf("%d attributes: %d objects, before %d", n, objects, before)
				}
			}
		})
	}
}

// SoftHSM is initialised anew after so many uses, under all that goes on: nothing fails by it, signers and keys are
// found again.
func TestRenew(t *testing.T) {
	tok, _ := newFactoryClosed(t, nil)
	token := must[*FactoryToken](t)(OpenFactory(t.Context(), tok.URI, Options{renewAfter: 25}))
	closeAfter(t, token.base)
	s := must[crypto.Signer](t)(token.Signer(testSigning))
	make, before := func() {
		if _, _, err := token.MakeDeviceKey(t.Context(), kme.SuiteECDSA, testInjection); err != nil {
			t.Error(err)
		}
	}, token.hsm.Epoch()
	var all sync.WaitGroup
	for range 6 {
		all.Go(func() {
			for range 50 {
				make()
				digest := sha256.Sum256([]byte("x"))
				sig, err := s.Sign(rand.Reader, digest[:], crypto.SHA256)
				if err != nil || !ecdsa.VerifyASN1(s.Public().(*ecdsa.PublicKey), digest[:], sig) {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	for end := time.Now().Add(testproc.Patience); token.hsm.Epoch() == before; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the module was not reinitialised")
		}
	}
	// A PIN that is gone is no reason to stop.
	if err := os.Remove(tok.PINFile); err != nil {
		t.Fatal(err)
	}
	for range 30 {
		make()
	}
	if h := token.Health(); h.Cause != nil || h.Reinitialised != 0 {
		t.Errorf("%+v", h)
	}
}

// A panic in the code of a method ends its call and nothing else.
func TestPanicInAMethod(t *testing.T) {
	token := newOperator(t)
	importLot(t, token, testLot, must[*rsa.PrivateKey](t)(testkeys.RSA(2048)))
	log := testproc.Logged(t)
	if p := panics.Of(token.ProveLotKey(t.Context(), testLot, nil)); p == nil ||
		!strings.Contains(log.String(), "hsmkeys.") {
		t.Errorf("%v, in the log: %s", p, log)
	}
	if err := token.Ping(t.Context()); err != nil {
		t.Error(err)
	}
	if h := token.Health(); h.Panics != 1 || h.Cause != nil || h.Hung != 0 {
		t.Errorf("%+v", h)
	}
}

// The security officer's PIN is tried once; the key that receives is looked at before it is.
func TestEnrolRefuses(t *testing.T) {
	tok := softhsmtest.Token(t)
	good := &must[*rsa.PrivateKey](t)(testkeys.RSA(3072)).PublicKey
	if _, err := EnrollKey(t.Context(), tok.URI, PIN(tok.PIN), testKEK, good); err == nil ||
		!strings.Contains(err.Error(), "refused the PIN") {
		t.Errorf("a wrong security officer's PIN: %v", err)
	}
	weak := &must[*rsa.PrivateKey](t)(testkeys.RSA(2048)).PublicKey
	if _, err := EnrollKey(t.Context(), tok.URI, PIN(tok.SOPIN), testKEK, weak); err == nil {
		t.Error("a weak transport key was taken")
	}
}
