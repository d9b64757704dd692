package hsmkeys

import (
	"crypto/rsa"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testkeys"
)

// finding is the one of a check; nil if there is none.
func finding(report []Finding, check string) *Finding {
	if i := slices.IndexFunc(report, func(f Finding) bool { return f.Check == check }); i >= 0 {
		return &report[i]
	}
	return nil
}

// The doctor reports every key of ours, as an auditor asks for it, and nothing is wrong with any. The trials leave
// nothing behind.
func TestDoctorReportsKeys(t *testing.T) {
	ctx := t.Context()
	operator, factory, transport, pub := newSides(t)
	grant := must[[]byte](t)(factory.WrapLotKey(ctx, testLot, testKEK))
	if err := operator.UnwrapKEK(ctx, testKEK, transport,
		must[[]byte](t)(factory.WrapEnrolled(ctx, testKEK))); err != nil {
		t.Fatal(err)
	}
	must[bool](t)(operator.UnwrapLotKey(ctx, testLot, testKEK, grant, pub))
	sealed := testLot
	sealed.Name = "L2"
	if _, _, err := factory.EnsureLotKey(ctx, sealed, 2048, PrimesAuto); err != nil {
		t.Fatal(err)
	}
	if err := factory.SealLotKey(ctx, sealed); err != nil {
		t.Fatal(err)
	}
	leftOver := ""
	for _, c := range []struct {
		token *base
		keys  map[string]string // LOCAL, ALWAYS_SENSITIVE and NEVER_EXTRACTABLE
	}{
		{factory.base, map[string]string{testSigning.Label(): "111", testInjection.Label(): "110",
			testKEK.Label(): "110", testLot.Label(): "110", sealed.Label(): "110"}},
		{operator.base, map[string]string{keyspec.Storage.Label(): "110", keyspec.Ledger.Label(): "110",
			testKEK.Label(): "000", testLot.Label(): "000", "": "111"}},
	} {
		before := countObjects(t, c.token, nil)
		var report []Finding
		if c.token == factory.base {
			report = must[[]Finding](t)(factory.DoctorFactory(ctx, testSigning, testInjection))
		} else {
			report = must[[]Finding](t)(operator.DoctorOperator(ctx))
		}
		if after := countObjects(t, c.token, nil); after != before {
			t.Errorf("%d objects before, %d after", before, after)
		}
		for _, f := range report {
			if f.Required && !f.OK {
				t.Errorf("%+v", f)
			}
			label, isKey := strings.CutPrefix(f.Check, "key \"")
			if label = strings.TrimSuffix(label, "\""); !isKey {
				continue
			}
			if strings.HasPrefix(label, "kme transport ") {
				if leftOver, label = label, ""; f.OK || f.Required ||
					!strings.Contains(f.Consequence, "keysvc transport destroy") {
					t.Errorf("a transport key that is left over: %+v", f)
				}
			}
			var got strings.Builder
			for _, name := range []string{"CKA_LOCAL", "CKA_ALWAYS_SENSITIVE", "CKA_NEVER_EXTRACTABLE"} {
				value, there := f.Attributes[name]
				if !there {
					t.Errorf("%s of %q is not said", name, label)
				}
				got.WriteString(fmt.Sprint(map[bool]int{true: 1}[value]))
			}
			if want, ok := c.keys[label]; !ok || got.String() != want {
				t.Errorf("%q is %s, want %s", label, got.String(), want)
			}
			delete(c.keys, label)
		}
		if len(c.keys) > 0 {
			t.Errorf("not reported: %v", c.keys)
		}
	}
	if leftOver == "" {
		t.Error("the transport key is not reported")
	}
}

