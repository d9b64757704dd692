// Package softhsmtest gives tests real PKCS #11 tokens, made by the project's own softhsm-setup.sh. A machine without
// SoftHSM fails these tests; it does not skip them.
//
// SoftHSM reads SOFTHSM2_CONF, and looks for tokens, once: when a process initialises the module. So the tokens of
// a test binary are all made by [Main], before any test, and handed out by [Token]. Tests that start other processes
// make those a folder of tokens of their own with [Make].
package softhsmtest

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/scheduling"
	"github.com/kmehsm/kmehsm/internal/testkeys"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// Tok is a token that nobody else uses.
type Tok struct {
	Label     string
	URI       string // RFC 7512, with module-path and pin-source
	PIN       string
	SOPIN     string
	PINFile   string
	SOPINFile string
	Module    string // the path of SoftHSM's library
}

var (
	mu     sync.Mutex
	dir    string
	made   int
	module string
	unused []Tok

	library string // SoftHSM's own
	built   []byte // around that
)

// Main runs a package's tests below testproc's guard, with a number of tokens, t00 and up, and exits. It is for
// TestMain:
//
//	func TestMain(m *testing.M) { softhsmtest.Main(m, 8) }
func Main(m *testing.M, tokens int) {
	MainWith(m, tokens, func() error { return nil })
}

// MainWith runs prepare before the tests, when the tokens are there.
func MainWith(m *testing.M, tokens int, prepare func() error) {
	testproc.Main(func() int { return run(m, tokens, prepare) })
}

func run(m *testing.M, tokens int, prepare func() error) int {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "softhsmtest:", err)
		return 1
	}
	tmp, err := os.MkdirTemp("", "softhsmtest-")
	if err != nil {
		return fail(err)
	}
	defer os.RemoveAll(tmp)

	toks, err := setup(tmp, []string{"t00"})
	if err != nil {
		return fail(err)
	}
	first := toks["t00"]
	unused = append(unused, first)
	for i := 1; i < tokens; i++ {
		tok, err := first.copy(tmp, i)
		if err != nil {
			return fail(err)
		}
		unused = append(unused, tok)
	}
	dir, made, module = tmp, tokens, first.Module
	if err := os.Setenv("SOFTHSM2_CONF", conf(tmp)); err != nil {
		return fail(err)
	}
	if err := prepare(); err != nil {
		return fail(err)
	}
	return m.Run()
}

// copy makes a token's twin, with the same PINs and another label and serial number, which SoftHSM keeps as they are:
// another run of softhsm-setup.sh takes a hundred times as long.
func (t Tok) copy(dir string, number int) (Tok, error) {
	tok, tokens := t, filepath.Join(dir, "tokens")
	tok.Label = fmt.Sprintf("t%02d", number)
	tok.PINFile, tok.SOPINFile = filepath.Join(dir, tok.Label+".pin"), filepath.Join(dir, tok.Label+".so-pin")
	tok.URI = strings.NewReplacer("token="+t.Label, "token="+tok.Label, "/"+t.Label+".pin", "/"+tok.Label+".pin").
		Replace(t.URI)
	data, err := os.ReadFile(filepath.Join(tokens, t.Label, "token.object"))
	if err != nil {
		return Tok{}, err
	}
	before, after, found := bytes.Cut(data, fmt.Appendf(nil, "%-32s", t.Label))
	const attribute = 3 * 8 // the type, the kind and the length of the next one's value
	if !found || len(after) < attribute+16 {
		return Tok{}, errors.New("this SoftHSM has another form of tokens")
	}
	data = slices.Concat(before, fmt.Appendf(nil, "%-32s", tok.Label), after[:attribute],
		fmt.Appendf(nil, "%016x", 1<<16+number), after[attribute+16:])
	folder := filepath.Join(tokens, tok.Label)
	return tok, errors.Join(os.CopyFS(folder, os.DirFS(filepath.Join(tokens, t.Label))),
		os.WriteFile(filepath.Join(folder, "token.object"), data, 0o600),
		os.WriteFile(tok.PINFile, []byte(tok.PIN), 0o600), os.WriteFile(tok.SOPINFile, []byte(tok.SOPIN), 0o600))
}

// Token hands out a token that no other test has had.
func Token(t testing.TB) Tok {
	t.Helper()
	mu.Lock()
	defer mu.Unlock()
	if len(unused) == 0 {
		t.Fatalf("all %d tokens are in use: raise the number in TestMain's softhsmtest.Main", made)
	}
	tok := unused[0]
	unused = unused[1:]
	return tok
}

// Dir is the folder of Main's tokens.
func Dir() string { return dir }

// Make makes tokens in a folder of their own, for processes started with [Env]. The test's own process does not see
// them if it has initialised the module.
func Make(t testing.TB, dir string, labels ...string) map[string]Tok {
	t.Helper()
	return must.Get[map[string]Tok](t)(setup(dir, labels))
}

// Env is the environment entry that shows a process the tokens in dir.
func Env(dir string) string { return "SOFTHSM2_CONF=" + conf(dir) }

