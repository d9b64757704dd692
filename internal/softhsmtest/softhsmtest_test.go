package softhsmtest

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
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
