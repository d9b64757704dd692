package faultmodule_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/internal/testkeys"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

type healthy interface{ Health() hsmkeys.Health }

// givenUp makes a call that hangs in the module as lines say, which must be given up. Then it lets it go, and waits
// until nothing is left of it in any of the tokens.
func givenUp(t *testing.T, tokens []healthy, call func() error, lines ...string) {
	t.Helper()
	faulty.Tell(t, lines...)
	done := make(chan error, 1)
	go func() { done <- call() }()
	select {
	case err := <-done:
		if !errors.Is(err, hsmkeys.ErrUnavailable) {
			t.Errorf("%v", err)
		}
	case <-time.After(time.Minute):
		t.Error("it was not given up within a minute")
	}
	faulty.Tell(t)
	var h hsmkeys.Health
	for _, token := range tokens {
		for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
			if h = token.Health(); h.Hung == 0 && h.Cause == nil {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("the token does not come back: %+v", h)
			}
		}
	}
}

// A call that was given up goes on, and writes nothing that its caller has: the race detector sees it otherwise.
func TestGivenUp(t *testing.T) {
	ctx := t.Context()
	operator, operatorTok, opening := newOperator(t)
	transport := must[*rsa.PublicKey](t)(operator.NewTransportKey(ctx))
	kek := hsmkeys.Key{Role: hsmkeys.RoleKEK, Manufacturer: "m", Name: "op"}
	injection := hsmkeys.Key{Role: hsmkeys.RoleInjection, Manufacturer: "m", Name: "f1"}
	fixture := must[*rsa.PrivateKey](t)(testkeys.RSA(3072))
	factory, tok := newFactory(t, map[hsmkeys.Key]*rsa.PublicKey{kek: transport, injection: &fixture.PublicKey})
	signing := hsmkeys.Key{Role: hsmkeys.RoleSigning}
	lot := hsmkeys.Key{Role: hsmkeys.RoleLot, Manufacturer: "m", Name: "L1"}
	pub, _, err := factory.EnsureLotKey(ctx, lot, 2048, hsmkeys.PrimesAuto)
	if err != nil {
		t.Fatal(err)
	}
	wrapped, enrolment := must[[]byte](t)(factory.WrapLotKey(ctx, lot, kek)), must[[]byte](t)(factory.WrapEnrolled(ctx,
		kek))
	if err := operator.UnwrapKEK(ctx, kek, transport, enrolment); err != nil {
		t.Fatal(err)
	}
	must[bool](t)(operator.UnwrapLotKey(ctx, lot, kek, wrapped, pub))
	device := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	payload := hsmkeys.Payload{
		Suite: kme.SuiteECDSA, Lot: lot, N: pub, Device: &device.PublicKey, Bytes: make([]byte, 256),
	}
	sealed := must[*hsmkeys.Opened](t)(operator.OpenPayload(ctx, payload)).Sealed
	none, lot2 := hsmkeys.Key{Role: hsmkeys.RoleLot, Name: "never made"}, lot
	lot2.Name = "L2"
	user := must[*p11.Token](t)(p11.OpenUser(ctx, faulty.URI(tok.URI), p11.Options{}))
	if err := user.With(ctx, "test", func(s *p11.Session) error { // what a change of the security officer's PIN leaves
		return s.PutNote("kme so split", []byte(`{"split":"one","threshold":2,"count":3}`),
			ck.Attributes{ck.Attr(pkcs11.CKA_PRIVATE, false)})
	}); err != nil {
		t.Fatal(err)
	}
	user.Close()

	type tokens struct {
		o *hsmkeys.OperatorToken
		f *hsmkeys.FactoryToken
	}
	for _, c := range []struct {
		name, hangs string
		call        func(tokens) error
	}{
		{"OpenPayload", "C_Decrypt", func(t tokens) error { return second(t.o.OpenPayload(ctx, payload)) }},
		{"ExportKME", "C_Decrypt", func(t tokens) error { return second(t.o.ExportKME(ctx, payload)) }},
		{"EncryptRANDs", "C_UnwrapKey", func(t tokens) error {
			return second(t.o.EncryptRANDs(ctx, sealed, make([]hsmkeys.RAND, 1)))
		}},
		{"DecryptRAND", "C_UnwrapKey", func(t tokens) error {
			return second(t.o.DecryptRAND(ctx, sealed, [16]byte{}))
		}},
		{"Has", "C_FindObjects", func(t tokens) error { return second(t.o.Has(ctx, none)) }},
		{"RememberLotKeys", "C_GetAttributeValue", func(t tokens) error { return second(t.o.RememberLotKeys(ctx)) }},
		{"TransportKeys", "C_GetAttributeValue", func(t tokens) error { return second(t.o.TransportKeys(ctx)) }},
		{"NewTransportKey", "C_GenerateKeyPair", func(t tokens) error { return second(t.o.NewTransportKey(ctx)) }},
		{"UnwrapKEK", "C_UnwrapKey", func(t tokens) error { return t.o.UnwrapKEK(ctx, kek, transport, enrolment) }},
		{"UnwrapLotKey", "C_UnwrapKey", func(t tokens) error {
			return second(t.o.UnwrapLotKey(ctx, lot2, kek, wrapped, pub))
		}},
		{"DoctorOperator, mechanisms", "C_GetMechanismInfo", func(t tokens) error {
			return second(t.o.DoctorOperator(ctx))
		}},
		{"DoctorOperator, policies", "C_GenerateKeyPair", func(t tokens) error {
			return second(t.o.DoctorOperator(ctx))
		}},
		{"EnsureSigningKey", "C_GenerateKeyPair", func(t tokens) error {
			return second(t.f.EnsureSigningKey(ctx, none))
		}},
		{"MakeDeviceKey", "C_WrapKey", func(t tokens) error {
			_, _, err := t.f.MakeDeviceKey(ctx, kme.SuiteECDSA, injection)
			return err
		}},
		{"LotKeySealed", "C_GetAttributeValue", func(t tokens) error { return second(t.f.LotKeySealed(ctx, lot)) }},
		{"WrapLotKey", "C_WrapKey", func(t tokens) error { return second(t.f.WrapLotKey(ctx, lot, kek)) }},
		{"WrapEnrolled", "C_WrapKey", func(t tokens) error { return second(t.f.WrapEnrolled(ctx, kek)) }},
		{"OfficerSplit", "C_GetAttributeValue", func(t tokens) error {
			_, _, err := t.f.OfficerSplit(ctx)
			return err
		}},
		{"Fixtures", "C_FindObjects", func(t tokens) error { return second(t.f.Fixtures(ctx, "m")) }},
		{"Sign", "C_Sign", func(t tokens) error {
			signer, err := t.f.Signer(signing)
			if err != nil {
				return err
			}
			return second(signer.Sign(rand.Reader, make([]byte, 32), nil))
		}},
		{"Signer", "C_FindObjects", func(t tokens) error { return second(t.f.Signer(signing)) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			// New ones: what was just lost is reinitialised only after a second.
			both := tokens{openOperator(t, operatorTok.URI, impatient(opening)),
				openFactory(t, tok.URI, impatient(opening))}
			givenUp(t, []healthy{both.o, both.f}, func() error { return c.call(both) }, c.hangs+" hang")
		})
	}
}

