package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/factory/inspect"
	"github.com/kmehsm/kmehsm/factory/memory"
	"github.com/kmehsm/kmehsm/internal/cmdline"
)

func auditCommand() *cli.Command {
	return &cli.Command{
		Name: "audit", Usage: "check all lots, each by itself, and all of them against each other",
		Description: "It needs no token, and changes nothing. It checks what lot verify checks of each lot, but no " +
			"injection packages; common divisors of all moduli; overlapping ranges; device keys in two lots. Exit " +
			"code 1 if anything is wrong.",
		Flags: overviewFlags(), Action: audit,
	}
}

func audit(c *cli.Context) error {
	return verify(c, func(ctx context.Context, store directory.Store, v *directory.Verifier, report func(int)) (
		*inspect.Verification, error) {
		made, err := memory.Names(ctx, c.String("state"), v.KeyID())
		if err != nil {
			return nil, err
		}
		found, err := inspect.All(ctx, store, v, made, report)
		if err == nil && found.Lots == 0 && found.OK() {
			if !dirExists(c.String("state")) { // so nobody knows what was made
				return nil, errors.New("the directory has no lots: check --directory, and whether it is mounted")
			}
			noLots(c)
		}
		return found, err
	})
}

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

// noLots says that a new line has no lots yet.
func noLots(c *cli.Context) {
	fmt.Fprintln(c.App.ErrWriter, "no lots yet: factory lot create makes one")
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
	}{Verification: found, OK: found.OK()}
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
