package cmdline

import (
	"log/slog"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/vaultstore"
)

// DirectoryFlags name a public-key directory, and say how to log in to Vault where it is there.
func DirectoryFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "directory", EnvVars: []string{"KMEHSM_DIRECTORY"}, Category: Configured,
			Usage: "the public-key directory, `WHERE`: file:DIR, or vault:MOUNT with the " +
				"usual environment (VAULT_ADDR, VAULT_TOKEN, VAULT_CACERT, ...)"},
		&cli.StringFlag{Name: "vault-role-id", Category: Configured,
			Usage: "log in to Vault by AppRole, with this role `ID`"},
		&cli.StringFlag{Name: "vault-secret-id-file", Category: Configured,
			Usage: "the `FILE` with the AppRole's secret id"},
		&cli.BoolFlag{Name: "vault-secret-id-wrapped", Category: Configured,
			Usage: "the file has a wrapping token for the secret id instead"},
		&cli.StringFlag{Name: "vault-cert-role", Category: Configured,
			Usage: "log in to Vault by TLS certificate (VAULT_CLIENT_CERT, VAULT_CLIENT_KEY), in this `ROLE`"},
	}
}

// VaultLogin gives the login that DirectoryFlags name.
func VaultLogin(c *cli.Context) vaultstore.Login {
	return vaultstore.Login{
		RoleID: c.String("vault-role-id"), SecretIDFile: c.String("vault-secret-id-file"),
		Wrapped: c.Bool("vault-secret-id-wrapped"), CertRole: c.String("vault-cert-role"),
	}
}

// StderrLog is the log of a command's background work.
func StderrLog(c *cli.Context) *slog.Logger {
	return slog.New(slog.NewTextHandler(c.App.ErrWriter, &slog.HandlerOptions{Level: slog.LevelWarn}))
}
