package factory

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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

// GrantedLots lists the lots that an operator was granted, sorted.
func GrantedLots(state, operator string) (lots []string, err error) {
	if err := directory.CheckName(operator); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(filepath.Join(state, "grants", operator))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("operator %s was granted nothing, as far as the folder %s knows", operator, state)
	}
	for _, e := range entries {
		if directory.CheckName(e.Name()) == nil {
			lots = append(lots, e.Name())
		}
	}
	return lots, err
}
