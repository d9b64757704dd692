package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/keysvcd/operator"
)

func transportCommand() *cli.Command {
	return &cli.Command{
		Name: "transport", Usage: "the transport keys, each of which receives one KEK",
		Subcommands: []*cli.Command{
			{
				Name: "new", Usage: "make a transport key for one enrolment, and write its public half for the " +
					"manufacturer",
				Description: "Give the file to the manufacturer, and read out the thumbprint over a trusted channel, " +
					"in person or by telephone: nothing in the file proves whose it is. keysvc enroll destroys the " +
					"key when the KEK is in the token. Until then, anybody with the token's PIN and the enrolment " +
					"could take the KEK, too: enroll on the same day.",
				Flags: []cli.Flag{cmdline.Token, stateFlag,
					&cli.StringFlag{Name: "out",
						Usage: "the `FILE` to write (default: transport.json in the --state folder)"},
					cmdline.JSON},
				Action: cmdline.Alone(transportNew),
			},
			{Name: "list", Usage: "list the transport keys that wait for their enrolment",
				Flags: []cli.Flag{cmdline.Token, stateFlag, cmdline.JSON}, Action: transportList},
			{
				Name: "destroy", Usage: "destroy a transport key whose enrolment will not be imported",
				ArgsUsage: "THUMBPRINT", Flags: []cli.Flag{cmdline.Token, stateFlag, cmdline.Yes, cmdline.JSON},
				Action: cmdline.Alone(transportDestroy),
			},
		},
	}
}

func transportNew(c *cli.Context) error {
	return withToken(c, func(token *hsmkeys.OperatorToken) error {
		path := outOr(c, "transport.json")
		stop := cmdline.Spin(c, "making an RSA key in the token")
		thumbprint, err := operator.NewTransportKey(c.Context, token, path)
		stop()
		if err != nil {
			return err
		}
		return printReceiver(c, token, path, thumbprint, "for the manufacturer's factory operator enroll",
			"to the manufacturer")
	})
}

// outOr is the file that --out names, or one of this name in the --state folder.
func outOr(c *cli.Context, name string) string {
	return cmp.Or(c.String("out"), filepath.Join(c.String("state"), name))
}

// printReceiver says of a key that receives others what its file is for, and to whom its thumbprint is read out.
func printReceiver(c *cli.Context, token *hsmkeys.OperatorToken, path, thumbprint, use, listener string) error {
	result := map[string]any{"thumbprint": thumbprint, "out": path, "token": token.Serial()}
	return cmdline.Printf(c, result, "wrote %s: %s\nthumbprint %s: read it out %s\n", path, use, thumbprint, listener)
}

func transportList(c *cli.Context) error {
	return withToken(c, func(token *hsmkeys.OperatorToken) error {
		all, err := operator.TransportKeys(c.Context, token)
		if err != nil {
			return err
		}
		thumbprints := append([]string{}, slices.Sorted(maps.Keys(all))...)
		return cmdline.Print(c, map[string]any{"transport_keys": thumbprints}, func(w io.Writer) {
			for _, t := range thumbprints {
				fmt.Fprintln(w, t)
			}
		})
	})
}

func transportDestroy(c *cli.Context) error {
	return withToken(c, func(token *hsmkeys.OperatorToken) error {
		thumbprint := c.Args().First()
		key, err := operator.TransportKey(c.Context, token, thumbprint)
		if err != nil {
			return err
		}
		if err := cmdline.Confirm(c, fmt.Sprintf("Transport key %s in %s will be destroyed: an enrolment for it, "+
			"which may be on its way, cannot be imported any more.", thumbprint, token), thumbprint[:8]); err != nil {
			return err
		}
		if err := token.DestroyTransportKey(c.Context, key); err != nil {
			return err
		}
		return cmdline.Printf(c, map[string]any{"thumbprint": thumbprint, "destroyed": true},
			"transport key %s is destroyed: an enrolment for it cannot be imported any more\n", thumbprint)
	})
}
