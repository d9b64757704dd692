package proof

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const outsider = `package main

import (
	"fmt"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/kme"
)

func main() {
	_, err := client.New(client.Options{})
	fmt.Println(err, client.Reason(kme.NotBound), kmev1.State_ACTIVE)
}
`

// A program of somebody else's is built with client, and gets with it nothing of what the service is made of: no Vault,
// no SQL, no PKCS #11, no cgo. It runs without network where the modules that client needs are in the cache.
func TestOutsideProgram(t *testing.T) {
	t.Parallel()
	tree, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	read := func(name string) []byte {
		data, err := os.ReadFile(filepath.Join(tree, name))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	root := read("go.mod")
	if regexp.MustCompile(`(?m)^(replace|exclude)\b`).Match(root) {
		t.Error("go.mod replaces or excludes a module: go install of a program at a version refuses that. Do it in " +
			"go.work")
	}

	dir := t.TempDir()
	mod := bytes.NewBufferString("module hss\n\ngo 1.26.0\n\n")
	for _, m := range regexp.MustCompile(`(?m)^\t(github.com/kmehsm/kmehsm/(\S+)) (v\S+)$`).FindAllStringSubmatch(
		string(root), -1) {
		// as if it were published
		mod.WriteString("replace " + m[1] + " " + m[3] + " => " + filepath.Join(tree, m[2]) + "\n")
		if m[2] == "client" {
			mod.WriteString("require " + m[1] + " " + m[3] + "\n")
		}
	}
	for name, data := range map[string][]byte{"main.go": []byte(outsider), "go.mod": mod.Bytes(),
		"go.sum": read("client/go.sum")} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cgo := "1"
	run := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "GOWORK=off", "GOFLAGS=-mod=mod", "PWD="+dir, "CGO_ENABLED="+cgo)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v\n%s%s", cmd, err, out, &stderr)
		}
		return strings.TrimSpace(string(out))
	}
	known := regexp.MustCompile(
		`^(hss|github.com/kmehsm/kmehsm/(api/kme|client|kme)|connectrpc.com/connect|golang.org/x/crypto|` +
			`google.golang.org/protobuf)$`)
	for m := range strings.Lines(run("go", "list", "-m", "-f", "{{.Path}}", "all")) {
		if m = strings.TrimSpace(m); !known.MatchString(m) {
			t.Errorf("module %s comes with client", m)
		}
	}
	if come := run("go", "list", "-deps", "-f",
		`{{if and .CgoFiles (not .Standard)}}{{.ImportPath}}{{end}}`); come != "" {
		t.Errorf("these packages come with client, and use cgo: %s", come)
	}
	// go test keeps a result until something changes that the test has read itself.
	ours := `{{with .Module}}{{if .Replace}}{{$.Dir}}{{end}}{{end}}`
	for folder := range strings.Lines(run("go", "list", "-deps", "-f", ours)) {
		if _, err := os.ReadDir(strings.TrimSpace(folder)); err != nil {
			t.Fatal(err)
		}
	}
	cgo = "0"
	run("go", "build", ".")
	const want = `a client has from 1 to 16 addresses of the service, not 0 NOT_BOUND:  ACTIVE`
	if got := run("./hss"); got != want {
		t.Errorf("it says %q, want %q", got, want)
	}
}
