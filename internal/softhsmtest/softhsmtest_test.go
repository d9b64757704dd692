package softhsmtest

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testkeys"
)

func TestMain(m *testing.M) { Main(m, 2) }

// fatalTB is a test that may end early without failing the test around it.
type fatalTB struct {
	testing.TB
	fatal string
}

func (f *fatalTB) Helper() {}
func (f *fatalTB) Fatal(args ...any) {
	f.fatal = fmt.Sprint(args...)
	runtime.Goexit()
}
func (f *fatalTB) Fatalf(format string, args ...any) { f.Fatal(fmt.Sprintf(format, args...)) }

// fatal returns what fn ends its test with.
func fatal(t *testing.T, fn func(testing.TB)) string {
	f := &fatalTB{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		fn(f)
	}()
	<-done
	return f.fatal
}

func TestToken(t *testing.T) {
	if got := "SOFTHSM2_CONF=" + os.Getenv("SOFTHSM2_CONF"); got != Env(Dir()) {
		t.Errorf("%s, want %s", got, Env(Dir()))
	}
	a, b := Token(t), Token(t)
	if a.Label != "t00" || b.Label != "t01" {
		t.Errorf("labels %s and %s, want t00 and t01", a.Label, b.Label)
	}
	login(t, Dir(), a)
	login(t, Dir(), b)
	if msg := fatal(t, func(tb testing.TB) { Token(tb) }); !strings.Contains(msg, "all 2 tokens") {
		t.Errorf("a third token of two: %q", msg)
	}
}

func TestMake(t *testing.T) {
	dir := t.TempDir()
	toks := Make(t, dir, "factory", "operator")
	if len(toks) != 2 {
		t.Fatalf("%d tokens, want 2", len(toks))
	}
	for _, tok := range toks {
		login(t, dir, tok)
	}
}

// The RSA keys that a token makes are the next of those that are kept, and whole.
func TestKeptKeys(t *testing.T) {
	ctx := pkcs11.New(ModulePath())
	must.Do(t, ctx.Initialize())
	defer ctx.Finalize()
	slot := must.Get[[]uint](t)(ctx.GetSlotList(true))[0]
	session := must.Get[pkcs11.SessionHandle](t)(ctx.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION))
	must.Do(t, ctx.Login(session, pkcs11.CKU_USER, read(t, filepath.Join(Dir(), "t00.pin")))) // it is all tokens' PIN
	primes := strings.Fields(testkeys.ForTokens(2048))
	for i := range 2 {
		public, private, err := ctx.GenerateKeyPair(session,
			[]*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, nil)},
			[]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_MODULUS_BITS, 2048),
				pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1})},
			[]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_SIGN, true)})
		must.Do(t, err)
		got := must.Get[[]*pkcs11.Attribute](t)(ctx.GetAttributeValue(session, public,
			[]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_MODULUS, nil)}))
		key, want := &rsa.PublicKey{N: new(big.Int).SetBytes(got[0].Value), E: 65537}, big.NewInt(1)
		for _, text := range primes[2*i : 2*i+2] {
			p, _ := new(big.Int).SetString(text, 16)
			want.Mul(want, p)
		}
		if key.N.Cmp(want) != 0 {
			t.Errorf("key %d is not that which is kept", i)
		}
		must.Do(t, ctx.SignInit(session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_SHA256_RSA_PKCS, nil)},
			private))
		signature := must.Get[[]byte](t)(ctx.Sign(session, []byte("signed")))
		digest := sha256.Sum256([]byte("signed"))
		must.Do(t, rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], signature))
	}
}

// Whoever lacks SoftHSM must hear of it: tests that skipped would look as if they had passed.
func TestNoSoftHSMFails(t *testing.T) {
	t.Setenv("PATH", pathWithout(t, "softhsm2-util"))
	if msg := fatal(t, func(tb testing.TB) {
		Make(tb, t.TempDir(), "a")
	}); !strings.Contains(msg, "softhsm2-util not found") {
		t.Errorf("Make without SoftHSM: %q", msg)
	}
	if code := run(nil, 1, nil); code != 1 {
		t.Errorf("Main without SoftHSM exits with %d, want 1", code)
	}
}
