package softhsmtest

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

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

// Two processes have a token make RSA keys: they are the first two of those that are kept, and whole.
func TestKeptKeys(t *testing.T) {
	dir := t.TempDir()
	tok := Make(t, dir, "a")["a"]
	primes := strings.Fields(testkeys.ForTokens(2048))
	tool := func(args ...string) []byte {
		t.Helper()
		cmd := exec.Command("pkcs11-tool",
			append([]string{"--module", tok.Module, "--token-label", tok.Label, "--login", "--pin", tok.PIN}, args...)...)
		cmd.Env = append(os.Environ(), Env(dir))
		return must.Get[[]byte](t)(cmd.Output())
	}
	message, signature := filepath.Join(dir, "message"), filepath.Join(dir, "signature")
	write(t, message, "signed")
	for i, id := range []string{"01", "02"} {
		tool("--keypairgen", "--key-type", "rsa:2048", "--id", id)
		public := filepath.Join(dir, "public")
		tool("--read-object", "--type", "pubkey", "--id", id, "--output-file", public)
		key := must.Get[any](t)(x509.ParsePKIXPublicKey([]byte(read(t, public)))).(*rsa.PublicKey)
		want := big.NewInt(1)
		for _, text := range primes[2*i : 2*i+2] {
			p, _ := new(big.Int).SetString(text, 16)
			want.Mul(want, p)
		}
		if key.N.Cmp(want) != 0 {
			t.Errorf("key %s is none of those that are kept", id)
		}
		tool("--sign", "--mechanism", "SHA256-RSA-PKCS", "--id", id, "--input-file", message, "--output-file", signature)
		digest := sha256.Sum256([]byte("signed"))
		must.Do(t, rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], []byte(read(t, signature))))
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
