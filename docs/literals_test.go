package docs

import (
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/must"
)

// nothing imports nothing: what a package says of its own types is enough here.
type nothing struct{}

func (nothing) Import(string) (*types.Package, error) { return nil, errors.New("not needed") }

// A literal of a struct says the names of its fields. go vet holds that for structs of other packages only; this, for
// those of the package itself, and for those without a name. Left out are tests, and packages of tests, where a row is
// often a line of a table.
func TestKeyedLiterals(t *testing.T) {
	dirs, seen := must.Get[[]byte](t)(exec.Command("go", "list", "-f", "{{.Dir}}", "work").Output()), 0
	for dir := range strings.Lines(string(dirs)) {
		if strings.HasSuffix(strings.TrimSpace(dir), "test") {
			continue
		}
		set, info := token.NewFileSet(), &types.Info{Types: map[ast.Expr]types.TypeAndValue{}}
		var files []*ast.File
		for _, name := range must.Get[[]string](t)(filepath.Glob(filepath.Join(strings.TrimSpace(dir), "*.go"))) {
			if !strings.HasSuffix(name, "_test.go") {
				files = append(files, must.Get[*ast.File](t)(parser.ParseFile(set, name, nil, 0)))
			}
		}
		config := types.Config{Importer: nothing{}, Error: func(error) {}, FakeImportC: true}
		config.Check(dir, set, files, info) // fails for want of imports
		for e, of := range info.Types {
			l, ok := e.(*ast.CompositeLit)
			if !ok || len(l.Elts) == 0 {
				continue
			}
			if p, ok := of.Type.Underlying().(*types.Pointer); ok { // of a list of pointers
				of.Type = p.Elem()
			}
			if _, ok := of.Type.Underlying().(*types.Struct); !ok {
				continue
			}
			if _, keyed := l.Elts[0].(*ast.KeyValueExpr); keyed {
				seen++
			} else {
				t.Errorf("%s: name the fields of %s", set.Position(l.Pos()), of.Type)
			}
		}
	}
	if seen < 300 {
		t.Errorf("only %d literals were seen", seen)
	}
}
