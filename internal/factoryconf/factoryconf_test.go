package factoryconf

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/config"
)

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "factory.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const all = `
token: pkcs11:token=factory?module-path=/dev/null&pin-source=file:/dev/null
state: s
directory: file:d
vault: {role_id: i, secret_id_file: f, secret_id_wrapped: true}
manufacturer: m.pem
injection: in
fixture: f1
workers: 3
bits: 4096
suite: tr33868-rsa2048
shard_size: 64
primes: x931
valid_for: 720h
listen: 127.0.0.1:0
tls: {certificate: a, key: b, client_ca: c}
stations: [s1, s2]
line: hall 3, line 2
timeout: 5m
`

// Every setting is read, and the help has it.
func TestRead(t *testing.T) {
	path := write(t, all)
	c, r := Read(path, nil)
	if err := r.Err(); err != nil {
		t.Fatal(err)
	}
	for _, f := range reflect.VisibleFields(reflect.TypeFor[Config]()) {
		if key := f.Tag.Get("yaml"); !strings.Contains(Help(), "\n    "+key+":") {
			t.Errorf("the help has no %s", key)
		} else if reflect.ValueOf(c).Elem().FieldByIndex(f.Index).IsZero() {
			t.Errorf("%s was not read", key)
		}
	}
	dir, values := filepath.Dir(path), config.Values(c)
	for flag, want := range map[string]string{"injection": dir + "/in", "out": dir + "/in", "client-ca": dir + "/c",
		"tls-key": dir + "/b", "directory": "file:" + dir + "/d", "vault-secret-id-file": dir + "/f",
		"shard-size": "64",
		"valid-for":  "720h0m0s", "station": "s1 s2", "vault-secret-id-wrapped": "true"} {
		if got := strings.Join(values[flag], " "); got != want {
			t.Errorf("--%s is %q, want %q", flag, got, want)
		}
	}
}

// A setting that is refused is named, with its line.
func TestRefused(t *testing.T) {
	for text, want := range map[string]string{
		"workers: -1":         "line 1: workers: must be a whole number",
		"workers: 0":          "line 1: workers: must be a whole number above zero, not \"0\"",
		"bits: 0":             "line 1: bits: must be 2048, 3072 or 4096, not \"0\"",
		"shard_size: 0":       "line 1: shard_size: must be a whole number from 1 to 1024",
		"valid_for: 0s":       "line 1: valid_for: must be a time",
		"timeout: 0s":         "line 1: timeout: must be a time of a second at least",
		"listen: h:99999":     "line 1: listen: must be HOST:PORT, with a port from 0 to 65535",
		"listen: ''":          "line 1: listen: it is empty: give it a value, or take it out",
		"state:":              "line 1: state: it is empty",
		"suite: ''":           "line 1: suite: it is empty",
		"line: ''":            "line 1: line: it is empty",
		"token: ''":           "line 1: token: it is empty",
		"bits: 1024":          "line 1: bits: must be 2048, 3072 or 4096, not \"1024\"",
		"suite: x":            "line 1: suite: must be tr33868-ecdsa-p256",
		"shard_size: 2000":    "line 1: shard_size: must be a whole number from 1 to 1024",
		"primes: big":         "line 1: primes: must be auto or x931",
		"valid_for: 1":        "line 1: valid_for: must be a time, such as 720h, not \"1\": it has no unit",
		"timeout: 1ms":        "line 1: timeout: must be a time of a second at least",
		"listen: x":           "line 1: listen: must be HOST:PORT",
		"directory: /srv":     "line 1: directory: must be file:DIR or vault:MOUNT",
		"fixture: a/b":        "line 1: fixture: must be a name",
		"stations: [a/b]":     "line 1: stations: ",
		"vault: {role_id: x}": "line 1: vault: AppRole needs a role id and a file with the secret id",
		"vault: {role: i}":    "line 1: vault.role: there is no such setting: did you mean vault.role_id?",
		"shardsize: 2":        "line 1: shardsize: there is no such setting: did you mean shard_size?",
		"state: s\nbits: x":   "line 2: bits: must be 2048, 3072 or 4096, not \"x\"",

		"vault: {secret_id_wrapped: true}": "line 1: vault: only an AppRole's secret id can be wrapped",
	} {
		if _, r := Read(write(t, text), nil); r.Err() == nil || !strings.Contains(r.Err().Error(), want) {
			t.Errorf("%s: %v, want %s", text, r.Err(), want)
		}
	}
}

// Check says all that is wrong with what the configuration names.
func TestCheck(t *testing.T) {
	var settings []string
	for _, p := range Check(write(t, all), nil, false).Problems() {
		settings = append(settings, p.Setting)
	}
	want := []string{"token", "state", "directory", "vault.secret_id_file", "manufacturer", "tls.certificate",
		"tls.key",
		"tls.client_ca"}
	if !slices.Equal(settings, want) {
		t.Errorf("%q, want %q", settings, want)
	}
	file := write(t, "x")
	path := write(t, fmt.Sprintf("state: %[1]s\ndirectory: file:%[1]s\nmanufacturer: %[1]s\ninjection: %[1]s\n", file))
	wrong := Check(path, nil, false).Err()
	for _, want := range []string{"line 1: state: the line's folder " + file + " is no folder",
		"line 2: directory: the public-key directory",
		"line 3: manufacturer: " + file + ": the file is no PEM file",
		"line 4: injection: the folder of the injection packages: " + file} {
		if wrong == nil || !strings.Contains(wrong.Error(), want) {
			t.Errorf("a file in the place of a folder: %v, want %s", wrong, want)
		}
	}
	t.Setenv("VAULT_ADDR", "http://vault.example:8200")
	if r := Check(write(t, "state: "+t.TempDir()+"\ndirectory: vault:kme\n"), nil, false); r.Err() == nil ||
		!strings.Contains(r.Err().Error(), "line 2: directory: the environment for Vault: whoever is on the way to ") {
		t.Errorf("Vault without TLS: %v", r.Err())
	}
	if r := Check(write(t, "listen: 127.0.0.1:0\n"), nil, false); r.Err() == nil ||
		!strings.Contains(r.Err().Error(), ": tls: listen needs tls") {
		t.Errorf("without tls: %v", r.Err())
	}
}
