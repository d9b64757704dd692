package cmdline

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/internal/usage"
)

// helpCommand shows what --help shows.
func (p Program) helpCommand() *cli.Command {
	return &cli.Command{
		Name: "help", Usage: "show the help of a command, as --help does", ArgsUsage: "[COMMAND...]",
		Action: func(c *cli.Context) error {
			words, name, commands := c.Args().Slice(), "", p.Commands
			for _, word := range words {
				at := slices.IndexFunc(commands, func(c *cli.Command) bool { return c.HasName(word) })
				if at < 0 {
					return noCommand(p.Name, name, word, commands)
				}
				name, commands = cmp.Or(name, p.Name)+" "+word, commands[at].Subcommands
			}
			if len(words) == 0 {
				return cli.ShowAppHelp(c)
			}
			return p.RunContext(c.Context, slices.Concat([]string{os.Args[0]}, words, []string{"--help"}))
		},
	}
}

// completionArg asks for the completions of the words after it. It is for the scripts below.
const completionArg = "--complete"

// complete prints what the last word may become, a line each, with what it is for after a tab. It prints nothing where
// a file may stand.
func (p Program) complete(words []string) {
	last := words[len(words)-1]
	var command *cli.Command
	commands := p.Commands
	valueOf := ""
	for _, word := range words[:len(words)-1] {
		if strings.HasPrefix(word, "-") {
			valueOf = strings.TrimLeft(word, "-")
			continue
		}
		valueOf = ""
		if at := slices.IndexFunc(commands, func(c *cli.Command) bool { return c.HasName(word) }); at >= 0 {
			command, commands = commands[at], commands[at].Subcommands
		}
	}
	var flags []cli.Flag
	if command != nil && len(commands) == 0 {
		flags = command.Flags
	}
	offer := func(name, usage string) {
		if strings.HasPrefix(name, last) {
			fmt.Fprintf(p.Writer, "%s\t%s\n", name, strings.ReplaceAll(usage, "`", ""))
		}
	}
	for _, f := range flags {
		if _, isBool := f.(*cli.BoolFlag); slices.Contains(f.Names(), valueOf) && !isBool {
			return
		}
	}
	if strings.HasPrefix(last, "-") {
		for _, f := range flags {
			if v, ok := f.(cli.VisibleFlag); ok && v.IsVisible() {
				offer("--"+f.Names()[0], usageOf(f))
			}
		}
		offer("--help", "show help")
		return
	}
	for _, c := range commands {
		if !c.Hidden {
			offer(c.Name, c.Usage)
		}
	}
	if command != nil && command.Name == "completion" {
		for _, shell := range shells {
			offer(shell.name, "")
		}
	}
}

func usageOf(f cli.Flag) string {
	if d, ok := f.(cli.DocGenerationFlag); ok {
		return d.GetUsage()
	}
	return ""
}

// shells are those that there are completions for, and what they read. %[1]s is the program.
var shells = []struct{ name, where, script string }{
	{name: "bash", where: "/usr/share/bash-completion/completions/%s", script: `_%[1]s() {
	local IFS=$'\n'
	COMPREPLY=($(%[1]s --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null | cut -f 1))
}
complete -o default -F _%[1]s %[1]s
`},
	{name: "zsh", where: "/usr/share/zsh/vendor-completions/_%s", script: `#compdef %[1]s
_%[1]s() {
	local -a found
	found=("${(@f)$(%[1]s --complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
	found=("${(@)found/$'\t'/:}")
	if [[ -n $found[1] ]]; then
		_describe %[1]s found
	else
		_files
	fi
}
if [[ $funcstack[1] == _%[1]s ]]; then
	_%[1]s "$@"
else
	compdef _%[1]s %[1]s
fi
`},
	{name: "fish", where: "/usr/share/fish/vendor_completions.d/%s.fish",
		script: `complete -c %[1]s -a '(%[1]s --complete (commandline -opc)[2..] "$(commandline -ct)" 2>/dev/null)'
`},
}

func (p Program) completionCommand() *cli.Command {
	var where strings.Builder
	for _, s := range shells {
		fmt.Fprintf(&where, "\n    %-4s  "+s.where, s.name, p.Name)
	}
	return &cli.Command{
		Name: "completion", Usage: "print what a shell needs to complete commands and flags", ArgsUsage: "SHELL",
		Description: "SHELL is bash, zsh or fish. For all users, put it into" + where.String(),
		Action: func(c *cli.Context) error {
			var names []string
			for _, s := range shells {
				if s.name == c.Args().First() {
					_, err := fmt.Fprintf(c.App.Writer, s.script, p.Name)
					return err
				}
				names = append(names, s.name)
			}
			return usage.Errorf("there is no completion for %q%s: there is for bash, zsh and fish", c.Args().First(),
				meant("", c.Args().First(), names))
		},
	}
}

func (p Program) manCommand() *cli.Command {
	return &cli.Command{
		Name: "man", Usage: "print the manual page, for man -l -",
		Action: func(c *cli.Context) error {
			_, err := io.WriteString(c.App.Writer, p.man())
			return err
		},
	}
}
