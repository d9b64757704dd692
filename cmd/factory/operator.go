package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/directories"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/policies"
)

func operatorCommand() *cli.Command {
	return &cli.Command{
		Name: "operator", Usage: "the operators that are granted lots",
		Subcommands: []*cli.Command{{
			Name: "enroll", Usage: "make an operator's KEK as a TRUSTED key, and write it wrapped to the operator's " +
				"transport key", ArgsUsage: "NAME",
			Description: "The operator makes a transport key with keysvc transport new, gives you the file, and " +
				"reads out its thumbprint over a trusted channel, in person or by telephone: whoever has the private " +
				"half will get the lots that you grant. This needs the security officer's PIN, because only keys " +
				"that the security officer has made TRUSTED may wrap a lot key.",
			Flags: enrolFlags("KEK", &cli.StringFlag{Name: "transport-key",
				Usage: "the operator's transport key, the `FILE` that keysvc transport new wrote"},
				&cli.StringFlag{Name: "thumbprint", Usage: "its thumbprint, `T`, as the operator reads it out"}),
			Action: cmdline.Alone(cmdline.Requiring(operatorEnroll, "transport-key", "thumbprint", "out")),
		}, {
			Name: "policy", Usage: "print the Vault policy of one operator: its granted lots, to read",
			ArgsUsage: "NAME", Description: "For vault policy write MOUNT-operator-NAME -",
			Flags: []cli.Flag{stateFlag, &cli.StringFlag{Name: "directory", EnvVars: []string{"KMEHSM_DIRECTORY"},
				Category: cmdline.Configured, Usage: "the directory, vault:`MOUNT`"}, cmdline.JSON},
			Action: operatorPolicy,
		}},
	}
}

func operatorEnroll(c *cli.Context) error {
	data, err := durable.ReadFile(c.String("transport-key"))
	if err != nil {
		return err
	}
	transport, err := handover.ParseReceiver(handover.TypeTransportKey, data, c.String("thumbprint"))
	if err != nil {
		return fmt.Errorf("the operator's transport key %s: %w", c.String("transport-key"), err)
	}
	name := c.Args().First()
	return enroll(c, "operator enroll", func(officer hsmkeys.PIN) (*factory.Enrolled, error) {
		return factory.EnrollOperator(c.Context, c.String("token"), officer, name, transport, c.Int("generation"))
	}, func(e *factory.Enrolled) (map[string]any, string) {
		what := map[bool]string{true: "a new KEK", false: "the KEK made before"}[e.Created]
		return map[string]any{"operator": name, "created": e.Created},
			fmt.Sprintf("%s of operator %s, wrapped to transport key %s", what, name,
				pemkey.Thumbprint(transport))
	})
}

func operatorPolicy(c *cli.Context) error {
	mount := directories.Mount(c.String("directory"))
	if mount == "" {
		return usage.Errorf("--directory vault:MOUNT says which mount the policy is for")
	}
	operator := c.Args().First()
	lots, err := state(c).GrantedLots(operator)
	if err != nil {
		return err
	}
	text, err := policies.Operator(mount, operator, lots)
	if err != nil {
		return err
	}
	return cmdline.Printf(c, map[string]any{"operator": operator, "policy": text}, "%s", text)
}
