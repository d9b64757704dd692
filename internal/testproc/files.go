package testproc

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/must"
)

// TestFiles gives the text of all tests of each package of the tree, by its folder. It enters no other folders: go test
// keeps no result of a test that has read a folder in which git or a build works.
func TestFiles(t testing.TB) map[string]string {
	t.Helper()
	packages := map[string]string{}
	dirs := must.Get[[]byte](t)(exec.Command("go", "list", "-f", "{{.Dir}}", "work").Output())
	for dir := range strings.Lines(string(dirs)) {
		dir = strings.TrimSpace(dir)
		for _, file := range must.Get[[]string](t)(filepath.Glob(filepath.Join(dir, "*_test.go"))) {
			packages[dir] += string(must.Get[[]byte](t)(os.ReadFile(file)))
		}
	}
	return packages
}
