package hsmkeys

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"github.com/tink-crypto/tink-go/v2/kwp/subtle"

	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/kme"
)

func TestMain(m *testing.M) {
	if os.Getenv(childURI) != "" { // its tokens are those of the process that began it
		os.Exit(m.Run())
	}
	softhsmtest.Main(m, 64)
}

// childURI names the token of a test's second process.
const childURI = "KMEHSM_TEST_CHILD_URI"

const manufacturer = "test-manufacturer"

var (
	testSigning   = Key{Role: RoleSigning}
	testInjection = Key{Role: RoleInjection, Manufacturer: manufacturer, Name: "f1"}
	testLot       = Key{Role: RoleLot, Manufacturer: manufacturer, Name: "L1"}
	testKEK       = Key{Role: RoleKEK, Manufacturer: manufacturer, Name: "op"}
)

func open(t testing.TB, tok softhsmtest.Tok) *Token {
	t.Helper()
	token, err := Open(t.Context(), tok.URI)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := token.Close(); err != nil {
			t.Error(err)
		}
	})
	return token
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// newOperator is an operator's token with its own keys.
func newOperator(t testing.TB) *Token { return newOperatorOn(t, softhsmtest.Operator(t)) }

func newOperatorOn(t testing.TB, tok softhsmtest.Tok) *Token {
	t.Helper()
	token := open(t, tok)
	must[bool](t)(token.Dedicate(t.Context(), Dedication{Side: Operator}))
	must[bool](t)(token.EnsureStorageKey(t.Context()))
	must[bool](t)(token.EnsureLedgerKey(t.Context()))
	return token
}

// fixtureKey is the private half of the key that the test's fixture has.
var fixtureKey = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		panic(err)
	}
	return key
})

// newFactory is a manufacturer's token with its own keys and a fixture's, and a KEK for the operator, if there is one, whose transport key it gives.
func newFactory(t testing.TB, operator *Token) (*Token, *rsa.PublicKey) {
	t.Helper()
	tok := softhsmtest.Token(t)
	token := must[*Token](t)(Open(t.Context(), tok.URI))
	must[bool](t)(token.Dedicate(t.Context(), Dedication{Side: Factory}))
	must[bool](t)(token.EnsureSigningKey(t.Context(), testSigning))
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	var transport *rsa.PublicKey
	if operator != nil {
		transport = must[*rsa.PublicKey](t)(operator.NewTransportKey(t.Context()))
		must[bool](t)(EnrollKey(t.Context(), tok.URI, PIN(tok.SOPIN), testKEK, transport))
	}
	must[bool](t)(EnrollKey(t.Context(), tok.URI, PIN(tok.SOPIN), testInjection, &fixtureKey().PublicKey))
	return open(t, tok), transport
}

