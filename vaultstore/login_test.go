package vaultstore

import (
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/internal/vaulttest"
	"github.com/kmehsm/kmehsm/policies"
)

// shortly is a role whose tokens are renewed, and logged in anew, within a test. Each is when half of a life is over:
// at 10 seconds and at 17.5. A busy machine may be late by nearly the other half, 7.5 seconds at least.
func shortly() map[string]any {
	return map[string]any{"token_policies": "p", "token_ttl": "20s", "token_max_ttl": "25s"}
}

func TestVaultLogin(t *testing.T) {
	server := vaulttest.Start(t)
	root := server.Client(t, server.Root)
	server.Mount(t, "kme", "2")
	if err := New(root, "kme").Create(t.Context(), "lots/L1/manifest", []byte("x")); err != nil {
		t.Fatal(err)
	}
	text, err := policies.Of("kme", policies.Publisher)
	if err == nil {
		err = errors.Join(root.Sys().PutPolicy("p", text),
			root.Sys().EnableAuthWithOptions("approle", &api.EnableAuthOptions{Type: "approle"}))
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := root.Logical().Write("auth/approle/role/r", shortly()); err != nil {
		t.Fatal(err)
	}
	role, err := root.Logical().Read("auth/approle/role/r/role-id")
	if err != nil {
		t.Fatal(err)
	}
	roleID := role.Data["role_id"].(string)
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	secretID := func() string {
		s, err := root.Logical().Write("auth/approle/role/r/secret-id", nil)
		if err != nil {
			t.Fatal(err)
		}
		return s.Data["secret_id"].(string)
	}
	wrapping := server.Client(t, server.Root)
	wrapping.SetWrappingLookupFunc(func(string, string) string { return "5m" })
	wrapped, err := wrapping.Logical().Write("auth/approle/role/r/secret-id", nil)
	if err != nil {
		t.Fatal(err)
	}
	plain, wrappedFile := secretID(), file("wrapped", wrapped.WrapInfo.Token)
	t.Setenv("VAULT_ADDR", server.Addr)

	for name, l := range map[string]Login{
		"AppRole":                 {RoleID: roleID, SecretIDFile: file("plain", plain)},
		"AppRole, wrapped secret": {RoleID: roleID, SecretIDFile: wrappedFile, Wrapped: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := t.Context()
			log := new(testproc.Log)
			client, err := Connect(ctx, l,
				slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})))
			if err != nil {
				t.Fatal(err)
			}
			store, first := New(client, "kme"), client.Token()
			anew := func() bool {
				return client.Token() != first && strings.Contains(log.String(), "logged in to Vault anew")
			}
			for start := time.Now(); !anew(); time.Sleep(100 * time.Millisecond) {
				if _, _, err := store.Read(ctx, "lots/L1/manifest"); err != nil {
					t.Fatalf("after %v: %v\n%s", time.Since(start), err, log)
				}
				if time.Since(start) > testproc.Patience {
					t.Fatalf("no new login:\n%s", log)
				}
			}
			if _, _, err := store.Read(ctx, "lots/L1/manifest"); err != nil {
				t.Errorf("with the new token: %v", err)
			}
			for _, secret := range []string{first, client.Token(), plain} {
				if strings.Contains(log.String(), secret) {
					t.Error("the log has a token or a secret id")
				}
			}
		})
	}
	// A secret id that is replaced in its file is the one of the next login; calls go on meanwhile.
	before := secretID()
	replaced := file("replaced", before)
	t.Run("AppRole, secret replaced", func(t *testing.T) {
		t.Parallel()
		write := func(path string, data map[string]any) *api.Secret {
			t.Helper()
			return must.Get[*api.Secret](t)(root.Logical().Write("auth/approle/role/r/"+path, data))
		}
		client := must.Get[*api.Client](t)(Connect(t.Context(), Login{RoleID: roleID, SecretIDFile: replaced},
			slog.New(slog.DiscardHandler)))
		token := client.Token()
		after := write("secret-id", nil).Data["secret_id"].(string)
		must.Do(t, os.WriteFile(replaced, []byte(after+"\n"), 0o600))
		write("secret-id/destroy", map[string]any{"secret_id": before})
		works := func() {
			t.Helper()
			if _, _, err := New(client, "kme").Read(t.Context(), "lots/L1/manifest"); err != nil {
				t.Error(err)
			}
		}
		testproc.Await(t, "a new login", func() bool { works(); return client.Token() != token })
		works()
	})
	for name, c := range map[string]struct {
		login Login
		want  string
	}{
		"a wrapping token used before": {Login{RoleID: roleID, SecretIDFile: file("used", "hvs.none"), Wrapped: true},
			"unwrapped"},
		"a wrong secret id":     {Login{RoleID: roleID, SecretIDFile: file("wrong", "wrong")}, "is refused"},
		"no secret id file":     {Login{RoleID: roleID, SecretIDFile: dir + "/none"}, "none"},
		"role without secret":   {Login{RoleID: roleID}, "secret id"},
		"two ways at once":      {Login{RoleID: roleID, SecretIDFile: "x", CertRole: "c"}, "not both"},
		"no login at all":       {Login{}, "VAULT_TOKEN"},
		"no client certificate": {Login{CertRole: "c"}, "is refused"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Connect(t.Context(), c.login, slog.New(slog.DiscardHandler)); err == nil ||
				!strings.Contains(err.Error(), c.want) {
				t.Errorf("%v does not say %q", err, c.want)
			} else if strings.Contains(err.Error(), plain) {
				t.Error("the error has the secret id")
			}
		})
	}
}

