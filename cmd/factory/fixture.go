package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/pemkey"
)

var fixtureFlag = &cli.StringFlag{Name: "fixture", Category: cmdline.Configured,
	Usage: "the fixture that the packages are for, `NAME` (default: the one that is enrolled)"}

func fixtureCommand() *cli.Command {
	return &cli.Command{
		Name: "fixture", Usage: "the fixtures that inject keys into devices",
		Subcommands: []*cli.Command{{
			Name: "enroll", Usage: "make a fixture's own injection key, and write it wrapped to the fixture's RSA " +
				"key (RSA-OAEP)", ArgsUsage: "NAME",
			Description: "This needs the security officer's PIN: an injection key leaves the token only under a key " +
				"that the security officer has made TRUSTED. If the fixture has a new RSA key, run it again. With " +
				"the next --generation it makes a new injection key, for all packages from then on.",
			Flags: enrolFlags("injection key",
				&cli.StringFlag{Name: "fixture-key",
					Usage: "the fixture's public key, RSA of 3072 bits or more, as `PEM`"}),
			Action: cmdline.Alone(cmdline.Requiring(fixtureEnroll, "fixture-key", "out")),
		}},
	}
}

func fixtureEnroll(c *cli.Context) error {
	data, err := durable.ReadFile(c.String("fixture-key"))
	if err != nil {
		return err
	}
	key, err := pemkey.RSA(data)
	if err != nil {
		return fmt.Errorf("the fixture's key %s: %w", c.String("fixture-key"), err)
	}
	name := c.Args().First()
	return enroll(c, "fixture enroll", func(officer hsmkeys.PIN) (*factory.Enrolled, error) {
		return factory.EnrollFixture(c.Context, c.String("token"), officer, name, key, c.Int("generation"))
	}, func(e *factory.Enrolled) (map[string]any, string) {
		return map[string]any{"fixture": name, "injection_key": e.KeyID},
			fmt.Sprintf("the injection key %s of fixture %s, wrapped to the fixture's key %s", e.KeyID, name,
				pemkey.Thumbprint(key))
	})
}
