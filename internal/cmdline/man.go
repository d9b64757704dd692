package cmdline

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// man is the manual page, in man(7).
func (p Program) man() string {
	var page strings.Builder
	version, _, _ := strings.Cut(p.Version, ",")
	fmt.Fprintf(&page, ".TH %s 1 \"\" \"kmehsm %s\" \"kmehsm\"\n", strings.ToUpper(p.Name), roff(version))
	page.WriteString(".ad l\n.nh\n") // paths and flags are long words
	fmt.Fprintf(&page, ".SH NAME\n%s \\- %s\n.SH SYNOPSIS\n.B %[1]s\n.I COMMAND\n[\\fIFLAGS\\fR] [\\fIARGUMENTS\\fR]\n",
		p.Name, roff(p.Usage))
	page.WriteString(".SH DESCRIPTION\n" + roffText(p.Description) + ".SH COMMANDS\n")
	env := map[string]string{}
	p.manCommands(&page, p.Name, p.Commands, env)
	if len(env) > 0 {
		page.WriteString(".SH ENVIRONMENT\n")
		for _, name := range slices.Sorted(maps.Keys(env)) {
			fmt.Fprintf(&page, ".TP\n.B %s\nas %s\n", name, roff("--"+env[name]))
		}
	}
	if p.Config != nil {
		fmt.Fprintf(&page, ".SH FILES\n.TP\n.I /etc/kmehsm/%s.yaml\nthe configuration, unless %s names another; "+
			"else it is %[1]s.yaml in the working folder\n", p.Name, roff("--config"))
	}
	return page.String()
}

// manCommands describes the commands that have an action, and notes the environment variables that they read.
func (p Program) manCommands(page *strings.Builder, parent string, commands []*cli.Command, env map[string]string) {
	for _, c := range commands {
		name := parent + " " + c.Name
		if len(c.Subcommands) > 0 {
			p.manCommands(page, name, c.Subcommands, env)
			continue
		}
		fmt.Fprintf(page, ".SS %s\n%s.\n", roff(strings.TrimSpace(name+" "+c.ArgsUsage)), roff(c.Usage))
		if c.Description != "" {
			page.WriteString(".PP\n" + roffText(c.Description))
		}
		for _, f := range c.VisibleFlags() {
			d, ok := f.(cli.DocGenerationFlag)
			if !ok || f.Names()[0] == "help" {
				continue
			}
			value := ""
			if d.TakesValue() {
				_, value, _ = strings.Cut(d.GetUsage(), "`")
				value, _, _ = strings.Cut(value, "`")
				value = " \\fI" + roff(cmp.Or(value, "VALUE")) + "\\fR"
			}
			usage := strings.ReplaceAll(d.GetUsage(), "`", "")
			if def := d.GetDefaultText(); def != "" && def != `""` && d.TakesValue() {
				usage += zeroDefault.ReplaceAllString(" (default: "+def+")", "")
			}
			fmt.Fprintf(page, ".TP\n\\fB%s\\fR%s\n%s\n", roff("--"+f.Names()[0]), value, roff(usage))
			for _, v := range d.GetEnvVars() {
				env[v] = f.Names()[0]
			}
		}
	}
}

// roffText is text whose indented lines, and lists of two columns, stay as they are.
func roffText(text string) string {
	var b strings.Builder
	verbatim := false
	for line := range strings.SplitSeq(strings.TrimRight(text, "\n"), "\n") {
		if as := strings.Contains(line, "  "); as != verbatim {
			verbatim = as
			b.WriteString(map[bool]string{true: ".PP\n.nf\n", false: ".fi\n.PP\n"}[as])
		}
		if line == "" {
			line = ".PP"
		} else {
			line = roff(line)
		}
		b.WriteString(line + "\n")
	}
	if verbatim {
		b.WriteString(".fi\n")
	}
	return b.String()
}

// roff escapes a text for a line of man(7).
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(text)
	if strings.HasPrefix(text, ".") || strings.HasPrefix(text, "'") {
		text = `\&` + text
	}
	return text
}
