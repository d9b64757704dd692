package softhsmtest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// result is how a run of softhsm-setup.sh ended. A killed run has the code -1.
type result struct {
	out  string
	code int
}

// start runs softhsm-setup.sh. env is added to the test's own environment.
func start(t *testing.T, env []string, args ...string) result {
	t.Helper()
	path, err := script()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{string(out), cmd.ProcessState.ExitCode()}
}

// succeed runs softhsm-setup.sh, which must do what it was told.
func succeed(t *testing.T, args ...string) {
	t.Helper()
	if r := start(t, nil, args...); r.code != 0 {
		t.Fatalf("softhsm-setup.sh %q: exit %d\n%s", args, r.code, r.out)
	}
}

// refuse runs softhsm-setup.sh, which must exit with code and say want.
func refuse(t *testing.T, env []string, code int, want string, args ...string) {
	t.Helper()
	if r := start(t, env, args...); r.code != code || !strings.Contains(r.out, want) {
		t.Errorf("softhsm-setup.sh %q: exit %d, want %d with %q\n%s", args, r.code, code, want, r.out)
	}
}

// load reads the tokens of a folder as its env file tells of them.
func load(t *testing.T, dir string, labels ...string) map[string]Tok {
	t.Helper()
	env, err := sourced(filepath.Join(dir, "env"))
	if err != nil {
		t.Fatal(err)
	}
	toks := make(map[string]Tok)
	for _, l := range labels {
		if toks[l], err = token(env, dir, l); err != nil {
			t.Fatal(err)
		}
	}
	return toks
}

// login proves that a token takes both its PINs. It uses OpenSC's tool, which knows nothing of how the token was made.
func login(t *testing.T, dir string, tok Tok) {
	t.Helper()
	for _, args := range [][]string{
		{"--login", "--pin", "env:PIN", "--list-objects"},
		{"--login", "--login-type", "so", "--so-pin", "env:SOPIN", "--init-pin", "--new-pin", "env:PIN"},
	} {
		cmd := exec.Command("pkcs11-tool",
			append([]string{"--module", tok.Module, "--token-label", tok.Label}, args...)...)
		cmd.Env = append(os.Environ(), Env(dir), "PIN="+tok.PIN, "SOPIN="+tok.SOPIN)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("token %s: pkcs11-tool %q: %v\n%s", tok.Label, args, err, out)
		}
	}
}

