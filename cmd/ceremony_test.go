package cmd_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/programs"
)

// docs/ceremony.md is read aloud. Its commands run as they are printed, one after the other in one
// shell, and show what it says.
func TestCeremony(t *testing.T) {
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile(filepath.Join(root, "docs", "ceremony.md"))
	if err != nil {
		t.Fatal(err)
	}
	const mark = "end of what a command shows"
	var script strings.Builder
	var shown [][]string // of each command: the lines that the document has below it
	continued := false
	for line := range strings.SplitSeq(string(doc), "\n") {
		text, indented := strings.CutPrefix(line, "    ")
		command, isCommand := strings.CutPrefix(text, "$ ")
		switch {
		case !indented:
			continue
		case isCommand:
			if shown = append(shown, nil); len(shown) > 1 {
				script.WriteString("echo '" + mark + "'\n")
			}
			script.WriteString(command + "\n")
		case continued:
			script.WriteString(text + "\n")
		default:
			shown[len(shown)-1] = append(shown[len(shown)-1], text)
		}
		continued = (isCommand || continued) && strings.HasSuffix(text, "\\")
	}
	if len(shown) < 20 {
		t.Fatalf("only %d commands were found", len(shown))
	}
	dir := t.TempDir()
	if err := os.Symlink(filepath.Join(root, "softhsm-setup.sh"), filepath.Join(dir, "softhsm-setup.sh")); err != nil {
		t.Fatal(err)
	}
	shell := exec.Command("bash", "-eo", "pipefail", "-c", script.String())
	shell.Dir = dir
	shell.Env = append(os.Environ(), "PATH="+programs.Dir(t)+":"+os.Getenv("PATH"))
	var stderr bytes.Buffer
	shell.Stderr = &stderr
	out, err := shell.Output()
	if err != nil {
		t.Fatalf("%v\n%s%s", err, out, &stderr)
	}
	outputs := strings.Split(string(out), mark+"\n")
	if len(outputs) != len(shown) {
		t.Fatalf("%d commands were run, of %d", len(outputs), len(shown))
	}
	for i, lines := range shown {
		for _, line := range lines {
			pattern := "(?m)^" + strings.ReplaceAll(regexp.QuoteMeta(line), `\.\.\.`, ".*") + "$"
			if !regexp.MustCompile(pattern).MatchString(outputs[i]) {
				t.Errorf("the document shows %q; the command shows\n%s", line, outputs[i])
			}
		}
	}
}
