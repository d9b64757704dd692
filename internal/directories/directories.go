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
			return usage.Errorf("the mount of --directory: %w", err)
		}
		return nil
	}
	return usage.Errorf("--directory %q is neither file:DIR nor vault:MOUNT", name)
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

// CheckVault refuses a client's certificate in the environment that Vault would refuse without saying why. If it cannot
// be read, vaultstore.Connect says so.
func CheckVault() error {
	path := os.Getenv("VAULT_CLIENT_CERT")
	if chain, err := config.ReadCertificates(path); err == nil {
		if err := config.CheckPurpose(chain[0], x509.ExtKeyUsageClientAuth); err != nil {
			return usage.Errorf("the environment for Vault: the certificate %s %w", path, err)
		}
	}
	return nil
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
