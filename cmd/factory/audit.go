package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/factory/inspect"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
)

func auditCommand() *cli.Command {
	return &cli.Command{
		Name: "audit", Usage: "check all lots, each by itself and all against all",
		Description: "Reads, needs no token, and changes nothing: what lot verify checks of each lot but its " +
			"injection packages; greatest common divisors of all moduli; overlapping ranges; device keys in two " +
			"lots. Exits with 1 if anything is wrong.",
		Flags:  slices.Concat(cmdline.DirectoryFlags(), []cli.Flag{manufacturerFlag, stateFlag, cmdline.JSON}),
		Action: audit,
	}
}

func reconcileCommand() *cli.Command {
	return &cli.Command{
		Name: "reconcile", Usage: "compare what journal, injection packages, directory and token have of a lot",
		ArgsUsage: "LOT", Description: "Says of each difference what is to be done. Exits with 1 while there are any.",
		Flags: lineFlags(&cli.StringFlag{Name: "out", Category: cmdline.Configured,
			Usage: "the folder, `DIR`, of the injection packages (default: injection in the --state folder)"},
			&cli.BoolFlag{Name: "repair", Usage: "do what is safe: what loses no key, and publishes none but those " +
				"of a whole package"}),
		Action: cmdline.Alone(reconcile),
	}
}

func logCommand() *cli.Command {
	return &cli.Command{
		Name: "log", Usage: "the audit log of all commands that used the token, log.jsonl in the --state folder",
		Subcommands: []*cli.Command{{
			Name: "verify", Usage: "find a line that was changed, removed or moved",
			Description: "Needs no token. Each line holds the SHA-256 of the line before, and the token signs the " +
				"last line at the end of each command. Keep copies of log.head.jws elsewhere: whoever can replace " +
				"the whole folder by an earlier one can go back to that.",
			Flags:  []cli.Flag{manufacturerFlag, stateFlag, cmdline.JSON},
			Action: logVerify,
		}},
	}
}

func audit(c *cli.Context) error { return verify(c, inspect.All) }

func lotVerify(c *cli.Context) error {
	dir := injectionDir(c, "injection")
	if !c.IsSet("injection") && !dirExists(filepath.Join(dir, c.Args().First())) {
		dir = ""
	}
	return verify(c, func(ctx context.Context, store directory.Store, v *directory.Verifier, report func(int)) (
		*inspect.Verification, error) {
		lot := c.Args().First()
		found, err := inspect.Lot(ctx, store, v, lot, dir, report)
		return found, factory.NoLot(lot, err)
	})
}

func dirExists(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

func verify(c *cli.Context, f func(context.Context, directory.Store, *directory.Verifier, func(devices int)) (
	*inspect.Verification, error)) error {
	verifier, err := manufacturer(c)
	if err != nil {
		return err
	}
	store, err := openDirectory(c)
	if err != nil {
		return err
	}
	shown := cmdline.NewProgress(c, "verified", "devices", 0)
	found, err := f(c.Context, store, verifier, shown.At)
	shown.Close()
	if err != nil {
		return err
	}
	result := struct {
		*inspect.Verification
		OK bool `json:"ok"`
	}{found, found.OK()}
	err = cmdline.Print(c, result, func(w io.Writer) {
		for _, p := range found.Problems {
			fmt.Fprintln(w, p)
		}
		if found.More > 0 {
			fmt.Fprintf(w, "and %d more\n", found.More)
		}
		for _, l := range found.RevokedLots {
			fmt.Fprintf(w, "lot %s is revoked since %s, all of it and for good: %s\n", l.Lot,
				l.Time.Format(time.RFC3339), l.Reason)
		}
		fmt.Fprintf(w, "%d lots, %d devices verified, %d injection packages compared, %d revocations\n", found.Lots,
			found.Devices, found.Packages, found.Revoked)
	})
	if err == nil && !found.OK() {
		err = cmdline.Said(fmt.Errorf("%d problems were found", len(found.Problems)+found.More))
	}
	return err
}

func reconcile(c *cli.Context) error {
	return withLine(c, func(_ *hsmkeys.FactoryToken, line *factory.Line) error {
		r, err := line.Reconcile(c.Context, c.Args().First(), injectionDir(c, "out"), c.Bool("repair"))
		if err != nil {
			return err
		}
		err = cmdline.Print(c, r, func(w io.Writer) {
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
		if err == nil && r.Open() > 0 {
			err = cmdline.Said(fmt.Errorf("%d differences are left", r.Open()))
		}
		return err
	})
}

func logVerify(c *cli.Context) error {
	verifier, err := manufacturer(c)
	if err != nil {
		return err
	}
	r, err := state(c).Log().Verify(verifier)
	if err != nil {
		return err
	}
	return cmdline.Print(c, r, func(w io.Writer) {
		for _, e := range r.Interrupted {
			fmt.Fprintf(w, "line %d, begun and not ended: %s, %s, %s\n", e.Seq, e.Time.Format(time.RFC3339), e.Who,
				strings.Join(e.Command, " "))
		}
		fmt.Fprintf(w, "%d lines, whole and in order; signed up to line %d\n", r.Lines, r.Signed)
	})
}
