// Package filestore keeps a directory in a folder: each object in a file.
package filestore

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/durable"
)

// temporary is how the names of files begin that are being written. No object's path begins so.
const temporary = ".tmp-"

// A Store is a directory.Store. Other processes may use the same folder.
type Store struct{ dir string }

var _ directory.Store = (*Store)(nil)

// Open makes a Store below dir. The folder is made with the first object; until then nothing can be read.
func Open(dir string) (*Store, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if info, err := os.Stat(abs); err == nil && !info.IsDir() {
		return nil, fmt.Errorf("%s is a file, not a folder", abs)
	}
	return &Store{dir: abs}, nil
}

func (s *Store) file(path string) (string, error) {
	if !filepath.IsLocal(path) || strings.Contains(path, "/.") {
		return "", fmt.Errorf("%q is no path of an object", path)
	}
	return filepath.Join(s.dir, filepath.FromSlash(path)), nil
}

// place gives the file of an object, and makes its folder.
func (s *Store) place(ctx context.Context, path string, data []byte) (string, error) {
	if err := cmp.Or(ctx.Err(), directory.CheckSize(path, data)); err != nil {
		return "", err
	}
	file, err := s.file(path)
	if err != nil {
		return "", err
	}
	err = durable.Mkdir(s.dir, 0o755)
	if err == nil {
		err = durable.MkdirAll(filepath.Dir(file), 0o755)
	}
	return file, cannotWrite(path, err)
}

// Create writes a temporary file and links it to the object's name, which fails if the name exists, whoever made it.
func (s *Store) Create(ctx context.Context, path string, data []byte) error {
	file, err := s.place(ctx, path, data)
	if err != nil {
		return err
	}
	dir := filepath.Dir(file)
	tmp, err := os.CreateTemp(dir, temporary)
	if err != nil {
		return cannotWrite(path, err)
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(data)
	if err == nil {
		err = errors.Join(tmp.Chmod(0o644), tmp.Sync())
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		return cannotWrite(path, err)
	}
	if err := os.Link(tmp.Name(), file); errors.Is(err, fs.ErrExist) {
		have, _, err := s.Read(ctx, path)
		if err != nil {
			return err
		}
		if !bytes.Equal(have, data) {
			return directory.NewConflictError(path, have, data)
		}
	} else if err != nil {
		return cannotWrite(path, err)
	}
	// Also if another process has linked it: the link may not be on disk yet.
	return cannotWrite(path, durable.SyncDir(dir))
}

func (s *Store) Read(ctx context.Context, path string) (data []byte, version string, err error) {
	if err := ctx.Err(); err != nil {
		return nil, "", err
	}
	file, err := s.file(path)
	if err != nil {
		return nil, "", err
	}
	info, err := os.Stat(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, "", cmp.Or(s.gone(), fmt.Errorf("%s: %w", path, directory.ErrNotFound))
	case err != nil:
		return nil, "", fmt.Errorf("%s cannot be read: %w", path, err)
	case !info.Mode().IsRegular():
		return nil, "", &directory.RefusedError{Object: path, Reason: "it is no file"}
	}
	data, err = durable.ReadUpTo(file, directory.MaxObject)
	switch {
	case len(data) > directory.MaxObject: // whatever size it says that it has
		return nil, "", &directory.RefusedError{Object: path, Reason: "it is larger than any object"}
	case err != nil:
		return nil, "", fmt.Errorf("%s cannot be read: %w", path, err)
	}
	sum := sha256.Sum256(data)
	return data, hex.EncodeToString(sum[:]), nil
}

// gone fails if the folder of all objects is not there: then it is not known what is published. The error is not
// fs.ErrNotExist if the folder could not be made.
func (s *Store) gone() error {
	_, err := os.Stat(s.dir)
	if err := durable.CanMkdir(s.dir); err != nil {
		return fmt.Errorf("the directory's folder: %w", err)
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("the directory's folder %s is not there: check its name, and whether it is mounted: %w", s.dir,
			fs.ErrNotExist)
	}
	return err
}

// Update compares and replaces under a lock on the object's folder, which other processes take too.
func (s *Store) Update(ctx context.Context, path string, data []byte, version string) error {
	file, err := s.place(ctx, path, data)
	if err != nil {
		return err
	}
	dir := filepath.Dir(file)
	lock, err := os.Open(dir)
	if err != nil {
		return cannotWrite(path, err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return cannotWrite(path, err)
	}
	_, now, err := s.Read(ctx, path)
	if err != nil && !errors.Is(err, directory.ErrNotFound) {
		return err
	}
	if now != version {
		return fmt.Errorf("%s: %w", path, directory.ErrChanged)
	}
	return cannotWrite(path, durable.WriteFile(file, data, 0o644))
}

func (s *Store) List(ctx context.Context, path string) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	dir, err := s.file(path)
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, s.gone()
	}
	if err != nil {
		return nil, fmt.Errorf("%s cannot be listed: %w", path, err)
	}
	var names []string
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// cannotWrite explains the error of writing an object. Without an error it is nil.
func cannotWrite(path string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s cannot be written; check the folder's owner and the room on its disk, and run this again: %w",
		path, err)
}
