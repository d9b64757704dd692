package cmdline

import (
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

func TestFlagsFirst(t *testing.T) {
	app := &cli.App{Commands: []*cli.Command{{Name: "lot", Subcommands: []*cli.Command{{
		Name: "create", Flags: []cli.Flag{&cli.StringFlag{Name: "tac", Aliases: []string{"t"}},
			&cli.BoolFlag{Name: "json"}, &cli.IntFlag{Name: "first"}},
	}}}}}
	ordered := func(args []string) []string {
		t.Helper()
		args, err := flagsFirst(app, args)
		if err != nil {
			t.Error(err)
		}
		return args
	}
	for in, want := range map[string]string{
		"p lot create L1 --tac 1":        "p lot create --tac 1 L1",
		"p lot create --tac 1 L1":        "p lot create --tac 1 L1",
		"p --tac 1 lot create L1":        "p lot create --tac 1 L1",
		"p lot --json create L1":         "p lot create --json L1",
		"p lot create --json L1 --tac=1": "p lot create --json --tac=1 L1",
		"p lot create L1 -t 1":           "p lot create -t 1 L1",
		"p lot create L1 --first -1":     "p lot create --first -1 L1",
		"p lot create L1 --tac":          "p lot create --tac", // whose value is missing
		"p lot create L1 --tac --json":   "p lot create --tac",
		"p lot create L1 --none x":       "p lot create --none L1 x",
		"p lot create create":            "p lot create create",
		"p lot create --json -- --tac 1": "p lot create --json -- --tac 1",
		"p lot create L1 -":              "p lot create L1 -",
		"p":                              "p",
	} {
		if got := strings.Join(ordered(strings.Fields(in)), " "); got != want {
			t.Errorf("%q became %q, want %q", in, got, want)
		}
	}
	const minus = "-euMzHXk2vYzjqEoIb7y1gTn4yqGxqUq0v9k1mQvWc0"
	if got := ordered([]string{"p", "lot", "create", minus, "--tac", "1"}); !slices.Equal(got,
		[]string{"p", "lot", "create", "--tac", "1", "--", minus}) {
		t.Errorf("a thumbprint that begins with a minus sign: %q", got)
	}
	if got := ordered([]string{"p", "lot", "create", ""}); !slices.Equal(got,
		[]string{"p", "lot", "create", ""}) {
		t.Errorf("an empty argument became %q", got)
	}
}
