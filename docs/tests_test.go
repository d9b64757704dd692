package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Every test that a page names is there, and what it runs by go test runs something.
func TestNamedTests(t *testing.T) {
	tests := map[string]string{} // names of tests and benchmarks, by folder
	for _, root := range []string{"api", "binding", "client", "cmd", "deploy", "directory", "docs", "factory",
		"hsmkeys", "internal", "kme", "tools", "vaultstore"} {
		err := filepath.WalkDir(filepath.Join("..", root), func(path string, _ os.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, "_test.go") {
				return err
			}
			for _, m := range regexp.MustCompile(`(?m)^func ((?:Test|Benchmark)\w+)\(`).FindAllStringSubmatch(
				read(t, path), -1) {
				tests[filepath.Dir(path)] += m[1] + "\n"
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	var all strings.Builder
	for _, names := range tests {
		all.WriteString(names)
	}
	pages := []string{"../README.md", "../CONTRIBUTING.md", "../SECURITY.md"}
	for _, pattern := range []string{"*.md", "*/*.md"} {
		more, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		pages = append(pages, more...)
	}
	named, run := 0, 0
	for _, page := range pages {
		text := strings.Join(strings.Fields(read(t, page)), " ")
		for _, name := range regexp.MustCompile("`(Test[A-Z]\\w*)`").FindAllStringSubmatch(text, -1) {
			named++
			if !strings.Contains(all.String(), name[1]+"\n") {
				t.Errorf("%s names %s, which there is not", page, name[1])
			}
		}
		for _, command := range regexp.MustCompile("go test [^`]*").FindAllString(text, -1) {
			what := regexp.MustCompile(`-(run|bench) '?([A-Z][\w|]*)`).FindStringSubmatch(command)
			where := regexp.MustCompile(` \./([\w/]+)`).FindStringSubmatch(command)
			if what == nil || where == nil || what[2] == "XXX" {
				continue
			}
			run++
			for part := range strings.SplitSeq(what[2], "|") {
				begin := map[string]string{"run": "", "bench": "Benchmark"}[what[1]]
				if !strings.Contains(tests[filepath.Join("..", where[1])], begin+part) {
					t.Errorf("%s: %s runs no %s", page, command, part)
				}
			}
		}
	}
	if named < 40 || run < 5 {
		t.Errorf("only %d names and %d commands were found", named, run)
	}
}
