package cmdline

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/usage"
)

type settings struct {
	Token string   `yaml:"token"`
	State string   `yaml:"state" path:""`
	Names []string `yaml:"names" flag:"name"`
	Count int      `yaml:"count"`
}

// run runs a command line of a program that gives each end, and takes settings.
func run(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs strings.Builder
	flags := []cli.Flag{
		&cli.StringFlag{Name: "token", EnvVars: []string{"KMEHSM_TEST_SETTING"}, Category: Configured},
		&cli.StringFlag{Name: "state", Value: "var", Category: Configured},
		&cli.StringSliceFlag{Name: "name", Category: Configured},
		&cli.IntFlag{Name: "count", Category: Configured}, &cli.StringFlag{Name: "own"}, JSON,
	}
	ends := func(name string, err error) *cli.Command {
		return &cli.Command{Name: name, Action: func(*cli.Context) error { return err }}
	}
	p := Program{
		App: &cli.App{Name: "p", Writer: &out, ErrWriter: &errs, DisableSliceFlagSeparator: true,
			Commands: []*cli.Command{
				{Name: "show", Flags: flags, Description: "One\ntwo.\n\nfirst   1\nsecond  2\n  an example",
					Action: func(c *cli.Context) error {
						return json.NewEncoder(c.App.Writer).Encode([]any{c.String("token"), c.String("state"),
							c.StringSlice("name"), c.Int("count"), c.String("own")})
					}},
				{Name: "ends", Subcommands: []*cli.Command{
					ends("failed", errors.New("failed")), ends("hostile", errors.New("é\x1b[2J\u202e\r\nnext")),
					ends("usage", usage.Errorf("usage")),
					ends("partial", Partial(errors.New("partial"))),
					ends("denied", &fs.PathError{Op: "open", Path: "x", Err: fs.ErrPermission}),
					ends("full", &fs.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}),
					{Name: "late", Flags: []cli.Flag{JSON, &cli.IntFlag{Name: "items", Value: -1},
						&cli.BoolFlag{Name: "said"}}, Action: late},
					ends("said", fmt.Errorf("give more room: %w", syscall.ENOSPC)),
				}},
				{Name: "list", ArgsUsage: "[ITEM...]", Flags: []cli.Flag{JSON}, Action: func(c *cli.Context) error {
					return PrintList(c, `"items"`, func(yield func(int, error) bool) {
						for i := range c.NArg() {
							if c.Args().Get(i) == "fails" {
								yield(0, errors.New("gone"))
								return
							}
							if !yield(i, nil) {
								return
							}
						}
					})
				}},
			}},
		Common: []cli.Flag{&cli.StringFlag{Name: "common"}, &cli.BoolFlag{Name: "switch"}, JSON},
		Config: &Config{Program: "p", Defaults: func(path string) (any, *config.Report) {
			return config.Schema[settings]{See: "p show"}.Read(path, nil)
		}},
	}
	code = p.Run(context.Background(), append([]string{"p"}, args...))
	return code, out.String(), errs.String()
}

