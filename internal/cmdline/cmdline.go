// Package cmdline is what the commands have in common: flags, output, exit codes and signals.
package cmdline

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/terminal"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/internal/version"
)

// Exit codes.
const (
	exitFailed  = 1
	exitUsage   = 2
	exitPartial = 3 // part of it is done; the same command again goes on
)

type exitError struct {
	error
	code int
}

func (e exitError) Unwrap() error { return e.error }

// Partial marks err as one that left part of the work done.
func Partial(err error) error { return exitError{error: err, code: exitPartial} }

// Said marks an err that the result in the command's JSON document says already.
func Said(err error) error { return exitError{error: saidError{error: err}, code: exitFailed} }

type saidError struct{ error }

func (e saidError) Unwrap() error { return e.error }

// Common flags.
var (
	Token = &cli.StringFlag{Name: "token", EnvVars: []string{"KMEHSM_TOKEN"}, Category: Configured,
		Usage: "the token, as an RFC 7512 `URI` with module-path and pin-source"}
	JSON = &cli.BoolFlag{Name: "json", Usage: "print one JSON document on standard output"}
)

// A Program is a command line, and what the library has no place for.
type Program struct {
	*cli.App
	Examples map[string]string // of each command that does something: lines to type, by its name
	Config   *Config           // nil if the program has no configuration
	Common   []cli.Flag        // a script may give these to each command: one that has no use for them ignores them
}

// Main runs a program's command line and exits.
func Main(p Program) {
	// A core would have PINs, and all that a software token keeps in this process. Nobody is refused a lower limit.
	syscall.Setrlimit(syscall.RLIMIT_CORE, &syscall.Rlimit{})
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	os.Exit(p.Run(ctx, os.Args))
}

// Outlast is for services: whoever reads the log may end first, and the service goes on without it. (Other commands end
// when nobody reads their output any more.)
func Outlast() { signal.Ignore(syscall.SIGPIPE) }

// Run runs a command line and gives the exit code.
func (p Program) Run(ctx context.Context, args []string) int {
	app := p.App
	p.addCommon(app.Commands)
	app.Commands = append(app.Commands, p.helpCommand(), p.completionCommand(), p.manCommand())
	out := &output{Writer: app.Writer}
	app.Metadata = map[string]any{outputKey: out}
	if !terminal.Is(out.Writer) { // a terminal takes all
		app.Writer = out
	}
	app.ErrWriter = onScreen(app.ErrWriter)
	if s, ok := app.ErrWriter.(*screen); ok {
		context.AfterFunc(ctx, s.end)
	}
	app.ExitErrHandler = func(*cli.Context, error) {} // errors are printed below, once
	app.HideHelpCommand = true
	app.Flags = append(app.Flags, cli.HelpFlag) // the library has none beside a command of that name
	app.Version = version.Text()
	p.prepare(app.Name, app.Commands)
	app.OnUsageError = onUsageError
	app.Action = unknown("", app.Commands, cli.ShowAppHelp)
	if len(args) > 2 && args[1] == completionArg {
		p.complete(args[2:])
		return 0
	}
	args, err := flagsFirst(app, args)
	if err == nil {
		err = app.RunContext(ctx, args)
	}
	if err == nil {
		out.end()
		err = out.err
	}
	if err == nil {
		return 0
	}
	text := err.Error()
	if ctx.Err() != nil { // by a signal
		text = strings.ReplaceAll(text, context.Canceled.Error(), "interrupted")
	}
	text = strings.Join(slices.Compact(strings.Split(text, "\n")), "\n") // of several who were interrupted
	if errors.Is(err, fs.ErrPermission) {
		text += ": this user may not; run it as the one whose file that is"
	}
	if about, ok := errors.AsType[usage.About](err); ok {
		text = "--" + about.Setting + ": " + text
	}
	if errors.Is(err, syscall.ENOSPC) && !strings.Contains(text, "room") {
		text += ": make room on its disk, and run this again"
	}
	fmt.Fprintf(app.ErrWriter, "%s: %s\n", app.Name, visible(text))
	asked := slices.Contains(args, "--json") || slices.Contains(args, "--json=true")
	if asked && out.err == nil {
		if !errors.As(err, new(saidError)) {
			out.failed(text)
		}
		out.end()
	}
	return exitCode(err)
}

func exitCode(err error) int {
	if e, ok := errors.AsType[exitError](err); ok {
		return e.code
	}
	if _, ok := errors.AsType[usage.Error](err); ok {
		return exitUsage
	}
	return exitFailed
}

// The library's help is as wide as its texts.
func init() {
	cli.HelpPrinter = func(w io.Writer, template string, data any) {
		var text strings.Builder
		cli.HelpPrinterCustom(&text, template, data, nil)
		for line := range strings.Lines(text.String()) {
			io.WriteString(w, fold(line))
		}
	}
	stringer := cli.FlagStringer
	cli.FlagStringer = func(f cli.Flag) string { return zeroDefault.ReplaceAllString(stringer(f), "") }
}

