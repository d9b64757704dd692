// Package docs holds the pages to what they say of the code.
package docs

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/kmehsm/kmehsm"

// Whoever answers the twelve questions of architecture.md from it alone is right: the packages that import what a
// question has are below the one that its answer names, and there is one.
func TestWhichPackage(t *testing.T) {
	page, err := os.ReadFile("architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	_, quiz, _ := strings.Cut(string(page), "\n## Which package?\n")
	questions, answers, _ := strings.Cut(quiz, "\nAnswers:\n")
	item, code := regexp.MustCompile(`(?m)^\d+\. .*$`), regexp.MustCompile("`([^`]+)`")
	asked, answered := item.FindAllString(questions, -1), item.FindAllString(answers, -1)
	if len(asked) != 12 || len(answered) != 12 {
		t.Fatalf("there are %d questions and %d answers", len(asked), len(answered))
	}
	imports := imports(t)
	for i, q := range asked {
		room := module + "/" + code.FindStringSubmatch(answered[i])[1]
		with, without, _ := strings.Cut(q, "but not")
		found := 0
		for name, all := range imports {
			has := func(m []string) bool { return slices.Contains(all, strings.Replace(m[1], "…", module, 1)) }
			wanted, unwanted := code.FindAllStringSubmatch(with, -1), code.FindAllStringSubmatch(without, -1)
			if slices.ContainsFunc(wanted, func(m []string) bool { return !has(m) }) ||
				slices.ContainsFunc(unwanted, has) {
				continue
			}
			found++
			if name != room && !strings.HasPrefix(name, room+"/") {
				t.Errorf("%s, and package %s has these imports; the answer is %s", q, name, answered[i])
			}
		}
		if found == 0 {
			t.Errorf("%s: no package has these imports", q)
		}
	}
}

// Every package has its row in architecture.md, by its whole path, and every path there is a package's.
func TestEveryPackage(t *testing.T) {
	page := read(t, "architecture.md")
	_, table, _ := strings.Cut(page, "\n| package |")
	table, _, _ = strings.Cut(table, "\n\n")
	out, err := exec.Command("go", "list", "-f", "{{.ImportPath}} {{len .GoFiles}}", "work").Output()
	if err != nil {
		t.Fatal(err)
	}
	known := 0
	for line := range strings.Lines(string(out)) {
		path, files, _ := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), module+"/"), " ")
		if files == "0" || strings.HasPrefix(path, "cmd/") || strings.HasPrefix(path, "api/kme/v1/") {
			continue // has tests alone; is in the picture; is generated
		}
		if known++; !strings.Contains(table, "`"+path+"`") {
			t.Errorf("architecture.md has no package %s", path)
		}
	}
	if known < 60 {
		t.Errorf("only %d packages were seen", known)
	}
	for _, row := range regexp.MustCompile("(?m)^\\| (`[^|]*) \\|").FindAllStringSubmatch(table, -1) {
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(row[1], -1) {
			if _, err := os.Stat("../" + m[1]); err != nil {
				t.Errorf("architecture.md has %s: %v", m[1], err)
			}
		}
	}
}

// What flags and commands are is known to the programs alone: a daemon, say, is told its settings by them.
func TestCommandLineIsAbove(t *testing.T) {
	above := regexp.MustCompile("^" + module + "/(cmd/|internal/cmdline$)")
	known := 0
	for name, all := range imports(t) {
		for _, of := range []string{module + "/internal/cmdline", "github.com/urfave/cli/v2"} {
			switch {
			case !slices.Contains(all, of):
			case above.MatchString(name):
				known++
			default:
				t.Errorf("%s imports %s", name, of)
			}
		}
	}
	if known < 7 {
		t.Errorf("only %d imports were seen", known)
	}
}

// imports are those of each package of the module. Left out are tests, and packages that are for tests.
func imports(t *testing.T) map[string][]string {
	t.Helper()
	list := exec.Command("go", "list", "-json=ImportPath,Imports", module+"/...")
	list.Stderr = os.Stderr
	out, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string][]string{}
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p struct {
			ImportPath string
			Imports    []string
		}
		switch err := d.Decode(&p); {
		case errors.Is(err, io.EOF):
			return all
		case err != nil:
			t.Fatal(err)
		}
		if !strings.HasPrefix(p.ImportPath, module+"/tools/") && !slices.Contains(p.Imports, "testing") {
			all[p.ImportPath] = p.Imports
		}
	}
}
