package factory

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/durable"
)

// The line remembers in its --state folder who was granted what: grants/OPERATOR/LOT. The grant itself is not kept.

// RecordGrant remembers a grant, durably. It comes before the grant is handed out.
func RecordGrant(state, operator, lot string) error {
	if err := errors.Join(directory.CheckName(operator), directory.CheckName(lot)); err != nil {
		return err
	}
	dir := filepath.Join(state, "grants", operator)
	if err := durable.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(dir, lot), []byte(time.Now().UTC().Format(time.RFC3339)+"\n"), 0o644)
}

// GrantedLots lists the lots that an operator was granted, sorted, for a policy of Vault's. Vault knows no capital
// letters in a policy's name: operators whose names differ in them alone are refused.
func GrantedLots(state, operator string) (lots []string, err error) {
	if err := directory.CheckName(operator); err != nil {
		return nil, err
	}
	names := func(folder ...string) (names []string, err error) {
		entries, err := os.ReadDir(filepath.Join(append([]string{state, "grants"}, folder...)...))
		for _, e := range entries {
			if directory.CheckName(e.Name()) == nil {
				names = append(names, e.Name())
			}
		}
		return names, err
	}
	operators, err := names()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if !slices.Contains(operators, operator) {
		return nil, fmt.Errorf("operator %s was granted nothing, as far as the folder %s knows", operator, state)
	}
	for _, other := range operators {
		if other != operator && strings.EqualFold(other, operator) {
			return nil, fmt.Errorf("to Vault the operators %s and %s are one, and would have one policy: "+
				"enroll one of them by another name, and grant it its lots by that", min(operator, other), max(operator, other))
		}
	}
	return names(operator)
}
