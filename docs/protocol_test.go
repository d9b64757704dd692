package docs

import (
	"go/ast"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The names of files' types in protocol.md are those of the code: none is missing, and there is no other.
func TestFileTypes(t *testing.T) {
	page, name := read(t, "protocol.md"), regexp.MustCompile(`^kme-[a-z-]+(\+jws)?$`)
	// These stay with whoever made them, and are no files between the parties.
	own := []string{"kme-ceremony-minutes+jws", "kme-audit-log-head+jws", "kme-so-share"}
	var types []string
	for _, root := range []string{"directory", "factory", "internal/handover", "internal/custody",
		"binding/tokenkeys"} {
		for _, file := range parse(t, root) {
			ast.Inspect(file, func(n ast.Node) bool {
				if l, ok := n.(*ast.BasicLit); ok {
					if s, _ := literal(l); name.MatchString(s) && !slices.Contains(own, s) {
						types = append(types, s)
					}
				}
				return true
			})
		}
	}
	for _, s := range types {
		if !strings.Contains(page, "`"+s+"`") {
			t.Errorf("the page has no %s", s)
		}
	}
	for _, m := range regexp.MustCompile("`(kme-[a-z-]+(\\+jws)?)`").FindAllStringSubmatch(page, -1) {
		if !slices.Contains(types, m[1]) {
			t.Errorf("the code has no %s", m[1])
		}
	}
	if len(types) < 10 {
		t.Errorf("only %q were found", types)
	}
}

// The settings of kme.fdx on hss-integration.md are those that it reads.
func TestSettingsOfTheExtension(t *testing.T) {
	code, err := os.ReadFile(filepath.Join("..", "plugins", "freediameter", "conf.c"))
	if err != nil {
		t.Fatal(err)
	}
	_, page, _ := strings.Cut(read(t, "hss-integration.md"), "/etc/freeDiameter/kme.conf")
	page, _, _ = strings.Cut(page, "\n**keysvc**")
	found := func(text, pattern string) (names []string) {
		for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
			names = append(names, m[1])
		}
		slices.Sort(names)
		return slices.Compact(names)
	}
	onPage := append(found(page, `(?m)^    #?(\w+) = `), "ca", "cert", "key") // of service = https:
	slices.Sort(onPage)
	// A row of a table, as { "vendor", 1, ... or { "open", &conf...; or a comparison, as strcmp(key, "s13").
	inCode := found(string(code), `(?:\{ |\bkey, )"(\w+)"(?:\)|, [&\d])`)
	if !slices.Equal(onPage, inCode) || len(inCode) < 15 {
		t.Errorf("the page has the settings\n%q, and the extension reads\n%q", onPage, inCode)
	}
	// The limits: { "in_flight", 1, 10000, ...
	for _, m := range regexp.MustCompile(`\{ "(\w+)", (\d+), (\d+), &conf`).FindAllStringSubmatch(string(code), -1) {
		line := regexp.MustCompile(`(?m)^    ` + m[1] + ` = .*`).FindString(page)
		if limits := regexp.MustCompile(`\d+ to \d+`).FindString(line); limits != "" && limits != m[2]+" to "+m[3] {
			t.Errorf("%s: the extension takes %s to %s", line, m[2], m[3])
		}
	}
}
