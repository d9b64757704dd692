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

// officerFlags are those of the commands that log in as the security officer, and the command's own.
func officerFlags(own ...cli.Flag) []cli.Flag {
	return slices.Concat([]cli.Flag{cmdline.Token, stateFlag}, own, []cli.Flag{
		&cli.StringFlag{Name: "so-pin-source", Usage: "where the security officer's PIN is, if it is in no shares: file:/path, a `URI`"},
		&cli.StringSliceFlag{Name: "so-share", Usage: "a share of the security officer's PIN, as its custodian has decrypted it with age -d, a `FILE`; once for each share. Without it, shares are asked for at the terminal"},
		&cli.StringSliceFlag{Name: "present", Usage: "who is there, for the minutes, a `NAME`; once for each"},
		cmdline.JSON,
	})
}

func officerCommand() *cli.Command {
	return &cli.Command{
		Name: "so", Usage: "the security officer's PIN, in shares of which nobody has enough alone",
		Subcommands: []*cli.Command{{
			Name: "split", Usage: "set a new random PIN, and write a share of it for each custodian",
			Description: `The PIN that was before is void then, and nobody knows the new one: operator enroll and fixture enroll ask for shares. Custodian 2, say, gets
DIR/so-SPLIT/custodian-2.age, and reads the share with age -d -i KEYFILE custodian-2.age. Run this again with enough shares to change custodians.
If it was interrupted, factory so show says so, and factory so check, with the PIN before or with the new shares, finds out which of them is the token's.`,
			Flags: officerFlags(&cli.IntFlag{Name: "shares", Usage: "how many there are, `N`, 16 at most"},
				&cli.IntFlag{Name: "threshold", Usage: "how many are needed, `K`, 2 at least"},
				&cli.StringSliceFlag{Name: "custodian", Usage: "whom a share is encrypted to, an age `RECIPIENT` (age1...); once for each share"},
				&cli.StringFlag{Name: "out", Usage: "the folder, `DIR`, for the shares"}),
			Action: cmdline.Alone(soSplit),
		}, {
			Name: "check", Usage: "log in with the PIN, to show that the shares, or the PIN in the file, are the token's",
			Description: "It also ends a factory so split that was interrupted. It tries what it is given once, whatever the token says of splits.",
			Flags:       officerFlags(), Action: cmdline.Alone(soCheck),
		}, {
			Name: "show", Usage: "print which split the PIN is in",
			Flags: []cli.Flag{cmdline.Token, stateFlag, cmdline.JSON}, Action: soShow,
		}},
	}
}

func minutesCommand() *cli.Command {
	return &cli.Command{
		Name: "minutes", Usage: "the minutes of what was done with the security officer's PIN, in the folder minutes of the --state folder",
		Subcommands: []*cli.Command{{
			Name: "verify", Usage: "check the token's signature on minutes, and print them", ArgsUsage: "FILE",
			Flags: []cli.Flag{manufacturerFlag, stateFlag, cmdline.JSON}, Action: minutesVerify,
		}},
	}
}

// ceremony runs f with the security officer's PIN, in the presence of who is named, and writes the minutes of what f has made. Without minutes, what f
// has made is to be handed to nobody.
func ceremony(c *cli.Context, what string, basis factory.Basis, f func(token string, pin hsmkeys.OfficerPIN) (made map[string]string, err error)) (minutes string, err error) {
	officer := factory.Officer{Source: c.String("so-pin-source"), Shares: c.StringSlice("so-share")}
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
	m := factory.Minutes{Ceremony: what, Present: append([]string{}, c.StringSlice("present")...)}
	var pin hsmkeys.OfficerPIN
	// The security officer's login needs the token for itself.
	err = cmdline.WithFactory(c, func(token *hsmkeys.FactoryToken) (err error) {
		m.Token = token.Serial()
		if err := factory.CanSign(token); err != nil {
			return err
		}
		pin, m.Shares, err = officer.PIN(c.Context, token, basis)
		m.Split = pin.Split
		return err
	})
	if errors.Is(err, factory.ErrNoOfficerPIN) {
		return "", cmdline.Usage(err)
	}
	if err != nil {
		return "", err
	}
	err = logged(c, m.Token, func() error {
		if m.Made, err = f(m.Token, pin); err != nil {
			return err
		}
		err = cmdline.WithFactory(c, func(token *hsmkeys.FactoryToken) (err error) {
			minutes, err = factory.WriteMinutes(c.String("state"), token, m)
			return err
		})
		if err != nil {
			return cmdline.Partial(fmt.Errorf("%s is done, but there are no minutes of it: %w", what, err))
		}
		return nil
	}, func(head *factory.LogHead) error {
		return cmdline.WithFactory(c, func(token *hsmkeys.FactoryToken) error { return factory.SignLog(c.String("state"), token, head) })
	})
	return minutes, err
}

