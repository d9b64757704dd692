package faultmodule_test

import (
	"crypto/rsa"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/binding/tokenkeys"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/directory/filestore"
	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/kme"
)

// Trials that fail together where the user can make a key TRUSTED in any way, and those of CKA_UNWRAP_TEMPLATE.
var (
	byUser = []string{
		"refuses to make a TRUSTED key for the user, C_CreateObject",
		"refuses to make a TRUSTED key for the user, C_GenerateKey",
		"refuses to make a TRUSTED key for the user, C_GenerateKeyPair",
		"refuses to make a TRUSTED key for the user, C_UnwrapKey",
		"refuses to make a TRUSTED key for the user, C_CopyObject",
		"refuses to make a TRUSTED key for the user, C_SetAttributeValue",
	}
	templates = []string{
		"refuses to unwrap a KEK otherwise than as CKA_UNWRAP_TEMPLATE says",
		"refuses to unwrap a lot key otherwise than as CKA_UNWRAP_TEMPLATE says",
		"refuses to unwrap a KME otherwise than as CKA_UNWRAP_TEMPLATE says",
		"refuses to forget CKA_UNWRAP_TEMPLATE on a copy", "refuses to clear CKA_UNWRAP_TEMPLATE",
	}
	mechanisms = []string{
		"refuses to unwrap and decrypt with a transport key by other mechanisms than ours",
		"refuses to unwrap and decrypt with a KEK by other mechanisms than ours",
		"refuses to unwrap and decrypt with a storage key by other mechanisms than ours",
	}
)

