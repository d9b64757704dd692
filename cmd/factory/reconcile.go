package main

import (
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
)

func reconcileCommand() *cli.Command {
	return &cli.Command{
		Name: "reconcile", Usage: "compare a lot in journal, injection packages, directory and token",
		ArgsUsage: "LOT", Description: "It says what to do about each difference. Exit code 1 if there are any, " +
			"and 3 if a repair was interrupted.",
		Flags: lineFlags(packagesFlag("out"),
			&cli.BoolFlag{Name: "repair", Usage: "do what is safe: lose no key, and publish only keys of a complete " +
				"package"}),
		Action: cmdline.Alone(reconcile),
	}
}

func reconcile(c *cli.Context) error {
	return withLine(c, func(_ *hsmkeys.FactoryToken, line *factory.Line) error {
		r, stopped := line.Reconcile(c.Context, c.Args().First(), injectionDir(c, "out"), c.Bool("repair"))
		if r == nil {
			return stopped
		}
		err := cmdline.Print(c, r, func(w io.Writer) {
			for _, d := range r.Differences {
				where := "the lot"
				if d.Shard >= 0 {
					where = fmt.Sprintf("shard %d", d.Shard)
				}
				todo := "to do"
				switch {
				case d.Repaired:
					todo = "done"
				case d.Safe:
					todo = "--repair does"
				}
				fmt.Fprintf(w, "%s: %s\n    %s: %s\n", where, d.What, todo, d.Remedy)
			}
			fmt.Fprintf(w, "%d shards agree everywhere, %d are still to be made, %d differences, %d of them left\n",
				r.Agreed, r.Pending, len(r.Differences), r.Open())
		})
		switch {
		case err != nil:
			return err
		case stopped != nil:
			return cmdline.Partial(cmdline.Said(stopped))
		case r.Open() > 0:
			return cmdline.Said(fmt.Errorf("%d differences are left", r.Open()))
		}
		return nil
	})
}
