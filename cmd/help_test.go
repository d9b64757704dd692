package cmd_test

import (
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/programs"
)

// The help of every command fits into 120 columns.
func TestHelpWidth(t *testing.T) {
	for _, name := range []string{"factory", "keysvc", "mesim"} {
		if n := helpWidth(t, filepath.Join(programs.Dir(t), name)); n < 3 {
			t.Errorf("%s has the help of %d commands", name, n)
		}
	}
}

// helpWidth looks at the help of a command and of those below it, and says how many these are.
func helpWidth(t *testing.T, program string, command ...string) (n int) {
	t.Helper()
	out, err := exec.Command(program, append(command, "--help")...).Output()
	if err != nil {
		t.Fatal(command, err)
	}
	for line := range strings.Lines(string(out)) {
		if len(line) > 121 && strings.Contains(strings.TrimSpace(line), " ") {
			t.Errorf("%s %v: %s", filepath.Base(program), command, line)
		}
	}
	_, below, _ := strings.Cut(string(out), "\nCOMMANDS:\n")
	below, _, _ = strings.Cut(below, "\n\n")
	for _, m := range regexp.MustCompile(`(?m)^   (\S+)  `).FindAllStringSubmatch(below, -1) {
		n += helpWidth(t, program, append(command, m[1])...)
	}
	return n + 1
}
