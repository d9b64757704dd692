package main

import (
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/keysvcd/operator"
)

func initToken(c *cli.Context) error {
	if err := durable.CheckNotOf("factory", c.String("state"), "log.jsonl"); err != nil {
		return err
	}
	uri := c.String("token")
	return operator.WithToken(c.Context, uri, func(token *hsmkeys.OperatorToken) error {
		made, err := operator.Init{
			URI: uri, State: c.String("state"), Store: storeName(c),
			AcceptWeak: c.Bool(acceptFlag.Name), NewStore: c.Bool("new-store"),
		}.Run(c.Context, token)
		if err != nil {
			return err
		}
		return cmdline.Print(c, map[string]any{"created": made.Keys, "token": token.Serial(),
			"weak": append([]string{}, made.Weak...), "store_created": made.Store}, func(w io.Writer) {
			if made.Keys {
				fmt.Fprintf(w, "made the storage and ledger key in %s\nnext, for each manufacturer: keysvc transport "+
					"new\n", token)
			} else if made.Store {
				fmt.Fprintf(w, "%s has its keys already; made an empty store, %s\n", token, storeName(c))
			} else {
				fmt.Fprintf(w, "%s has its keys already; nothing changed\n", token)
			}
			for _, what := range made.Weak {
				fmt.Fprintf(w, "accepted as it is: %s\n", what)
			}
		})
	})
}

func doctor(c *cli.Context) error {
	return withToken(c, func(token *hsmkeys.OperatorToken) error {
		report, err := token.DoctorOperator(c.Context)
		if err != nil {
			return err
		}
		return cmdline.PrintFindings(c, token, report)
	})
}
