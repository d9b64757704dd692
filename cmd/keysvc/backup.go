package main

import (
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/binding/tokenkeys"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/keysvcd/operator"
)

var soPINFlag = &cli.StringFlag{Name: "so-pin-source",
	Usage: "where the security officer's PIN is: file:/path, a `URI`"}

func backupCommand() *cli.Command {
	return &cli.Command{
		Name: "backup", Usage: "bring the storage and ledger key to another token, from HSM to HSM",
		Description: `On the other token:   keysvc backup prepare --out restore-key.json
                      and read its thumbprint out
On this token:        keysvc backup create --to restore-key.json --thumbprint T --so-pin-source URI --out backup.json
                      and read the backup's thumbprint out
On the other token:   keysvc backup restore backup.json --thumbprint B
KEKs and lot keys never leave a token: enroll the other token with each manufacturer under the same operator name
(keysvc transport new, factory operator enroll, keysvc enroll), and import the same grants there.`,
		Subcommands: []*cli.Command{
			{
				Name: "prepare", Usage: "on the token that is to get the keys: make a key that receives them",
				Description: "keysvc backup restore destroys the key. Until then, whoever has this token's PIN and " +
					"the backup can have the storage key without its limits: do not let days pass between the two.",
				Flags: []cli.Flag{cmdline.Token, stateFlag, acceptFlag,
					&cli.StringFlag{Name: "out",
						Usage: "the `FILE` to write (default: restore-key.json in the --state folder)"}, cmdline.JSON},
				Action: cmdline.AloneMaking(backupPrepare),
			},
			{
				Name: "create", Usage: "on the token that has the keys: wrap them for another token",
				Flags: []cli.Flag{cmdline.Token, stateFlag,
					&cli.StringFlag{Name: "to", Usage: "the other token's key, the `FILE` of keysvc backup prepare"},
					&cli.StringFlag{Name: "thumbprint",
						Usage: "what keysvc backup prepare printed there, read out, `T`"}, soPINFlag,
					&cli.StringFlag{Name: "out", Usage: "the backup, a `FILE` to write"}, cmdline.JSON},
				Action: cmdline.Alone(cmdline.Requiring(backupCreate, "to", "thumbprint", "so-pin-source", "out")),
			},
			{
				Name: "restore", Usage: "on the token that is to get the keys: import them", ArgsUsage: "FILE",
				Flags: []cli.Flag{cmdline.Token, stateFlag, &cli.StringFlag{Name: "thumbprint",
					Usage: "what keysvc backup create printed, read out, `B`"}, cmdline.JSON},
				Action: cmdline.Alone(cmdline.Requiring(backupRestore, "thumbprint")),
			},
		},
	}
}

func backupPrepare(c *cli.Context) error {
	return withToken(c, func(token *hsmkeys.OperatorToken) error {
		path := outOr(c, "restore-key.json")
		stop := cmdline.Spin(c, "making an RSA key in the token")
		thumbprint, err := operator.NewRestoreKey(c.Context, token, c.Bool(acceptFlag.Name), path)
		stop()
		if err != nil {
			return err
		}
		return printReceiver(c, token, path, thumbprint, "for keysvc backup create on the token that has the keys",
			"there")
	})
}

// officerPIN is the PIN that --so-pin-source says.
func officerPIN(c *cli.Context) (hsmkeys.PIN, error) {
	pin, err := hsmkeys.ReadPIN(c.String("so-pin-source"))
	if err != nil {
		err = fmt.Errorf("the security officer's PIN: %w", err)
	}
	return pin, err
}

func backupCreate(c *cli.Context) error {
	data, err := durable.ReadFile(c.String("to"))
	if err != nil {
		return err
	}
	to, err := handover.ParseReceiver(handover.TypeRestoreKey, data, c.String("thumbprint"))
	if err != nil {
		return fmt.Errorf("--to: %w", err)
	}
	out := c.String("out")
	if err := durable.CheckNew(out); err != nil { // before the PIN is tried
		return err
	}
	officer, err := officerPIN(c)
	if err != nil {
		return err
	}
	uri, err := tokenURI(c)
	if err != nil {
		return err
	}
	b, err := operator.CreateBackup(c.Context, uri, officer, to)
	if err != nil {
		return err
	}
	if err := durable.WriteNew(out, b.Data, 0o644); err != nil {
		return err
	}
	result := map[string]any{"thumbprint": b.Thumbprint, "out": out, "token": b.Token, "keys": b.Keys}
	return cmdline.Printf(c, result, "wrote %s, with %d keys, for keysvc backup restore on the other "+
		"token\nthumbprint %s: read it out there\n", out, len(b.Keys), b.Thumbprint)
}

func backupRestore(c *cli.Context) error {
	data, err := durable.ReadFile(c.Args().First())
	if err != nil {
		return err
	}
	return withToken(c, func(token *hsmkeys.OperatorToken) error {
		taken, err := tokenkeys.Restore(c.Context, token, data, c.String("thumbprint"))
		if err != nil {
			return err
		}
		labels := make([]string, len(taken))
		for i, k := range taken {
			labels[i] = k.Label()
		}
		return cmdline.Print(c, map[string]any{"imported": labels, "token": token.Serial()}, func(w io.Writer) {
			if len(taken) == 0 {
				fmt.Fprintf(w, "%s has the keys of this backup already; nothing changed\n", token)
				return
			}
			fmt.Fprintf(w, "%d keys are in %s, and the key that they came under is destroyed\n", len(taken), token)
		})
	})
}
