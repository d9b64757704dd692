package hsmkeys

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/rsa"
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

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyop"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testkeys"
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

func open(t testing.TB, tok softhsmtest.Tok) *OperatorToken { return openWith(t, tok, Options{}) }

func openWith(t testing.TB, tok softhsmtest.Tok, o Options) *OperatorToken {
	t.Helper()
	token := must[*OperatorToken](t)(OpenOperator(t.Context(), tok.URI, o))
	closeAfter(t, token.base)
	return token
}

func openFactory(t testing.TB, tok softhsmtest.Tok) *FactoryToken {
	t.Helper()
	token := must[*FactoryToken](t)(OpenFactory(t.Context(), tok.URI, Options{}))
	closeAfter(t, token.base)
	return token
}

func closeAfter(t testing.TB, b *base) {
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
}

// A holder is a token of either side.
type holder interface{ held() *base }

func (b *base) held() *base { return b }

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// newSides are an operator's token and its transport key, and a factory's token and the public key of its lot.
func newSides(t *testing.T) (o *OperatorToken, f *FactoryToken, transport, lot *rsa.PublicKey) {
	t.Helper()
	o = newOperatorOn(t, softhsmtest.Token(t))
	f, transport = newFactory(t, o)
	lot, _, err := f.EnsureLotKey(t.Context(), testLot, 2048, PrimesAuto)
	if err != nil {
		t.Fatal(err)
	}
	return o, f, transport, lot
}

// newOperator is an operator's token with its own keys.
func newOperator(t testing.TB) *OperatorToken { return newOperatorOn(t, softhsmtest.Operator(t)) }

func newOperatorOn(t testing.TB, tok softhsmtest.Tok) *OperatorToken {
	t.Helper()
	token := open(t, tok)
	must[bool](t)(token.Dedicate(t.Context(), Dedication{Side: Operator}))
	must[bool](t)(token.EnsureStorageKey(t.Context()))
	must[bool](t)(token.EnsureLedgerKey(t.Context()))
	return token
}

// fixtureKey is the private half of the key that the test's fixture has.
var fixtureKey = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := testkeys.RSA(3072)
	if err != nil {
		panic(err)
	}
	return key
})

// newFactory is a manufacturer's token with its own keys and a fixture's, and a KEK for the operator, if there is one,
// whose transport key it gives.
func newFactory(t testing.TB, operator *OperatorToken) (*FactoryToken, *rsa.PublicKey) {
	t.Helper()
	tok, transport := newFactoryClosed(t, operator)
	return openFactory(t, tok), transport
}

func newFactoryClosed(t testing.TB, operator *OperatorToken) (tok softhsmtest.Tok, transport *rsa.PublicKey) {
	t.Helper()
	tok = softhsmtest.Token(t)
	token := must[*FactoryToken](t)(OpenFactory(t.Context(), tok.URI, Options{}))
	must[bool](t)(token.Dedicate(t.Context(), Dedication{Side: Factory}))
	must[bool](t)(token.EnsureSigningKey(t.Context(), testSigning))
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	if operator != nil {
		transport = must[*rsa.PublicKey](t)(operator.NewTransportKey(t.Context()))
		must[bool](t)(EnrollKey(t.Context(), tok.URI, PIN(tok.SOPIN), testKEK, transport))
	}
	must[bool](t)(EnrollKey(t.Context(), tok.URI, PIN(tok.SOPIN), testInjection, &fixtureKey().PublicKey))
	return tok, transport
}

