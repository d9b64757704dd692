package cmd_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/programs"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// elsewhere are the arguments of commands that need more than those of their usage, for a folder where nothing is.
// FILES is a folder with files that are good.
var elsewhere = map[string]string{
	"factory audit":              "--directory file:dir",
	"factory fixture enroll":     "f1 --fixture-key FILES/fixture.pem --so-pin-source SO --out out",
	"factory log verify":         "",
	"factory lot create":         "L1 --directory file:dir --tac 35209900 --first 0 --count 1 --bits 2048",
	"factory lot grant":          "L1 --directory file:dir --operator op --out out",
	"factory lot list":           "--directory file:dir",
	"factory lot provision":      "L1 --directory file:dir",
	"factory lot refresh":        "--directory file:dir",
	"factory lot reissue":        "L1 35209900000000 --directory file:dir --reason x",
	"factory lot revoke":         "L1 35209900000000 --directory file:dir --reason x --yes",
	"factory lot seal":           "L1 --directory file:dir --yes",
	"factory lot show":           "L1 --directory file:dir",
	"factory lot status":         "L1 --directory file:dir",
	"factory lot verify":         "L1 --directory file:dir",
	"factory minutes verify":     "none",
	"factory operator enroll":    "op --transport-key FILES/transport.json --thumbprint T --so-pin-source SO --out out",
	"factory operator policy":    "op --directory vault:kme",
	"factory reconcile":          "L1 --directory file:dir --repair",
	"factory rotate signing-key": "--generation 2",
	"factory so check":           "--so-pin-source SO",
	"factory so show":            "",
	"factory station report":     "L1",
	"factory station serve": "--directory file:dir --listen 127.0.0.1:0 --tls-certificate FILES/c.pem " +
		"--tls-key FILES/k.pem --client-ca FILES/c.pem",
	"keysvc backup create":         "--to FILES/restore.json --thumbprint T --so-pin-source SO --out out",
	"keysvc backup restore":        "none --thumbprint T",
	"keysvc binding explain":       "001010000000000",
	"keysvc binding list":          "",
	"keysvc binding open":          "001010000000000",
	"keysvc binding report":        "",
	"keysvc binding revoke":        "001010000000000 --yes",
	"keysvc binding show":          "001010000000000",
	"keysvc device":                "35209900000000",
	"keysvc equipment add":         "35209900 --status whitelisted --reason x",
	"keysvc equipment import":      "FILES/devices.csv",
	"keysvc equipment list":        "",
	"keysvc equipment remove":      "35209900 --reason x",
	"keysvc equipment show":        "35209900000000",
	"keysvc enroll":                "FILES/e.jws --manufacturer FILES/manufacturer.pem --thumbprint T",
	"keysvc lot import":            "FILES/e.jws",
	"keysvc lot list":              "",
	"keysvc lot retire":            "L1 --reason x --yes",
	"keysvc manufacturer distrust": "M --reason x --yes",
	"keysvc manufacturer list":     "",
	"keysvc manufacturer trust":    "M --reason x",
	"keysvc serve":                 "--config FILES/keysvc.yaml",
	"keysvc storage list":          "",
	"keysvc storage retire":        "--yes",
	"keysvc storage rotate":        "--so-pin-source SO",
	"keysvc store accept-rollback": "--reason x --yes",
	"keysvc store backup":          "--out out",
	"keysvc store log":             "",
	"keysvc store migrate":         "--from sqlite:none.db --to sqlite:copy.db",
	"keysvc store upgrade":         "--store sqlite:none.db --role r",
	"keysvc store verify":          "",
	"keysvc transport destroy":     "T --yes",
	"keysvc transport new":         "",
	"mesim attach":                 "--injection none --fixture-key none --fixture-enrolment none --server unix:none",
	"mesim load":                   "--injection none --fixture-key none --fixture-enrolment none --server unix:none",
	"mesim payload": "--imei 35209900000000 --injection none --fixture-key none " +
		"--fixture-enrolment none",
}

// makers are the commands that make a folder.
var makers = []string{"factory init", "keysvc init", "keysvc backup prepare"}

// In a folder where nothing is, every command but those that begin something fails, says why, and leaves nothing. A
// command that is not in the table above is run with what its usage names, and may succeed.
func TestNothingIsMade(t *testing.T) {
	dir, files := filepath.Join(t.TempDir(), "softhsm"), t.TempDir()
	toks := softhsmtest.Make(t, dir, "factory", "operator")
	conf, where, _ := strings.Cut(softhsmtest.Env(dir), "=")
	t.Setenv(conf, where)
	run := func(folder string, words ...string) (code int, stderr string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), testproc.Patience)
		defer cancel()
		program := exec.CommandContext(ctx, filepath.Join(programs.Dir(t), words[0]), words[1:]...)
		token := toks["operator"]
		if words[0] == "factory" {
			token = toks["factory"]
		}
		for i, w := range program.Args {
			program.Args[i] = strings.NewReplacer("FILES", files, "SO", "file:"+token.SOPINFile).Replace(w)
		}
		program.Env = append(os.Environ(), "KMEHSM_TOKEN="+token.URI)
		program.Dir = folder
		var text bytes.Buffer
		program.Stderr = &text
		program.Run()
		if ctx.Err() != nil {
			t.Errorf("%v does not end", words)
		}
		return program.ProcessState.ExitCode(), text.String()
	}
	good := func(words string) {
		t.Helper()
		if code, stderr := run(files, strings.Fields(words)...); code != 0 {
			t.Fatalf("%s: %s", words, stderr)
		}
	}
	good("factory init")
	good("keysvc init")
	private, public := fixtureKey(t)
	for name, data := range map[string][]byte{"fixture.key": private, "fixture.pem": public,
		"keysvc.yaml": []byte("socket: s\nstate: none\n"),
		"devices.csv": []byte("equipment,status,reason\n35209900,whitelisted,x\n")} {
		if err := os.WriteFile(filepath.Join(files, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}

	seen := 0
	for _, program := range []string{"factory", "keysvc", "mesim"} {
		for command := range leaves(t, program) {
			name := program + " " + command
			args, known := elsewhere[name]
			switch {
			case slices.Contains(makers, name):
				continue
			case known:
				seen++
			default:
				args = needed(t, name)
			}
			folder := t.TempDir()
			code, stderr := run(folder, strings.Fields(name+" "+args)...)
			t.Logf("%s: exit code %d: %s", name, code, stderr)
			if left, err := os.ReadDir(folder); err != nil || len(left) > 0 {
				t.Errorf("%s has left %v, %v: %s", name, left, err, stderr)
			}
			if known && (code == 0 || stderr == "" || strings.Contains(stderr, "goroutine ")) {
				t.Errorf("%s ends with %d: %s", name, code, stderr)
			}
		}
	}
	if seen != len(elsewhere) {
		t.Errorf("of %d commands in the table, %d are there", len(elsewhere), seen)
	}
}

// needed are the arguments that the usage of a command names, without those in brackets.
func needed(t *testing.T, command string) string {
	t.Helper()
	words := append(strings.Fields(command), "--help")
	out, err := exec.Command(filepath.Join(programs.Dir(t), words[0]), words[1:]...).Output()
	if err != nil {
		t.Fatal(command, err)
	}
	usage := regexp.MustCompile(`USAGE:\n   ` + command + `(.*)\n`).FindSubmatch(out)
	if usage == nil {
		return ""
	}
	return regexp.MustCompile(`\[.*?\]`).ReplaceAllString(string(usage[1]), "")
}
