package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/custody"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/terminal"
	"github.com/kmehsm/kmehsm/internal/usage"
)

// officerFlags are those of the commands that log in as the security officer, and the command's own.
func officerFlags(own ...cli.Flag) []cli.Flag {
	return slices.Concat([]cli.Flag{cmdline.Token, stateFlag}, own, []cli.Flag{
		&cli.StringFlag{Name: "so-pin-source",
			Usage: "where the security officer's PIN is, if it is in no shares: file:/path, a `URI`"},
		&cli.StringSliceFlag{Name: "so-share", Usage: "a share of the security officer's PIN, as its custodian has " +
			"decrypted it with age -d, a `FILE`; once for each share. Without it, shares are asked for at the " +
			"terminal"},
		&cli.StringSliceFlag{Name: "present", Usage: "who is there, for the minutes, a `NAME`; once for each"},
		cmdline.JSON,
	})
}

// enrolFlags are those of the commands that make a key as the security officer, and the command's own.
func enrolFlags(key string, own ...cli.Flag) []cli.Flag {
	return officerFlags(append(own, &cli.IntFlag{Name: "generation", Usage: "of the " + key +
		", `N`: one more than the newest rotates it, an earlier one is for what was wrapped under it (default: the " +
		"newest)"}, outFileFlag)...)
}

func officerCommand() *cli.Command {
	return &cli.Command{
		Name: "so", Usage: "the security officer's PIN, in shares of which nobody has enough alone",
		Subcommands: []*cli.Command{{
			Name: "split", Usage: "set a new random PIN, and write a share of it for each custodian",
			Description: `The PIN that was before is void then, and nobody knows the new one: operator enroll and
fixture enroll ask for shares. Custodian 2, say, gets DIR/so-SPLIT/custodian-2.age, and reads the share with
age -d -i KEYFILE custodian-2.age. Run this again with enough shares to change custodians.
If it was interrupted, factory so show says so, and factory so check, with the PIN before or with the new shares,
finds out which of them is the token's.`,
			Flags: officerFlags(&cli.IntFlag{Name: "shares", Usage: "how many there are, `N`, 16 at most"},
				&cli.IntFlag{Name: "threshold", Usage: "how many are needed, `K`, 2 at least"},
				&cli.StringSliceFlag{Name: "custodian",
					Usage: "whom a share is encrypted to, an age `RECIPIENT` (age1...); once for each share"},
				&cli.StringFlag{Name: "out", Usage: "the folder, `DIR`, for the shares"}),
			Action: cmdline.Alone(cmdline.Requiring(soSplit, "shares", "threshold", "custodian", "out")),
		}, {
			Name:  "check",
			Usage: "log in with the PIN, to show that the shares, or the PIN in the file, are the token's",
			Description: "It also ends a factory so split that was interrupted. It tries what it is given once, " +
				"whatever the token says of splits.", Flags: officerFlags(), Action: cmdline.Alone(soCheck),
		}, {
			Name: "show", Usage: "print which split the PIN is in",
			Flags: []cli.Flag{cmdline.Token, stateFlag, cmdline.JSON}, Action: soShow,
		}},
	}
}

func soSplit(c *cli.Context) error {
	custodians, err := custody.ParseCustodians(c.StringSlice("custodian"))
	if err != nil {
		return usage.Mark(err)
	}
	if n := c.Int("shares"); n != len(custodians) {
		return usage.Errorf("--shares is %d, and --custodian was given %d times: each share needs a custodian of "+
			"its own", n, len(custodians))
	}
	if err := custody.CheckSize(c.Int("threshold"), len(custodians)); err != nil {
		return usage.Mark(err)
	}
	var split *hsmkeys.Split
	var files []string
	minutes, err := ceremony(c, "so split", custody.MaybeInterrupted,
		func(token string, pin hsmkeys.OfficerPIN) (made map[string]string, err error) {
			split, files, err = custody.SplitOfficerPIN(c.Context, c.String("token"), token, pin, c.Int("threshold"),
				custodians, c.String("out"))
			if err != nil {
				return nil, err
			}
			return factory.SplitFacts(split, custodians), nil
		})
	if split != nil && err != nil { // the shares are the only way to the PIN, minutes or not
		return fmt.Errorf("%w; the shares of split %s are in force: %s", err, split.ID, strings.Join(files, ", "))
	}
	if err != nil {
		return err
	}
	return cmdline.Print(c, map[string]any{"split": split.ID, "threshold": split.Threshold, "shares": files,
		"minutes": minutes}, func(w io.Writer) {
		fmt.Fprintf(w, "the security officer has a new PIN, which is in split %s: any %d of its %d shares have it; "+
			"the PIN before is void\n", split.ID, split.Threshold, split.Count)
		for i, path := range files {
			fmt.Fprintf(w, "custodian %d  %s  %s\n", i+1, custodians[i], path)
		}
		fmt.Fprintf(w, "minutes      %s\n", minutes)
	})
}

func soCheck(c *cli.Context) error {
	var now *hsmkeys.Split
	minutes, err := ceremony(c, "so check", custody.Anything,
		func(_ string, pin hsmkeys.OfficerPIN) (map[string]string, error) {
			now = pin.Split
			return map[string]string{}, hsmkeys.CheckOfficerPIN(c.Context, c.String("token"), pin)
		})
	if err != nil {
		return err
	}
	return cmdline.Printf(c, map[string]any{"split": now, "minutes": minutes},
		"this is the security officer's PIN, %s\nminutes %s\n", inShares(now), minutes)
}

func inShares(s *hsmkeys.Split) string {
	if s == nil {
		return "which is in no shares"
	}
	return fmt.Sprintf("which is in split %s: any %d of its %d shares have it", s.ID, s.Threshold, s.Count)
}

func soShow(c *cli.Context) error {
	return withToken(c, func(token *hsmkeys.FactoryToken) error {
		inForce, begun, err := token.OfficerSplit(c.Context)
		if err != nil {
			return err
		}
		return cmdline.Print(c, map[string]any{"split": inForce, "interrupted": begun}, func(w io.Writer) {
			if begun != nil {
				fmt.Fprintf(w, "factory so split was interrupted: the security officer has the PIN before, or the "+
					"one %s; factory so check finds out\nbefore: ", inShares(begun))
			}
			fmt.Fprintf(w, "the security officer has a PIN %s\n", inShares(inForce))
		})
	})
}

func minutesCommand() *cli.Command {
	return &cli.Command{
		Name: "minutes", Usage: "the minutes of what was done with the security officer's PIN, in the folder minutes " +
			"of the --state folder",
		Subcommands: []*cli.Command{{
			Name: "verify", Usage: "check the token's signature on minutes, and print them", ArgsUsage: "FILE",
			Flags: []cli.Flag{manufacturerFlag, stateFlag, cmdline.JSON}, Action: minutesVerify,
		}},
	}
}

// ceremony holds one, and gives the path of its minutes.
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
	// Before anybody is asked for shares, and a key is made.
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

func minutesVerify(c *cli.Context) error {
	verifier, err := manufacturer(c)
	if err != nil {
		return err
	}
	path := c.Args().First()
	jws, err := durable.ReadFile(path)
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
			officer = fmt.Sprintf("of shares %s of split %s (%d of %d)", strings.Trim(fmt.Sprint(m.Shares), "[]"),
				m.Split.ID, m.Split.Threshold, m.Split.Count)
		}
		line("SO PIN", officer)
		for _, name := range slices.Sorted(maps.Keys(m.Made)) {
			line(name, m.Made[name])
		}
		fmt.Fprintf(w, "\nsigned by the manufacturer's token\n")
	})
}
