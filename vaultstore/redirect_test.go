package vaultstore

import (
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/directory"
)

// A Vault that was just unsealed redirects to the active node that it remembers, which may be itself, or one that
// redirects too. That is no answer: nothing was written, and nothing is known of what is there.
func TestNoActiveNode(t *testing.T) {
	var target string
	var left atomic.Int64 // requests that are redirected
	redirect := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case left.Add(-1) >= 0:
			w.Header().Set("Location", target+r.URL.Path)
			w.WriteHeader(http.StatusTemporaryRedirect)
		case r.URL.Path == "/v1/sys/internal/ui/mounts/kme":
			io.WriteString(w, `{"data":{"type":"kv","options":{"version":"2"}}}`)
		default:
			io.WriteString(w, `{"data":{"data":{"jws":"x"},"metadata":{"version":1}}}`)
		}
	})
	one, other := httptest.NewServer(redirect), httptest.NewServer(redirect)
	defer one.Close()
	defer other.Close()
	secretID := filepath.Join(t.TempDir(), "secret-id")
	if err := os.WriteFile(secretID, []byte("s"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("VAULT_ADDR", one.URL)
	t.Setenv("VAULT_TOKEN", "t")
	client, err := Connect(t.Context(), Login{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	client.SetMinRetryWait(time.Millisecond)
	client.SetMaxRetryWait(time.Millisecond)
	store := New(client, "kme")
	target = "http://vault.invalid"
	left.Store(1 << 40)
	if err := second(store.Read(t.Context(), "lots/L1/revocations")); err == nil ||
		!strings.Contains(err.Error(), "a redirect of Vault is to http://vault.invalid, which has no TLS") {
		t.Errorf("to another machine without TLS: %v", err)
	}
	for name, to := range map[string]string{"to itself": one.URL, "to another that redirects": other.URL} {
		t.Run(name, func(t *testing.T) {
			target = to
			for what, ask := range map[string]func() error{
				"create": func() error { return store.Create(t.Context(), "lots/L1/manifest", []byte("x")) },
				"update": func() error { return store.Update(t.Context(), "lots/L1/revocations", []byte("x"), "") },
				"read":   func() error { return second(store.Read(t.Context(), "lots/L1/revocations")) },
				"list":   func() error { return first(store.List(t.Context(), "lots")) },
			} {
				for _, checked := range []bool{false, true} { // the mount
					store.checked.Store(checked)
					left.Store(1 << 40)
					if err := ask(); !errors.Is(err, directory.ErrUnavailable) {
						t.Errorf("%s, checked %v: %v", what, checked, err)
					}
					left.Store(3)
					if err := ask(); err != nil {
						t.Errorf("%s, and there is an active node in the end: %v", what, err)
					}
				}
			}
			logins := map[string]Login{"AppRole": {RoleID: "r", SecretIDFile: secretID}, "the environment's token": {}}
			for what, l := range logins {
				left.Store(1 << 40)
				if _, err := (&session{client: client, login: l}).token(t.Context()); !errors.Is(err,
					directory.ErrUnavailable) {
					t.Errorf("login by %s: %v", what, err)
				}
			}
		})
	}
}
