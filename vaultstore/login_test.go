package vaultstore

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

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
