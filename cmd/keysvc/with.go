package main

import (
	"cmp"
	"errors"
	"slices"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/keysvcd"
	"github.com/kmehsm/kmehsm/internal/keysvcd/operator"
	"github.com/kmehsm/kmehsm/internal/who"
)

var storeFlag = &cli.StringFlag{Name: "store", EnvVars: []string{"KMEHSM_STORE"}, Category: cmdline.Configured,
	Usage: "the `STORE`: sqlite:PATH, or postgres://USER@HOST/DATABASE (default: keysvc.db in the --state folder)"}

// storeFlags say where the service's store is, and the token whose key its rows are verified with.
func storeFlags(own ...cli.Flag) []cli.Flag {
	return slices.Concat([]cli.Flag{cmdline.Token, stateFlag, storeFlag}, own, []cli.Flag{cmdline.JSON})
}

// tokenURI names the operator's token, for all commands but those that begin or run a service.
func tokenURI(c *cli.Context) (string, error) {
	return operator.TokenURI(c.String(stateFlag.Name), c.String(cmdline.Token.Name), cmdline.Typed(cmdline.Token.Name))
}

// withToken runs f with the operator's token, which also makes the MACs of the store's rows. The ledger names the
// command as the actor of what f does.
func withToken(c *cli.Context, f func(*hsmkeys.OperatorToken) error) error {
	uri, err := tokenURI(c)
	if err != nil {
		return err
	}
	asCommand(c)
	return operator.WithToken(c.Context, uri, f)
}

// withStore runs f with the store, which must not be rolled back.
func withStore(c *cli.Context, f func(*sqlstore.Store) error) error {
	return withTokenAndStore(c, func(_ *hsmkeys.OperatorToken, store *sqlstore.Store) error { return f(store) })
}

// withTokenAndStore is withStore for commands that use the token, too.
func withTokenAndStore(c *cli.Context, f func(*hsmkeys.OperatorToken, *sqlstore.Store) error) error {
	return withToken(c, func(token *hsmkeys.OperatorToken) error {
		return useStore(c, token, func(store *sqlstore.Store) error { return f(token, store) })
	})
}

func useStore(c *cli.Context, token *hsmkeys.OperatorToken, f func(*sqlstore.Store) error) error {
	asCommand(c)
	return operator.UseStore(c.Context, token, storeName(c), f)
}

// withAnyStore runs f with the store, also if that is rolled back or damaged.
func withAnyStore(c *cli.Context, f func(*hsmkeys.OperatorToken, *sqlstore.Store) error) error {
	return withToken(c, func(token *hsmkeys.OperatorToken) error {
		store, err := operator.OpenStore(c.Context, token, storeName(c))
		if err != nil {
			return err
		}
		return errors.Join(f(token, store), store.Close())
	})
}

// asCommand makes the command the actor of later entries of the ledger.
func asCommand(c *cli.Context) {
	c.Context = binding.WithActor(c.Context, binding.Actor{Client: c.Command.HelpName, User: who.Name()})
}

func storeName(c *cli.Context) string {
	return cmp.Or(c.String("store"), sqlstore.InFolder(c.String("state")))
}

// openLots opens the lots of a store, with the directories that the manufacturers were enrolled with, or --directory.
func openLots(c *cli.Context, store *sqlstore.Store) (*registry.Lots, error) {
	return keysvcd.OpenLots(c.Context, store, c.String("state"), c.String("directory"), cmdline.VaultLogin(c),
		cmdline.StderrLog(c))
}
