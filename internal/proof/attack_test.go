package proof

import (
	"bytes"
	"database/sql"
	"encoding/base64"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	_ "github.com/mattn/go-sqlite3"

	"github.com/kmehsm/kmehsm/internal/faultmodule"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
)

// attackDemo is what somebody tries on what the demo leaves, below dir, who has the user PINs, all files and no program
// of ours but the command line; not the security officer's PIN.
func attackDemo(t *testing.T, w *world, dir string) {
	env, err := os.ReadFile(dir + "/softhsm/env")
	if err != nil {
		t.Fatal(err)
	}
	uri := regexp.MustCompile(`FACTORY_TOKEN='([^']+module-path=([^&']+)[^']*)'`).FindSubmatch(env)
	factory, module := softhsmtest.Tok{URI: string(uri[1])}, string(uri[2])
	headers, err := faultmodule.Headers()
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), "attack")
	if out, err := exec.Command("gcc", "-std=gnu11", "-O2", "-Wall", "-I", headers, "testdata/attack.c", "-o", program,
		"-ldl").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// attack gives what worked, each once.
	attack := func(t *testing.T, token string, args ...string) (worked []string) {
		t.Helper()
		cmd := exec.Command(program, append([]string{module, token, dir + "/softhsm/" + token + ".pin"}, args...)...)
		cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+dir+"/softhsm/softhsm2.conf")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%v: %s", err, stderr.String())
		}
		for line := range strings.Lines(string(out)) {
			if line = strings.TrimSpace(line); !slices.Contains(worked, line) {
				worked = append(worked, line)
			}
		}
		slices.Sort(worked)
		return worked
	}
	file := func(name string, content []byte) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	manufacturer := field(t, w.run(factory, "factory", "init", "--state", "var/demo/factory", "--json"), "manufacturer")

	// The keys of a factory go where they belong. Adding UNWRAP to a lot key, which sealing leaves
	// modifiable, brings P and Q nowhere.
	t.Run("everything at the factory", func(t *testing.T) {
		want := []string{
			"changed 0x107 of kme lot L1 of " + manufacturer,
			"wrapped kme injection f1 of " + manufacturer + " under kme fixture f1 of " + manufacturer,
			"wrapped kme kek acme of " + manufacturer + " under kme operator-transport acme of " + manufacturer,
		}
		if worked := attack(t, "factory", "everything"); !slices.Equal(worked, want) {
			t.Errorf("worked:\n%s", strings.Join(worked, "\n"))
		}
	})
	t.Run("everything at the operator", func(t *testing.T) {
		if worked := attack(t, "operator", "everything"); len(worked) > 0 {
			t.Errorf("worked:\n%s", strings.Join(worked, "\n"))
		}
	})
	for what, name := range map[string]string{
		"the grant unwrapped into a key that can be read": "grant.jws",
		"the enrolment unwrapped again":                   "enrolment.jws",
	} {
		t.Run(what, func(t *testing.T) {
			jws, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			if worked := attack(t, "operator", "unwrap", file(name, wrappedIn(t, jws))); len(worked) > 0 {
				t.Errorf("worked: %q", worked)
			}
		})
	}
	t.Run("sealed KMEs unwrapped into keys that can be read", func(t *testing.T) {
		db, err := sql.Open("sqlite3", "file:"+dir+"/keysvc/keysvc.db?mode=ro")
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		var sealed []byte
		if err := db.QueryRow("SELECT sealed FROM bindings WHERE length(sealed) > 0").Scan(&sealed); err != nil {
			t.Fatal(err)
		}
		if worked := attack(t, "operator", "unwrap", file("kme", sealed[1:])); len(worked) > 0 {
			t.Errorf("worked: %q", worked)
		}
	})

	// A fixture's software key in the place of an operator's, by everybody's command line. The security
	// officer is there, and is deceived.
	t.Run("a fixture enrolled as an operator", func(t *testing.T) {
		data, err := os.ReadFile(dir + "/fixture.pem")
		if err != nil {
			t.Fatal(err)
		}
		key, err := pemkey.RSA(data)
		if err != nil {
			t.Fatal(err)
		}
		typed, err := handover.NewReceiver(handover.TypeTransportKey, key, "1")
		if err != nil {
			t.Fatal(err)
		}
		thumbprint := pemkey.Thumbprint(key)
		for name, c := range map[string]struct{ path, thumbprint, want string }{
			"the bare key":                      {"var/demo/fixture.pem", thumbprint, "no transport key"},
			"its enrolment":                     {"var/demo/fixture-enrolment.json", thumbprint, "no transport key"},
			"the typed file, another read out":  {file("t", typed), manufacturer, "read it out again"},
			"the typed file, and its own print": {file("t", typed), thumbprint, "enrolled already"},
		} {
			cmd := w.command(factory, "factory", "operator", "enroll", "beta", "--state", "var/demo/factory",
				"--transport-key", c.path,
				"--thumbprint", c.thumbprint, "--so-pin-source", "file:"+dir+"/softhsm/factory.so-pin", "--out",
				filepath.Join(t.TempDir(), "e.jws"))
			if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), c.want) {
				t.Errorf("%s: %v, %s", name, err, out)
			}
		}
	})
}

// wrappedIn is the wrapped key in a signed file.
func wrappedIn(t *testing.T, jws []byte) []byte {
	t.Helper()
	payload, err := base64.RawURLEncoding.DecodeString(strings.Split(strings.TrimSpace(string(jws)), ".")[1])
	if err != nil {
		t.Fatal(err)
	}
	var carried struct{ Wrapped string }
	if err := json.Unmarshal(payload, &carried); err != nil {
		t.Fatal(err)
	}
	wrapped, err := base64.RawURLEncoding.DecodeString(carried.Wrapped)
	if err != nil || len(wrapped) == 0 {
		t.Fatal(len(wrapped), err)
	}
	return wrapped
}