// A server that is none is named as that, without the page that it answers.
func TestAnotherServer(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "<!DOCTYPE html>\n<title>no page of ours</title>", http.StatusNotFound)
	}))
	defer server.Close()
	t.Setenv("VAULT_ADDR", server.URL)
	t.Setenv("VAULT_TOKEN", "x")
	_, err := Connect(t.Context(), Login{}, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "no Vault: see that VAULT_ADDR is its address") ||
		strings.Contains(err.Error(), "page") {
		t.Error(err)
	}
}

// Without TLS, only a Vault of this machine is asked.
func TestEnvironment(t *testing.T) {
	for address, want := range map[string]string{
		"https://vault.example:8200": "",
		"http://127.0.0.1:8200":      "",
		"http://127.9.9.9":           "",
		"http://[::1]:8200":          "",
		"http://localhost:8200":      "",
		"http://10.99.0.4:8200": "http://10.99.0.4:8200 could read the login: have Vault serve TLS, and set " +
			"VAULT_ADDR to https://10.99.0.4:8200;",
		"http://localhost.example":       "set VAULT_ADDR to https://localhost.example;",
		"http://0.0.0.0:8200":            "have Vault serve TLS",
		"http://u:p@vault.example":       "http://u:xxxxx@vault.example could",
		"http://127.0.0.1@vault.example": "have Vault serve TLS",
		"http://127.0.0.1.example":       "have Vault serve TLS",
		"vault.example:8200":             "VAULT_ADDR is https://HOST:PORT, or http://HOST:PORT of this machine, not",
		"ftp://127.0.0.1":                "VAULT_ADDR is https://HOST:PORT",
	} {
		t.Setenv("VAULT_ADDR", address)
		t.Setenv("VAULT_TOKEN", "x")
		err := CheckEnvironment()
		if want != "" {
			if _, connect := Connect(t.Context(), Login{}, slog.New(slog.DiscardHandler)); connect == nil ||
				connect.Error() != err.Error() {
				t.Errorf("%s: connected: %v", address, connect)
			}
		}
		if (err == nil) != (want == "") || err != nil && (!strings.Contains(err.Error(), want) ||
			!errors.Is(err, ErrSettings)) {
			t.Errorf("%s: %v, want %q", address, err, want)
		}
	}
}
