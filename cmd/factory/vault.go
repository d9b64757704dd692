package main

import (
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/directories"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/policies"
	"github.com/kmehsm/kmehsm/vaultstore"
)

func vaultCommand() *cli.Command {
	return &cli.Command{
		Name: "vault", Usage: "HashiCorp Vault as the public-key directory",
		Subcommands: []*cli.Command{{
			Name: "setup", Usage: "make the directory's mount, write its policies, and print the AppRole steps",
			Description: "It needs a token of Vault's administrator (VAULT_ADDR, VAULT_TOKEN): none of the policies " +
				"that it writes allows this. Running it again only corrects what is not as it should be.",
			Flags: append(cmdline.DirectoryFlags(),
				&cli.BoolFlag{Name: "dry-run", Usage: "say what would be done, and do nothing"}, cmdline.JSON),
			Action: vaultSetup,
		}},
	}
}

func vaultSetup(c *cli.Context) error {
	mount := directories.Mount(c.String("directory"))
	if mount == "" {
		return usage.Errorf("--directory vault:MOUNT says which mount to set up")
	}
	if err := directories.CheckVault(); err != nil {
		return err
	}
	client, err := vaultstore.Connect(c.Context, cmdline.VaultLogin(c), cmdline.StderrLog(c))
	if err != nil {
		return directories.LoginError(err)
	}
	steps, err := vaultstore.Setup(c.Context, client, mount, c.Bool("dry-run"))
	if err != nil {
		return err
	}
	return cmdline.Print(c, map[string]any{"mount": mount, "dry_run": c.Bool("dry-run"), "steps": steps},
		func(w io.Writer) {
			for _, s := range steps {
				mark := "done"
				switch {
				case s.Done:
					mark = "is there"
				case c.Bool("dry-run"):
					mark = "to do"
				}
				fmt.Fprintf(w, "%-8s  %s\n", mark, s.What)
			}
			publisher := policies.Name(mount, policies.Publisher)
			fmt.Fprintf(w, `
What is left, for the line:
  vault auth enable approle
  vault write auth/approle/role/%[1]s token_policies=%[1]s token_ttl=1h token_max_ttl=24h
  vault read -field=role_id auth/approle/role/%[1]s/role-id
  vault write -f -wrap-ttl=10m -field=wrapping_token auth/approle/role/%[1]s/secret-id >FILE
  factory lot ... --directory vault:%[2]s --vault-role-id ID --vault-secret-id-file FILE --vault-secret-id-wrapped
and for each operator, after each grant:
  factory operator policy NAME --directory vault:%[2]s | vault policy write %[3]s -
  vault write auth/approle/role/%[3]s token_policies=%[3]s token_ttl=1h token_max_ttl=24h
`, publisher, mount, policies.OperatorName(mount, "NAME"))
		})
}
