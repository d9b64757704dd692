package main

import (
	"cmp"
	"fmt"
	"io"
	"path/filepath"
	"slices"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/usage"
)

func initCommand() *cli.Command {
	return &cli.Command{
		Name: "init", Usage: "make the manufacturer's signing key in the token, and write its public half, " +
			"manufacturer.pem",
		Description: "Operators pin manufacturer.pem: give it to them, and tell them the manufacturer's name, its " +
			"thumbprint, over a trusted channel: in person, or by telephone. Running this again changes nothing. No " +
			"other command makes the --state folder.",
		Flags: []cli.Flag{cmdline.Token, stateFlag,
			&cli.StringFlag{Name: "out", Usage: "a folder, `DIR`, for a copy of manufacturer.pem, which is in the " +
				"--state folder"}, cmdline.JSON},
		Action: cmdline.AloneMaking(initLine),
	}
}

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name: "doctor", Usage: "say what the token can and cannot do, and what follows",
		Flags: []cli.Flag{cmdline.Token, stateFlag, cmdline.JSON}, Action: doctor,
	}
}

func rotateCommand() *cli.Command {
	return &cli.Command{
		Name: "rotate", Usage: "make the next generation of one of the line's own keys, without stopping the line",
		Subcommands: []*cli.Command{{
			Name: "signing-key", Usage: "make the next signing key, which the ones before vouch for",
			Description: "Operators still pin the first key, manufacturer.pem: every object that is signed from now " +
				"on has the statements that lead from that key to the new one. What was signed before stays valid. " +
				"This does not help if the signing key was stolen: then begin as a new manufacturer.",
			Flags: []cli.Flag{cmdline.Token, stateFlag, &cli.IntFlag{Name: "generation",
				Usage: "which one to make, `N`: the first rotation makes 2. With the same N again nothing changes"},
				cmdline.JSON},
			Action: cmdline.Alone(rotateSigningKey),
		}},
	}
}

func initLine(c *cli.Context) error {
	if err := durable.CheckNotOf("keysvc", c.String("state"), "token"); err != nil {
		return err
	}
	kept := state(c).PublicKey()
	path := kept
	if out := c.String("out"); out != "" {
		path = filepath.Join(out, filepath.Base(kept))
	}
	return withAnyToken(c, func(token *hsmkeys.FactoryToken) error {
		if err := cmp.Or(factory.Fits(token, kept), factory.Fits(token, path)); err != nil {
			return usage.Mark(err)
		}
		return recorded(c, token, func(token *hsmkeys.FactoryToken) error {
			pem, keyID, created, err := factory.Init(c.Context, token)
			if err != nil {
				return err
			}
			for _, file := range slices.Compact([]string{kept, path}) {
				if err := durable.MkdirAll(filepath.Dir(file), 0o755); err != nil {
					return usage.Errorf("--out: %w: name another folder", err)
				}
				if err := durable.WriteFile(file, pem, 0o644); err != nil {
					return err
				}
			}
			result := map[string]any{"manufacturer": keyID, "key": path, "created": created, "token": token.Serial()}
			return cmdline.Print(c, result, func(w io.Writer) {
				if created {
					fmt.Fprintf(w, "made the signing key in %s\n", token)
				} else {
					fmt.Fprintf(w, "%s has its key already; nothing changed\n", token)
				}
				fmt.Fprintf(w, "manufacturer %s\npublic key   %s\n", keyID, path)
			})
		})
	})
}

// doctor examines any token, also before factory init. In the line's own folder, the audit log notes it.
func doctor(c *cli.Context) error {
	return withAnyToken(c, func(token *hsmkeys.FactoryToken) error {
		if state(c).Check(token) != nil {
			return examine(c, token)
		}
		return recorded(c, token, func(token *hsmkeys.FactoryToken) error { return examine(c, token) })
	})
}

func examine(c *cli.Context, token *hsmkeys.FactoryToken) error {
	keys, err := factory.Keys(c.Context, token)
	if err != nil {
		return err
	}
	report, err := token.DoctorFactory(c.Context, keys...)
	if err != nil {
		return err
	}
	return cmdline.PrintFindings(c, token, report)
}

func rotateSigningKey(c *cli.Context) error {
	generation := c.Int("generation")
	if generation < 2 {
		return usage.Errorf("--generation is missing: the first rotation makes generation 2; see %s --help",
			c.Command.HelpName)
	}
	return withToken(c, func(token *hsmkeys.FactoryToken) error {
		keyID, created, err := factory.RotateSigningKey(c.Context, token, generation)
		if err != nil {
			return err
		}
		return cmdline.Print(c, map[string]any{"key": keyID, "generation": generation, "created": created},
			func(w io.Writer) {
				if created {
					fmt.Fprintf(w, "made signing key %s, generation %d\n", keyID, generation)
				} else {
					fmt.Fprintf(w, "generation %d of the signing key is there already: %s; nothing changed\n",
						generation, keyID)
				}
			})
	})
}
