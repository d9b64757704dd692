package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
)

func lotGrant(c *cli.Context) error {
	return withLine(c, func(_ *hsmkeys.FactoryToken, line *factory.Line) error {
		lot, operator := c.Args().First(), c.String("operator")
		wrote, err := line.WriteGrant(c.Context, lot, operator, c.String("out"))
		if err != nil {
			return err
		}
		did := map[bool]string{true: "wrote", false: "left as it is"}[wrote]
		return printOut(c, did, map[string]any{"lot": lot, "operator": operator},
			"the key of lot %s, wrapped for operator %s", lot, operator)
	})
}

func lotSeal(c *cli.Context) error {
	store, err := openDirectory(c)
	if err != nil {
		return err
	}
	return withLineOf(c, store, func(token *hsmkeys.FactoryToken, line *factory.Line) error {
		lot := c.Args().First()
		if _, err := line.Lot(c.Context, lot); err != nil {
			return err
		}
		sealed, err := line.Sealed(c.Context, lot)
		if err != nil {
			return err
		}
		if !sealed {
			if err := confirmSeal(c, store, token, lot); err != nil {
				return err
			}
		}
		if err := line.Seal(c.Context, lot); err != nil {
			return err
		}
		return cmdline.Printf(c, map[string]any{"lot": lot, "sealed": true},
			"lot %s is sealed: its key can never leave %s again, not even wrapped\n", lot, token)
	})
}

// confirmSeal asks whether a lot is meant to be sealed.
func confirmSeal(c *cli.Context, store directory.Store, token *hsmkeys.FactoryToken, lot string) error {
	_, s, err := oneLot(c, store)
	if err != nil {
		return err
	}
	if err := s.MaySeal(c.String("state")); err != nil && !c.Bool("force") {
		return fmt.Errorf("%w, or say --force", err)
	}
	return cmdline.Confirm(c, s.SealLoss(token), lot)
}