// One test for each exit code, and for each way of wrong usage.
func TestExitCodes(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, c := range []struct {
		args string
		code int
		want string // on standard error
	}{
		{"ends", 0, ""}, {"--help", 0, ""}, {"help", 0, ""}, {"help show", 0, ""}, {"--version", 0, ""}, {"", 0, ""},
		{"show x --help", 0, ""}, {"show x -h", 0, ""}, {"show --own x y --help --strange", 0, ""},
		{"ends -h failed", 0, ""}, {"help show --help", 0, ""},
		{"shwo --help", 2, "did you mean show?"}, {"shwo it -h", 2, "did you mean show?"},
		{"ends failed", 1, "p: failed"},
		{"ends hostile", 1, `p: é\x1b[2J\u202e\r` + "\nnext"},
		{"ends usage", 2, "p: usage"},
		{"ends partial", 3, "p: partial"},
		{"ends denied", 1, "p: open x: permission denied: this user may not; run it as the one whose file that is"},
		{"ends full", 1, "p: write x: no space left on device: make room on its disk, and run this again\n"},
		{"ends said", 1, "p: give more room: no space left on device\n"},
		{"shwo", 2, `there is no command "shwo" (did you mean show?)`},
		{"zebra", 2, `there is no command "zebra"; see p --help`},
		{"ends faild", 2,
			`there is no command "p ends faild" (did you mean p ends failed?); see p ends --help`},
		{"ends faild --zebra x", 2, `there is no command "p ends faild"`},
		{"shwo it --zebra x", 2, `there is no command "shwo" (did you mean show?)`},
		{"help shwo", 2, `(did you mean show?)`},
		{"show --tokn x", 2, `there is no flag --tokn (did you mean --token?); see p show --help`},
		{"show --zebra", 2, `there is no flag --zebra; see p show --help`},
		{"show --count many", 2, "many"},
		{"show x --count", 2, "--count needs a value; see p show --help"},
		{"show --own --count 1", 2, "--own needs a value; see p show --help"},
		{"show --own --strange", 0, ""},
		{"show --own x --count 1 --own=y", 2, "p: --own is there twice, with two values: give it once"},
		{"show --own x --own x --name a --name b --json --json", 0, ""},
		{"show x", 2, "takes no arguments"},
		{"show --common x --switch --json", 0, ""}, {"list --common=x x --common x", 0, ""},
		{"--switch ends failed --json --common x", 1, "p: failed"},
		{"completion --common x bash", 2, "no flag --common"},
		{"completion tcsh", 2, "bash, zsh and fish"},
		{"show --config none.yaml", 2, "none.yaml: the configuration cannot be read"},
	} {
		code, _, stderr := run(t, strings.Fields(c.args)...)
		if code != c.code || !strings.Contains(stderr, c.want) || (c.want == "") != (stderr == "") {
			t.Errorf("p %s: exit code %d, want %d; %q, want %q", c.args, code, c.code, stderr, c.want)
		}
	}
}

// A list that fails before its first item is a command that fails; one that breaks off has no end.
func TestListThatFails(t *testing.T) {
	for args, want := range map[string]string{
		"": `{"items": [ ]}`, "x x": `{"items": [ 0, 1 ]}`, "fails": `{"error":"gone","ok":false}`,
		"x fails": `{"items": [ 0`,
	} {
		code, stdout, _ := run(t, append([]string{"list", "--json"}, strings.Fields(args)...)...)
		got, fails := strings.Join(strings.Fields(stdout), " "), strings.Contains(args, "fails")
		if got != want || (code == 0) == fails {
			t.Errorf("%q: exit code %d, %s, want %s", args, code, got, want)
		}
	}
}

// late prints a result, or a list of items, and fails after that.
func late(c *cli.Context) error {
	err := errors.New("unsigned <&>")
	if n := c.Int("items"); n >= 0 {
		return errors.Join(PrintList(c, `"items"`, func(yield func(int, error) bool) {
			for i := 0; i < n && yield(i, nil); i++ {
			}
		}), err)
	}
	if c.Bool("said") {
		err = Said(err)
	}
	return errors.Join(Printf(c, map[string]any{"made": uint64(1<<63 + 1), "ok": true}, "made\n"), err)
}

// A command that fails after its result prints one document, with the result and the error. The result is what a script
// needs: the change was made.
func TestFailsAfterResult(t *testing.T) {
	for args, want := range map[string]string{
		"":                 "made\n",
		"--json":           `{"error":"unsigned \u003c\u0026\u003e","made":9223372036854775809,"ok":false}` + "\n",
		"--json --said":    "{\n  \"made\": 9223372036854775809,\n  \"ok\": true\n}\n",
		"--json --items=0": `{"error":"unsigned \u003c\u0026\u003e","items":[],"ok":false}` + "\n",
		"--json --items=2": "{\"items\": [\n0,\n1",
	} {
		code, stdout, stderr := run(t, append([]string{"ends", "late"}, strings.Fields(args)...)...)
		if code != 1 || stdout != want || stderr != "p: unsigned <&>\n" {
			t.Errorf("%s: exit code %d, %q, want %q; %q", args, code, stdout, want, stderr)
		}
	}
}