func second[T any](_ T, err error) error { return err }

// A token that fails, and then hangs when it is asked for a new session, holds up its callers no longer than any
// other that hangs.
func TestHangBehindAFailure(t *testing.T) {
	token, tok, opening := newOperatorWith(t, hsmkeys.Options{HangTimeout: given})
	for range token.Sessions() { // all are open: one after the other gets its turn
		testproc.Await(t, "a call", func() bool { return token.Ping(t.Context()) == nil })
	}
	givenUp(t, []healthy{token}, func() error { return token.Ping(t.Context()) }, "C_Sign 0x5", "C_OpenSession hang")
	back(t, token, tok, opening)
}

// A handle that a call finds which was given up is nobody's: the key may have gone meanwhile, and the handle be
// another's.
func TestGivenUpHandle(t *testing.T) {
	maker, tok := newFactory(t, nil)
	lot := hsmkeys.Key{Role: hsmkeys.RoleLot, Name: "L1"}
	if _, _, err := maker.EnsureLotKey(t.Context(), lot, 2048, hsmkeys.PrimesAuto); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	openFactory(t, tok.URI, hsmkeys.Options{})
	// One that has not looked for it yet.
	token := openFactory(t, tok.URI, impatient(time.Since(start)))
	givenUp(t, []healthy{token}, func() error {
		_, err := token.Has(t.Context(), lot)
		testproc.Await(t, "the token's return", func() bool {
			return second(token.Has(t.Context(), hsmkeys.Key{Role: hsmkeys.RoleSigning})) == nil
		})
		// On a busy machine, this may be given up, too.
		testproc.Await(t, "the key's end", func() bool { return token.RemoveLotKey(t.Context(), lot) == nil })
		return err
	}, "C_FindObjectsFinal hang-once 2")
	var has bool
	testproc.Await(t, "an answer", func() bool {
		var err error
		has, err = token.Has(t.Context(), lot)
		return err == nil
	})
	if has {
		t.Error("a key that was removed is there")
	}
}
