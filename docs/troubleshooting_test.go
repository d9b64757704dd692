package docs

import (
	"go/ast"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Each message in troubleshooting.md is in the code, and each reason of the API is on the page.
func TestTroubleshooting(t *testing.T) {
	page := read(t, "troubleshooting.md")
	var texts []string // all strings of the code; those that are joined by + are one
	for _, root := range []string{"api", "binding", "cmd", "directory", "factory", "hsmkeys", "internal", "kme",
		"vaultstore"} {
		for _, file := range parse(t, root) {
			ast.Inspect(file, func(n ast.Node) bool {
				if x, ok := n.(ast.Expr); ok {
					if s, ok := joined(x); ok {
						texts = append(texts, s)
						return false
					}
				}
				return true
			})
		}
	}
	sources, err := filepath.Glob("../plugins/freediameter/*.c")
	if err != nil || len(sources) == 0 {
		t.Fatal(err, "no C")
	}
	for _, path := range sources {
		c, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		texts = append(texts, string(c))
	}
	all := strings.Join(texts, "\n")
	rows := 0
	reasons, rest, _ := strings.Cut(page, "\n## The token\n")
	for _, m := range append(regexp.MustCompile("(?m)^\\| `[A-Z_]+` \\| `([^`]+)`").FindAllStringSubmatch(reasons, -1),
		regexp.MustCompile("(?m)^\\| `([^`]+)`").FindAllStringSubmatch(rest, -1)...) {
		rows++
		if !strings.Contains(all, m[1]) {
			t.Errorf("no string in the code has %q", m[1])
		}
	}
	if rows < 60 {
		t.Errorf("only %d messages were found", rows)
	}
	for name, file := range parse(t, "kme") {
		if !strings.HasSuffix(name, "reason.go") {
			continue
		}
		for _, d := range file.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.CONST {
				continue
			}
			for _, s := range g.Specs {
				v := s.(*ast.ValueSpec)
				if id, ok := v.Type.(*ast.Ident); !ok || id.Name != "Reason" {
					continue
				}
				if reason, _ := literal(v.Values[0]); !strings.Contains(reasons, "\n| `"+reason+"` |") {
					t.Errorf("the page has no row for the reason %s", reason)
				}
			}
		}
	}
}

// joined is a string, or strings joined by +, with nothing else between.
func joined(x ast.Expr) (string, bool) {
	if b, ok := x.(*ast.BinaryExpr); ok && b.Op == token.ADD {
		left, ok := joined(b.X)
		right, too := joined(b.Y)
		return left + right, ok && too
	}
	return literal(x)
}

// Each link from a page to another, or to a heading, leads somewhere.
func TestLinks(t *testing.T) {
	pages, err := filepath.Glob("*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, pattern := range []string{"../*.md", "../deploy/*.md", "hsm/*.md", "decisions/*.md", "model/*.md"} {
		more, err := filepath.Glob(pattern)
		if err != nil || len(more) == 0 {
			t.Fatal(pattern, err)
		}
		pages = append(pages, more...)
	}
	link := regexp.MustCompile(`\]\(([^)\s]+)\)|(?m)^\[[^\]]+\]: (\S+)$`)
	for _, page := range pages {
		for _, m := range link.FindAllStringSubmatch(read(t, page), -1) {
			to := m[1] + m[2]
			if strings.Contains(to, "://") || strings.HasPrefix(to, "mailto:") {
				continue
			}
			file, heading, _ := strings.Cut(to, "#")
			path := page
			if file != "" {
				path = filepath.Join(filepath.Dir(page), file)
			}
			if _, err := os.Stat(path); err != nil {
				t.Errorf("%s links to %s: %v", page, to, err)
			} else if heading != "" && !hasHeading(read(t, path), heading) {
				t.Errorf("%s links to %s, which has no such heading", page, to)
			}
		}
	}
}

// hasHeading finds a heading by the anchor that GitHub gives it.
func hasHeading(page, anchor string) bool {
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(page, -1) {
		name := regexp.MustCompile(`[^\p{L}\p{N} _-]`).ReplaceAllString(strings.ToLower(m[1]), "")
		if strings.ReplaceAll(name, " ", "-") == anchor {
			return true
		}
	}
	return false
}
