package main

import (
	"context"
	"os"
	"path/filepath"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/factory/inspect"
)

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
