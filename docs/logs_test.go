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

	"github.com/kmehsm/kmehsm/binding"
)

// Every message that the code logs has a row in logs.md, with its levels and its fields; every field has a row, and
// every row is logged.
func TestLogFields(t *testing.T) {
	page := read(t, "logs.md")
	heads := []string{"\n## Fields\n", "\n## Messages of keysvc\n", "\n## Messages of the station server\n"}
	sections := make([]string, len(heads))
	for i, head := range slices.Backward(heads) {
		var found bool
		if page, sections[i], found = strings.Cut(page, head); !found {
			t.Fatalf("logs.md has no section %q", head)
		}
	}
	programs := []map[string]*message{
		logged(t, []string{"api", "binding", "hsmkeys", "vaultstore", "internal/keysvcd", "internal/n5geir",
			"internal/panics", "internal/webhook"}, map[string]wrapper{"Refused": {"refused", 2},
			"failed": {"refused", 4}, "Broken": {"internal error", 2}, "Recovered": {"panic", 1},
			"Unauthenticated": {"client authentication failed", 2}, "stranger": {"client authentication failed", 2}}),
		logged(t, []string{"cmd/factory", "factory/station", "hsmkeys", "internal/panics"}, map[string]wrapper{
			"refused": {"refused", 1}, "refuse": {"refused", 5}, "Recovered": {"panic", 1}}),
	}
	every := map[string]bool{"time": true, "level": true, "msg": true, "actor": true}
	for _, name := range fields[binding.Actor]() {
		every["actor."+name] = true
	}
	for i, messages := range programs {
		rows := rowsOf(t, sections[1+i])
		if len(rows) != len(messages) || len(rows) < 5 {
			t.Errorf("%s has %d messages, and the code %d", strings.TrimSpace(heads[1+i]), len(rows), len(messages))
		}
		for text, m := range messages {
			row, ok := rows[text]
			if !ok {
				t.Errorf("logs.md has no row for the message %q", text)
				continue
			}
			levels := regexp.MustCompile(`\b[A-Z]{4,5}\b`).FindAllString(code.ReplaceAllString(row[0], ""), -1)
			if m.chosen && len(levels) > 0 { // by a variable: one at least is in the code
				levels = levels[:1]
			}
			if !slices.Equal(levels, m.levels) {
				t.Errorf("%q has the levels %q on the page, and %q in the code", text, levels, m.levels)
			}
			var named []string
			for _, f := range code.FindAllStringSubmatch(row[1], -1) {
				named = append(named, f[1])
			}
			if own := slices.Sorted(maps.Keys(m.fields)); !slices.Equal(named, own) {
				t.Errorf("%q has the fields\n%q on the page, and in the code\n%q", text, named, own)
			}
			maps.Copy(every, m.fields)
			maps.Copy(every, m.inner)
		}
	}
	rows := rowsOf(t, sections[0])
	for name := range every {
		if rows[name] == nil {
			t.Errorf("logs.md has no row for the field %q", name)
		}
	}
	for name := range rows {
		if !every[name] {
			t.Errorf("logs.md has the field %q, which nothing logs", name)
		}
	}
}

var code = regexp.MustCompile("`([^`]+)`")

// rowsOf gives the rows of a section's table by what they begin with, without it.
func rowsOf(t *testing.T, section string) map[string][]string {
	t.Helper()
	rows := map[string][]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| (.*) \\|$").FindAllStringSubmatch(section, -1) {
		if rows[m[1]] != nil {
			t.Errorf("logs.md has two rows for %q", m[1])
		}
		rows[m[1]] = strings.Split(m[2], " | ")
	}
	return rows
}

// A message is what the code says of one.
type message struct {
	levels        []string
	chosen        bool            // whether the code that logs it chooses among levels
	fields, inner map[string]bool // inner are those of groups
}

// A wrapper is a function of ours that logs a message, with fields from its argument number first.
type wrapper struct {
	message string
	first   int
}