func (b *base) mustFind(tb testing.TB, class uint, k Key) pkcs11.ObjectHandle {
	tb.Helper()
	var h pkcs11.ObjectHandle
	err := b.hsm.With(context.Background(), "test", func(s *p11.Session) (err error) {
		h, err = b.find(s, class, k)
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	return h
}

// importLot puts a software key into a token as a lot key, as only a test may.
func importLot(t testing.TB, token holder, k Key, key *rsa.PrivateKey) {
	t.Helper()
	err := token.held().hsm.With(t.Context(), "test", func(s *p11.Session) error {
		_, err := s.Ctx.CreateObject(s.ID, ck.Join(keyspec.Named(k), ck.Guarded(false),
			ck.Use(ck.PrivateUsages, pkcs11.CKA_DECRYPT), rsaPrivate(key)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// rsaPrivate is the part of a private key object's template that holds the key.
func rsaPrivate(key *rsa.PrivateKey) ck.Attributes {
	return ck.Attributes{
		ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), ck.Attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA),
		ck.Attr(pkcs11.CKA_MODULUS, key.N.Bytes()),
		ck.Attr(pkcs11.CKA_PUBLIC_EXPONENT, big.NewInt(int64(key.E)).Bytes()),
		ck.Attr(pkcs11.CKA_PRIVATE_EXPONENT, key.D.Bytes()),
		ck.Attr(pkcs11.CKA_PRIME_1, key.Primes[0].Bytes()), ck.Attr(pkcs11.CKA_PRIME_2, key.Primes[1].Bytes()),
		ck.Attr(pkcs11.CKA_EXPONENT_1, key.Precomputed.Dp.Bytes()),
		ck.Attr(pkcs11.CKA_EXPONENT_2, key.Precomputed.Dq.Bytes()),
		ck.Attr(pkcs11.CKA_COEFFICIENT, key.Precomputed.Qinv.Bytes()),
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
		if err := token.ProveLotKey(t.Context(), Key{Role: RoleLot, Manufacturer: manufacturer, Name: l.Name},
			&key.PublicKey); err != nil {
			t.Error(err)
		}
	}
	tags := map[string]bool{}
	for _, c := range v.Vectors {
		t.Run(c.Name, func(t *testing.T) {
			suite := must[kme.Suite](t)(kme.ParseSuite(c.Suite))
			device := must[any](t)(x509.ParsePKIXPublicKey(c.Device))
			o, err := token.OpenPayload(t.Context(),
				Payload{Suite: suite, Lot: Key{Role: RoleLot, Manufacturer: manufacturer, Name: c.Lot}, N: lots[c.Lot],
					Device: device, Bytes: c.Payload})
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
				if len(o.Tag) != sha256.Size || len(o.Sealed) != keyop.SealedSize {
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
func checkSealed(t *testing.T, token *OperatorToken, sealed, key []byte) {
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
	if _, _, err := factory.EnsureLotKey(ctx, testLot, 3072, PrimesAuto); err == nil ||
		!strings.Contains(err.Error(), "ask for 2048 bits") {
		t.Errorf("other bits: %v", err)
	}
	if _, _, err := factory.EnsureLotKey(ctx, Key{Role: RoleLot, Manufacturer: manufacturer, Name: "L2"}, 2048,
		PrimesX931); err == nil || !strings.Contains(err.Error(), "X9.31") {
		t.Errorf("x931 on a token without it: %v", err)
	}

	t.Run("only under a TRUSTED key", func(t *testing.T) {
		if _, err := factory.WrapLotKey(ctx, testLot, testInjection); !ck.IsCKR(err, pkcs11.CKR_KEY_NOT_WRAPPABLE) {
			t.Errorf("under the injection key: %v", err)
		}
		err := factory.hsm.With(ctx, "test", func(s *p11.Session) error {
			own, err := s.Ctx.GenerateKey(s.ID, ck.Mechanism(pkcs11.CKM_AES_KEY_GEN),
				ck.Attributes{ck.Attr(pkcs11.CKA_VALUE_LEN, 32), ck.Attr(pkcs11.CKA_TOKEN, false),
					ck.Attr(pkcs11.CKA_WRAP, true)})
			if err != nil {
				return err
			}
			_, err = s.Ctx.WrapKey(s.ID, ck.Mechanism(pkcs11.CKM_AES_KEY_WRAP_PAD), own,
				factory.mustFind(t, pkcs11.CKO_PRIVATE_KEY, testLot))
			return err
		})
		if !ck.IsCKR(err, pkcs11.CKR_KEY_NOT_WRAPPABLE) {
			t.Errorf("under a key of the user's own: %v", err)
		}
		err = factory.hsm.With(ctx, "test", func(s *p11.Session) error {
			_, err := s.Ctx.GenerateKey(s.ID, ck.Mechanism(pkcs11.CKM_AES_KEY_GEN),
				ck.Attributes{ck.Attr(pkcs11.CKA_VALUE_LEN, 32), ck.Attr(pkcs11.CKA_TOKEN, false),
					ck.Attr(pkcs11.CKA_WRAP, true), ck.Attr(pkcs11.CKA_TRUSTED, true)})
			return err
		})
		if err == nil {
			t.Error("the user made a TRUSTED key")
		}
	})
	// With the KEK in clear, every lot key that it carried would be.
	t.Run("the KEK only under a TRUSTED key", func(t *testing.T) {
		key := must[*rsa.PrivateKey](t)(testkeys.RSA(3072))
		err := factory.hsm.With(ctx, "test", func(s *p11.Session) error {
			own, err := s.Ctx.CreateObject(s.ID,
				ck.Join(keyspec.Wrapping(&key.PublicKey), ck.Attributes{ck.Attr(pkcs11.CKA_TOKEN, false)}))
			if err != nil {
				return err
			}
			_, err = s.Ctx.WrapKey(s.ID,
				[]*pkcs11.Mechanism{pkcs11.NewMechanism(keyspec.OAEP,
					pkcs11.NewOAEPParams(pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1, pkcs11.CKZ_DATA_SPECIFIED, nil))}, own,
				factory.mustFind(t, pkcs11.CKO_SECRET_KEY, testKEK))
			return err
		})
		if !ck.IsCKR(err, pkcs11.CKR_KEY_NOT_WRAPPABLE) {
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
		for _, bad := range [][]byte{nil, wrapped[:8], wrapped[:len(wrapped)-8], wrapped[:len(wrapped)-1],
			flip(wrapped)} {
			if _, err := operator.UnwrapLotKey(ctx, testLot, testKEK, bad, pub); err == nil {
				t.Error("a damaged lot key was taken")
			}
		}
		other := must[*rsa.PrivateKey](t)(testkeys.RSA(2048))
		if _, err := operator.UnwrapLotKey(ctx, testLot, testKEK, wrapped, &other.PublicKey); err == nil ||
			!strings.Contains(err.Error(), "not this modulus's key") {
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
		if _, err := factory.WrapLotKey(ctx, testLot, testKEK); !ck.IsCKR(err, pkcs11.CKR_KEY_UNEXTRACTABLE) {
			t.Errorf("a sealed lot key was wrapped: %v", err)
		}
		err := factory.hsm.With(ctx, "test", func(s *p11.Session) error {
			return s.Ctx.SetAttributeValue(s.ID, factory.mustFind(t, pkcs11.CKO_PRIVATE_KEY, testLot),
				ck.Attributes{ck.Attr(pkcs11.CKA_EXTRACTABLE, true)})
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

func countObjects(t *testing.T, token holder, template ck.Attributes) int {
	t.Helper()
	n := 0
	err := token.held().hsm.With(context.Background(), "test", func(s *p11.Session) error {
		if err := s.Ctx.FindObjectsInit(s.ID, template); err != nil {
			return err
		}
		found, _, err := s.Ctx.FindObjects(s.ID, 1000)
		n = len(found)
		return errors.Join(err, s.Ctx.FindObjectsFinal(s.ID))
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// readBack are the attributes that tests read back from tokens, in this order.
var readBack = []struct {
	typ  uint
	name string
}{
	{pkcs11.CKA_TOKEN, "TOKEN"}, {pkcs11.CKA_PRIVATE, "PRIVATE"}, {pkcs11.CKA_SENSITIVE, "SENSITIVE"},
	{pkcs11.CKA_EXTRACTABLE, "EXTRACTABLE"},
	{pkcs11.CKA_MODIFIABLE, "MODIFIABLE"}, {pkcs11.CKA_COPYABLE, "COPYABLE"},
	{pkcs11.CKA_ALWAYS_SENSITIVE, "ALWAYS_SENSITIVE"},
	{pkcs11.CKA_NEVER_EXTRACTABLE, "NEVER_EXTRACTABLE"}, {pkcs11.CKA_LOCAL, "LOCAL"}, {pkcs11.CKA_SIGN, "SIGN"},
	{pkcs11.CKA_VERIFY, "VERIFY"},
	{pkcs11.CKA_ENCRYPT, "ENCRYPT"}, {pkcs11.CKA_DECRYPT, "DECRYPT"}, {pkcs11.CKA_WRAP, "WRAP"},
	{pkcs11.CKA_UNWRAP, "UNWRAP"}, {pkcs11.CKA_DERIVE, "DERIVE"},
	{pkcs11.CKA_WRAP_WITH_TRUSTED, "WRAP_WITH_TRUSTED"}, {pkcs11.CKA_TRUSTED, "TRUSTED"},
}

func aesBlock(t *testing.T, key []byte, in [RANDSize]byte) (out [RANDSize]byte) {
	t.Helper()
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	block.Encrypt(out[:], in[:])
	return out
}

var errRoom = errors.New("refused for want of room")
