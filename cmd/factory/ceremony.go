package main

import (
	"errors"
	"os"
	"slices"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/custody"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/terminal"
	"github.com/kmehsm/kmehsm/internal/usage"
)

// officerFlags are the flags of commands that log in as the security officer, and a command's own.
func officerFlags(own ...cli.Flag) []cli.Flag {
	return slices.Concat([]cli.Flag{cmdline.Token, stateFlag}, own, []cli.Flag{
		&cli.StringFlag{Name: "so-pin-source",
			Usage: "where the security officer's PIN is, if it is in no shares: file:/path, a `URI`"},
		&cli.StringSliceFlag{Name: "so-share", Usage: "a share of the security officer's PIN, as its custodian has " +
			"decrypted it with age -d, a `FILE`; once for each share. Without it, shares are asked for at the " +
			"terminal"},
		&cli.StringSliceFlag{Name: "present", Usage: "who is present, for the minutes, a `NAME`; once for each person"},
		cmdline.JSON,
	})
}

// enrolFlags are the flags of commands that make a key as the security officer, and a command's own.
func enrolFlags(key string, own ...cli.Flag) []cli.Flag {
	return officerFlags(append(own, &cli.IntFlag{Name: "generation", Usage: "of the " + key +
		", `N`: one more than the newest rotates it, an earlier one is for what was wrapped under it (default: the " +
		"newest)"}, outFileFlag)...)
}

// ceremony holds a ceremony, and gives the path of its minutes.
func ceremony(c *cli.Context, name string, basis custody.Basis, act factory.Act) (minutes string, err error) {
	officer := custody.Officer{Source: c.String("so-pin-source"), Shares: c.StringSlice("so-share")}
	if officer.Source != "" && len(officer.Shares) > 0 {
		return "", usage.Errorf("--so-pin-source and --so-share: the PIN comes from one of them")
	}
	if terminal.Is(os.Stdin) {
		officer.Ask = func(q *custody.Quorum) error { return q.Ask(c.Context, os.Stdin, c.App.ErrWriter) }
	}
	if err := factory.CheckPresent(c.StringSlice("present")); err != nil {
		return "", usage.Errorf("--present %w", err)
	}
	minutes, err = factory.Ceremony{
		Name: name, Command: calledAs(), State: state(c), TokenURI: c.String("token"), Officer: officer, Basis: basis,
		Present: c.StringSlice("present"),
	}.Hold(c.Context, act)
	switch {
	case errors.Is(err, custody.ErrNoOfficerPIN):
		err = usage.Mark(err)
	case errors.Is(err, factory.ErrNoMinutes), errors.Is(err, hsmkeys.ErrPINMaybeSet):
		err = cmdline.Partial(err)
	}
	return minutes, err
}

// enroll holds the ceremony of an enrolment, and writes the file for the other party.
func enroll(c *cli.Context, name string, f func(officer hsmkeys.PIN) (*factory.Enrolled, error),
	say func(*factory.Enrolled) (result map[string]any, text string)) error {
	// This comes before anybody is asked for shares, and before a key is made.
	if err := durable.CheckNew(c.String("out")); err != nil {
		return err
	}
	var e *factory.Enrolled
	act := func(_ string, officer hsmkeys.OfficerPIN) (made map[string]string, err error) {
		if e, err = f(officer.PIN); err != nil {
			return nil, err
		}
		return e.Made, nil
	}
	minutes, err := ceremony(c, name, custody.Settled, act)
	if err != nil {
		return err
	}
	result, text := say(e)
	result["minutes"] = minutes
	return writeOut(c, e.File, result, "%s", text)
}
