package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// Every field and every message that the code logs has a row in logs.md, and every row is logged.
func TestLogFields(t *testing.T) {
	page := read(t, "logs.md")
	fields, messages, found := strings.Cut(page, "\n## Messages\n")
	if !found {
		t.Fatal("logs.md has no section Messages")
	}
	logged := logCalls(t)
	for what, have := range map[string]struct {
		page string
		code map[string]bool
	}{"field": {fields, logged.fields}, "message": {messages, logged.messages}} {
		var rows []string
		for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)`").FindAllStringSubmatch(have.page, -1) {
			rows = append(rows, m[1])
		}
		for name := range have.code {
			if !slices.Contains(rows, name) {
				t.Errorf("logs.md has no row for the %s %q", what, name)
			}
		}
		for i, name := range rows {
			if slices.Contains(rows[:i], name) {
				t.Errorf("logs.md has two rows for the %s %q", what, name)
			}
			if !have.code[name] {
				t.Errorf("logs.md has the %s %q, which nothing logs", what, name)
			}
		}
		if len(rows) < 20 {
			t.Errorf("logs.md has %d rows of %ss", len(rows), what)
		}
	}
}

type logged struct{ fields, messages map[string]bool }

// logCalls reads the code of the daemons. A line is logged by a method of slog, or by one of ours that takes the
// same list; a list that is made beforehand is a []any, or appended to one that is called attrs.
func logCalls(t *testing.T) logged {
	t.Helper()
	l := logged{map[string]bool{"time": true, "level": true, "msg": true}, map[string]bool{}}
	firstField := map[string]int{ // the position of the first field's name
		"Debug": 1, "Info": 1, "Warn": 1, "Error": 1,
		"DebugContext": 2, "InfoContext": 2, "WarnContext": 2, "ErrorContext": 2, "Log": 3,
		"Refused": 2, "Broken": 2, "Unauthenticated": 2, "failed": 4,
	}
	ours := map[string]bool{"Refused": true, "Broken": true, "Unauthenticated": true, "failed": true}
	for _, root := range []string{"api", "binding", "hsmkeys", "vaultstore", "cmd/factory", "factory/station",
		"internal/keysvcd", "internal/n5geir", "internal/webhook"} {
		for _, file := range parse(t, root) {
			pairs := func(args []ast.Expr) {
				for i := 0; i+1 < len(args); i += 2 {
					if s, ok := literal(args[i]); ok && regexp.MustCompile(`^[a-z][a-z_0-9]*$`).MatchString(s) {
						l.fields[s] = true
					}
				}
			}
			ast.Inspect(file, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.CompositeLit:
					if a, ok := n.Type.(*ast.ArrayType); ok && isAny(a.Elt) {
						pairs(n.Elts)
					}
				case *ast.TypeSpec:
					if n.Name.Name == "Actor" {
						for _, f := range n.Type.(*ast.StructType).Fields.List {
							tag := regexp.MustCompile(`json:"([a-z]+)`).FindStringSubmatch(f.Tag.Value)
							l.fields["actor."+tag[1]] = true
						}
					}
				case *ast.CallExpr:
					l.call(n, firstField, ours, pairs)
				}
				return true
			})
		}
	}
	return l
}

// call notes what a call logs.
func (l logged) call(n *ast.CallExpr, firstField map[string]int, ours map[string]bool, pairs func([]ast.Expr)) {
	if f, ok := n.Fun.(*ast.Ident); ok && f.Name == "append" {
		if list, ok := n.Args[0].(*ast.Ident); ok && list.Name == "attrs" {
			pairs(n.Args[1:])
		}
	}
	f, ok := n.Fun.(*ast.SelectorExpr)
	if !ok {
		return
	}
	if p, ok := f.X.(*ast.Ident); ok && p.Name == "slog" {
		switch {
		case f.Sel.Name == "Group":
			pairs(n.Args[:2]) // its name
			pairs(n.Args[1:])
		case len(n.Args) == 2:
			pairs(n.Args) // slog.String and others
		}
	}
	first, ok := firstField[f.Sel.Name]
	if !ok || len(n.Args) < first {
		return
	}
	if !ours[f.Sel.Name] {
		s, ok := literal(n.Args[first-1])
		if !ok || !isLog(f.X) {
			return
		}
		l.messages[s] = true
	}
	if !n.Ellipsis.IsValid() {
		pairs(n.Args[first:])
	}
}

// isLog says whether what a method is called on is a logger, and not an error or a test.
func isLog(x ast.Expr) bool {
	switch x := x.(type) {
	case *ast.Ident:
		return x.Name == "log" || x.Name == "slog"
	case *ast.SelectorExpr:
		return strings.EqualFold(x.Sel.Name, "log")
	}
	return false
}

func isAny(x ast.Expr) bool {
	id, ok := x.(*ast.Ident)
	return ok && id.Name == "any"
}

func literal(x ast.Expr) (string, bool) {
	lit, ok := x.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return "", false
	}
	s, err := strconv.Unquote(lit.Value)
	return s, err == nil
}

// parse reads all Go files below a folder of the tree but tests and what is for tests.
func parse(t *testing.T, root string) map[string]*ast.File {
	t.Helper()
	files := map[string]*ast.File{}
	err := filepath.WalkDir(filepath.Join("..", root), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasSuffix(path, "test") || d.Name() == "testdata") {
			return fs.SkipDir
		}
		if filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		files[path], err = parser.ParseFile(token.NewFileSet(), path, nil, 0)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatalf("there is no Go file in %s, of %v", root, slices.Collect(maps.Keys(files)))
	}
	return files
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
