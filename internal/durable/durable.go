// Package durable writes files that are whole, and on disk, or not there; and keeps a program's folder for one process
// and one user.
package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/google/renameio/v2"
)

// WriteFile writes a file in one step, and replaces the one before. When it returns, file and name survive a loss of
// power. A process that is killed meanwhile may leave a file beside path, whose name begins with a dot.
func WriteFile(path string, data []byte, perm os.FileMode) error {
	dir := filepath.Dir(path)
	err := renameio.WriteFile(path, data, perm, renameio.WithStaticPermissions(perm), renameio.WithTempDir(dir))
	if err != nil {
		return err
	}
	return SyncDir(dir)
}

// Mkdir makes a folder, unless it is there, so that it survives a loss of power. A parent that is not there is not
// made: it was mistyped, or is not mounted.
func Mkdir(dir string, perm os.FileMode) error {
	if err := CanMkdir(dir); err != nil {
		return err
	}
	if err := os.Mkdir(dir, perm); err != nil && !os.IsExist(err) {
		return err
	}
	return SyncDir(filepath.Dir(dir))
}

// CanMkdir fails unless a folder is there, or the one that it is to be made in.
func CanMkdir(dir string) error {
	for _, path := range []string{dir, filepath.Dir(dir)} {
		switch info, err := os.Stat(path); {
		case err == nil && info.IsDir():
			return nil
		case err == nil:
			return fmt.Errorf("%s is a file, and no folder: name another", path)
		case !Missing(err):
			return err
		}
		if info, err := os.Lstat(path); err == nil && info.Mode().Type() == fs.ModeSymlink {
			return fmt.Errorf("%s is a link to what is not there: mount or make that, or name another", path)
		}
	}
	return fmt.Errorf("there is no folder %s to make %s in: check the name, or make it", filepath.Dir(dir),
		filepath.Base(dir))
}

// Missing says whether an error is that a file is not there, or that what should be its folder is a file.
func Missing(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
}

// MkdirAll makes a folder and its parents, so that they survive a loss of power.
func MkdirAll(dir string, perm os.FileMode) error {
	if info, err := os.Stat(dir); err == nil && info.IsDir() {
		return nil
	}
	parent := filepath.Dir(dir)
	if parent != dir {
		if err := MkdirAll(parent, perm); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, perm); err != nil && !os.IsExist(err) {
		return err
	}
	return SyncDir(parent)
}

// SyncDir makes the names in a folder durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
