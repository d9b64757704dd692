package factory

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestGrantedLots(t *testing.T) {
	state := t.TempDir()
	for _, grant := range []string{"acme/L2", "acme/L1", "Beta/L3"} {
		if err := os.MkdirAll(filepath.Join(state, "grants", grant), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if lots, err := GrantedLots(state, "acme"); err != nil || !slices.Equal(lots, []string{"L1", "L2"}) {
		t.Error(lots, err)
	}
	if lots, err := GrantedLots(state, "ACME"); err == nil || !strings.Contains(err.Error(), "granted nothing") {
		t.Error(lots, err)
	}
	// To Vault these two are one: each would have the lots of the policy that was written last.
	if err := os.Mkdir(filepath.Join(state, "grants", "beta"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"beta", "Beta"} {
		if lots, err := GrantedLots(state, name); err == nil || !strings.Contains(err.Error(), "Beta and beta") {
			t.Error(lots, err)
		}
	}
}
