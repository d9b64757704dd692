package main

import (
	"fmt"
	"io"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/kme"
)

func lotRefresh(c *cli.Context) error {
	validity, lots := c.Duration("valid-for"), c.Args().Slice()
	if c.IsSet("valid-for") {
		if err := directory.CheckValidity(validity); err != nil {
			return usage.Errorf("--valid-for: %w", err)
		}
	}
	if c.Bool("begin") && len(lots) == 0 {
		return usage.Errorf("--begin is for lots that are named: a list that is not there may have been taken away")
	}
	return withLine(c, func(_ *hsmkeys.FactoryToken, line *factory.Line) error {
		done, failed := line.RefreshAll(c.Context, lots, validity, c.Bool("begin"))
		if failed != nil && len(done) > 0 {
			return cmdline.Partial(fmt.Errorf("%w\nthe lists of the %d other lots are signed anew", failed, len(done)))
		}
		if failed != nil {
			return failed
		}
		if len(done) == 0 {
			noLots(c)
		}
		return cmdline.Print(c, map[string]any{"lots": done}, func(w io.Writer) {
			for _, r := range done {
				fmt.Fprintf(w, "the list of revoked devices of lot %s, version %d, is good until %s\n", r.Lot,
					r.Version, r.NextUpdate.Format(time.RFC3339))
			}
		})
	})
}

func lotRevoke(c *cli.Context) error {
	if _, err := strict.Reason(c.String("reason")); err != nil {
		return usage.Mark(err)
	}
	lot, reason := c.Args().First(), c.String("reason")
	imeis, err := toRevoke(c)
	if err != nil {
		return err
	}
	return withLine(c, func(_ *hsmkeys.FactoryToken, line *factory.Line) error {
		loss, err := line.RevocationLoss(c.Context, lot, imeis)
		if err != nil {
			return err
		}
		if loss != nil {
			if err := cmdline.Confirm(c, loss.Says, loss.Name); err != nil {
				return err
			}
		}
		if c.Bool("all") {
			if err := line.RevokeLot(c.Context, lot, reason); err != nil {
				return err
			}
			return cmdline.Printf(c, map[string]any{"lot": lot, "all": true, "revoked": true},
				"lot %s is revoked, all of it and for good\n", lot)
		}
		return revokeDevices(c, line, lot, imeis, reason)
	})
}

// toRevoke are the devices that a command line names; none for the whole lot.
func toRevoke(c *cli.Context) ([]kme.IMEI, error) {
	switch one := c.NArg() == 2; {
	case one && !c.IsSet("imeis") && !c.Bool("all"):
		imei, err := kme.ParseIMEI(c.Args().Get(1))
		if err != nil {
			return nil, usage.Mark(err)
		}
		return []kme.IMEI{imei}, nil
	case c.IsSet("imeis") && !one && !c.Bool("all"):
		imeis, err := factory.ReadIMEIs(c.String("imeis"))
		if err != nil {
			return nil, usage.Errorf("--imeis: %w", err)
		}
		return imeis, nil
	case c.Bool("all") && !one && !c.IsSet("imeis"):
		return nil, nil
	}
	return nil, usage.Errorf("say what is revoked: an IMEI, --imeis FILE, or --all for the whole lot; see %s --help",
		c.Command.HelpName)
}

func revokeDevices(c *cli.Context, line *factory.Line, lot string, imeis []kme.IMEI, reason string) error {
	shown, done := cmdline.NewProgress(c, "revoked", "devices", len(imeis)), 0
	err := line.Revoke(c.Context, lot, imeis, reason, func(n int) { done = n; shown.At(n) })
	shown.Close()
	if err != nil && done > 0 {
		return cmdline.Partial(fmt.Errorf("%w (%d of %d devices are revoked; the same command again goes on)",
			err, done, len(imeis)))
	}
	if err != nil {
		return err
	}
	if c.NArg() == 2 {
		return cmdline.Printf(c, map[string]any{"lot": lot, "devices": 1, "revoked": true, "imei": imeis[0]},
			"%s of lot %s is revoked\n", imeis[0], lot)
	}
	return cmdline.Printf(c, map[string]any{"lot": lot, "devices": len(imeis), "revoked": true},
		"%d devices of lot %s are revoked\n", len(imeis), lot)
}

func lotReissue(c *cli.Context) error {
	if _, err := strict.Reason(c.String("reason")); err != nil {
		return usage.Mark(err)
	}
	imei, err := kme.ParseIMEI(c.Args().Get(1))
	if err != nil {
		return usage.Mark(err)
	}
	return withLine(c, func(_ *hsmkeys.FactoryToken, line *factory.Line) error {
		lot := c.Args().First()
		path, err := line.Reissue(c.Context, lot, imei, c.String("reason"), c.String("fixture"), injectionDir(c, "out"))
		if err != nil {
			return err
		}
		return cmdline.Printf(c, map[string]any{"lot": lot, "imei": imei, "injection": path},
			"%s of lot %s has a new key, and the one that it had is revoked\ninjection package %s\n", imei, lot, path)
	})
}
