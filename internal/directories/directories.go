// Package directories opens the public-key directory that a setting names: file:DIR or vault:MOUNT.
package directories

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/directory/filestore"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/vaultstore"
)

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

// Check refuses what is no name of a directory.
func Check(name string) error {
	switch kind, where, _ := strings.Cut(name, ":"); {
	case where != "" && kind == "file":
		return nil
	case where != "" && kind == "vault":
		if err := directory.CheckName(where); err != nil {
			return usage.In("directory", usage.Errorf("the mount: %w", err))
		}
		return nil
	}
	return usage.In("directory", usage.Errorf("%q is neither file:DIR nor vault:MOUNT", name))
}

// Open opens the store that a name stands for. A login to Vault is kept alive until ctx ends.
func Open(
	ctx context.Context, name string, login vaultstore.Login, log *slog.Logger,
) (directory.Store, error) {
	if err := Check(name); err != nil {
		return nil, err
	}
	kind, where, _ := strings.Cut(name, ":")
	if kind == "file" {
		return filestore.Open(where)
	}
	if err := CheckVault(); err != nil {
		return nil, err
	}
	client, err := vaultstore.Connect(ctx, login, log)
	if err != nil {
		return nil, LoginError(err)
	}
	return vaultstore.New(client, where), nil
}

// LoginError is an error of vaultstore.Connect. One of the environment or the login is an error of usage.
func LoginError(err error) error {
	if errors.Is(err, vaultstore.ErrSettings) {
		return usage.Mark(err)
	}
	return err
}

// CheckVault refuses an environment that does not name Vault as it must; or that has a client's certificate which Vault
// would refuse without saying why.
func CheckVault() error {
	if err := vaultstore.CheckEnvironment(); err != nil {
		return usage.Mark(err)
	}
	path := os.Getenv("VAULT_CLIENT_CERT")
	if chain, err := config.ReadCertificates(path); err == nil {
		if err := config.CheckPurpose(chain[0], x509.ExtKeyUsageClientAuth); err != nil {
			return usage.Errorf("the environment for Vault: the certificate %s %w", path, err)
		}
	}
	return nil
}

// Inspect reports what is wrong with the directory of a setting, without asking Vault.
func Inspect(r *config.Report, name string) {
	if dir, ok := strings.CutPrefix(name, "file:"); ok {
		r.Folder("directory", "the public-key directory", dir, "mount it, or name another")
	} else if Mount(name) != "" {
		if err := CheckVault(); err != nil {
			r.Add("directory", err.Error(), "")
		}
	}
}

// Absolute is the same directory by a name that does not depend on the working folder.
func Absolute(name string) (string, error) {
	if err := Check(name); err != nil {
		return "", err
	}
	dir, ok := strings.CutPrefix(name, "file:")
	if !ok {
		return name, nil
	}
	dir, err := filepath.Abs(dir)
	return fmt.Sprintf("file:%s", dir), err
}

// There fails if a directory in a folder is not there. Of one elsewhere that is not known.
func There(name string) error {
	dir, ok := strings.CutPrefix(name, "file:")
	if !ok {
		return nil
	}
	_, err := os.Stat(dir)
	return err
}

// Mount is the mount of a directory in Vault; empty if a name is none of one.
func Mount(name string) string {
	mount, ok := strings.CutPrefix(name, "vault:")
	if !ok || Check(name) != nil {
		return ""
	}
	return mount
}
