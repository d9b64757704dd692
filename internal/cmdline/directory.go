package cmdline

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/directory/filestore"
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

// Vault is the login to Vault as configurations have it.
type Vault struct {
	RoleID          string `yaml:"role_id"`
	SecretIDFile    string `yaml:"secret_id_file" path:""`
	SecretIDWrapped bool   `yaml:"secret_id_wrapped"`
	CertRole        string `yaml:"cert_role"`
}

// Login is the login.
func (v Vault) Login() vaultstore.Login {
	return vaultstore.Login{
		RoleID: v.RoleID, SecretIDFile: v.SecretIDFile, Wrapped: v.SecretIDWrapped, CertRole: v.CertRole,
	}
}

// VaultLogin is what DirectoryFlags say of the login.
func VaultLogin(c *cli.Context) vaultstore.Login {
	return vaultstore.Login{
		RoleID: c.String("vault-role-id"), SecretIDFile: c.String("vault-secret-id-file"),
		Wrapped: c.Bool("vault-secret-id-wrapped"), CertRole: c.String("vault-cert-role"),
	}
}

// CheckDirectory refuses what is no name of a directory.
func CheckDirectory(name string) error {
	switch kind, where, _ := strings.Cut(name, ":"); {
	case where != "" && kind == "file":
		return nil
	case where != "" && kind == "vault":
		if err := directory.CheckName(where); err != nil {
			return Usagef("the mount of --directory: %w", err)
		}
		return nil
	}
	return Usagef("--directory %q is neither file:DIR nor vault:MOUNT", name)
}

// OpenDirectory opens the store that a name stands for. A login to Vault is kept alive until ctx ends.
func OpenDirectory(
	ctx context.Context, name string, login vaultstore.Login, log *slog.Logger,
) (directory.Store, error) {
	if err := CheckDirectory(name); err != nil {
		return nil, err
	}
	kind, where, _ := strings.Cut(name, ":")
	if kind == "file" {
		return filestore.Open(where)
	}
	client, err := vaultstore.Connect(ctx, login, log)
	if err != nil {
		return nil, VaultError(err)
	}
	return vaultstore.New(client, where), nil
}

// VaultError is an error of vaultstore.Connect. One of the environment or the login is an error of usage.
func VaultError(err error) error {
	if errors.Is(err, vaultstore.ErrSettings) {
		return Usage(err)
	}
	return err
}

// AbsoluteDirectory is the same directory by a name that does not depend on the working folder.
func AbsoluteDirectory(name string) (string, error) {
	if err := CheckDirectory(name); err != nil {
		return "", err
	}
	dir, ok := strings.CutPrefix(name, "file:")
	if !ok {
		return name, nil
	}
	dir, err := filepath.Abs(dir)
	return fmt.Sprintf("file:%s", dir), err
}

// StderrLog is for what a command's background work has to say.
func StderrLog(c *cli.Context) *slog.Logger {
	return slog.New(slog.NewTextHandler(c.App.ErrWriter, &slog.HandlerOptions{Level: slog.LevelWarn}))
}
