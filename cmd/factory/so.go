package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/hsmkeys/officer"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/custody"
	"github.com/kmehsm/kmehsm/internal/usage"
)

func officerCommand() *cli.Command {
	return &cli.Command{
		Name: "so", Usage: "the security officer's PIN, in shares: no custodian alone has enough of them",
		Subcommands: []*cli.Command{{
			Name: "split", Usage: "set a new random PIN, and write a share of it for each custodian",
			Description: `After that the old PIN is void, and nobody knows the new one: operator enroll and fixture
enroll ask for shares. Custodian 2, for example, gets DIR/so-SPLIT/custodian-2.age, and decrypts the share with
age -d -i KEYFILE custodian-2.age. To change custodians, run it again with enough shares.
If it was interrupted, factory so show says so; factory so check, with the old PIN or with the new shares, finds out
which PIN the token has.`,
			Flags: officerFlags(&cli.IntFlag{Name: "shares", Usage: "how many there are, `N`, 16 at most"},
				&cli.IntFlag{Name: "threshold", Usage: "how many are needed, `K`, 2 at least"},
				&cli.StringSliceFlag{Name: "custodian",
					Usage: "whom a share is encrypted to, an age `RECIPIENT` (age1...); once for each share"},
				&cli.StringFlag{Name: "out", Usage: "the folder, `DIR`, for the shares"}),
			Action: cmdline.Alone(cmdline.Requiring(soSplit, "shares", "threshold", "custodian", "out")),
		}, {
			Name:  "check",
			Usage: "log in with the PIN, to show that the shares, or the PIN in the file, are the token's",
			Description: "It also completes a factory so split that was interrupted. It tries the given PIN or " +
				"shares once, whatever the token " +
				"says about splits.", Flags: officerFlags(), Action: cmdline.Alone(soCheck),
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
			return map[string]string{}, officer.CheckPIN(c.Context, c.String("token"), pin)
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
