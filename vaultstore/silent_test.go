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
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// A silent Vault takes connections and requests, and answers none until it is told to.
type silent struct {
	speaks chan struct{} // closed when it answers
	busy   atomic.Bool   // then it answers that it is
}

func (s *silent) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	select {
	case <-s.speaks:
	case <-r.Context().Done():
		return
	}
	switch {
	case s.busy.Load():
		w.WriteHeader(http.StatusServiceUnavailable)
	case strings.HasSuffix(r.URL.Path, "/login"):
		w.Write([]byte(`{"auth":{"client_token":"t"}}`))
	case strings.Contains(r.URL.Path, "/mounts/"):
		w.Write([]byte(`{"data":{"type":"kv","options":{"version":"2"}}}`))
	default:
		w.Write([]byte(`{"data":{"data":{"jws":"x"},"metadata":{"version":1}}}`))
	}
}

// A service starts although Vault is silent, and none of its reads waits for long: neither for an answer, nor because
// the client tries again and again. When Vault speaks, all is well.
func TestSilent(t *testing.T) {
	vault := &silent{speaks: make(chan struct{})}
	server := httptest.NewServer(vault)
	t.Cleanup(server.Close)
	t.Setenv("VAULT_ADDR", server.URL)
	t.Setenv("VAULT_TOKEN", "")
	file := filepath.Join(t.TempDir(), "secret-id")
	if err := os.WriteFile(file, []byte("s"), 0o600); err != nil {
		t.Fatal(err)
	}
	// Without the time-outs each of these takes minutes, or for ever.
	soon := func(what string, f func()) {
		t.Helper()
		start := time.Now()
		if f(); time.Since(start) > 10*answerTimeout {
			t.Errorf("%s has taken %s", what, time.Since(start))
		}
	}
	var store *Store
	soon("the login", func() {
		client, err := Connect(t.Context(), Login{RoleID: "r", SecretIDFile: file, Wait: true},
			slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		client.SetMaxRetries(10_000)
		store = New(client, "kme")
	})
	fails := func(what string) {
		soon(what, func() {
			if _, _, err := store.Read(t.Context(), "lots/L1/manifest"); !errors.Is(err, directory.ErrUnavailable) {
				t.Errorf("%s: %v", what, err)
			}
		})
	}
	fails("a read of a silent Vault")
	close(vault.speaks)
	works := func() {
		t.Helper()
		for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
			data, _, err := store.Read(t.Context(), "lots/L1/manifest")
			if err == nil && string(data) == "x" {
				return
			}
			if time.Since(start) > testproc.Patience {
				t.Fatal(err)
			}
		}
	}
	works()
	vault.busy.Store(true)
	fails("a read of a busy Vault")
	vault.busy.Store(false)
	works()
}

// An answer without an end fills no memory.
func TestEndless(t *testing.T) {
	var sent atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasSuffix(r.URL.Path, "/lookup-self"):
			w.WriteHeader(http.StatusForbidden)
			return
		case strings.Contains(r.URL.Path, "/mounts/"):
			w.Write([]byte(`{"data":{"type":"kv","options":{"version":"2"}}}`))
			return
		}
		some := []byte(strings.Repeat("x", 1<<20))
		for w.Write([]byte(`{"data":{"keys":["`)); sent.Load() < 4*maxNames; sent.Add(int64(len(some))) {
			if _, err := w.Write(some); err != nil {
				return
			}
		}
	}))
	t.Cleanup(server.Close)
	t.Setenv("VAULT_ADDR", server.URL)
	t.Setenv("VAULT_TOKEN", "t")
	client, err := Connect(t.Context(), Login{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	store := New(client, "kme")
	for what, c := range map[string]struct {
		ask  func() error
		most int64
	}{
		"a read": {func() error { _, _, err := store.Read(t.Context(), "lots/L1/manifest"); return err }, maxAnswer},
		"a list": {func() error { _, err := store.List(t.Context(), "lots"); return err }, maxNames},
	} {
		sent.Store(0)
		if err := c.ask(); err == nil || !strings.Contains(err.Error(), "longer than") {
			t.Errorf("%s: %v", what, err)
		}
		// The rest is in the network's buffers: net.ipv4.tcp_rmem and tcp_wmem, 36 MiB where this was measured.
		if n := sent.Load(); n > c.most+64<<20 {
			t.Errorf("%s took %d bytes", what, n)
		}
	}
}