// logged reads the code of a program. A line is logged by a method of slog, or by a wrapper. A list of fields that is
// made before is a []any, or appended to one that is called attrs: in the same function, or in one that this calls.
func logged(t *testing.T, roots []string, wrappers map[string]wrapper) map[string]*message {
	t.Helper()
	messages, lists := map[string]*message{}, map[string]*message{}
	var functions []*ast.FuncDecl
	for _, root := range roots {
		for _, file := range parse(t, root) {
			for _, d := range file.Decls {
				if f, ok := d.(*ast.FuncDecl); ok && f.Body != nil {
					functions = append(functions, f)
				}
			}
		}
	}
	for _, f := range functions {
		list := &message{fields: map[string]bool{}, inner: map[string]bool{}}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CompositeLit:
				if a, ok := n.Type.(*ast.ArrayType); ok && isAny(a.Elt) {
					list.pairs(n.Elts)
				}
			case *ast.CallExpr:
				if f, ok := n.Fun.(*ast.Ident); ok && f.Name == "append" {
					if l, ok := n.Args[0].(*ast.Ident); ok && l.Name == "attrs" {
						list.pairs(n.Args[1:])
					}
				}
			}
			return true
		})
		if len(list.fields) > 0 {
			lists[f.Name.Name] = list
		}
	}
	for _, f := range functions {
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			text, level, first := logs(call, wrappers)
			if text == "" {
				return true
			}
			m := messages[text]
			if m == nil {
				m = &message{fields: map[string]bool{}, inner: map[string]bool{}}
				messages[text] = m
			}
			m.chosen = m.chosen || level == "LOG"
			if slices.Contains([]string{"DEBUG", "INFO", "WARN", "ERROR"}, level) && !slices.Contains(m.levels, level) {
				m.levels = append(m.levels, level)
			}
			if !call.Ellipsis.IsValid() {
				m.pairs(call.Args[first:])
				return true
			}
			ast.Inspect(f, func(n ast.Node) bool { // the function, and what it calls but for other wrappers
				if id, ok := n.(*ast.Ident); ok && lists[id.Name] != nil {
					if _, other := wrappers[id.Name]; !other || id == f.Name {
						maps.Copy(m.fields, lists[id.Name].fields)
					}
				}
				return true
			})
			return true
		})
	}
	return messages
}

// logs gives the message of a call, its level in capitals, which a wrapper has none of, and where its fields begin; no
// message if the call logs nothing, or what is no literal.
func logs(call *ast.CallExpr, wrappers map[string]wrapper) (text, level string, first int) {
	f, ok := call.Fun.(*ast.SelectorExpr)
	if id, function := call.Fun.(*ast.Ident); function {
		f = &ast.SelectorExpr{Sel: id}
	} else if !ok {
		return "", "", 0
	}
	if w, ok := wrappers[f.Sel.Name]; ok && len(call.Args) >= w.first {
		return w.message, "", w.first
	}
	level, inContext := strings.CutSuffix(f.Sel.Name, "Context")
	first = map[string]int{"Debug": 1, "Info": 1, "Warn": 1, "Error": 1, "Log": 3}[level]
	if inContext {
		first++
	}
	if first == 0 || !isLog(f.X) || len(call.Args) < first {
		return "", "", 0
	}
	text, _ = literal(call.Args[first-1])
	return text, strings.ToUpper(level), first
}

// pairs notes the names in a list of names and values, or groups of them.
func (m *message) pairs(args []ast.Expr) {
	for i := 0; i < len(args); {
		if group, ok := args[i].(*ast.CallExpr); ok && len(group.Args) > 0 {
			in := &message{fields: m.inner, inner: m.inner}
			in.pairs(group.Args[1:])
			if name, ok := literal(group.Args[0]); ok {
				m.fields[name] = true
			}
			i++
			continue
		}
		if s, ok := literal(args[i]); ok {
			m.fields[s] = true
		}
		i += 2
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
