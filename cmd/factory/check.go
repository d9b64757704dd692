package main

import (
	"slices"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/factoryconf"
)

func checkCommand() *cli.Command {
	return &cli.Command{
		Name: "check", Usage: "say all that is wrong with the configuration, with lines and remedies",
		Description: "It checks settings, files, certificates, PIN files and ports, but not the token (see factory " +
			"doctor) or the directory. Exit code 2 if the configuration cannot be used.\n\n" +
			factoryconf.Help(),
		Flags: slices.Concat([]cli.Flag{configuration.Flag()}, lineFlags(&cli.BoolFlag{Name: "running",
			Usage: "factory station serve runs, so its port is in use: check the rest"})),
		Action: check,
	}
}

func check(c *cli.Context) error {
	path, err := configuration.Require(c, "factory check")
	if err != nil {
		return err
	}
	return cmdline.PrintReport(c, factoryconf.Check(path, cmdline.Given(c), c.Bool("running")))
}
