package hsmkeys

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/asn1"
	"errors"
	"slices"
	"strings"
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

// Whoever has the user PIN, and the files that pass between the parties, unwraps nothing into a key that says what it
// is.
func TestUnwrapTemplates(t *testing.T) {
	ctx := t.Context()
	operator, factory, transport, pub := newSides(t)
	enrolment := must[[]byte](t)(factory.WrapEnrolled(ctx, testKEK))
	grant := must[[]byte](t)(factory.WrapLotKey(ctx, testLot, testKEK))
	_, sealed, err := operator.sample(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := operator.UnwrapKEK(ctx, testKEK, transport, enrolment); err != nil {
		t.Fatal(err)
	}
	var private pkcs11.ObjectHandle
	if err := operator.hsm.With(ctx, "test", func(s *p11.Session) (err error) {
		private, err = keyop.Receiver(s, keyspec.TransportLabel, transport)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	here := ck.Attributes{ck.Attr(pkcs11.CKA_TOKEN, false)}
	for _, target := range []struct {
		name      string
		mechanism uint
		key       pkcs11.ObjectHandle
		wrapped   []byte
		ours      ck.Attributes
	}{
		{"a lot key", operator.hsm.KWP(), operator.mustFind(t, pkcs11.CKO_SECRET_KEY, testKEK), grant,
			keyspec.ImportedLot},
		{"a KEK", keyspec.OAEP, private, enrolment, keyspec.ImportedKEK},
		{"a KME", pkcs11.CKM_AES_KEY_WRAP, operator.mustFind(t, pkcs11.CKO_SECRET_KEY, keyspec.Storage),
			sealed[1:], keyspec.KME},
	} {
		for _, try := range []struct {
			name     string
			template ck.Attributes
			works    bool
		}{
			{"as it should be", target.ours, true},
			{"that can be read", ck.With(target.ours, ck.Attr(pkcs11.CKA_SENSITIVE, false)), false},
			{"that can be extracted", ck.With(target.ours, ck.Attr(pkcs11.CKA_EXTRACTABLE, true)), false},
			{"both", ck.With(target.ours, ck.Attr(pkcs11.CKA_SENSITIVE, false),
				ck.Attr(pkcs11.CKA_EXTRACTABLE, true)), false},
			{"for nothing said", ck.Without(target.ours, pkcs11.CKA_SENSITIVE, pkcs11.CKA_EXTRACTABLE), false},
			{"that signs", ck.With(target.ours, ck.Attr(pkcs11.CKA_SIGN, true)), false},
			{"that derives", ck.With(target.ours, ck.Attr(pkcs11.CKA_DERIVE, true)), false},
			{"as a generic secret", ck.With(target.ours, ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
				ck.Attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET)), false},
		} {
			t.Run(target.name+" "+try.name, func(t *testing.T) {
				err := operator.hsm.With(ctx, "test", func(s *p11.Session) error {
					h, err := s.Unwrap(target.mechanism, target.key, target.wrapped, ck.Join(try.template, here))
					if err == nil {
						err = s.Destroy(h)
					}
					return err
				})
				if works := err == nil; works != try.works {
					t.Errorf("it works: %v, %v", works, err)
				}
			})
		}
	}
	// When the KEK is there, nothing makes it again without its template.
	if err := operator.DestroyTransportKey(ctx, transport); err != nil {
		t.Fatal(err)
	}
	if err := operator.DestroyTransportKey(ctx, transport); err != nil {
		t.Errorf("a second time: %v", err)
	}
	if err := operator.UnwrapKEK(ctx, testKEK, transport, enrolment); !errors.Is(err, ErrNoKey) {
		t.Errorf("the enrolment is taken again: %v", err)
	}
	if _, err := operator.UnwrapLotKey(ctx, testLot, testKEK, grant, pub); err != nil {
		t.Errorf("the KEK has gone: %v", err)
	}
}

// A key that unwraps or receives does so by no mechanism but its own: others are padding oracles. SoftHSM 2.6.1 says
// CKR_MECHANISM_INVALID.
func TestUnwrapTemplatesAllowOneMechanism(t *testing.T) {
	ctx := t.Context()
	operator, factory, transport, _ := newSides(t)
	_, sealed, err := operator.sample(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := operator.UnwrapKEK(ctx, testKEK, transport,
		must[[]byte](t)(factory.WrapEnrolled(ctx, testKEK))); err != nil {
		t.Fatal(err)
	}
	restore := must[*rsa.PublicKey](t)(operator.NewRestoreKey(ctx))
	receiver := func(label string, pub *rsa.PublicKey) (h pkcs11.ObjectHandle) {
		if err := operator.hsm.With(ctx, "test", func(s *p11.Session) (err error) {
			h, err = keyop.Receiver(s, label, pub)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return h
	}
	kek := factory.mustFind(t, pkcs11.CKO_SECRET_KEY, testKEK)
	for _, c := range []struct {
		name      string
		token     *base
		mechanism uint
		with      func(s *p11.Session, m uint) error
	}{
		{"the KEK unwraps by AES key wrap", operator.base, pkcs11.CKM_AES_KEY_WRAP,
			unwrapping(operator.mustFind(t, pkcs11.CKO_SECRET_KEY, testKEK), sealed[1:], keyspec.ImportedLot)},
		{"the storage key unwraps by AES-KWP", operator.base, operator.hsm.KWP(),
			unwrapping(operator.mustFind(t, pkcs11.CKO_SECRET_KEY, keyspec.Storage), sealed[1:], keyspec.KME)},
		{"the transport key unwraps by PKCS #1 v1.5", operator.base, pkcs11.CKM_RSA_PKCS,
			unwrapping(receiver(keyspec.TransportLabel, transport), make([]byte, 384), keyspec.ImportedKEK)},
		{"a restore key unwraps by PKCS #1 v1.5", operator.base, pkcs11.CKM_RSA_PKCS,
			unwrapping(receiver(keyspec.RestoreLabel, restore), make([]byte, 384), keyspec.ImportedKEK)},
		{"the lot key decrypts by PKCS #1 v1.5", factory.base, pkcs11.CKM_RSA_PKCS,
			func(s *p11.Session, m uint) error {
				_, err := s.Decrypt(m, factory.mustFind(t, pkcs11.CKO_PRIVATE_KEY, testLot), make([]byte, 256),
					make([]byte, 256))
				return err
			}},
		{"the KEK is wrapped by PKCS #1 v1.5", factory.base, pkcs11.CKM_RSA_PKCS,
			func(s *p11.Session, m uint) error {
				_, err := s.Wrap(m, factory.mustFind(t, pkcs11.CKO_PUBLIC_KEY, keyspec.Recipient(testKEK)), kek,
					make([]byte, keyspec.WrappedRoom))
				return err
			}},
		{"the KEK wraps by AES key wrap", factory.base, pkcs11.CKM_AES_KEY_WRAP,
			func(s *p11.Session, m uint) error {
				_, err := s.Wrap(m, kek, factory.mustFind(t, pkcs11.CKO_PRIVATE_KEY, testLot),
					make([]byte, keyspec.WrappedRoom))
				return err
			}},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := c.token.hsm.With(ctx, "test", func(s *p11.Session) error { return c.with(s, c.mechanism) })
			if !ck.IsCKR(err, pkcs11.CKR_MECHANISM_INVALID) {
				t.Error(err)
			}
		})
	}
}

func unwrapping(h pkcs11.ObjectHandle, wrapped []byte, as ck.Attributes) func(*p11.Session, uint) error {
	return func(s *p11.Session, m uint) error {
		_, err := s.Unwrap(m, h, wrapped, ck.InSession(as))
		return err
	}
}

// Whoever has the factory's user PIN sends each key only where it belongs. A fixture's key may be in software: nothing
// but its own injection key may be wrapped under it, although the security officer has made it TRUSTED.
func TestWhatLeavesTheFactory(t *testing.T) {
	ctx := t.Context()
	factory, _ := newFactory(t, newOperatorOn(t, softhsmtest.Token(t)))
	if _, _, err := factory.EnsureLotKey(ctx, testLot, 2048, PrimesAuto); err != nil {
		t.Fatal(err)
	}
	fixture := factory.mustFind(t, pkcs11.CKO_PUBLIC_KEY, keyspec.Recipient(testInjection))
	operator := factory.mustFind(t, pkcs11.CKO_PUBLIC_KEY, keyspec.Recipient(testKEK))
	kek := factory.mustFind(t, pkcs11.CKO_SECRET_KEY, testKEK)
	injection := factory.mustFind(t, pkcs11.CKO_SECRET_KEY, testInjection)
	lot := factory.mustFind(t, pkcs11.CKO_PRIVATE_KEY, testLot)
	for _, c := range []struct {
		what, under   string
		mechanism     uint
		wrapping, key pkcs11.ObjectHandle
		works         bool
	}{
		{"the injection key", "its fixture's", keyspec.OAEP, fixture, injection, true},
		{"a KEK", "a fixture's", keyspec.OAEP, fixture, kek, false},
		{"the KEK", "its operator's", keyspec.OAEP, operator, kek, true},
		{"the injection key", "an operator's", keyspec.OAEP, operator, injection, false},
		{"the lot key", "a KEK", factory.hsm.KWP(), kek, lot, true},
		{"the injection key", "a KEK", factory.hsm.KWP(), kek, injection, false},
		{"the KEK", "itself", factory.hsm.KWP(), kek, kek, false},
		{"the lot key", "an injection key", factory.hsm.KWP(), injection, lot, false},
		{"the KEK", "an injection key", factory.hsm.KWP(), injection, kek, false},
	} {
		err := factory.hsm.With(ctx, "test", func(s *p11.Session) error {
			_, err := s.Wrap(c.mechanism, c.wrapping, c.key, make([]byte, keyspec.WrappedRoom))
			return err
		})
		if c.works != (err == nil) || err != nil && !ck.IsCKR(err, pkcs11.CKR_KEY_NOT_WRAPPABLE) {
			t.Errorf("%s under %s: %v", c.what, c.under, err)
		}
	}
	// Nor does the user make keys that are taken for others.
	err := factory.hsm.With(ctx, "test", func(s *p11.Session) error {
		_, err := s.Create(ck.Join(keyspec.Wrapping(&fixtureKey().PublicKey),
			ck.Attributes{ck.Attr(pkcs11.CKA_TOKEN, false), ck.Attr(pkcs11.CKA_TRUSTED, true)}))
		return err
	})
	if err == nil {
		t.Error("the user made a TRUSTED key")
	}
}

// A lot key that somebody has put there is not taken for one of a run that was interrupted.
func TestPlantedLotKey(t *testing.T) {
	factory, _ := newFactory(t, nil)
	importLot(t, factory, testLot, must[*rsa.PrivateKey](t)(testkeys.RSA(2048)))
	if _, _, err := factory.EnsureLotKey(t.Context(), testLot, 2048, PrimesAuto); err == nil ||
		!strings.Contains(err.Error(), "others may know its P and Q") {
		t.Error(err)
	}
}

// A key that is enrolled as a fixture's is not an operator's, nor another fixture's, and the reverse.
func TestOneKeyOneRecipient(t *testing.T) {
	ctx := t.Context()
	tok := softhsmtest.Token(t)
	officer := PIN(tok.SOPIN)
	fixture, other := &fixtureKey().PublicKey, &must[*rsa.PrivateKey](t)(testkeys.RSA(3072)).PublicKey
	if _, err := EnrollKey(ctx, tok.URI, officer, testInjection, fixture); !errors.Is(err, ErrNotDedicated) {
		t.Errorf("before init: %v", err)
	}
	token := must[*FactoryToken](t)(OpenFactory(ctx, tok.URI, Options{}))
	must[bool](t)(token.Dedicate(ctx, Dedication{Side: Factory}))
	token.Close()
	second := testInjection
	second.Name = "f2"
	must[bool](t)(EnrollKey(ctx, tok.URI, officer, testInjection, fixture))
	for _, k := range []Key{testKEK, second} {
		if _, err := EnrollKey(ctx, tok.URI, officer, k, fixture); err == nil ||
			!strings.Contains(err.Error(), "kme fixture f1") {
			t.Errorf("%s: %v", k, err)
		}
	}
	must[bool](t)(EnrollKey(ctx, tok.URI, officer, testKEK, other))
	if _, err := EnrollKey(ctx, tok.URI, officer, second, other); err == nil ||
		!strings.Contains(err.Error(), "kme operator-transport op") {
		t.Errorf("an operator's as a fixture's: %v", err)
	}
	if created := must[bool](t)(EnrollKey(ctx, tok.URI, officer, testInjection, fixture)); created {
		t.Error("the injection key was made a second time")
	}
	token = openFactory(t, tok)
	if names := must[[]string](t)(token.Fixtures(ctx, manufacturer)); !slices.Equal(names, []string{"f1"}) {
		t.Errorf("fixtures %q", names)
	}
	for _, k := range []Key{testKEK, second} {
		if has := must[bool](t)(token.Has(ctx, k)); has != (k == testKEK) {
			t.Errorf("%s: %v", k, has)
		}
	}
}

// A token of one side is refused by all that make keys of the other.
func TestSides(t *testing.T) {
	ctx := t.Context()
	operator := newOperatorOn(t, softhsmtest.Token(t))
	factory, transport := newFactory(t, operator)
	lot := must[*rsa.PrivateKey](t)(testkeys.RSA(2048))
	wrapped := make([]byte, 1024)
	// Each token as one of the other side.
	factorys, operators := &OperatorToken{base: factory.base}, &FactoryToken{operator.base}
	for name, do := range map[string]func(context.Context) error{
		"Dedicate": func(ctx context.Context) error {
			_, err := factory.Dedicate(ctx, Dedication{Side: Operator})
			return err
		},
		"EnsureStorageKey": func(ctx context.Context) error { _, err := factorys.EnsureStorageKey(ctx); return err },
		"EnsureLedgerKey":  func(ctx context.Context) error { _, err := factorys.EnsureLedgerKey(ctx); return err },
		"NewTransportKey":  func(ctx context.Context) error { _, err := factorys.NewTransportKey(ctx); return err },
		"UnwrapKEK": func(ctx context.Context) error {
			return factorys.UnwrapKEK(ctx, testKEK, transport, wrapped)
		},
		"UnwrapLotKey": func(ctx context.Context) error {
			_, err := factorys.UnwrapLotKey(ctx, testLot, testKEK, wrapped, &lot.PublicKey)
			return err
		},
		"Ping": factorys.Ping,
	} {
		if err := do(ctx); err == nil || !strings.Contains(err.Error(), "a token of the factory's") {
			t.Errorf("%s of a factory's: %v", name, err)
		}
	}
	for name, do := range map[string]func(context.Context) error{
		"Dedicate": func(ctx context.Context) error {
			_, err := operator.Dedicate(ctx, Dedication{Side: Factory})
			return err
		},
		"EnsureSigningKey": func(ctx context.Context) error {
			_, err := operators.EnsureSigningKey(ctx, testSigning)
			return err
		},
		"EnsureLotKey": func(ctx context.Context) error {
			_, _, err := operators.EnsureLotKey(ctx, testLot, 2048, PrimesAuto)
			return err
		},
		"WrapLotKey": func(ctx context.Context) error {
			_, err := operators.WrapLotKey(ctx, testLot, testKEK)
			return err
		},
		"WrapEnrolled": func(ctx context.Context) error { _, err := operators.WrapEnrolled(ctx, testKEK); return err },
	} {
		if err := do(ctx); err == nil || !strings.Contains(err.Error(), "a token of the operator's") {
			t.Errorf("%s of an operator's: %v", name, err)
		}
	}
	// What a token is for stands for ever, and so does what was accepted with it.
	for _, token := range []*base{operator.base, factory.base} {
		err := token.hsm.With(ctx, "test", func(s *p11.Session) error {
			found, err := s.Find(ck.Attributes{ck.Attr(pkcs11.CKA_LABEL, keyspec.DedicationLabel)})
			if err != nil || len(found) != 1 {
				t.Fatal(found, err)
			}
			if err := s.Set(found[0], ck.Attr(pkcs11.CKA_APPLICATION, "{}")); err == nil {
				t.Error("it was changed")
			}
			if err := s.Destroy(found[0]); err == nil {
				t.Error("it was destroyed")
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	fresh := open(t, softhsmtest.Token(t))
	if _, err := fresh.EnsureStorageKey(ctx); !errors.Is(err, ErrNotDedicated) {
		t.Errorf("a token that nobody initialised: %v", err)
	}
	must[bool](t)(fresh.Dedicate(ctx, Dedication{Side: Operator, Weak: []string{"it does not enforce x"}}))
	if again := must[bool](t)(fresh.Dedicate(ctx, Dedication{Side: Operator})); again {
		t.Error("dedicated twice")
	}
	if weak := must[[]string](t)(fresh.Weak(ctx)); !slices.Equal(weak, []string{"it does not enforce x"}) {
		t.Errorf("weak: %q", weak)
	}
}

// Objects that are not PRIVATE can be removed and made without a PIN, under the label and CKA_ID of ours too. None is
// taken for a key of ours.
func TestPlantedKeys(t *testing.T) {
	ctx := t.Context()
	plant := func(token holder, k Key, more ...*pkcs11.Attribute) {
		t.Helper()
		err := token.held().hsm.With(ctx, "test", func(s *p11.Session) error {
			if err := token.held().destroy(s, pkcs11.CKO_SECRET_KEY, k); err != nil {
				return err
			}
			_, err := s.Create(ck.Frozen(keyspec.Named(k), keyspec.LeavesUnderTrusted,
				ck.Use(ck.Usages, pkcs11.CKA_WRAP), more, ck.Attributes{
					ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), ck.Attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
					ck.Attr(pkcs11.CKA_VALUE, make([]byte, 32)),
				}))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	refused := func(what string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), "the wrong user has made") {
			t.Errorf("%s: %v", what, err)
		}
	}

	factory, _ := newFactory(t, nil)
	if _, _, err := factory.MakeDeviceKey(ctx, kme.SuiteECDSA, testInjection); err != nil {
		t.Fatal(err)
	}
	for _, private := range []bool{false, true} { // true takes the user's PIN
		plant(factory, testInjection, ck.Attr(pkcs11.CKA_PRIVATE, private))
		_, _, err := factory.MakeDeviceKey(ctx, kme.SuiteECDSA, testInjection)
		refused("a device key under a planted injection key", err)
		_, err = factory.WrapEnrolled(ctx, testInjection)
		refused("a planted injection key for its fixture", err)
	}

	operator := open(t, softhsmtest.Token(t))
	must[bool](t)(operator.Dedicate(ctx, Dedication{Side: Operator}))
	plant(operator, keyspec.Storage, ck.Attr(pkcs11.CKA_PRIVATE, false))
	_, err := operator.EnsureStorageKey(ctx)
	refused("a planted storage key", err)

	// The public half of the signing key is what operators pin.
	other := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	must[crypto.Signer](t)(factory.Signer(testSigning))
	err = factory.hsm.With(ctx, "test", func(s *p11.Session) error {
		if err := factory.destroy(s, pkcs11.CKO_PUBLIC_KEY, testSigning); err != nil {
			return err
		}
		point := must[[]byte](t)(asn1.Marshal(must[[]byte](t)(other.PublicKey.Bytes())))
		_, err := s.Create(ck.Join(keyspec.Named(testSigning),
			ck.Attributes{ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
				ck.Attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC),
				ck.Attr(pkcs11.CKA_PRIVATE, false), ck.Attr(pkcs11.CKA_EC_PARAMS, keyspec.P256Params),
				ck.Attr(pkcs11.CKA_EC_POINT, point)}))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := factory.Signer(testSigning); err == nil || !strings.Contains(err.Error(), "not its public key") {
		t.Errorf("a planted public key: %v", err)
	}
}