// Keys that have our labels and are not as ours are made are found out.
func TestDoctorFindsStrangers(t *testing.T) {
	ctx := t.Context()
	tok := softhsmtest.Token(t)
	factory := must[*FactoryToken](t)(OpenFactory(ctx, tok.URI, Options{}))
	must[bool](t)(factory.Dedicate(ctx, Dedication{Side: Factory}))
	must[bool](t)(factory.EnsureSigningKey(ctx, testSigning))
	put := func(token holder, parts ...ck.Attributes) {
		t.Helper()
		if err := token.held().hsm.With(ctx, "test", func(s *p11.Session) error {
			_, err := s.Create(ck.Join(parts...))
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	// What somebody knows, in the place of a lot key; one that signs besides; one that leaves; and an operator's on a
	// factory's.
	lot := func(name string) Key { return Key{Role: RoleLot, Manufacturer: manufacturer, Name: name} }
	known := must[*rsa.PrivateKey](t)(testkeys.RSA(2048))
	value := rsaPrivate(known)
	put(factory, ck.With(ck.Join(keyspec.Named(lot("known")), keyspec.Lot), ck.Attr(pkcs11.CKA_TOKEN, true)), value)
	put(factory, ck.With(ck.Join(keyspec.Named(lot("signs")), keyspec.Lot), ck.Attr(pkcs11.CKA_SIGN, true)), value)
	put(factory, ck.With(ck.Join(keyspec.Named(lot("leaves")), keyspec.Lot),
		ck.Attr(pkcs11.CKA_WRAP_WITH_TRUSTED, false)), value)
	put(factory, ck.With(ck.Join(keyspec.Named(lot("readable")), keyspec.Lot), ck.Attr(pkcs11.CKA_SENSITIVE, false)),
		value)
	secret := ck.Attributes{ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		ck.Attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), ck.Attr(pkcs11.CKA_VALUE, make([]byte, 32))}
	put(factory, secret, keyspec.Named(keyspec.Storage), ck.Guarded(false), ck.Use(ck.Usages, pkcs11.CKA_WRAP))
	if err := factory.Close(); err != nil {
		t.Fatal(err)
	}
	// The security officer makes any key TRUSTED: one of their own, and one with our label that wraps everything.
	err := asOfficer(tok.URI, PIN(tok.SOPIN), func(officer *base) error {
		trusted := ck.Attributes{ck.Attr(pkcs11.CKA_TRUSTED, true)}
		put(officer, keyspec.Wrapping(&fixtureKey().PublicKey), trusted,
			ck.Attributes{ck.Attr(pkcs11.CKA_TOKEN, true), ck.Attr(pkcs11.CKA_LABEL, "kme fixture f9")})
		put(officer, keyspec.Wrapping(&fixtureKey().PublicKey), trusted,
			keyspec.Named(keyspec.Recipient(testInjection)))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	factory = openFactory(t, tok)
	report := must[[]Finding](t)(factory.DoctorFactory(ctx, testSigning))
	for check, wants := range map[string][]string{
		`key "` + lot("known").Label() + `"`: {"CKA_LOCAL is false", "CKA_ALWAYS_SENSITIVE is false",
			"make another"},
		`key "` + lot("signs").Label() + `"`:  {"CKA_SIGN is true"},
		`key "` + lot("leaves").Label() + `"`: {"it leaves under any key"},
		`key "` + lot("readable").Label() + `"`: {"CKA_SENSITIVE is false",
			"the token would give CKA_PRIVATE_EXPONENT, CKA_PRIME_1, CKA_PRIME_2"},
		`key "kme storage"`: {"none of the factory's"},
		"no TRUSTED key but those of enrolments": {`"kme fixture f9" that is not ours`,
			"kme fixture f1 of test-manufacturer, which wraps anything"},
	} {
		f := finding(report, check)
		if f == nil || f.OK || !f.Required {
			t.Errorf("%s: %+v", check, f)
			continue
		}
		for _, want := range wants {
			if !strings.Contains(f.Consequence, want) {
				t.Errorf("%s: %q does not say %q", check, f.Consequence, want)
			}
		}
	}
	// No lot is made beside a TRUSTED key that is a stranger.
	if weak := must[[]Finding](t)(factory.Weaknesses(ctx, Factory)); len(weak) != 1 ||
		!strings.Contains(Sentences(weak)[0], "kme fixture f9") {
		t.Errorf("%+v", weak)
	}
}

// As a factory's, NSS softoken is refused: what a lot rests on, it does not do. On an operator's side, what it does not
// do is known and has a consequence.
func TestNSSIsWeak(t *testing.T) {
	token := open(t, softhsmtest.NSS(t))
	for side, wants := range map[Side][]string{
		Factory: {"refuses to wrap a lot key under a key that is not TRUSTED",
			"refuses to wrap a WRAP_WITH_TRUSTED key under another"},
		Operator: {"refuses to wrap a WRAP_WITH_TRUSTED key under another"},
	} {
		weak := must[[]Finding](t)(token.Weaknesses(t.Context(), side))
		for _, f := range weak {
			t.Logf("%s: %s: %s", side, f.Check, f.Consequence)
		}
		for _, want := range wants {
			if f := finding(weak, want); f == nil {
				t.Errorf("%s: not found out: %s", side, want)
			}
		}
	}
}

// What a token says of itself, and of its PINs.
func TestIdentity(t *testing.T) {
	tok := softhsmtest.Token(t)
	token := open(t, tok)
	id := must[Identity](t)(token.Identity(t.Context()))
	if id.Manufacturer != "SoftHSM project" || id.Model != "SoftHSM v2" || id.Serial != token.Serial() ||
		id.FirmwareVersion != id.LibraryVersion || id.Cryptoki != "2.40" || id.Dedicated != "" {
		t.Errorf("%+v", id)
	}
	if len(id.PINs) != 0 {
		t.Errorf("PINs: %q", id.PINs)
	}
	must[bool](t)(token.Dedicate(t.Context(), Dedication{Side: Operator, Weak: []string{"x"}}))
	if id = must[Identity](t)(token.Identity(t.Context())); id.Dedicated != Operator ||
		!slices.Equal(id.Weak, []string{"x"}) {
		t.Errorf("%+v", id)
	}
	// A wrong PIN of the security officer's is on record until the right one comes.
	other := softhsmtest.Token(t)
	if err := asOfficer(other.URI, "wrong", func(*base) error { return nil }); err == nil {
		t.Fatal("a wrong PIN was taken")
	}
	if id = must[Identity](t)(open(t, other).Identity(t.Context())); len(id.PINs) != 1 ||
		!strings.Contains(id.PINs[0], "security officer") || id.ReportPINs().OK {
		t.Errorf("PINs: %q", id.PINs)
	}
}
