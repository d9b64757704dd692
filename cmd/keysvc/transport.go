package main

import (
	"cmp"
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/handover"
)

func transportCommand() *cli.Command {
	return &cli.Command{
		Name: "transport", Usage: "the transport keys, each of which receives one KEK",
		Subcommands: []*cli.Command{
			{
				Name: "new", Usage: "make a transport key for one enrolment, and write its public half for the manufacturer",
				Description: "Give the file to the manufacturer, and read the thumbprint out on another way, on the telephone for instance: nothing in the file proves whose it\nis. keysvc enroll destroys the key when the KEK is in the token. Until then, whoever has the token's PIN and the enrolment can take the KEK too: do not\nlet days pass between the two.",
				Flags: []cli.Flag{cmdline.Token, stateFlag, &cli.StringFlag{Name: "out", Usage: "the `FILE` to write (default: transport.json in the --state folder)"},
					cmdline.JSON},
				Action: cmdline.Alone(transportNew),
			},
			{Name: "list", Usage: "list the transport keys that wait for their enrolment", Flags: []cli.Flag{cmdline.Token, cmdline.JSON}, Action: transportList},
			{
				Name: "destroy", Usage: "destroy a transport key whose enrolment will not come", ArgsUsage: "THUMBPRINT",
				Flags: []cli.Flag{cmdline.Token, stateFlag, cmdline.JSON}, Action: cmdline.Alone(transportDestroy),
			},
		},
	}
}

func transportNew(c *cli.Context) error {
	return cmdline.WithOperator(c, func(token *hsmkeys.OperatorToken) error {
		pub, err := token.NewTransportKey(c.Context)
		if err != nil {
			return err
		}
		return handOut{
			file: "transport.json", make: handover.NewTransportKey, destroy: token.DestroyTransportKey,
			use: "for the manufacturer's factory operator enroll", listener: "to the manufacturer",
		}.do(c, token, pub)
	})
}

// A handOut is how the public half of a key that receives others comes to who sends them.
type handOut struct {
	file          string // its name, in the --state folder
	make          func(pub *rsa.PublicKey, serial string) ([]byte, error)
	destroy       func(context.Context, *rsa.PublicKey) error
	use, listener string // what the file is for, and to whom its thumbprint is read out
}

// do writes the file and says its thumbprint. A key that nobody can be given is destroyed.
func (h handOut) do(c *cli.Context, token *hsmkeys.OperatorToken, pub *rsa.PublicKey) error {
	path := cmp.Or(c.String("out"), filepath.Join(c.String("state"), h.file))
	data, err := h.make(pub, token.Serial())
	if err == nil {
		err = writeOut(path, data)
	}
	if err != nil {
		return fmt.Errorf("the file cannot be written: %w", errors.Join(err, h.destroy(c.Context, pub)))
	}
	thumbprint := directory.RSAThumbprint(pub)
	result := map[string]any{"thumbprint": thumbprint, "out": path, "token": token.Serial()}
	return cmdline.Print(c, result, func(w io.Writer) {
		fmt.Fprintf(w, "wrote %s: %s\nthumbprint %s: read it out %s\n", path, h.use, thumbprint, h.listener)
	})
}

func writeOut(path string, data []byte) error {
	if err := durable.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return durable.WriteFile(path, data, 0o644)
}

func transportList(c *cli.Context) error {
	return withTransportKeys(c, func(_ *hsmkeys.OperatorToken, all map[string]*rsa.PublicKey, thumbprints []string) error {
		return cmdline.Print(c, map[string]any{"transport_keys": thumbprints}, func(w io.Writer) {
			for _, t := range thumbprints {
				fmt.Fprintln(w, t)
			}
		})
	})
}

func transportDestroy(c *cli.Context) error {
	return withTransportKeys(c, func(token *hsmkeys.OperatorToken, all map[string]*rsa.PublicKey, _ []string) error {
		thumbprint := c.Args().First()
		pub := all[thumbprint]
		if pub == nil {
			return fmt.Errorf("%s has no transport key %s: see keysvc transport list", token, thumbprint)
		}
		if err := token.DestroyTransportKey(c.Context, pub); err != nil {
			return err
		}
		return cmdline.Print(c, map[string]any{"thumbprint": thumbprint, "destroyed": true}, func(w io.Writer) {
			fmt.Fprintf(w, "transport key %s is destroyed: an enrolment for it cannot be taken any more\n", thumbprint)
		})
	})
}

func withTransportKeys(c *cli.Context, f func(token *hsmkeys.OperatorToken, all map[string]*rsa.PublicKey, thumbprints []string) error) error {
	return cmdline.WithOperator(c, func(token *hsmkeys.OperatorToken) error {
		keys, err := token.TransportKeys(c.Context)
		if err != nil {
			return err
		}
		all, thumbprints := map[string]*rsa.PublicKey{}, []string{}
		for _, pub := range keys {
			t := directory.RSAThumbprint(pub)
			all[t], thumbprints = pub, append(thumbprints, t)
		}
		slices.Sort(thumbprints)
		return f(token, all, thumbprints)
	})
}
