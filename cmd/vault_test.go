package cmd_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/programs"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/vaulttest"
)

// A wrapped secret id is good for one login: a command of the line needs no second one.
func TestVaultWrappedSecretID(t *testing.T) {
	t.Parallel()
	server := vaulttest.Start(t)
	dir := t.TempDir()
	softhsm := filepath.Join(dir, "softhsm")
	token := softhsmtest.Make(t, softhsm, "factory")["factory"]
	factory := func(login, words string) {
		t.Helper()
		cmd := exec.Command(filepath.Join(programs.Dir(t), "factory"), strings.Fields(words)...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), softhsmtest.Env(softhsm), "KMEHSM_TOKEN="+token.URI, "VAULT_ADDR="+server.Addr,
			"KMEHSM_DIRECTORY=vault:kme", "VAULT_TOKEN="+login)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("factory %s: %v\n%s", words, err, out)
		}
	}
	factory(server.Root, "vault setup")
	root := server.Client(t, server.Root)
	must.Do(t, root.Sys().EnableAuthWithOptions("approle", &api.EnableAuthOptions{Type: "approle"}))
	const role = "auth/approle/role/kme-factory-publisher"
	must.Get[*api.Secret](t)(root.Logical().Write(role,
		map[string]any{"token_policies": "kme-factory-publisher"}))
	roleID := must.Get[*api.Secret](t)(root.Logical().Read(role + "/role-id")).Data["role_id"].(string)
	wrapping := server.Client(t, server.Root)
	wrapping.SetWrappingLookupFunc(func(string, string) string { return "5m" })

	factory("", "init")
	for _, words := range []string{
		"lot create L1 --tac 35209900 --first 0 --count 4 --bits 2048", "lot list", "lot status L1",
		"lot show L1 --ask-token", "lot refresh", "reconcile L1", "lot seal L1 --force --yes",
	} {
		secret := must.Get[*api.Secret](t)(wrapping.Logical().Write(role+"/secret-id", nil))
		must.Do(t, os.WriteFile(filepath.Join(dir, "secret"), []byte(secret.WrapInfo.Token), 0o600))
		factory("", words+" --vault-role-id "+roleID+" --vault-secret-id-file secret --vault-secret-id-wrapped")
	}
}
