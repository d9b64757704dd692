package vaultstore

import (
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// Nobody but the Vault of VAULT_CACERT gets a login, whatever the environment says; and no secret is taken from a file
// that all may read.
func TestWhoGetsTheLogin(t *testing.T) {
	var asked atomic.Int64
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		w.Write([]byte(`{"auth":{"client_token":"t"}}`))
	}))
	defer server.Close()
	dir := t.TempDir()
	file := func(name string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, []byte("s"), mode), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	closed, open := file("closed", 0o640), file("open", 0o644)
	for name, c := range map[string]struct {
		address, skip, key, file, want string
	}{
		"VAULT_SKIP_VERIFY":    {"https://vault.invalid", "true", "", closed, "VAULT_SKIP_VERIFY"},
		"a secret id for all":  {server.URL, "", "", open, "open to every user of the machine (mode 0644)"},
		"a client key for all": {server.URL, "", open, closed, "open to every user of the machine (mode 0644)"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("VAULT_ADDR", c.address)
			t.Setenv("VAULT_SKIP_VERIFY", c.skip)
			t.Setenv("VAULT_CLIENT_KEY", c.key)
			_, err := Connect(t.Context(), Login{RoleID: "r", SecretIDFile: c.file}, slog.New(slog.DiscardHandler))
			if !errors.Is(err, ErrSettings) || !strings.Contains(err.Error(), c.want) {
				t.Error(err)
			}
			if n := asked.Load(); n > 0 {
				t.Errorf("the server was asked %d times", n)
			}
		})
	}
}
