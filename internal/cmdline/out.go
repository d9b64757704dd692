package cmdline

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/kmehsm/kmehsm/internal/durable"
)

// WriteNew writes a file for another party. One that is there with the same content is left as it is; one with another
// content may be the only one of its kind, and is an error.
func WriteNew(path string, data []byte, perm os.FileMode) error {
	if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, data) {
		return nil
	}
	if err := CheckNew(path); err != nil {
		return err
	}
	if err := durable.WriteFile(path, data, perm); err != nil {
		return fmt.Errorf("the file cannot be written; make room, or name another with --out: %w", err)
	}
	return nil
}

// CheckNew fails if there is a file, or no folder for it. It comes before work whose result is never the same twice.
func CheckNew(path string) error {
	_, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Stat(filepath.Dir(path)); errors.Is(err, fs.ErrNotExist) {
			return Usagef("--out: there is no folder %s", filepath.Dir(path))
		}
		return nil
	case err == nil:
		err = fmt.Errorf("%s is there already, with another content: name another file with --out, or move that one "+
			"away", path)
	}
	return err
}