// zeroDefault matches the library's text for a flag without a default.
var zeroDefault = regexp.MustCompile(` ?\(default: (0|0s|false)\)`)

// joined is a text with each paragraph on one line, which fold breaks where the help ends. Lines of examples, and lists
// of two columns, stay as they are.
func joined(text string) string {
	var b strings.Builder
	prose := false
	for line := range strings.SplitSeq(text, "\n") {
		was := prose
		prose = line != "" && !strings.Contains(line, "  ")
		switch {
		case prose && was:
			b.WriteByte(' ')
		case b.Len() > 0:
			b.WriteByte('\n')
		}
		b.WriteString(line)
	}
	return b.String()
}

// column is what stands left of a flag's or a command's usage, or of a text.
var column = regexp.MustCompile(`^ *(\S+( \S+)*  +)?`)

// fold breaks a line of help at 120 columns, and indents the rest like the usage.
func fold(line string) (folded string) {
	const width = 120
	indent := len(column.FindString(line))
	for len(line) > width+1 { // with its end
		at := strings.LastIndexByte(line[:width+1], ' ')
		if at <= indent {
			break
		}
		folded += line[:at] + "\n"
		line = strings.Repeat(" ", indent) + line[at+1:]
	}
	return folded + line
}

func onUsageError(c *cli.Context, err error, _ bool) error {
	if flag, ok := strings.CutPrefix(err.Error(), "flag provided but not defined: -"); ok {
		flag, _, _ = strings.Cut(strings.TrimLeft(flag, "-"), "=")
		err = fmt.Errorf("there is no flag --%s%s; see %s --help", flag,
			meant("--", flag, flagNames(c.Command)), c.Command.HelpName)
	} else if flag, ok := strings.CutPrefix(err.Error(), "flag needs an argument: -"); ok {
		err = fmt.Errorf("--%s needs a value; see %s --help", strings.TrimLeft(flag, "-"), c.Command.HelpName)
	} else if m := badValue.FindStringSubmatch(err.Error()); m != nil {
		value, flag, why := m[1], m[2], m[3]
		if why == "parse error" || why == "value out of range" {
			why = "it takes " + kinds(c.Command, flag)
		}
		err = fmt.Errorf("--%s cannot be %s: %s", flag, value, why)
	}
	return usage.Mark(err)
}

// badValue matches package flag's error about a value. Its "parse error" does not say what can be parsed.
var badValue = regexp.MustCompile(`^invalid (?:boolean )?value (".*") for (?:flag )?-([^ :]+): (.*)$`)

// kinds says what values a flag takes.
func kinds(c *cli.Command, name string) string {
	for _, f := range c.Flags {
		if slices.Contains(f.Names(), name) {
			switch f.(type) {
			case *cli.DurationFlag:
				return "a time with its unit, such as 30s, 5m or 24h"
			case *cli.IntFlag:
				return "a whole number"
			case *cli.BoolFlag:
				return "true or false"
			}
		}
	}
	return "a number"
}

// meant suggests a name for one that does not exist.
func meant(prefix, name string, candidates []string) string {
	if near := config.Nearest(name, candidates); near != "" {
		return " (did you mean " + prefix + near + "?)"
	}
	return ""
}

// flagNames gives the names of a command's flags.
func flagNames(c *cli.Command) (names []string) {
	for _, f := range c.Flags {
		names = append(names, f.Names()...)
	}
	return names
}

// commandNames gives the names of commands.
func commandNames(commands []*cli.Command) (names []string) {
	for _, c := range commands {
		if !c.Hidden {
			names = append(names, c.Name)
		}
	}
	return names
}

// unknown is the action of a command that only has subcommands: it lists them, and refuses any other word.
func unknown(name string, commands []*cli.Command, help cli.ActionFunc) cli.ActionFunc {
	return func(c *cli.Context) error {
		if c.Args().Present() {
			return noCommand(c.App.Name, name, c.Args().First(), commands)
		}
		return help(c)
	}
}

// noCommand is the error of a word that is no command below name, which is empty at the top.
func noCommand(program, name, word string, commands []*cli.Command) error {
	parent := ""
	if name != "" {
		parent, program = name+" ", name
	}
	return usage.Errorf("there is no command %q%s; see %s --help", parent+word,
		meant(parent, word, commandNames(commands)), program)
}

// prepare gives every command the parts that are common to all.
func (p Program) prepare(parent string, commands []*cli.Command) {
	for _, c := range commands {
		name := parent + " " + c.Name
		c.OnUsageError = onUsageError
		c.HideHelpCommand = true
		c.Description = joined(c.Description)
		if len(c.Subcommands) > 0 {
			p.prepare(name, c.Subcommands)
			c.Action = unknown(name, c.Subcommands, cli.ShowSubcommandHelp)
			continue
		}
		if p.Config != nil {
			p.Config.prepare(c)
		}
		if text := p.Examples[name]; text != "" {
			c.Description = strings.TrimLeft(c.Description+"\n\nFor example:\n"+indent(text), "\n")
		}
		action, want := c.Action, strings.Fields(c.ArgsUsage)
		least := len(want)
		for least > 0 && want[least-1][0] == '[' { // optional
			least--
		}
		any := least < len(want) && strings.HasSuffix(want[len(want)-1], "...]") // as many as one likes
		c.Action = func(c *cli.Context) error {
			if c.NArg() < least || c.NArg() > len(want) && !any {
				return usage.Errorf("%s takes %s; see %s --help", name,
					cmp.Or(strings.Join(want, " "), "no arguments, only flags"), name)
			}
			return action(c)
		}
	}
}

