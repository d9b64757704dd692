package cmdline

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/kmehsm/kmehsm/directory"
)

// OpenDirectory opens the store that --directory names: file:DIR.
func OpenDirectory(name string) (directory.Store, error) {
	kind, where, _ := strings.Cut(name, ":")
	if where == "" || kind != "file" {
		return nil, Usagef("--directory %q is not file:DIR", name)
	}
	return directory.OpenFileStore(where)
}

// AbsoluteDirectory is the same directory by a name that does not depend on the working folder.
func AbsoluteDirectory(name string) (string, error) {
	if _, err := OpenDirectory(name); err != nil {
		return "", err
	}
	dir, err := filepath.Abs(strings.TrimPrefix(name, "file:"))
	return fmt.Sprintf("file:%s", dir), err
}
