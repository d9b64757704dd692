package main

import (
	"slices"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/keysvcd"
	"github.com/kmehsm/kmehsm/internal/keysvcd/settings"
)

// serviceFlags are the flags of commands that need the whole configuration.
func serviceFlags(own ...cli.Flag) []cli.Flag {
	return slices.Concat([]cli.Flag{configuration.Flag(), cmdline.Token, stateFlag, storeFlag},
		cmdline.DirectoryFlags(), own)
}

// source names the whole configuration, and fails if there is none.
func source(c *cli.Context) (s settings.Source, err error) {
	if s.Path, err = configuration.Require(c, "keysvc serve"); err != nil {
		return s, err
	}
	s.Given = cmdline.Given(c)
	return s, nil
}

func serve(c *cli.Context) error {
	from, err := source(c)
	if err != nil {
		return err
	}
	cmdline.Outlast()
	return keysvcd.Serve(c.Context, from, c.App.ErrWriter)
}

func check(c *cli.Context) error {
	from, err := source(c)
	if err != nil {
		return err
	}
	return cmdline.PrintReport(c, settings.Check(c.Context, from, c.Bool("running")))
}
