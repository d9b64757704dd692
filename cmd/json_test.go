package cmd_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/kmehsm/kmehsm/internal/programs"
	"github.com/kmehsm/kmehsm/internal/vaulttest"
)

// A field is what docs/json.md says of a field of a JSON document, or of the document.
type field struct {
	optional bool             // it may be missing, or null
	list     bool             // of what the rest says
	below    map[string]field // the fields that it has; nil if it has none
	open     bool             // it has others too, or is whatever it is
}

// documented is what docs/json.md says that commands print, by their names and those of flags that change it.
func documented(t testing.TB) map[string]field {
	t.Helper()
	all := map[string]field{}
	row := regexp.MustCompile("(?m)^\\| `((?:factory|keysvc|mesim) [^`]+)` \\| `([^`]+)` \\|")
	for _, m := range row.FindAllStringSubmatch(read(t, "docs/json.md"), -1) {
		tokens := regexp.MustCompile(`\w+|\?|\[\]|[{},]|…|\S`).FindAllString(m[2], -1)
		below, open, rest, err := parseFields(tokens)
		if err != nil || len(rest) > 0 {
			t.Fatalf("docs/json.md, %s: %v, %q is left", m[1], err, rest)
		}
		all[m[1]] = field{below: below, open: open}
	}
	return all
}

// parseFields parses "name, name? {...}, name[] {...}, name {…}", up to a closing brace.
func parseFields(tokens []string) (fields map[string]field, open bool, rest []string, err error) {
	fields = map[string]field{}
	next := func(want string) bool {
		if len(tokens) == 0 || tokens[0] != want {
			return false
		}
		tokens = tokens[1:]
		return true
	}
	for {
		if next("…") {
			return fields, true, tokens, nil
		}
		if len(tokens) == 0 || !regexp.MustCompile(`^\w+$`).MatchString(tokens[0]) {
			return nil, false, tokens, fmt.Errorf("a name is missing before %q", tokens)
		}
		name := tokens[0]
		tokens = tokens[1:]
		f := field{optional: next("?"), list: next("[]")}
		if next("{") {
			if f.below, f.open, tokens, err = parseFields(tokens); err != nil {
				return nil, false, tokens, err
			}
			if !next("}") {
				return nil, false, tokens, fmt.Errorf("%s does not end", name)
			}
		}
		fields[name] = f
		if !next(",") {
			return fields, false, tokens, nil
		}
	}
}

// differences are those between a JSON value and what the page says of it.
func (f field) differences(at string, v any) (all []string) {
	if f.list {
		list, ok := v.([]any)
		if !ok {
			return []string{fmt.Sprintf("%s is no list: %v", at, v)}
		}
		f.list = false
		for _, item := range list {
			all = append(all, f.differences(at+"[]", item)...)
		}
		return all
	}
	object, ok := v.(map[string]any)
	if _, list := v.([]any); list || ok != (f.below != nil) || v == nil {
		return []string{fmt.Sprintf("%s is %v", at, v)}
	}
	for name, value := range object {
		g, known := f.below[name]
		switch {
		case known && (value != nil || !g.optional):
			all = append(all, g.differences(at+"."+name, value)...)
		case !known && !f.open:
			all = append(all, at+"."+name+" is not on the page")
		}
	}
	for name, g := range f.below {
		if _, there := object[name]; !there && !g.optional {
			all = append(all, at+"."+name+" is missing")
		}
	}
	return all
}

// checkJSON says what is wrong with the output of a command, as docs/json.md has it.
func checkJSON(page map[string]field, words []string, output string) error {
	of := ""
	for name := range page {
		here := strings.Fields(name)
		command := slices.IndexFunc(here, func(w string) bool { return w[0] == '-' })
		if command < 0 {
			command = len(here)
		}
		if len(words) >= command && slices.Equal(words[:command], here[:command]) && len(name) > len(of) &&
			!slices.ContainsFunc(here[command:], func(flag string) bool { return !slices.Contains(words, flag) }) {
			of = name
		}
	}
	if of == "" {
		return fmt.Errorf("docs/json.md has no row for %q", words)
	}
	d := json.NewDecoder(strings.NewReader(output))
	var v any
	if err := d.Decode(&v); err != nil {
		return fmt.Errorf("%w: %s", err, output)
	}
	if d.More() {
		return fmt.Errorf("there is more than one document: %s", output)
	}
	if wrong := page[of].differences("", v); len(wrong) > 0 {
		return fmt.Errorf("docs/json.md, %s:\n%s", of, strings.Join(wrong, "\n"))
	}
	return nil
}

// prints PROGRAM ARGS... runs a program with --json, and demands that it prints what docs/json.md has.
func prints(ts *testscript.TestScript, _ bool, args []string) {
	exits(ts, false, slices.Concat([]string{"0"}, args, []string{"--json"}))
	ts.Check(checkJSON(documented(ts.Value(testKey{}).(testing.TB)), args, ts.ReadFile("stdout")))
}

// set NAME [FIELD] sets a variable to what standard output was, or to a field of its JSON document.
func set(ts *testscript.TestScript, _ bool, args []string) {
	text := strings.TrimSpace(ts.ReadFile("stdout"))
	if len(args) > 1 {
		var document map[string]any
		ts.Check(json.Unmarshal([]byte(text), &document))
		text = fmt.Sprint(document[args[1]])
	}
	ts.Setenv(args[0], text)
}

// Every command that prints a result takes --json, has its fields in docs/json.md, and is held to them by a script.
func TestJSONEverywhere(t *testing.T) {
	// What these print is for a shell, a reader or a log.
	without := []string{"serve", "station serve", "help", "man", "completion"}
	inTest := []string{"factory vault setup"} // TestJSONOfVaultSetup
	var scripts strings.Builder
	files, err := filepath.Glob("testdata/*/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatal(err, files)
	}
	for _, file := range files {
		scripts.WriteString(read(t, filepath.Join("cmd", file)))
	}
	rows := documented(t)
	for _, program := range []string{"factory", "keysvc", "mesim"} {
		all := leaves(t, program)
		for _, command := range slices.Sorted(maps.Keys(all)) {
			name := program + " " + command
			if slices.Contains(without, command) {
				continue
			}
			if !slices.Contains(all[command], "--json") {
				t.Errorf("%s has no --json", name)
			}
			if _, ok := rows[name]; !ok {
				t.Errorf("docs/json.md has no %s", name)
			}
			if !regexp.MustCompile(`(?m)^prints `+name+`( |$)`).MatchString(scripts.String()) &&
				!slices.Contains(inTest, name) {
				t.Errorf("no script has: prints %s", name)
			}
		}
		for name := range rows {
			command, _, _ := strings.Cut(name, " --")
			if at, command, _ := strings.Cut(command, " "); at == program && all[command] == nil {
				t.Errorf("docs/json.md has %s, which there is not", name)
			}
		}
	}
}

// As in docs/json.md.
func TestJSONOfVaultSetup(t *testing.T) {
	server := vaulttest.Any(t)
	words := []string{"factory", "vault", "setup", "--directory", "vault:kme", "--json"}
	for range 2 { // it makes all, and finds all
		command := exec.Command(filepath.Join(programs.Dir(t), words[0]), words[1:]...)
		command.Env = append(command.Environ(), "VAULT_ADDR="+server.Addr, "VAULT_TOKEN="+server.Root)
		out, err := command.Output()
		if err == nil {
			err = checkJSON(documented(t), words, string(out))
		}
		if err != nil {
			t.Error(err)
		}
	}
}