// enrolled adds to what an enrolment has made its file, and whether its key was made now.
func enrolled(file []byte, created bool, made map[string]string) map[string]string {
	made["file, SHA-256"] = fmt.Sprintf("%x", sha256.Sum256(file))
	made["key made now"] = map[bool]string{true: "yes", false: "no, earlier"}[created]
	return made
}

func soSplit(c *cli.Context) error {
	if err := cmdline.Require(c, "shares", "threshold", "custodian", "out"); err != nil {
		return err
	}
	custodians, err := custody.ParseCustodians(c.StringSlice("custodian"))
	if err != nil {
		return cmdline.Usage(err)
	}
	if n := c.Int("shares"); n != len(custodians) {
		return cmdline.Usagef("--shares is %d, and --custodian was given %d times: each share needs a custodian of its own", n, len(custodians))
	}
	if err := custody.CheckSize(c.Int("threshold"), len(custodians)); err != nil {
		return cmdline.Usage(err)
	}
	var split *hsmkeys.Split
	var files []string
	minutes, err := ceremony(c, "so split", factory.MaybeInterrupted, func(token string, pin hsmkeys.OfficerPIN) (made map[string]string, err error) {
		split, files, err = factory.SplitOfficerPIN(c.Context, c.String("token"), token, pin, c.Int("threshold"), custodians, c.String("out"))
		if errors.Is(err, hsmkeys.ErrPINMaybeSet) {
			return nil, cmdline.Partial(err)
		}
		if err != nil {
			return nil, err
		}
		made = map[string]string{"split": split.ID, "threshold": fmt.Sprint(split.Threshold)}
		for i, r := range custodians {
			made[fmt.Sprintf("custodian %02d", i+1)] = r.String()
		}
		return made, nil
	})
	if split != nil && err != nil { // the shares are the only way to the PIN, minutes or not
		return fmt.Errorf("%w; the shares of split %s are in force: %s", err, split.ID, strings.Join(files, ", "))
	}
	if err != nil {
		return err
	}
	return cmdline.Print(c, map[string]any{"split": split.ID, "threshold": split.Threshold, "shares": files, "minutes": minutes}, func(w io.Writer) {
		fmt.Fprintf(w, "the security officer has a new PIN, which is in split %s: any %d of its %d shares have it; the PIN before is void\n", split.ID, split.Threshold, split.Count)
		for i, path := range files {
			fmt.Fprintf(w, "custodian %d  %s  %s\n", i+1, custodians[i], path)
		}
		fmt.Fprintf(w, "minutes      %s\n", minutes)
	})
}

func soCheck(c *cli.Context) error {
	var now *hsmkeys.Split
	minutes, err := ceremony(c, "so check", factory.Anything, func(_ string, pin hsmkeys.OfficerPIN) (map[string]string, error) {
		now = pin.Split
		return map[string]string{}, hsmkeys.CheckOfficerPIN(c.Context, c.String("token"), pin)
	})
	if err != nil {
		return err
	}
	return cmdline.Print(c, map[string]any{"split": now, "minutes": minutes}, func(w io.Writer) {
		fmt.Fprintf(w, "this is the security officer's PIN, %s\nminutes %s\n", inShares(now), minutes)
	})
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
				fmt.Fprintf(w, "factory so split was interrupted: the security officer has the PIN before, or the one %s; factory so check finds out\nbefore: ", inShares(begun))
			}
			fmt.Fprintf(w, "the security officer has a PIN %s\n", inShares(inForce))
		})
	})
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