func (t *Token) mustFind(tb testing.TB, class uint, k Key) pkcs11.ObjectHandle {
	tb.Helper()
	var h pkcs11.ObjectHandle
	err := t.with(context.Background(), "test", func(s *session) (err error) {
		h, err = t.find(s, class, k)
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	return h
}

// importLot puts a software key into a token as a lot key, as only a test may.
func importLot(t testing.TB, token *Token, k Key, key *rsa.PrivateKey) {
	t.Helper()
	err := token.with(t.Context(), "test", func(s *session) error {
		_, err := s.CreateObject(s.h, join(named(k), guarded(false), use(privateUsages, pkcs11.CKA_DECRYPT), rsaPrivate(key)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// rsaPrivate is the part of a private key object's template that holds the key.
func rsaPrivate(key *rsa.PrivateKey) attributes {
	return attributes{
		attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA),
		attr(pkcs11.CKA_MODULUS, key.N.Bytes()), attr(pkcs11.CKA_PUBLIC_EXPONENT, rsaExponent),
		attr(pkcs11.CKA_PRIVATE_EXPONENT, key.D.Bytes()),
		attr(pkcs11.CKA_PRIME_1, key.Primes[0].Bytes()), attr(pkcs11.CKA_PRIME_2, key.Primes[1].Bytes()),
		attr(pkcs11.CKA_EXPONENT_1, key.Precomputed.Dp.Bytes()), attr(pkcs11.CKA_EXPONENT_2, key.Precomputed.Dq.Bytes()),
		attr(pkcs11.CKA_COEFFICIENT, key.Precomputed.Qinv.Bytes()),
	}
}

// vectors are the known answers of kme/testdata.
func vectors(t *testing.T) (v struct {
	Lots []struct {
		Name string
		Key  string `json:"private_key_pkcs8_pem"`
	}
	Vectors []struct {
		Name, Suite, Expect, Why string
		Lot                      string   `json:"lot_key"`
		Device                   []byte   `json:"device_public_key_spki_b64"`
		KME                      hexBytes `json:"kme_hex"`
		Payload                  hexBytes `json:"payload_hex"`
		NWSig                    hexBytes `json:"nw_sig_hex"`
	}
}) {
	t.Helper()
	data, err := os.ReadFile(filepath.FromSlash("../kme/testdata/kme-payload.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

type hexBytes []byte

func (h *hexBytes) UnmarshalText(b []byte) error {
	v, ok := new(big.Int).SetString("1"+string(b), 16)
	if !ok {
		return errors.New("not hex")
	}
	if *h = nil; len(b) > 0 {
		*h = v.Bytes()
		if len(b)%2 == 0 {
			*h = (*h)[1:]
		}
	}
	return nil
}

// Every known answer, with raw decryption, C_Verify, tagging and sealing in the token.
func TestVectors(t *testing.T) {
	token := newOperator(t)
	v := vectors(t)
	lots := map[string]*rsa.PublicKey{}
	for _, l := range v.Lots {
		block, _ := pem.Decode([]byte(l.Key))
		key := must[any](t)(x509.ParsePKCS8PrivateKey(block.Bytes)).(*rsa.PrivateKey)
		lots[l.Name] = &key.PublicKey
		importLot(t, token, Key{Role: RoleLot, Manufacturer: manufacturer, Name: l.Name}, key)
		if err := token.ProveLotKey(t.Context(), Key{Role: RoleLot, Manufacturer: manufacturer, Name: l.Name}, &key.PublicKey); err != nil {
			t.Error(err)
		}
	}
	tags := map[string]bool{}
	for _, c := range v.Vectors {
		t.Run(c.Name, func(t *testing.T) {
			suite := must[kme.Suite](t)(kme.ParseSuite(c.Suite))
			device := must[any](t)(x509.ParsePKIXPublicKey(c.Device))
			o, err := token.OpenPayload(t.Context(), Payload{Suite: suite, Lot: Key{Role: RoleLot, Manufacturer: manufacturer, Name: c.Lot}, N: lots[c.Lot], Device: device, Bytes: c.Payload})
			switch {
			case c.Why == "length":
				if err == nil {
					t.Fatal("accepted")
				}
			case err != nil:
				t.Fatal(err)
			case c.Expect == "reject":
				// A short plaintext may look like one whose KME begins with zeros: then the signature finds it.
				if string(o.Fault) != c.Why && !(c.Why == "layout" && o.Fault == FaultSignature) {
					t.Errorf("fault %q, want %q", o.Fault, c.Why)
				}
				if len(o.Tag) != sha256.Size || len(o.Sealed) != sealedSize {
					t.Error("a refused payload did not run through tagging and sealing")
				}
			default:
				if o.Fault != FaultNone || !bytes.Equal(o.NWSig[:], c.NWSig) {
					t.Errorf("fault %q, NW_SIG %x, want %x", o.Fault, o.NWSig, c.NWSig)
				}
				// A malleated signature changes nothing about the KME, and so nothing about its tag.
				tag := c.Lot + string(o.Tag)
				if again := tags[tag]; again != strings.Contains(c.Name, "second of a malleated pair") {
					t.Errorf("tag seen before: %v", again)
				}
				tags[tag] = true
				checkSealed(t, token, o.Sealed, c.KME)
			}
		})
	}
}

// checkSealed shows that what was sealed is the KME, by what AES does with it outside the token.
func checkSealed(t *testing.T, token *Token, sealed, key []byte) {
	t.Helper()
	in := make([]RAND, 32)
	for i := range in {
		in[i] = RAND{1, 2, 3, byte(i)}
	}
	out := must[[]RAND](t)(token.EncryptRANDs(t.Context(), sealed, in))
	if len(out) != len(in) {
		t.Fatalf("%d RANDs become %d", len(in), len(out))
	}
	for i := range in {
		if want := aesBlock(t, key, in[i]); out[i] != want {
			t.Errorf("RAND %d encrypts to %x, want %x", i, out[i], want)
		}
	}
	if back := must[RAND](t)(token.DecryptRAND(t.Context(), sealed, out[31])); back != in[31] {
		t.Errorf("RAND decrypts to %x", back)
	}
}

// A lot key's way from one token to another, and what stops every other way.
func TestLotKey(t *testing.T) {
	ctx := t.Context()
	operator := newOperator(t)
	factory, transport := newFactory(t, operator)
	pub, mech, err := factory.EnsureLotKey(ctx, testLot, 2048, PrimesAuto)
	if err != nil {
		t.Fatal(err)
	}
	if mech != "CKM_RSA_PKCS_KEY_PAIR_GEN" || pub.N.BitLen() != 2048 || pub.E != 65537 {
		t.Fatalf("%s, %d bits, e %d", mech, pub.N.BitLen(), pub.E)
	}
	if again, _, err := factory.EnsureLotKey(ctx, testLot, 2048, PrimesAuto); err != nil || !again.Equal(pub) {
		t.Errorf("a second run did not find the key: %v", err)
	}
	if _, _, err := factory.EnsureLotKey(ctx, testLot, 3072, PrimesAuto); err == nil || !strings.Contains(err.Error(), "--bits 2048") {
		t.Errorf("other bits: %v", err)
	}
	if _, _, err := factory.EnsureLotKey(ctx, Key{Role: RoleLot, Manufacturer: manufacturer, Name: "L2"}, 2048, PrimesX931); err == nil || !strings.Contains(err.Error(), "X9.31") {
		t.Errorf("x931 on a token without it: %v", err)
	}

	t.Run("only under a TRUSTED key", func(t *testing.T) {
		if _, err := factory.WrapLotKey(ctx, testLot, testInjection); !isCKR(err, pkcs11.CKR_KEY_NOT_WRAPPABLE) {
			t.Errorf("under the injection key: %v", err)
		}
		err := factory.with(ctx, "test", func(s *session) error {
			own, err := s.GenerateKey(s.h, mechanism(pkcs11.CKM_AES_KEY_GEN), attributes{attr(pkcs11.CKA_VALUE_LEN, 32), attr(pkcs11.CKA_TOKEN, false), attr(pkcs11.CKA_WRAP, true)})
			if err != nil {
				return err
			}
			_, err = s.WrapKey(s.h, mechanism(pkcs11.CKM_AES_KEY_WRAP_PAD), own, factory.mustFind(t, pkcs11.CKO_PRIVATE_KEY, testLot))
			return err
		})
		if !isCKR(err, pkcs11.CKR_KEY_NOT_WRAPPABLE) {
			t.Errorf("under a key of the user's own: %v", err)
		}
		err = factory.with(ctx, "test", func(s *session) error {
			_, err := s.GenerateKey(s.h, mechanism(pkcs11.CKM_AES_KEY_GEN), attributes{attr(pkcs11.CKA_VALUE_LEN, 32), attr(pkcs11.CKA_TOKEN, false), attr(pkcs11.CKA_WRAP, true), attr(pkcs11.CKA_TRUSTED, true)})
			return err
		})
		if err == nil {
			t.Error("the user made a TRUSTED key")
		}
	})
	// With the KEK in clear, every lot key that it carried would be.
	t.Run("the KEK only under a TRUSTED key", func(t *testing.T) {
		key := must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 3072))
		err := factory.with(ctx, "test", func(s *session) error {
			own, err := s.CreateObject(s.h, join(wrappingPublic(&key.PublicKey), attributes{attr(pkcs11.CKA_TOKEN, false)}))
			if err != nil {
				return err
			}
			_, err = s.WrapKey(s.h, mechanism(oaep, pkcs11.NewOAEPParams(pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1, pkcs11.CKZ_DATA_SPECIFIED, nil)), own, factory.mustFind(t, pkcs11.CKO_SECRET_KEY, testKEK))
			return err
		})
		if !isCKR(err, pkcs11.CKR_KEY_NOT_WRAPPABLE) {
			t.Error(err)
		}
	})

	wrappedKEK := must[[]byte](t)(factory.WrapEnrolled(ctx, testKEK))
	wrapped := must[[]byte](t)(factory.WrapLotKey(ctx, testLot, testKEK))

	t.Run("damage", func(t *testing.T) {
		if err := operator.UnwrapKEK(ctx, testKEK, transport, flip(wrappedKEK)); err == nil {
			t.Error("a damaged KEK was taken")
		}
		if err := operator.UnwrapKEK(ctx, testKEK, transport, nil); err == nil {
			t.Error("an empty KEK was taken")
		}
		if _, err := operator.UnwrapLotKey(ctx, testLot, testKEK, wrapped, pub); !errors.Is(err, ErrNoKey) {
			t.Errorf("without a KEK: %v", err)
		}
		if err := operator.UnwrapKEK(ctx, testKEK, transport, wrappedKEK); err != nil {
			t.Fatal(err)
		}
		for _, bad := range [][]byte{nil, wrapped[:8], wrapped[:len(wrapped)-8], wrapped[:len(wrapped)-1], flip(wrapped)} {
			if _, err := operator.UnwrapLotKey(ctx, testLot, testKEK, bad, pub); err == nil {
				t.Error("a damaged lot key was taken")
			}
		}
		other := must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048))
		if _, err := operator.UnwrapLotKey(ctx, testLot, testKEK, wrapped, &other.PublicKey); err == nil || !strings.Contains(err.Error(), "not this modulus's key") {
			t.Errorf("a key that does not fit: %v", err)
		}
		if has := must[bool](t)(operator.Has(ctx, testLot)); has {
			t.Error("a refused lot key is in the token")
		}
	})
	for _, first := range []bool{true, false} { // the second changes nothing
		if err := operator.UnwrapKEK(ctx, testKEK, transport, wrappedKEK); err != nil {
			t.Fatal(err)
		}
		if taken, err := operator.UnwrapLotKey(ctx, testLot, testKEK, wrapped, pub); err != nil || taken != first {
			t.Fatal(taken, err)
		}
	}
	if err := operator.ProveLotKey(ctx, testLot, pub); err != nil {
		t.Error(err)
	}

	t.Run("sealed", func(t *testing.T) {
		if sealed := must[bool](t)(factory.LotKeySealed(ctx, testLot)); sealed {
			t.Error("sealed too early")
		}
		for range 2 {
			if err := factory.SealLotKey(ctx, testLot); err != nil {
				t.Fatal(err)
			}
		}
		if sealed := must[bool](t)(factory.LotKeySealed(ctx, testLot)); !sealed {
			t.Error("not sealed")
		}
		if _, err := factory.WrapLotKey(ctx, testLot, testKEK); !isCKR(err, pkcs11.CKR_KEY_UNEXTRACTABLE) {
			t.Errorf("a sealed lot key was wrapped: %v", err)
		}
		err := factory.with(ctx, "test", func(s *session) error {
			return s.SetAttributeValue(s.h, factory.mustFind(t, pkcs11.CKO_PRIVATE_KEY, testLot), attributes{attr(pkcs11.CKA_EXTRACTABLE, true)})
		})
		if err == nil {
			t.Error("the seal was undone")
		}
	})
}

func flip(b []byte) []byte {
	c := bytes.Clone(b)
	c[len(c)/2] ^= 1
	return c
}

// A wrapped device key, unwrapped by another implementation, is the key that was published.
func TestDeviceKey(t *testing.T) {
	ctx := t.Context()
	factory, _ := newFactory(t, nil)
	enrolment := must[[]byte](t)(factory.WrapEnrolled(ctx, testInjection))
	key := must[[]byte](t)(rsa.DecryptOAEP(sha1.New(), nil, fixtureKey(), enrolment, nil))
	kwp := must[*subtle.KWP](t)(subtle.NewKWP(key))
	seen := map[string]bool{}
	for _, suite := range kme.Suites {
		for range 3 {
			pub, wrapped, err := factory.MakeDeviceKey(ctx, suite, testInjection)
			if err != nil {
				t.Fatal(err)
			}
			if err := suite.CheckDevice(pub); err != nil {
				t.Error(err)
			}
			private := must[any](t)(x509.ParsePKCS8PrivateKey(must[[]byte](t)(kwp.Unwrap(wrapped)))).(crypto.Signer)
			if !private.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(pub) {
				t.Error("the wrapped private key is not that of the public key")
			}
			spki := must[[]byte](t)(x509.MarshalPKIXPublicKey(pub))
			if seen[string(spki)] {
				t.Error("two devices have one key")
			}
			seen[string(spki)] = true
		}
	}
	if n := countObjects(t, factory, attributes{attr(pkcs11.CKA_TOKEN, false)}); n != 0 {
		t.Errorf("%d session objects are left", n)
	}
}

func countObjects(t *testing.T, token *Token, template attributes) int {
	t.Helper()
	n := 0
	err := token.with(context.Background(), "test", func(s *session) error {
		if err := s.FindObjectsInit(s.h, template); err != nil {
			return err
		}
		found, _, err := s.FindObjects(s.h, 1000)
		n = len(found)
		return errors.Join(err, s.FindObjectsFinal(s.h))
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestSigner(t *testing.T) {
	factory, _ := newFactory(t, nil)
	signer := must[crypto.Signer](t)(factory.Signer(testSigning))
	digest := sha256.Sum256([]byte("manifest"))
	sig := must[[]byte](t)(signer.Sign(rand.Reader, digest[:], crypto.SHA256))
	if !ecdsa.VerifyASN1(signer.Public().(*ecdsa.PublicKey), digest[:], sig) {
		t.Error("the signature does not verify")
	}
	if _, err := factory.Signer(Key{Role: RoleSigning, Name: "none"}); !errors.Is(err, ErrNoKey) {
		t.Error(err)
	}
}

// readBack are the attributes that tests read back from tokens, in this order.
var readBack = []struct {
	typ  uint
	name string
}{
	{pkcs11.CKA_TOKEN, "TOKEN"}, {pkcs11.CKA_PRIVATE, "PRIVATE"}, {pkcs11.CKA_SENSITIVE, "SENSITIVE"}, {pkcs11.CKA_EXTRACTABLE, "EXTRACTABLE"},
	{pkcs11.CKA_MODIFIABLE, "MODIFIABLE"}, {pkcs11.CKA_COPYABLE, "COPYABLE"}, {pkcs11.CKA_ALWAYS_SENSITIVE, "ALWAYS_SENSITIVE"},
	{pkcs11.CKA_NEVER_EXTRACTABLE, "NEVER_EXTRACTABLE"}, {pkcs11.CKA_LOCAL, "LOCAL"}, {pkcs11.CKA_SIGN, "SIGN"}, {pkcs11.CKA_VERIFY, "VERIFY"},
	{pkcs11.CKA_ENCRYPT, "ENCRYPT"}, {pkcs11.CKA_DECRYPT, "DECRYPT"}, {pkcs11.CKA_WRAP, "WRAP"}, {pkcs11.CKA_UNWRAP, "UNWRAP"}, {pkcs11.CKA_DERIVE, "DERIVE"},
	{pkcs11.CKA_WRAP_WITH_TRUSTED, "WRAP_WITH_TRUSTED"}, {pkcs11.CKA_TRUSTED, "TRUSTED"},
}

// trueAttributes names those of an object that are true. One that this kind of object, or the token, does not have is not.
func trueAttributes(t *testing.T, token *Token, h pkcs11.ObjectHandle) string {
	t.Helper()
	var is []string
	for _, e := range readBack {
		err := token.with(t.Context(), "test", func(s *session) error {
			a, err := s.GetAttributeValue(s.h, h, attributes{attr(e.typ, nil)})
			if err == nil && isTrue(a[0]) {
				is = append(is, e.name)
			}
			return err
		})
		if err != nil && !isCKR(err, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID) {
			t.Fatalf("%s: %v", e.name, err)
		}
	}
	return strings.Join(is, " ")
}

// What DESIGN calls the attributes that matter, read back from the token.
func TestAttributes(t *testing.T) {
	ctx := t.Context()
	operator := newOperatorOn(t, softhsmtest.Token(t))
	factory, transport := newFactory(t, operator)
	pub, _, err := factory.EnsureLotKey(ctx, testLot, 2048, PrimesAuto)
	if err != nil {
		t.Fatal(err)
	}
	if err := operator.UnwrapKEK(ctx, testKEK, transport, must[[]byte](t)(factory.WrapEnrolled(ctx, testKEK))); err != nil {
		t.Fatal(err)
	}
	if _, err := operator.UnwrapLotKey(ctx, testLot, testKEK, must[[]byte](t)(factory.WrapLotKey(ctx, testLot, testKEK)), pub); err != nil {
		t.Fatal(err)
	}

	for _, c := range []struct {
		name  string
		token *Token
		class uint
		key   Key
		want  string // the attributes that are true
	}{
		{"lot key", factory, pkcs11.CKO_PRIVATE_KEY, testLot, "TOKEN PRIVATE SENSITIVE EXTRACTABLE MODIFIABLE ALWAYS_SENSITIVE LOCAL DECRYPT WRAP_WITH_TRUSTED"},
		{"signing key", factory, pkcs11.CKO_PRIVATE_KEY, testSigning, "TOKEN PRIVATE SENSITIVE ALWAYS_SENSITIVE NEVER_EXTRACTABLE LOCAL SIGN"},
		{"injection key", factory, pkcs11.CKO_SECRET_KEY, testInjection, "TOKEN SENSITIVE EXTRACTABLE ALWAYS_SENSITIVE LOCAL WRAP WRAP_WITH_TRUSTED TRUSTED"},
		{"KEK at the factory", factory, pkcs11.CKO_SECRET_KEY, testKEK, "TOKEN SENSITIVE EXTRACTABLE ALWAYS_SENSITIVE LOCAL WRAP WRAP_WITH_TRUSTED TRUSTED"},
		{"KEK at the operator", operator, pkcs11.CKO_SECRET_KEY, testKEK, "TOKEN PRIVATE SENSITIVE UNWRAP"},
		{"lot key at the operator", operator, pkcs11.CKO_PRIVATE_KEY, testLot, "TOKEN PRIVATE SENSITIVE DECRYPT"},
		{"storage key", operator, pkcs11.CKO_SECRET_KEY, storageKey, "TOKEN PRIVATE SENSITIVE EXTRACTABLE ALWAYS_SENSITIVE LOCAL WRAP UNWRAP WRAP_WITH_TRUSTED"},
		{"ledger key", operator, pkcs11.CKO_SECRET_KEY, ledgerKey, "TOKEN PRIVATE SENSITIVE EXTRACTABLE ALWAYS_SENSITIVE LOCAL SIGN WRAP_WITH_TRUSTED"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := trueAttributes(t, c.token, c.token.mustFind(t, c.class, c.key)); got != c.want {
				t.Errorf("\n got %s\nwant %s", got, c.want)
			}
		})
		// Nobody gets at what is secret, nor changes what the key may do.
		t.Run(c.name+" keeps its secret", func(t *testing.T) {
			h := c.token.mustFind(t, c.class, c.key)
			values := []uint{pkcs11.CKA_VALUE}
			if c.class == pkcs11.CKO_PRIVATE_KEY && c.key.Role != RoleSigning {
				values = []uint{pkcs11.CKA_PRIVATE_EXPONENT, pkcs11.CKA_PRIME_1, pkcs11.CKA_PRIME_2, pkcs11.CKA_EXPONENT_1, pkcs11.CKA_EXPONENT_2, pkcs11.CKA_COEFFICIENT}
			}
			for _, typ := range values {
				err := c.token.with(ctx, "test", func(s *session) error {
					_, err := s.GetAttributeValue(s.h, h, attributes{attr(typ, nil)})
					return err
				})
				if !isCKR(err, pkcs11.CKR_ATTRIBUTE_SENSITIVE) {
					t.Errorf("attribute 0x%X: %v", typ, err)
				}
			}
			// The lot key may be sealed, so it may be changed; the token still holds what matters about it.
			changes := []attributes{{attr(pkcs11.CKA_SENSITIVE, false)}, {attr(pkcs11.CKA_WRAP_WITH_TRUSTED, false)}}
			if c.name != "lot key" {
				changes = append(changes, attributes{attr(pkcs11.CKA_DECRYPT, true)}, attributes{attr(pkcs11.CKA_EXTRACTABLE, true)}, attributes{attr(pkcs11.CKA_SIGN, true)})
			}
			for _, change := range changes {
				err := c.token.with(ctx, "test", func(s *session) error { return s.SetAttributeValue(s.h, h, change) })
				if err == nil {
					t.Errorf("attribute 0x%X was changed", change[0].Type)
				}
			}
			err := c.token.with(ctx, "test", func(s *session) error {
				_, err := s.CopyObject(s.h, h, attributes{attr(pkcs11.CKA_TOKEN, false)})
				return err
			})
			if err == nil {
				t.Error("the key was copied")
			}
		})
	}
}

func TestSessions(t *testing.T) {
	token := newOperator(t)
	t.Run("a caller that has gone", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := token.Ping(ctx); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	t.Run("all sessions taken", func(t *testing.T) {
		free := make(chan struct{})
		var taken, done sync.WaitGroup
		for range token.Sessions() {
			taken.Add(1)
			done.Go(func() {
				token.with(context.Background(), "test", func(*session) error { taken.Done(); <-free; return nil })
			})
		}
		taken.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if err := token.Ping(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		close(free)
		done.Wait()
		if err := token.Ping(t.Context()); err != nil {
			t.Error(err)
		}
	})
	t.Run("a failed call does not spoil its session", func(t *testing.T) {
		for range 2 * token.Sessions() {
			err := token.with(t.Context(), "test", func(s *session) error { // leaves a search active
				if err := s.FindObjectsInit(s.h, nil); err != nil {
					return err
				}
				return pkcs11.Error(pkcs11.CKR_ARGUMENTS_BAD)
			})
			if !isCKR(err, pkcs11.CKR_ARGUMENTS_BAD) {
				t.Fatal(err)
			}
		}
		if has, err := token.Has(t.Context(), Key{Role: RoleLot, Name: "never made"}); has || err != nil {
			t.Error(has, err)
		}
	})
}

func TestOpenRefuses(t *testing.T) {
	tok := softhsmtest.Token(t)
	dir := t.TempDir()
	file := func(name, content string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		os.Chmod(path, mode)
		return path
	}
	base := "pkcs11:token=" + tok.Label + "?module-path=" + tok.Module
	for name, c := range map[string]struct{ uri, want string }{
		"no URI":          {"", "--token"},
		"no PKCS #11 URI": {"http://x", "RFC 7512"},
		"garbage":         {"pkcs11:%zz", "RFC 7512"},
		"no module":       {"pkcs11:token=x", "module-path"},
		"missing module":  {"pkcs11:token=x?module-path=/nowhere.so&pin-source=" + tok.PINFile, "/nowhere.so"},
		"no library":      {"pkcs11:token=x?module-path=" + tok.PINFile + "&pin-source=" + tok.PINFile, "cannot be used"},
		"no token named":  {"pkcs11:?module-path=" + tok.Module, "token=LABEL"},
		"missing token":   {"pkcs11:token=nope?module-path=" + tok.Module + "&pin-source=" + tok.PINFile, "nope"},
		"wrong serial":    {"pkcs11:token=" + tok.Label + ";serial=00?module-path=" + tok.Module + "&pin-source=" + tok.PINFile, "serial"},
		"pin-value":       {base + "&pin-value=" + tok.PIN, "pin-source"},
		"no PIN":          {base, "pin-source"},
		"missing PIN":     {base + "&pin-source=file:/nowhere/pin", "/nowhere/pin"},
		"relative PIN":    {base + "&pin-source=pin", "absolute"},
		"empty PIN":       {base + "&pin-source=" + file("empty", "\n", 0o600), "empty"},
		"open PIN":        {base + "&pin-source=" + file("open", tok.PIN, 0o644), "chmod 0600"},
		"wrong PIN":       {base + "&pin-source=" + file("wrong", tok.PIN+"9", 0o600), "refused the PIN"},
	} {
		t.Run(name, func(t *testing.T) {
			token, err := Open(t.Context(), c.uri)
			if err == nil {
				token.Close()
				t.Fatal("opened")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("%q does not say %q", err, c.want)
			}
			if strings.Contains(err.Error(), tok.PIN) {
				t.Errorf("the error shows the PIN: %v", err)
			}
		})
	}
	// pin-source may end in a newline, and have file: or not.
	for _, source := range []string{"file:" + file("nl", tok.PIN+"\n", 0o600), file("crlf", tok.PIN+"\r\n", 0o400), "file://" + file("plain", tok.PIN, 0o600)} {
		token, err := Open(t.Context(), base+"&pin-source="+source)
		if err != nil {
			t.Error(source, err)
			continue
		}
		token.Close()
	}
	if _, err := EnrollKey(t.Context(), tok.URI, PIN(tok.PIN), testKEK, &must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 3072)).PublicKey); err == nil || !strings.Contains(err.Error(), "refused the PIN") {
		t.Errorf("a wrong security officer's PIN: %v", err)
	}
	if _, err := EnrollKey(t.Context(), tok.URI, PIN(tok.SOPIN), testKEK, &must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048)).PublicKey); err == nil {
		t.Error("a weak transport key was taken")
	}
}

// SoftHSM is initialised anew after so many uses, under all that goes on: nothing fails by it, signers and keys are found again.
func TestRenew(t *testing.T) {
	token, _ := newFactory(t, nil)
	injection, signing := testInjection, testSigning
	if token.renewAfter.Load() != softHSMRenewal {
		t.Error("SoftHSM is not renewed")
	}
	s, err := token.Signer(signing)
	if err != nil {
		t.Fatal(err)
	}
	first := token.held
	token.renewAfter.Store(25)
	var all sync.WaitGroup
	for range 6 {
		all.Go(func() {
			for range 50 {
				if _, _, err := token.MakeDeviceKey(t.Context(), kme.SuiteECDSA, injection); err != nil {
					t.Error(err)
				}
				digest := sha256.Sum256([]byte("x"))
				sig, err := s.Sign(rand.Reader, digest[:], crypto.SHA256)
				if err != nil || !ecdsa.VerifyASN1(s.Public().(*ecdsa.PublicKey), digest[:], sig) {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	token.reopening.Lock() // a renewal goes on beside the calls
	if token.held == first {
		t.Error("the module was not initialised anew")
	}
	// A PIN that is gone is no reason to stop.
	token.pin = "file:/nowhere"
	token.reopening.Unlock()
	for range 30 {
		if _, _, err := token.MakeDeviceKey(t.Context(), kme.SuiteECDSA, injection); err != nil {
			t.Fatal(err)
		}
	}
}
