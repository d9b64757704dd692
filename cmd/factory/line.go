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
	"github.com/kmehsm/kmehsm/internal/directories"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/usage"
)

// lineFlags are the flags of commands that work on lots, and a command's own.
func lineFlags(own ...cli.Flag) []cli.Flag {
	return slices.Concat([]cli.Flag{cmdline.Token}, cmdline.DirectoryFlags(), []cli.Flag{stateFlag}, own,
		[]cli.Flag{cmdline.JSON})
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
	return withLineOf(c, store, f)
}

// withLineOf is withLine on the directory that openDirectory has given.
func withLineOf(c *cli.Context, store directory.Store, f func(*hsmkeys.FactoryToken, *factory.Line) error) error {
	return withToken(c, func(token *hsmkeys.FactoryToken) error {
		line, err := factory.NewLine(token, store, state(c))
		if err != nil {
			return err
		}
		return f(token, line)
	})
}

// withToken runs f with the line's token, and notes in the audit log who did what with it.
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

// withAnyToken runs f with a token, which may be another line's.
func withAnyToken(c *cli.Context, f func(*hsmkeys.FactoryToken) error) error {
	return factory.WithToken(c.Context, c.String("token"), f)
}

// recorded runs f, and notes that in the audit log.
func recorded(c *cli.Context, token *hsmkeys.FactoryToken, f func(*hsmkeys.FactoryToken) error) error {
	if err := durable.CheckOwner("factory", c.String("state")); err != nil {
		return err
	}
	sign := func(head *auditlog.Head) error { return state(c).SignLog(token, head) }
	return state(c).Log().Record(calledAs(), token.Serial(), func() error { return f(token) }, sign)
}

// openDirectory opens the directory that the flags name. A command does it once: a wrapped secret id is good for one
// login to Vault.
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

// packagesFlag names the folder of the injection packages.
func packagesFlag(name string) cli.Flag {
	return &cli.StringFlag{Name: name, Category: cmdline.Configured,
		Usage: "the folder, `DIR`, of the injection packages (default: injection in the --state folder)"}
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

// printOut says what was done with the file for another party.
func printOut(c *cli.Context, did string, result map[string]any, format string, args ...any) error {
	result["out"] = c.String("out")
	return cmdline.Printf(c, result, "%s %s: %s\n", did, c.String("out"), fmt.Sprintf(format, args...))
}