// snapshot describes all files below dir, by their paths.
func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := make(map[string]string)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		var content []byte
		if d.Type().IsRegular() {
			if content, err = os.ReadFile(path); err != nil {
				return err
			}
		}
		name, err := filepath.Rel(dir, path)
		files[name] = fmt.Sprintf("%v %v %x", info.Mode(), info.ModTime().UnixNano(), content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// unchanged compares two snapshots in the files whose names begin with prefix.
func unchanged(t *testing.T, before, after map[string]string, prefix string) {
	t.Helper()
	for name := range before {
		if strings.HasPrefix(name, prefix) && after[name] != before[name] {
			t.Errorf("%s changed:\n%s\n%s", name, before[name], after[name])
		}
	}
	for name := range after {
		if _, ok := before[name]; !ok && strings.HasPrefix(name, prefix) {
			t.Errorf("%s is new", name)
		}
	}
}

// pathWithout is a PATH that has every program of the usual one but those named.
func pathWithout(t *testing.T, names ...string) string {
	t.Helper()
	bin := t.TempDir()
	for _, folder := range filepath.SplitList(os.Getenv("PATH")) {
		programs, _ := os.ReadDir(folder) // a PATH may name folders that do not exist
		for _, p := range programs {
			if !slices.Contains(names, p.Name()) {
				// The first program of a name wins, as in a PATH.
				if err := os.Symlink(filepath.Join(folder, p.Name()), filepath.Join(bin, p.Name())); err != nil &&
					!errors.Is(err, fs.ErrExist) {
					t.Fatal(err)
				}
			}
		}
	}
	return bin
}

// intercept is a PATH on which a shell script stands in for programs. The script finds the program's name in $name
// and the program itself in $real.
func intercept(t *testing.T, standIn string, names ...string) string {
	t.Helper()
	bin := t.TempDir()
	for _, name := range names {
		program, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		text := fmt.Sprintf("#!/bin/sh\nname=%s\nreal=%s\n%s\n", name, program, standIn)
		if err := os.WriteFile(filepath.Join(bin, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return "PATH=" + bin + ":" + os.Getenv("PATH")
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestSetupDefaults(t *testing.T) {
	t.Chdir(t.TempDir())
	succeed(t)
	dir, err := filepath.Abs("var/softhsm")
	if err != nil {
		t.Fatal(err)
	}
	env, err := sourced(filepath.Join(dir, "env"))
	if err != nil {
		t.Fatal(err)
	}
	if got := env["SOFTHSM2_CONF"]; got != conf(dir) {
		t.Errorf("SOFTHSM2_CONF=%s, want %s", got, conf(dir))
	}
	for label, tok := range load(t, dir, "factory", "operator") {
		want := "pkcs11:token=" + label + "?module-path=" + tok.Module + "&pin-source=file:" + tok.PINFile
		if got := env[strings.ToUpper(label)+"_TOKEN"]; got != want {
			t.Errorf("%s's variable has %q, want %q", label, got, want)
		}
		login(t, dir, tok)
	}
	for name, file := range snapshot(t, dir) {
		if !strings.HasPrefix(file, "-rw------- ") && !strings.HasPrefix(file, "drwx------ ") {
			t.Errorf("%s is open to others: %.10s", name, file)
		}
	}
}

func TestSetupAgainChangesNothing(t *testing.T) {
	dir := t.TempDir()
	succeed(t, "--dir", dir, "a", "b")
	before := snapshot(t, dir)
	succeed(t, "--dir", dir, "a", "b")
	succeed(t, "--dir", dir, "b")
	unchanged(t, before, snapshot(t, dir), "")
}

func TestSetupAddsALabel(t *testing.T) {
	dir := t.TempDir()
	succeed(t, "--dir", dir, "a")
	before := snapshot(t, dir)
	succeed(t, "--dir", dir, "b")
	after := snapshot(t, dir)
	unchanged(t, before, after, "a.")
	unchanged(t, before, after, "tokens/a")
	for _, tok := range load(t, dir, "a", "b") {
		login(t, dir, tok)
	}
}

func TestSetupReset(t *testing.T) {
	dir := t.TempDir()
	old := Make(t, dir, "a", "b", "c")

	// What others put there stays: a file, and a token that was made without the script.
	write(t, filepath.Join(dir, "notes.pin"), "mine")
	cmd := exec.Command("softhsm2-util", "--init-token", "--free", "--label", "other", "--pin", "1234",
		"--so-pin", "1234")
	cmd.Env = append(os.Environ(), Env(dir))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// A token that has lost its PIN is of no more use. The script says so, and begins anew when told to.
	if err := os.Remove(old["c"].PINFile); err != nil {
		t.Fatal(err)
	}
	refuse(t, nil, 1, "--reset", "--dir", dir, "c")

	succeed(t, "--dir", dir, "--reset", "a", "c")
	for label, tok := range load(t, dir, "a", "c") {
		if tok.PIN == old[label].PIN || tok.SOPIN == old[label].SOPIN {
			t.Errorf("%s has an old PIN", label)
		}
		login(t, dir, tok)
	}
	login(t, dir, Tok{Label: "other", PIN: "1234", SOPIN: "1234", Module: old["a"].Module})
	if got := read(t, filepath.Join(dir, "notes.pin")); got != "mine" {
		t.Errorf("notes.pin now has %q", got)
	}
	for name := range snapshot(t, dir) {
		if strings.HasPrefix(filepath.Base(name), "b.") { // a token's own folder may have any hexadecimal name
			t.Errorf("%s is still there", name)
		}
	}
	tokens, err := os.ReadDir(filepath.Join(dir, "tokens"))
	if err != nil || len(tokens) != 3 {
		t.Errorf("there are %d tokens, want a, c and the other: %v", len(tokens), err)
	}
	if strings.Contains(read(t, filepath.Join(dir, "env")), "B_TOKEN") {
		t.Error("env still names the token b")
	}
}

func TestSetupLeavesAlone(t *testing.T) {
	t.Run("folders of others", func(t *testing.T) {
		for _, name := range []string{"softhsm2.conf", "env", "tokens"} {
			dir := t.TempDir()
			write(t, filepath.Join(dir, name), "log.level = ERROR\n")
			before := snapshot(t, dir)
			refuse(t, nil, 1, "not made by this script", "--dir", dir)
			refuse(t, nil, 1, dir, "--reset", "--dir", dir)
			unchanged(t, before, snapshot(t, dir), "")
		}
		refuse(t, nil, 1, "no softhsm2.conf of this script", "--reset", "--dir", t.TempDir())
	})
	t.Run("tokens of another configuration", func(t *testing.T) {
		theirs, dir := t.TempDir(), t.TempDir()
		Make(t, theirs, "a")
		before := snapshot(t, theirs)
		for _, args := range [][]string{{"--dir", dir, "a"}, {"--dir", dir, "--reset", "a"}} {
			if r := start(t, []string{Env(theirs)}, args...); r.code != 0 {
				t.Fatalf("softhsm-setup.sh %q: exit %d\n%s", args, r.code, r.out)
			}
		}
		unchanged(t, before, snapshot(t, theirs), "")
	})
	t.Run("an edited configuration", func(t *testing.T) {
		dir := t.TempDir()
		succeed(t, "--dir", dir, "a")
		edited := strings.Replace(read(t, conf(dir)), "ERROR", "DEBUG", 1)
		write(t, conf(dir), edited)
		succeed(t, "--dir", dir, "b")
		if got := read(t, conf(dir)); got != edited {
			t.Errorf("the edit is lost:\n%s", got)
		}
	})
}

func TestSetupPaths(t *testing.T) {
	t.Run("awkward", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), ` o'n "é" $HOME ?&;+\ `)
		succeed(t, "--dir", dir, "a")
		before := snapshot(t, dir)
		succeed(t, "--dir="+dir, "a")
		unchanged(t, before, snapshot(t, dir), "")
		tok := load(t, dir, "a")["a"]
		login(t, dir, tok)
		if _, uri, _ := strings.Cut(tok.URI, "?"); strings.ContainsAny(uri, ` '"$?;+\`) {
			t.Errorf("unencoded characters in %s", tok.URI)
		}
	})
	t.Run("moved", func(t *testing.T) {
		tmp := t.TempDir()
		dir, moved := filepath.Join(tmp, "before"), filepath.Join(tmp, "after")
		succeed(t, "--dir", dir, "a")
		if err := os.Rename(dir, moved); err != nil {
			t.Fatal(err)
		}
		succeed(t, "--dir", moved, "a")
		login(t, moved, load(t, moved, "a")["a"])
	})
	t.Run("refused", func(t *testing.T) {
		tmp := t.TempDir()
		for _, name := range []string{"a#b", "a=b", "a%b", "a\nb", strings.Repeat("/long", 200)} {
			refuse(t, nil, 2, "the path", "--dir", filepath.Join(tmp, name))
		}
		refuse(t, nil, 2, "needs a folder", "--dir")
		refuse(t, nil, 2, "needs a folder", "--dir=")
		unchanged(t, map[string]string{".": snapshot(t, tmp)["."]}, snapshot(t, tmp), "")
	})
}

func TestSetupLabels(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	for _, label := range []string{"", ".a", "a b", "a/b", "a'", "é", "a\nb", "*", strings.Repeat("a", 33)} {
		refuse(t, nil, 2, "label", "--dir", dir, "fine", label)
	}
	refuse(t, nil, 2, "unknown option", "--dir", dir, "-a")
	if _, err := os.Stat(dir); err == nil {
		t.Error("a refused run made its folder")
	}

	// The longest label, one that begins no shell name, and one with every character that is none of a shell's.
	names := map[string]string{strings.Repeat("a", 32): strings.Repeat("A", 32) + "_TOKEN", "9": "_9_TOKEN",
		"b.C_d-e": "B_C_D_E_TOKEN"}
	for label, name := range names {
		succeed(t, "--dir", dir, label)
		tok := load(t, dir, label)[label]
		login(t, dir, tok)
		if env, err := sourced(filepath.Join(dir, "env")); err != nil || env[name] != tok.URI {
			t.Errorf("%s=%q, want %q (%v)", name, env[name], tok.URI, err)
		}
	}
	refuse(t, nil, 2, "B_C_D_E_TOKEN", "--dir", dir, "b-c.d.e")
	refuse(t, nil, 2, "B_C_D_E_TOKEN", "--dir", dir, "--reset", "b-c.d.e", "b.C_d-e")
	login(t, dir, load(t, dir, "9")["9"])
}

// killed stops softhsm-setup.sh, whose process id is in $SETUP, before the program that it starts as number $N. What a
// child of it starts after that does not run either.
const killed = `
echo >>"$COUNT"
if [ "$(wc -l <"$COUNT")" -ge "$N" ]; then
	kill -9 "$SETUP"
	exit 1
fi
exec "$real" "$@"`

// Whatever the moment a run is killed at, the next one finishes the work. This kills it before each program that it
// starts for a change of files.
func TestSetupInterrupted(t *testing.T) {
	path, err := script()
	if err != nil {
		t.Fatal(err)
	}
	env := intercept(t, killed, "softhsm2-util", "script", "mv", "rm", "mkdir", "mkfifo", "chmod", "od")

	for _, test := range []struct {
		name  string
		reset bool
	}{{"first run", false}, {"reset", true}} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			for n := 1; ; n++ {
				tmp := t.TempDir()
				dir := filepath.Join(tmp, "tokens")
				args := []string{"--dir", dir, "a"}
				if test.reset {
					succeed(t, "--dir", dir, "a", "b")
					args = append(args, "--reset")
				}
				cmd := exec.Command("/bin/sh", append([]string{"-c", `SETUP=$$ exec "$0" "$@"`, path}, args...)...)
				cmd.Env = append(os.Environ(), env, "COUNT="+filepath.Join(tmp, "count"), fmt.Sprint("N=", n))
				// The wait is for all that write to this, so for the children of a killed run too.
				var out bytes.Buffer
				cmd.Stdout, cmd.Stderr = &out, &out
				if err := cmd.Run(); err == nil {
					if n < 15 {
						t.Errorf("only %d programs were started: does this test still kill it?", n)
					}
					return
				} else if cmd.ProcessState.ExitCode() != -1 {
					t.Fatalf("step %d: %v\n%s", n, err, &out)
				}

				succeed(t, args[:3]...)
				login(t, dir, load(t, dir, "a")["a"])
				if left, _ := filepath.Glob(filepath.Join(dir, ".*")); left != nil {
					t.Errorf("step %d leaves %q", n, left)
				}
			}
		})
	}
}

func TestSetupKeepsAPINThatWaits(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "a.pin"), "chosen {}$\"'\\ pin\n")
	refuse(t, nil, 1, "printable", "--dir", dir, "a")
	write(t, filepath.Join(dir, "a.pin"), "abc\n")
	refuse(t, nil, 1, "4 to 255", "--dir", dir, "a")

	const pin = `chosen{}$"'\*`
	write(t, filepath.Join(dir, "a.pin"), pin)
	tok := Make(t, dir, "a")["a"]
	if tok.PIN != pin {
		t.Errorf("PIN %q, want %q", tok.PIN, pin)
	}
	login(t, dir, tok)
	if got := snapshot(t, dir)["a.pin"]; !strings.HasPrefix(got, "-rw------- ") {
		t.Errorf("a.pin is open to others: %.10s", got)
	}
}

func TestSetupHidesPINs(t *testing.T) {
	seen := filepath.Join(t.TempDir(), "seen")
	record := fmt.Sprintf(`printf '%%s\n' "$name" "$@" >>%s; env >>%s; exec "$real" "$@"`, seen, seen)
	dir := t.TempDir()
	r := start(t, []string{intercept(t, record, "softhsm2-util", "script", "mv", "sed", "cat", "tr")},
		"--dir", dir, "a")
	if r.code != 0 {
		t.Fatalf("exit %d\n%s", r.code, r.out)
	}
	tok := load(t, dir, "a")["a"]
	commands := read(t, seen)
	if !strings.Contains(commands, "softhsm2-util\n--init-token") {
		t.Fatalf("the programs were not recorded:\n%s", commands)
	}
	for _, pin := range []string{tok.PIN, tok.SOPIN} {
		if strings.Contains(commands, pin) || strings.Contains(r.out, pin) {
			t.Error("a PIN was on a command line, in the environment or in the output")
		}
	}
}

func TestSetupWithoutScript(t *testing.T) {
	dir := t.TempDir()
	r := start(t, []string{intercept(t, "exit 1", "script")}, "--dir", dir, "a")
	if r.code != 0 || !strings.Contains(r.out, "visible to ps") {
		t.Fatalf("exit %d\n%s", r.code, r.out)
	}
	login(t, dir, load(t, dir, "a")["a"])
}

func TestSetupFails(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	refuse(t, []string{"PATH=" + pathWithout(t, "softhsm2-util")}, 1, "apt-get install softhsm2", "--dir", dir)
	refuse(t, []string{"SOFTHSM2_MODULE=lib.so"}, 2, "absolute", "--dir", dir)
	refuse(t, []string{"SOFTHSM2_MODULE=" + dir}, 2, "no file", "--dir", dir)
	refuse(t, []string{intercept(t, `echo "no luck"; exit 1`, "softhsm2-util")}, 1, "no luck", "--dir", dir, "a")
	if _, err := os.Stat(filepath.Join(dir, "tokens", "a")); err == nil {
		t.Error("a failed run left a token")
	}
	succeed(t, "--dir", dir, "a")
	login(t, dir, load(t, dir, "a")["a"])
}

func TestSetupHelp(t *testing.T) {
	r := start(t, nil, "--help")
	for _, want := range []string{"--dir", "--reset", "factory operator", "var/softhsm/env", "SOFTHSM2_MODULE"} {
		if r.code != 0 || !strings.Contains(r.out, want) {
			t.Errorf("exit %d, and no word of %s:\n%s", r.code, want, r.out)
		}
	}
}
