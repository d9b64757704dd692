// Command factory is the manufacturer's line: lots and device keys made in an HSM, injection packages, the
// public-key directory, and what operators are handed.
package main

import (
	"os"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/factoryconf"
)

var (
	stateFlag = &cli.StringFlag{Name: "state", Value: "var/factory", EnvVars: []string{"KMEHSM_STATE"},
		Category: cmdline.Configured, Usage: "the line's own folder, `DIR`"}
	manufacturerFlag = &cli.StringFlag{Name: "manufacturer", Category: cmdline.Configured,
		Usage: "the manufacturer's public key, `PEM` (default: manufacturer.pem in the --state folder)"}
	outFileFlag = &cli.StringFlag{Name: "out", Usage: "the `FILE` to write"}
)

// configuration is factory.yaml, which all commands have their settings from.
var configuration = &cmdline.Config{Program: "factory",
	Defaults: func(path string) (any, *config.Report) { return factoryconf.Read(path, nil) }}

func main() {
	cmdline.Main(cmdline.Program{App: app(), Examples: examples, Config: configuration,
		Common: lineFlags()})
}

func app() *cli.App {
	return &cli.App{
		Name:  "factory",
		Usage: "make lots and device keys in an HSM, and publish their public keys",
		Description: `The order of things, once:      factory init; factory fixture enroll; factory operator enroll
for every manufacturing lot:    factory lot create; lot provision; lot grant; and lot seal, when nobody gets it any more

Exit codes: 0 done; 1 failed; 2 wrong usage or configuration, also a token or folder that does not exist or is the wrong
one; 3 partly done, run the same command again to continue.

A script may give --token, --state, --directory and --json to each command: one that has no use for them ignores them.`,
		Writer: os.Stdout, ErrWriter: os.Stderr,
		DisableSliceFlagSeparator: true, // a name may have a comma
		Commands: []*cli.Command{
			initCommand(), auditCommand(), doctorCommand(), fixtureCommand(), operatorCommand(), rotateCommand(),
			officerCommand(), minutesCommand(), stationCommand(), reconcileCommand(), logCommand(),
			vaultCommand(), lotCommand(), checkCommand(), cmdline.TokensCommand(),
		},
	}
}