// addCommon adds the common flags that a command does not have. They are in no help.
func (p Program) addCommon(commands []*cli.Command) {
	for _, c := range commands {
		p.addCommon(c.Subcommands)
		have := flagNames(c)
		c.Flags = slices.Clone(c.Flags)
		for _, f := range p.Common {
			name := f.Names()[0]
			if _, isBool := f.(*cli.BoolFlag); slices.Contains(have, name) {
				continue
			} else if isBool {
				c.Flags = append(c.Flags, &cli.BoolFlag{Name: name, Hidden: true})
			} else {
				c.Flags = append(c.Flags, &cli.StringFlag{Name: name, Hidden: true})
			}
		}
	}
}

// indent indents lines of examples.
func indent(text string) string {
	return "    " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n    ")
}

// Require fails if one of these flags is missing.
func Require(c *cli.Context, flags ...string) error {
	for _, f := range flags {
		if !c.IsSet(f) || c.String(f) == "" {
			return usage.Errorf("--%s is missing; see %s --help", f, c.Command.HelpName)
		}
	}
	return nil
}

// Requiring adds Require to an action.
func Requiring(action cli.ActionFunc, flags ...string) cli.ActionFunc {
	return func(c *cli.Context) error {
		if err := Require(c, flags...); err != nil {
			return err
		}
		return action(c)
	}
}

// flagsFirst moves flags before the arguments of their command. Our commands read better as "lot create NAME --tac
// ...", but package flag stops at the first argument. It fails if a flag has two values, of which package flag would
// forget the first.
func flagsFirst(app *cli.App, args []string) ([]string, error) {
	takesValue, isList := map[string]bool{}, map[string]bool{}
	var collect func([]*cli.Command)
	collect = func(commands []*cli.Command) {
		for _, c := range commands {
			for _, f := range c.Flags {
				_, isBool := f.(*cli.BoolFlag)
				_, list := f.(*cli.StringSliceFlag)
				if !list {
					_, list = f.(*cli.GenericFlag) // whose value knows what may be there twice
				}
				for _, n := range f.Names() {
					takesValue[n], isList[n] = !isBool, isList[n] || list
				}
			}
			collect(c.Subcommands)
		}
	}
	collect(app.Commands)
	isFlag := func(word string) bool {
		name, long := strings.CutPrefix(word, "--")
		_, known := takesValue[name]
		return long && known
	}

	var words, flags, rest []string
	values := map[string]string{}
	commands := app.Commands
	for i := 1; i < len(args); i++ {
		a := args[i]
		if a == "--" {
			rest = append(rest, args[i:]...)
			break
		}
		if thumbprint.MatchString(a) {
			rest = append(rest, a)
			continue
		}
		if name, value, _ := strings.Cut(strings.TrimLeft(a, "-"), "="); len(a) > 1 && a[0] == '-' {
			if (a == "--help" || a == "-h") && !slices.Equal(words, []string{"help"}) { // whose arguments count
				return slices.Concat(args[:1], words, []string{a}), nil // whatever else is there
			}
			flags = append(flags, a)
			if takesValue[name] && !strings.Contains(a, "=") {
				if i++; i == len(args) || isFlag(args[i]) {
					return slices.Concat(args[:1], words, []string{a}), nil // what misses its value
				}
				value = args[i]
				flags = append(flags, value)
			}
			if first, twice := values[name]; twice && first != value && takesValue[name] && !isList[name] {
				return args, usage.Errorf("--%s is there twice, with two values: give it once", name)
			}
			values[name] = value
			continue
		}
		at := slices.IndexFunc(commands, func(c *cli.Command) bool { return c.HasName(a) })
		if at < 0 {
			if len(commands) > 0 { // it is in a command's place: that it is none matters before its flags
				words = append(words, a)
			} else {
				rest = append(rest, a)
			}
			commands = nil
			continue
		}
		commands = commands[at].Subcommands
		words = append(words, a)
	}
	if len(rest) > 0 && thumbprint.MatchString(rest[0]) {
		rest = append([]string{"--"}, rest...)
	}
	return slices.Concat(args[:1], words, flags, rest), nil
}

// thumbprint is one of RFC 7638 that looks like a flag: base64url has the minus sign, and one of 64 begins with it.
var thumbprint = regexp.MustCompile(`^-[A-Za-z0-9_-]{42}$`)