func conf(dir string) string { return filepath.Join(dir, "softhsm2.conf") }

// script is softhsm-setup.sh, two folders up from this file.
func script() (string, error) {
	_, file, _, _ := runtime.Caller(0)
	path := filepath.Join(filepath.Dir(file), "..", "..", "softhsm-setup.sh")
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("%w (a test binary built with -trimpath cannot find it)", err)
	}
	return path, nil
}

// setup runs softhsm-setup.sh and reads what it tells its users: the env file.
func setup(dir string, labels []string) (map[string]Tok, error) {
	if len(labels) == 0 {
		return nil, errors.New("no tokens asked for")
	}
	path, err := script()
	if err != nil {
		return nil, err
	}
	if out, err := exec.Command(path, append([]string{"--dir", dir}, labels...)...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("softhsm-setup.sh: %w\n%s", err, out)
	}
	env, err := sourced(filepath.Join(dir, "env"))
	if err != nil {
		return nil, err
	}
	toks := make(map[string]Tok)
	for _, l := range labels {
		tok, err := token(env, dir, l)
		if err == nil {
			tok, err = tok.keep(dir)
		}
		if err != nil {
			return nil, err
		}
		toks[l] = tok
	}
	return toks, nil
}

//go:embed module/kept.c
var source string

// kept is kept.c, built around SoftHSM's library.
func kept(softhsm string) ([]byte, error) {
	mu.Lock()
	defer mu.Unlock()
	if built != nil {
		return built, nil
	}
	tmp, err := os.MkdirTemp("", "softhsmtest-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	so := filepath.Join(tmp, "kept.so")
	gcc := exec.Command("gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-fPIC", "-shared", "-x", "c", "-",
		"-x", "none", "-Wl,--no-as-needed,-rpath,"+filepath.Dir(softhsm), softhsm, "-o", so)
	gcc.Stdin = strings.NewReader(source)
	if out, err := gcc.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("gcc: %w: %s", err, out)
	}
	library = softhsm
	built, err = os.ReadFile(so)
	return built, err
}

// keep makes a token of a folder take its RSA keys from those that are kept. All processes share the folder's library,
// so that none takes a key that another has.
func (t Tok) keep(dir string) (Tok, error) {
	path := filepath.Join(dir, "kept.so")
	if _, err := os.Stat(path); err != nil {
		so, err := kept(t.Module)
		files := map[string][]byte{path: so}
		for _, bits := range []int{2048, 3072} {
			files[filepath.Join(dir, fmt.Sprint(bits, ".primes"))] = []byte(testkeys.ForTokens(bits))
			files[filepath.Join(dir, fmt.Sprint(bits, ".next"))] = nil
		}
		for name, data := range files {
			err = errors.Join(err, os.WriteFile(name, data, 0o600))
		}
		if err != nil {
			return Tok{}, err
		}
	}
	t.URI = strings.Replace(t.URI, "module-path="+t.Module, "module-path="+path, 1)
	t.Module = path
	return t, nil
}

// sourced returns the values that an env file sets, as a shell understands it.
func sourced(file string) (map[string]string, error) {
	cmd := exec.Command("/bin/sh", "-c", `. "$1" && env`, "sh", file)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("cannot source %s: %w", file, err)
	}
	env := make(map[string]string)
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		env[name] = value
	}
	return env, nil
}

func token(env map[string]string, dir, label string) (Tok, error) {
	tok := Tok{
		Label:     label,
		PINFile:   filepath.Join(dir, label+".pin"),
		SOPINFile: filepath.Join(dir, label+".so-pin"),
	}
	for _, uri := range env {
		if strings.HasPrefix(uri, "pkcs11:token="+label+"?") {
			tok.URI = uri
		}
	}
	_, query, _ := strings.Cut(tok.URI, "?")
	attributes, err := url.ParseQuery(query)
	if err != nil {
		return Tok{}, fmt.Errorf("the URI of %s: %w", label, err)
	}
	if tok.Module = attributes.Get("module-path"); tok.Module == "" {
		return Tok{}, fmt.Errorf("the env file has no URI with a module-path for %s", label)
	}
	pin, err := os.ReadFile(tok.PINFile)
	if err != nil {
		return Tok{}, err
	}
	soPIN, err := os.ReadFile(tok.SOPINFile)
	if err != nil {
		return Tok{}, err
	}
	tok.PIN, tok.SOPIN = string(pin), string(soPIN)
	return tok, nil
}

// ModulePath is the library of Main's tokens: SoftHSM's, with the RSA keys that are kept. See module/kept.c.
func ModulePath() string { return module }

// Library is SoftHSM's own. A copy of it is another module to the process, which a copy of ModulePath is not.
func Library() string { return library }

// AsServed schedules so many calls of a token at a time as keysvc and factory do, until the end of the test.
func AsServed(t testing.TB, calls int) {
	t.Helper()
	before := runtime.GOMAXPROCS(0)
	t.Cleanup(func() { runtime.GOMAXPROCS(before) })
	if err := scheduling.ForCalls(calls); err != nil {
		t.Log(err)
	}
}
