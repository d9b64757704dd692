package cmd_test

import (
	"maps"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
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

// completions are what a program offers in the place of the last word.
func completions(t *testing.T, program string, words ...string) (names []string) {
	t.Helper()
	out, err := exec.Command(filepath.Join(programs.Dir(t), program), append([]string{"--complete"}, words...)...).
		Output()
	if err != nil {
		t.Fatal(program, words, err)
	}
	for line := range strings.Lines(string(out)) {
		name, _, _ := strings.Cut(line, "\t")
		names = append(names, name)
	}
	return names
}

// leaves are the commands of a program that do something, and the flags of each. They are asked for once.
func leaves(t *testing.T, program string) map[string][]string {
	t.Helper()
	known.Lock()
	defer known.Unlock()
	if all := known.of[program]; all != nil {
		return maps.Clone(all)
	}
	all := map[string][]string{}
	var walk func(command []string)
	walk = func(command []string) {
		below := completions(t, program, append(slices.Clone(command), "")...)
		if len(below) == 0 || command != nil && command[0] == "completion" {
			all[strings.Join(command, " ")] = completions(t, program, append(slices.Clone(command), "--")...)
			return
		}
		for _, name := range below {
			walk(append(slices.Clone(command), name))
		}
	}
	walk(nil)
	known.of[program] = all
	return maps.Clone(all)
}

var known = struct {
	sync.Mutex
	of map[string]map[string][]string // by program and command
}{of: map[string]map[string][]string{}}

// Every command that does something has an example, and no example has a command or a flag that there is not.
func TestExamples(t *testing.T) {
	for program, fewest := range map[string]int{"factory": 25, "keysvc": 25, "mesim": 3} {
		all := leaves(t, program)
		if len(all) < fewest {
			t.Errorf("%s has %d commands", program, len(all))
		}
		delete(all, "help") // whose --help is the program's
		for command, flags := range all {
			words := strings.Fields(command)
			out, err := exec.Command(filepath.Join(programs.Dir(t), program), append(words, "--help")...).Output()
			if err != nil {
				t.Fatal(command, err)
			}
			_, text, ok := strings.Cut(string(out), "For example:\n")
			text, _, _ = strings.Cut(text, "\n\n")
			text = strings.ReplaceAll(text, "\\\n", "")
			if !ok || !strings.Contains(text, program) {
				t.Errorf("%s %s --help has no example", program, command)
			}
			for line := range strings.Lines(text) {
				line = strings.TrimSpace(line)
				if !strings.HasPrefix(line, program+" ") {
					continue
				}
				if rest, ok := strings.CutPrefix(line, program+" "+command); !ok || rest != "" && rest[0] != ' ' {
					t.Errorf("the example of %s %s is another's: %s", program, command, line)
				}
				for _, flag := range regexp.MustCompile(`--[a-z-]+`).FindAllString(line, -1) {
					if !slices.Contains(flags, flag) {
						t.Errorf("%s %s has no %s, as its example has: %s", program, command, flag, line)
					}
				}
			}
		}
	}
}

// What the shells' completions ask the program for.
func TestCompletion(t *testing.T) {
	for _, c := range []struct {
		words []string
		want  string // one of them; empty: none
	}{
		{[]string{"l"}, "lot"}, {[]string{"lot", "imp"}, "import"}, {[]string{"lot", "import", "--tok"}, "--token"},
		{[]string{"lot", "import", "--token", "--"}, ""}, {[]string{"lot", "import", "f", "--js"}, "--json"},
		{[]string{"completion", "z"}, "zsh"}, {[]string{"enroll", ""}, ""},
	} {
		if got := completions(t, "keysvc", c.words...); c.want == "" && len(got) > 0 ||
			c.want != "" && !slices.Contains(got, c.want) {
			t.Errorf("%q: %q, want %q", c.words, got, c.want)
		}
	}
}

// The manual page has every command, and is what groff takes.
func TestManualPages(t *testing.T) {
	for _, program := range []string{"factory", "keysvc", "mesim"} {
		page, err := exec.Command(filepath.Join(programs.Dir(t), program), "man").Output()
		if err != nil {
			t.Fatal(program, err)
		}
		for command, flags := range leaves(t, program) {
			if !strings.Contains(string(page), "\n.SS "+program+" "+strings.ReplaceAll(command, "-", `\-`)) {
				t.Errorf("the manual page of %s has no %s", program, command)
			}
			for _, flag := range flags {
				if !strings.Contains(string(page), strings.ReplaceAll(flag, "-", `\-`)) {
					t.Errorf("the manual page of %s has no %s", program, flag)
				}
			}
		}
		groff := exec.Command("groff", "-man", "-ww", "-W", "break", "-z") // a URI is no word to break
		groff.Stdin = strings.NewReader(string(page))
		if out, err := groff.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("groff: %s %v", out, err)
		}
	}
}
