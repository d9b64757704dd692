package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/custody"
)

func minutesCommand() *cli.Command {
	return &cli.Command{
		Name: "minutes", Usage: "the minutes of what was done with the security officer's PIN, in the folder minutes of the --state folder",
		Subcommands: []*cli.Command{{
			Name: "verify", Usage: "check the token's signature on minutes, and print them", ArgsUsage: "FILE",
			Flags: []cli.Flag{manufacturerFlag, stateFlag, cmdline.JSON}, Action: minutesVerify,
		}},
	}
}

// ceremony holds one, and gives the path of its minutes.
func ceremony(c *cli.Context, name string, basis custody.Basis, f func(token string, pin hsmkeys.OfficerPIN) (made map[string]string, err error)) (minutes string, err error) {
	officer := custody.Officer{Source: c.String("so-pin-source"), Shares: c.StringSlice("so-share")}
	if officer.Source != "" && len(officer.Shares) > 0 {
		return "", cmdline.Usagef("--so-pin-source and --so-share: the PIN comes from one of them")
	}
	if cmdline.Terminal(os.Stdin) {
		officer.Ask = func(q *custody.Quorum) error { return q.Ask(c.Context, os.Stdin, c.App.ErrWriter) }
	}
	for _, name := range c.StringSlice("present") { // minutes are printed, a fact a line
		if strings.TrimSpace(name) == "" || strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }) {
			return "", cmdline.Usagef("--present %q is no name: give each in one line of text", name)
		}
	}
	minutes, err = factory.Ceremony{
		Name: name, Command: calledAs(), State: state(c), TokenURI: c.String("token"), Officer: officer, Basis: basis,
		Present: c.StringSlice("present"),
	}.Hold(c.Context, f)
	switch {
	case errors.Is(err, custody.ErrNoOfficerPIN):
		err = cmdline.Usage(err)
	case errors.Is(err, factory.ErrNoMinutes), errors.Is(err, hsmkeys.ErrPINMaybeSet):
		err = cmdline.Partial(err)
	}
	return minutes, err
}

// enrolled adds to what an enrolment has made its file, and whether its key was made now.
func enrolled(file []byte, created bool, made map[string]string) map[string]string {
	made["file, SHA-256"] = fmt.Sprintf("%x", sha256.Sum256(file))
	made["key made now"] = map[bool]string{true: "yes", false: "no, earlier"}[created]
	return made
}

func minutesVerify(c *cli.Context) error {
	verifier, err := manufacturer(c)
	if err != nil {
		return err
	}
	path := c.Args().First()
	jws, err := cmdline.ReadFile(path)
	if err != nil {
		return err
	}
	m, err := factory.ReadMinutes(path, jws, verifier)
	if err != nil {
		return err
	}
	return cmdline.Print(c, m, func(w io.Writer) {
		line := func(name, value string) { fmt.Fprintf(w, "%-14s %s\n", name, value) }
		line("ceremony", m.Ceremony)
		line("time", m.Time.Format(time.RFC3339))
		line("manufacturer", m.Manufacturer)
		line("token", m.Token)
		line("by", m.Who)
		line("present", strings.Join(m.Present, ", "))
		officer := "from a file"
		if m.Split != nil {
			officer = fmt.Sprintf("of shares %s of split %s (%d of %d)", strings.Trim(fmt.Sprint(m.Shares), "[]"), m.Split.ID, m.Split.Threshold, m.Split.Count)
		}
		line("SO PIN", officer)
		for _, name := range slices.Sorted(maps.Keys(m.Made)) {
			line(name, m.Made[name])
		}
		fmt.Fprintf(w, "\nsigned by the manufacturer's token\n")
	})
}
