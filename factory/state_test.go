package factory

import (
	"os"
	"slices"
	"strings"
	"testing"
)

func TestGrantedLots(t *testing.T) {
	state := State{Dir: t.TempDir()}
	for _, grant := range []string{"acme/L2", "acme/L1", "Beta/L3"} {
		if err := os.MkdirAll(state.path("grants", grant), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if lots, err := state.GrantedLots("acme"); err != nil || !slices.Equal(lots, []string{"L1", "L2"}) {
		t.Error(lots, err)
	}
	if lots, err := state.GrantedLots("ACME"); err == nil || !strings.Contains(err.Error(), "granted nothing") {
		t.Error(lots, err)
	}
	// To Vault these two are one: each would have the lots of the policy that was written last.
	if err := os.Mkdir(state.path("grants", "beta"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"beta", "Beta"} {
		if lots, err := state.GrantedLots(name); err == nil || !strings.Contains(err.Error(), "Beta and beta") {
			t.Error(lots, err)
		}
	}
}
