package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/must"
)

// Whoever opens a file or a package can read it: a file has 500 lines at most, and a package but cmd 2,000, without its
// tests and what is generated.
func TestSizes(t *testing.T) {
	const ofFile, ofPackage = 500, 2000
	files := 0
	dirs := must.Get[[]byte](t)(exec.Command("go", "list", "-f", "{{.Dir}}", "work").Output())
	root := must.Get[string](t)(filepath.Abs(".."))
	for dir := range strings.Lines(string(dirs)) {
		dir = strings.TrimSpace(dir)
		of := 0
		for _, name := range must.Get[[]string](t)(filepath.Glob(filepath.Join(dir, "*.go"))) {
			text := read(t, name)
			f := must.Get[*ast.File](t)(parser.ParseFile(token.NewFileSet(), name, text, parser.ParseComments))
			if ast.IsGenerated(f) {
				continue
			}
			files++
			lines := strings.Count(text, "\n")
			if lines > ofFile {
				t.Errorf("%s has %d lines, and %d at most are allowed", name, lines, ofFile)
			}
			if !strings.HasSuffix(name, "_test.go") {
				of += lines
			}
		}
		if of > ofPackage && !strings.HasPrefix(dir, filepath.Join(root, "cmd")) {
			t.Errorf("%s has %d lines, and %d at most are allowed", dir, of, ofPackage)
		}
	}
	if files < 400 {
		t.Errorf("only %d files were seen", files)
	}
}
