package cmdline

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/usage"
)

// Configured is the category of the flags that a program's configuration has settings for.
const Configured = "Settings, which the configuration may have too"

const configFlag = "config"

// A Config is how a program reads its configuration.
type Config struct {
	Program string
	// Defaults gives the settings of a file, as a struct for [config.Schema], and what is wrong with them.
	Defaults func(path string) (any, *config.Report)
}

// Flag is --config.
func (p *Config) Flag() cli.Flag {
	return &cli.StringFlag{Name: configFlag, Usage: fmt.Sprintf(
		"the configuration, a YAML `FILE` (default: /etc/kmehsm/%s.yaml, else %[1]s.yaml in this folder)", p.Program)}
}

// prepare gives --config to a command that has settings for flags. One that has it already reads it itself.
func (p *Config) prepare(c *cli.Command) {
	configured := slices.ContainsFunc(c.Flags, isConfigured)
	if configured && !slices.Contains(flagNames(c), configFlag) {
		c.Flags = append(slices.Clone(c.Flags), p.Flag())
		before := c.Action
		c.Action = func(c *cli.Context) error {
			if err := p.fill(c); err != nil {
				return usage.Mark(err)
			}
			return before(c)
		}
	}
}

func isConfigured(f cli.Flag) bool {
	categorised, ok := f.(cli.CategorizableFlag)
	return ok && categorised.GetCategory() == Configured
}

// isSet says whether the command line or the environment gives a flag a value.
func isSet(c *cli.Context, name string) bool { return c.IsSet(name) && fmt.Sprint(c.Value(name)) != "" }

// Typed says whether the command line itself gives a flag a value.
func Typed(name string) bool {
	return slices.ContainsFunc(os.Args, func(word string) bool {
		flag, dash := strings.CutPrefix(word, "-")
		flag, _, _ = strings.Cut(strings.TrimPrefix(flag, "-"), "=")
		return dash && flag == name
	})
}

// fill sets the flags that neither the command line nor the environment has set.
func (p *Config) fill(c *cli.Context) error {
	path, err := p.Find(c)
	if path == "" || err != nil {
		return err
	}
	settings, report := p.Defaults(path)
	if err := report.Err(); err != nil {
		return err
	}
	values := config.Values(settings)
	for _, f := range c.Command.Flags {
		name := f.Names()[0]
		if !isConfigured(f) || isSet(c, name) {
			continue
		}
		for _, v := range values[name] {
			if err := c.Set(name, v); err != nil {
				return fmt.Errorf("%s: %s: %w", path, name, err)
			}
		}
	}
	return nil
}

// Find gives the path of the configuration; empty if there is none.
func (p *Config) Find(c *cli.Context) (string, error) {
	return config.Find(p.Program, c.String(configFlag))
}

// Require is Find for commands that cannot work without a configuration. The help of command documents it.
func (p *Config) Require(c *cli.Context, command string) (string, error) {
	path, err := p.Find(c)
	if err == nil && path == "" {
		err = fmt.Errorf("there is no configuration: name one with --config FILE, or put it at /etc/kmehsm/%s.yaml; "+
			"%s --help shows what it has", p.Program, command)
	}
	if err != nil {
		return "", usage.Mark(err)
	}
	return path, nil
}

// Given are the settings that the command line or the environment has.
func Given(c *cli.Context) config.Given {
	given := config.Given{}
	for _, f := range c.Command.Flags {
		name := f.Names()[0]
		if !isConfigured(f) || !isSet(c, name) {
			continue
		}
		if list := c.StringSlice(name); list != nil {
			given[name] = list
		} else {
			given[name] = []string{fmt.Sprint(c.Value(name))}
		}
	}
	return given
}

// PrintReport prints what is wrong with a configuration, and fails if it cannot be used.
func PrintReport(c *cli.Context, r *config.Report) error {
	problems, wrong := r.Problems(), 0
	for _, p := range problems {
		if !p.Warning {
			wrong++
		}
	}
	result := map[string]any{"config": r.Path, "ok": wrong == 0, "problems": append([]config.Problem{}, problems...)}
	err := Print(c, result, func(w io.Writer) {
		for _, p := range problems {
			mark := "WRONG  "
			if p.Warning {
				mark = "warning"
			}
			fmt.Fprintf(w, "%s  %s\n", mark, p)
		}
		if wrong == 0 {
			fmt.Fprintf(w, "%s can be used\n", cmp.Or(r.Path, "the configuration"))
		}
	})
	if err == nil && wrong > 0 {
		problems := "problems"
		if wrong == 1 {
			problems = "problem"
		}
		err = fmt.Errorf("%s has %d %s", cmp.Or(r.Path, "the configuration"), wrong, problems)
		err = exitError{error: saidError{error: err}, code: exitUsage}
	}
	return err
}