// A command that cannot print its result has failed, also where a result is a text that nobody checks.
func TestOutputNotWhole(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	for _, args := range []string{"text", "text --json"} {
		var errs strings.Builder
		p := Program{App: &cli.App{Name: "p", Writer: full, ErrWriter: &errs, Commands: []*cli.Command{{
			Name: "text", Flags: []cli.Flag{JSON},
			Action: func(c *cli.Context) error { return Printf(c, "x", "x\n") },
		}}}}
		code := p.Run(context.Background(), append([]string{"p"}, strings.Fields(args)...))
		if code != 1 || strings.Count(errs.String(), "the output is not whole") != 1 {
			t.Errorf("p %s: exit code %d, %s", args, code, &errs)
		}
	}
}

// An error is in the document that --json asks for, also of a command that prints none.
func TestErrorAsJSON(t *testing.T) {
	for _, args := range []string{"ends failed --json", "ends failed --json=true", "--json ends failed"} {
		if _, stdout, _ := run(t, strings.Fields(args)...); stdout != `{"error":"failed","ok":false}`+"\n" {
			t.Errorf("p %s: %s", args, stdout)
		}
	}
}

// A flag that a command ignores is in no list of its flags.
func TestCommonFlagsAreHidden(t *testing.T) {
	for _, args := range [][]string{{"man"}, {"--complete", "list", "-"}} {
		if _, stdout, _ := run(t, args...); strings.Contains(stdout, "common") || !strings.Contains(stdout, "json") {
			t.Errorf("p %s: %s", args, stdout)
		}
	}
}

// A paragraph is filled, whatever the lines of the source are. Lists and examples stay as they are. A flag without a
// default says nothing of one.
func TestHelpIsFilled(t *testing.T) {
	_, help, _ := run(t, "show", "--help")
	if !strings.Contains(help, "   One two.\n\n   first   1\n   second  2\n     an example\n") ||
		strings.Contains(help, "--common") || strings.Contains(help, "default: 0") ||
		strings.Contains(help, "default: false") ||
		!strings.Contains(help, `(default: "var")`) {
		t.Error(help)
	}
}

// Flags go before the environment, which goes before the file; a relative path in the file is relative to the file.
func TestConfiguration(t *testing.T) {
	dir, here := t.TempDir(), t.TempDir()
	t.Chdir(here)
	show := func(args ...string) string {
		t.Helper()
		code, stdout, stderr := run(t, append([]string{"show"}, args...)...)
		if code != 0 {
			t.Fatal(stderr)
		}
		return strings.TrimSpace(stdout)
	}
	write := func(path, text string) string {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	is := func(got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	is(show(), `["","var",null,0,""]`)
	file := write(filepath.Join(dir, "p.yaml"), "token: file\nstate: s\nnames: [a, 'b,c']\ncount: 7\n")
	is(show("--config", file), `["file","`+dir+`/s",["a","b,c"],7,""]`)
	is(show("--config", file, "--count", "0", "--own", "x", "--name", "z"), `["file","`+dir+`/s",["z"],0,"x"]`)
	t.Setenv("KMEHSM_TEST_SETTING", "environment")
	is(show("--config", file), `["environment","`+dir+`/s",["a","b,c"],7,""]`)
	is(show("--config", file, "--token", "flag", "--state", "."), `["flag",".",["a","b,c"],7,""]`)
	t.Setenv("KMEHSM_TEST_SETTING", "")
	is(show("--config", file), `["file","`+dir+`/s",["a","b,c"],7,""]`)
	write("p.yaml", "count: 9\n") // which nobody names
	is(show(), `["","var",null,9,""]`)
	write("p.yaml", "cuont: 9\nstate: [x]\n")
	code, _, stderr := run(t, "show")
	if code != 2 ||
		!strings.Contains(stderr, "p.yaml: line 1: cuont: there is no such setting: did you mean count?") ||
		!strings.Contains(stderr, "p.yaml: line 2: state: must be a text") {
		t.Errorf("a wrong file: %d, %s", code, stderr)
	}
	// A configuration of others is used only where it is named.
	write("p.yaml", "count: 9\n")
	if err := os.Chmod("p.yaml", 0o666); err != nil {
		t.Fatal(err)
	}
	code, _, stderr = run(t, "show")
	if code != 2 || !strings.Contains(stderr, "name it with --config p.yaml") {
		t.Errorf("a file that all may write: %d, %s", code, stderr)
	}
	is(show("--config", "p.yaml"), `["","var",null,9,""]`)
}
