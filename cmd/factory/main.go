// Command factory is the manufacturer's line: lots and device keys made in an HSM, injection packages, the
// public-key directory, and what operators are handed.
package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/factory/auditlog"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/directories"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/factoryconf"
	"github.com/kmehsm/kmehsm/internal/usage"
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

func main() { cmdline.Main(cmdline.Program{App: app(), Examples: examples, Config: configuration}) }

// lineFlags are those of the commands that work on lots, and the command's own.
func lineFlags(own ...cli.Flag) []cli.Flag {
	return slices.Concat([]cli.Flag{cmdline.Token}, cmdline.DirectoryFlags(), []cli.Flag{stateFlag}, own,
		[]cli.Flag{cmdline.JSON})
}

func app() *cli.App {
	return &cli.App{
		Name:  "factory",
		Usage: "make lots and device keys in an HSM, and publish their public keys",
		Description: `The order of things, once:      factory init; factory fixture enroll; factory operator enroll
for every manufacturing lot:    factory lot create; lot provision; lot grant; and lot seal, when nobody gets it any more

Exit codes: 0 done; 1 failed; 2 wrong usage or configuration, also a token or folder that is not there, or not the one
that belongs here; 3 part of it done, run the same command again to go on.`,
		Writer: os.Stdout, ErrWriter: os.Stderr,
		DisableSliceFlagSeparator: true, // a name may have a comma
		Commands: []*cli.Command{
			initCommand(), auditCommand(), doctorCommand(), fixtureCommand(), operatorCommand(), rotateCommand(),
			officerCommand(), minutesCommand(), stationCommand(), reconcileCommand(), logCommand(),
			vaultCommand(), lotCommand(), checkCommand(), cmdline.TokensCommand(),
		},
	}
}

// state is the line's own folder.
func state(c *cli.Context) factory.State { return factory.State{Dir: c.String("state")} }

// calledAs is the command as it was called, for the audit log.
func calledAs() []string { return append([]string{"factory"}, os.Args[1:]...) }

// withLine runs f with the line, on the token and the directory that the flags name.
func withLine(c *cli.Context, f func(*hsmkeys.FactoryToken, *factory.Line) error) error {
	store, err := openDirectory(c)
	if err != nil {
		return err
	}
	return withToken(c, func(token *hsmkeys.FactoryToken) error {
		line, err := factory.NewLine(token, store, state(c))
		if err != nil {
			return err
		}
		return f(token, line)
	})
}

// withToken runs f with the line's token, and puts down in the audit log who did what with it.
func withToken(c *cli.Context, f func(*hsmkeys.FactoryToken) error) error {
	if err := cmdline.CheckState(c); err != nil {
		return err
	}
	return withAnyToken(c, func(token *hsmkeys.FactoryToken) error {
		if err := state(c).Check(token); err != nil {
			return usage.Mark(err)
		}
		return recorded(c, token, f)
	})
}

// withAnyToken runs f with a token, whosever it is.
func withAnyToken(c *cli.Context, f func(*hsmkeys.FactoryToken) error) error {
	return factory.WithToken(c.Context, c.String("token"), f)
}

// recorded runs f, and puts that down in the audit log.
func recorded(c *cli.Context, token *hsmkeys.FactoryToken, f func(*hsmkeys.FactoryToken) error) error {
	if err := durable.CheckOwner("factory", c.String("state")); err != nil {
		return err
	}
	sign := func(head *auditlog.Head) error { return state(c).SignLog(token, head) }
	return state(c).Log().Record(calledAs(), token.Serial(), func() error { return f(token) }, sign)
}

func openDirectory(c *cli.Context) (directory.Store, error) {
	if err := cmdline.Require(c, "directory"); err != nil {
		return nil, err
	}
	return directories.Open(c.Context, c.String("directory"), cmdline.VaultLogin(c), cmdline.StderrLog(c))
}

// manufacturer is the public key of --manufacturer, or of its default.
func manufacturer(c *cli.Context) (*directory.Verifier, error) {
	path := cmp.Or(c.String("manufacturer"), state(c).PublicKey())
	pem, err := durable.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && c.String("manufacturer") == "" {
		return nil, usage.Errorf("%s, the manufacturer's public key, is not there: run factory init first, or name "+
			"it with --manufacturer", path)
	}
	if err != nil {
		return nil, usage.Errorf("the manufacturer's public key, which factory init writes, cannot be read; name it "+
			"with --manufacturer, or the line's folder with --state: %w", err)
	}
	v, err := directory.ParseVerifier(pem)
	if err != nil {
		return nil, usage.Errorf("%s: %w", path, err)
	}
	return v, nil
}

// injectionDir is the folder of the injection packages: what the flag says, or its default.
func injectionDir(c *cli.Context, flag string) string {
	return cmp.Or(c.String(flag), state(c).Injection())
}

// writeOut writes a file for another party and says so.
func writeOut(c *cli.Context, data []byte, result map[string]any, format string, args ...any) error {
	if err := durable.WriteNew(c.String("out"), data, 0o600); err != nil {
		return err
	}
	return printOut(c, "wrote", result, format, args...)
}

// printOut says what became of the file for another party.
func printOut(c *cli.Context, did string, result map[string]any, format string, args ...any) error {
	result["out"] = c.String("out")
	return cmdline.Printf(c, result, "%s %s: %s\n", did, c.String("out"), fmt.Sprintf(format, args...))
}