// SoftHSM does all that it must, on both sides. A token that does one thing which it must not is found out by the trial
// of that thing, and by no other.
func TestWeaknesses(t *testing.T) {
	const (
		clears   = "refuses to clear CKA_WRAP_WITH_TRUSTED"
		readable = "refuses to clear CKA_SENSITIVE"
		again    = "refuses to set CKA_EXTRACTABLE"
	)
	both := []hsmkeys.Side{hsmkeys.Factory, hsmkeys.Operator}
	tok := softhsmtest.Token(t)
	for _, c := range []struct {
		tell    string
		sides   []hsmkeys.Side
		factory []string // also
		want    []string
	}{
		{"", both, nil, nil},
		{"allows * 0x86", both, []string{"refuses to make a TRUSTED RSA key for the user"}, byUser},
		{"allows C_CreateObject 0x86", both, []string{"refuses to make a TRUSTED RSA key for the user"}, byUser[:1]},
		{"allows C_GenerateKey 0x86", both, nil, byUser[1:2]},
		{"allows C_GenerateKeyPair 0x86", both, nil, byUser[2:3]},
		{"allows C_UnwrapKey 0x86", both, nil, byUser[3:4]},
		{"allows C_CopyObject 0x86", both, nil, byUser[4:5]},
		{"allows C_SetAttributeValue 0x86", both, nil, byUser[5:]},
		{"ignores * 0x86", both, nil, nil}, // it says CKR_OK, and makes no key TRUSTED
		{"allows C_CopyObject 0x210", both, nil, []string{clears + " on a copy"}},
		{"allows C_SetAttributeValue 0x210", both, []string{clears + " of a lot key"}, []string{clears}},
		{"ignores * 0x210", both, []string{"refuses to wrap a lot key under a key that is not TRUSTED",
			clears + " of a lot key"},
			[]string{"refuses to wrap a WRAP_WITH_TRUSTED key under another", clears, clears + " on a copy"}},
		{"allows C_CopyObject 0x103", both, nil, []string{readable + " on a copy"}},
		{"allows C_SetAttributeValue 0x103", both, []string{"refuses to make a lot key readable"}, []string{readable}},
		{"allows C_CopyObject 0x162", both, nil, []string{again + " on a copy"}},
		{"allows C_SetAttributeValue 0x162", both, []string{again + " of a sealed lot key again"},
			[]string{again + " again"}},
		{"ignores C_SetAttributeValue 0x162", []hsmkeys.Side{hsmkeys.Factory}, nil, []string{"seals a lot key"}},
		{"ignores * 0x171", both, []string{"refuses to copy a lot key"},
			[]string{"refuses to copy a key that is not COPYABLE"}},
		{"ignores * 0x170", both, nil, []string{"refuses to change a key that is not MODIFIABLE"}},
		{"tells * 0x11", both, []string{"refuses to read the value of a lot key"},
			[]string{"refuses to read the value of an AES key"}},
		{"tells * 0x124", []hsmkeys.Side{hsmkeys.Factory}, nil, []string{"refuses to read the value of a lot key"}},
		{"tells * 0x128", []hsmkeys.Side{hsmkeys.Factory}, nil, []string{"refuses to read the value of a lot key"}},
		{"allows C_WrapKey 0", both, []string{"refuses to wrap a lot key under a key that is not TRUSTED",
			"refuses to wrap a sealed lot key",
			"refuses to wrap a key under an RSA key whose CKA_WRAP_TEMPLATE names another",
			"refuses to wrap an AES key under a KEK whose CKA_WRAP_TEMPLATE names RSA keys"},
			[]string{"refuses to wrap a WRAP_WITH_TRUSTED key under another",
				"refuses to wrap a key that is not EXTRACTABLE"}},
		{"ignores * 0x40000211", []hsmkeys.Side{hsmkeys.Factory}, nil, []string{
			"refuses to wrap a key under an RSA key whose CKA_WRAP_TEMPLATE names another",
			"refuses to wrap an AES key under a KEK whose CKA_WRAP_TEMPLATE names RSA keys"}},
		{"ignores * 0x40000212", []hsmkeys.Side{hsmkeys.Operator}, nil, templates},
		{"ignores C_UnwrapKey 0x40000212", []hsmkeys.Side{hsmkeys.Operator}, nil, []string{templates[1], templates[3]}},
		{"ignores C_GenerateKey 0x40000212", []hsmkeys.Side{hsmkeys.Operator}, nil, templates[2:3]},
		{"refuses * 0x40000212", []hsmkeys.Side{hsmkeys.Operator}, nil,
			[]string{"refuses to unwrap a key otherwise than as CKA_UNWRAP_TEMPLATE says"}},
		{"ignores * 0x40000600", []hsmkeys.Side{hsmkeys.Operator}, nil, mechanisms},
		{"ignores C_UnwrapKey 0x40000600", []hsmkeys.Side{hsmkeys.Operator}, nil, mechanisms[1:2]},
		{"refuses * 0x40000600", []hsmkeys.Side{hsmkeys.Operator}, nil, mechanisms},
	} {
		for _, side := range c.sides {
			t.Run(string(side)+" "+c.tell, func(t *testing.T) {
				faulty.Tell(t, c.tell)
				defer faulty.Tell(t)
				token := openFactory(t, tok.URI, hsmkeys.Options{})
				want, got := slices.Clone(c.want), []string{}
				if side == hsmkeys.Factory {
					want = append(want, c.factory...)
				}
				for _, f := range must[[]hsmkeys.Finding](t)(token.Weaknesses(t.Context(), side)) {
					if got = append(got, f.Check); f.Consequence == "" {
						t.Errorf("%q: what follows is not said", f.Check)
					}
				}
				slices.Sort(want)
				slices.Sort(got)
				if !slices.Equal(got, want) {
					t.Errorf("found out\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
				}
			})
		}
	}
}

// A token that is away, or short of something, is not one that refuses.
func TestTrialsOfATokenThatFails(t *testing.T) {
	tok := softhsmtest.Token(t)
	for _, line := range []string{"C_CopyObject 0x30", "C_SetAttributeValue 0x31", "C_WrapKey 0x32", "C_UnwrapKey 0xB3",
		"C_CreateObject 0x2"} {
		token := openFactory(t, tok.URI, hsmkeys.Options{})
		faulty.Tell(t, line)
		for _, side := range []hsmkeys.Side{hsmkeys.Factory, hsmkeys.Operator} {
			if weak, err := token.Weaknesses(t.Context(), side); err == nil {
				t.Errorf("%s: no error, and findings %v", line, weak)
			}
		}
		faulty.Tell(t)
	}
}

// No lot is made in a token that fails a trial, and no key of a line: it says what failed. The lots of a
// token that was good before stay.
func TestWeakFactory(t *testing.T) {
	ctx := t.Context()
	tok := softhsmtest.Token(t)
	token := openFactory(t, tok.URI, hsmkeys.Options{})
	faulty.Tell(t, "allows C_CopyObject 0x86")
	defer faulty.Tell(t)
	if _, _, _, err := factory.Init(ctx, token); err == nil ||
		!strings.Contains(err.Error(), "it does not refuse to make a TRUSTED key for the user, C_CopyObject") {
		t.Errorf("init: %v", err)
	}
	if _, err := token.Weak(ctx); !errors.Is(err, hsmkeys.ErrNotDedicated) {
		t.Errorf("the token that was refused is dedicated: %v", err)
	}
	faulty.Tell(t)
	must[string](t)(first(factory.Init(ctx, token)))
	store := must[*filestore.Store](t)(filestore.Open(t.TempDir()))
	line := must[*factory.Line](t)(factory.NewLine(token, store, factory.State{Dir: t.TempDir()}))
	spec := factory.LotSpec{Lot: "L1", Range: directory.Range{TAC: must[kme.TAC](t)(kme.ParseTAC("35209900")),
		Count: 4}, Bits: 2048, Suite: kme.SuiteECDSA,
		ShardSize: 4, Primes: hsmkeys.PrimesAuto}
	must[*directory.Manifest](t)(line.CreateLot(ctx, spec))
	spec.Lot, spec.Range.First = "L2", 4
	for _, line2 := range []struct{ tell, says string }{
		{"allows C_SetAttributeValue 0x210", "it does not refuse to clear CKA_WRAP_WITH_TRUSTED of a lot key"},
		{"ignores * 0x40000211", "CKA_WRAP_TEMPLATE names another"},
		{"tells * 0x125", "it does not refuse to read the value of a lot key"},
	} {
		faulty.Tell(t, line2.tell)
		if _, err := line.CreateLot(ctx, spec); err == nil || !strings.Contains(err.Error(), line2.says) ||
			!strings.Contains(err.Error(), "factory doctor") {
			t.Errorf("%s: %v", line2.tell, err)
		}
	}
	faulty.Tell(t)
	if has := must[bool](t)(token.Has(ctx, hsmkeys.Key{Role: hsmkeys.RoleLot, Manufacturer: line.Manufacturer(),
		Name: "L2"})); has {
		t.Error("a lot key was made")
	}
	must[*directory.Manifest](t)(line.CreateLot(ctx, spec))
}

// An operator's token that fails a trial is refused, and nothing is in it; accepted, it says so for ever,
// and keys are made as it allows.
func TestWeakOperator(t *testing.T) {
	ctx := t.Context()
	for _, c := range []struct{ tell, says string }{
		{"refuses * 0x40000212", "otherwise than as CKA_UNWRAP_TEMPLATE says"},
		{"ignores * 0x40000212", "it does not refuse to unwrap a KME otherwise than as CKA_UNWRAP_TEMPLATE says"},
		{"allows C_GenerateKey 0x86", "it does not refuse to make a TRUSTED key for the user, C_GenerateKey"},
		{"ignores * 0x210", "it does not refuse to wrap a WRAP_WITH_TRUSTED key under another"},
		{"refuses * 0x40000600", "it does not refuse to unwrap and decrypt with a storage key by other"},
	} {
		t.Run(c.tell, func(t *testing.T) {
			tok := softhsmtest.Token(t)
			token := openOperator(t, tok.URI, hsmkeys.Options{})
			faulty.Tell(t, c.tell)
			defer faulty.Tell(t)
			if _, _, err := tokenkeys.Init(ctx, token, false); err == nil || !strings.Contains(err.Error(), c.says) ||
				!strings.Contains(err.Error(), "--accept-weak-token") {
				t.Fatalf("init: %v", err)
			}
			if _, err := token.Weak(ctx); !errors.Is(err, hsmkeys.ErrNotDedicated) {
				t.Errorf("the token that was refused is dedicated: %v", err)
			}
			created, weak, err := tokenkeys.Init(ctx, token, true)
			if err != nil || !created || !strings.Contains(strings.Join(weak, "; "), c.says) {
				t.Fatal(created, weak, err)
			}
			if err := token.Ping(ctx); err != nil {
				t.Error(err)
			}
			must[*rsa.PublicKey](t)(token.NewTransportKey(ctx))
			wrong := map[string]string{}
			for _, f := range must[[]hsmkeys.Finding](t)(token.DoctorOperator(ctx)) {
				if strings.HasPrefix(f.Check, "key ") && f.Required && !f.OK {
					wrong[f.Check] = f.Consequence
				}
				if strings.Contains(c.tell, "0x86") && f.Check == `key "kme storage"` &&
					f.Attributes["CKA_EXTRACTABLE"] {
					t.Error("the storage key can leave under a key that the user has made TRUSTED")
				}
				if f.Check == `key "kme storage"` && c.tell == "refuses * 0x40000600" &&
					!strings.Contains(f.Consequence, "it has no CKA_ALLOWED_MECHANISMS") {
					t.Errorf("%+v", f)
				}
			}
			for check, what := range wrong {
				// Without CKA_UNWRAP_TEMPLATE there are keys that unwrap without.
				if !strings.Contains(c.tell, "0x40000212") || !strings.Contains(what, "it has no CKA_UNWRAP_TEMPLATE") {
					t.Errorf("%s: %s", check, what)
				}
			}
			// Well again, it says the same, and so does another init.
			faulty.Tell(t)
			again := openOperator(t, tok.URI, hsmkeys.Options{})
			if got := must[[]string](t)(again.Weak(ctx)); !slices.Equal(got, weak) {
				t.Errorf("it remembers %q, was accepted for %q", got, weak)
			}
			if created, got, err := tokenkeys.Init(ctx, again, false); created || err != nil ||
				!slices.Equal(got, weak) {
				t.Errorf("init again: %v, %q, %v", created, got, err)
			}
		})
	}
}
