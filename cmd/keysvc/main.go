// Command keysvc is the operator's side: it imports what manufacturers hand over, and serves the HSS.
package main

import (
	"os"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/keysvcd/settings"
)

var stateFlag = &cli.StringFlag{Name: "state", Value: "var/keysvc", EnvVars: []string{"KMEHSM_STATE"},
	Category: cmdline.Configured,
	Usage:    "the service's own folder, `DIR`, with its database"}

var acceptFlag = &cli.BoolFlag{Name: "accept-weak-token",
	Usage: "accept a token that does not keep keys as it should; the token, the service's log and /readyz say so " +
		"for good"}

// configuration is keysvc.yaml, which all commands have their settings from.
var configuration = &cmdline.Config{Program: "keysvc",
	Defaults: func(path string) (any, *config.Report) { return settings.ReadDefaults(settings.Source{Path: path}) }}

func main() {
	cmdline.Main(cmdline.Program{App: app(), Examples: examples, Config: configuration,
		Common: storeFlags(cmdline.DirectoryFlags()...)})
}

func app() *cli.App {
	return &cli.App{
		Name:  "keysvc",
		Usage: "bind subscriptions to devices, for an operator's HSS",
		Description: `The order of things, once:        keysvc init
for each manufacturer:            keysvc transport new; keysvc enroll
for each lot that is granted:     keysvc lot import
and then:                         keysvc serve

Exit codes: 0 done; 1 failed; 2 wrong usage or configuration, also a token, folder or store that does not exist or is
the wrong one; 3 partly done, run the same command again to continue.

A script may give --token, --state, --directory and --json to each command: one that has no use for them ignores them.`,
		Writer: os.Stdout, ErrWriter: os.Stderr,
		Commands: []*cli.Command{
			{
				Name: "init", Usage: "make the operator's storage and ledger key in the token, and the database",
				Description: "It first tries whether the token keeps keys as it should, and refuses a token that " +
					"does not: keysvc doctor says more. Running it again changes nothing. It makes the --state " +
					"folder, and notes the token there: other commands use this one if neither --token nor the " +
					"configuration names one, also where KMEHSM_TOKEN does; only serve and check do not. No other " +
					"command makes a database; keysvc store upgrade makes the tables in PostgreSQL.",
				Flags: storeFlags(acceptFlag, &cli.BoolFlag{Name: "new-store", Usage: "make an empty database " +
					"although the token has written another one: that one is lost, with all decisions in it"}),
				Action: cmdline.AloneMaking(initToken),
			},
			transportCommand(),
			{
				Name: "enroll", Usage: "import a manufacturer's enrolment: pin its key, import the operator's KEK " +
					"into the token", ArgsUsage: "FILE",
				Description: "Be sure that the key is the manufacturer's: the service believes whatever it signs. " +
					"The manufacturer reads out its thumbprint, as factory init prints it, over a trusted channel: " +
					"in person, or by telephone. The transport key of this enrolment is destroyed.",
				Flags: storeFlags(&cli.StringFlag{Name: "directory",
					Usage: "where the manufacturer publishes its public keys, `WHERE`: file:DIR or vault:MOUNT"},
					&cli.StringFlag{Name: "manufacturer", Usage: "the manufacturer's public signing key, as `PEM`"},
					&cli.StringFlag{Name: "thumbprint",
						Usage: "that key's thumbprint, `T`, as the manufacturer reads it out"},
					&cli.StringSliceFlag{Name: "tac", Usage: "a type allocation code, `TAC`, of its devices; repeat " +
						"it for each. Its lots may have no other TACs, and lots of other manufacturers not these " +
						"(default: those given before; else all that no other manufacturer has)"}),
				Action: cmdline.Alone(cmdline.Requiring(enroll, "manufacturer", "thumbprint")),
			},
			lotCommand(),
			manufacturerCommand(),
			{
				Name: "device", Usage: "show what the directory has about a device, and verify its signatures",
				ArgsUsage: "IMEI", Flags: storeFlags(cmdline.DirectoryFlags()...), Action: device,
			},
			bindingCommand(),
			equipmentCommand(),
			storeCommand(),
			backupCommand(),
			storageCommand(),
			{
				Name: "serve", Usage: "serve the HSS",
				Description: "After SIGTERM, /readyz says no; after drain_delay keysvc finishes the calls that have " +
					"begun, and ends. SIGHUP reloads lots, clients and certificates.\n\n" + settings.Help(),
				Flags: serviceFlags(), Action: serve,
			},
			{
				Name: "check", Usage: "say all that is wrong with the configuration, with lines and remedies",
				Description: "It checks settings, files, certificates, PIN files, ports and the store's schema, as " +
					"serve does before it starts. It does not check the token (see keysvc doctor) or a directory. " +
					"Exit code 2 if the configuration cannot be used.",
				Flags: serviceFlags(&cli.BoolFlag{Name: "running",
					Usage: "the service runs, so its ports are in use: check the rest"}, cmdline.JSON),
				Action: check,
			},
			cmdline.TokensCommand(),
			{
				Name: "doctor", Usage: "say what the token can and cannot do, and what follows",
				Flags: []cli.Flag{cmdline.Token, stateFlag, cmdline.JSON}, Action: doctor,
			},
		},
	}
}
