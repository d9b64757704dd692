package directory

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

	"github.com/google/renameio/v2"

	"github.com/kmehsm/kmehsm/internal/durable"
)

// temporary marks files that are being written; no path of an object begins so.
const temporary = ".tmp-"

// A FileStore keeps each object in a file, below a folder.
type FileStore struct{ dir string }

var _ Store = (*FileStore)(nil)

// OpenFileStore keeps objects below dir, which is made with the first one.
func OpenFileStore(dir string) (*FileStore, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if info, err := os.Stat(abs); err == nil && !info.IsDir() {
		return nil, fmt.Errorf("%s is a file, not a folder", abs)
	}
	return &FileStore{abs}, nil
}

func (s *FileStore) file(path string) (string, error) {
	if !filepath.IsLocal(path) || strings.Contains(path, "/.") {
		return "", fmt.Errorf("%q is no path of an object", path)
	}
	return filepath.Join(s.dir, filepath.FromSlash(path)), nil
}

// Create writes a temporary file and links it to its name, which fails where there is one, whoever made it.
func (s *FileStore) Create(ctx context.Context, path string, data []byte) error {
	if err := cmp.Or(ctx.Err(), CheckSize(path, data)); err != nil {
		return err
	}
	file, err := s.file(path)
	if err != nil {
		return err
	}
	dir := filepath.Dir(file)
	if err := durable.MkdirAll(dir, 0o755); err != nil {
		return cannotWrite(path, err)
	}
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
			return NewConflictError(path, have, data)
		}
	} else if err != nil {
		return cannotWrite(path, err)
	}
	// Also where another process linked it: its success may not be on disk yet.
	return durable.SyncDir(dir)
}

func (s *FileStore) Read(ctx context.Context, path string) (data []byte, version string, err error) {
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
		return nil, "", fmt.Errorf("%s: %w", path, ErrNotFound)
	case err != nil:
		return nil, "", fmt.Errorf("%s cannot be read: %w", path, err)
	case info.Size() > MaxObject || !info.Mode().IsRegular():
		return nil, "", fmt.Errorf("%s cannot be read: it is larger than any object, or no file", path)
	}
	if data, err = os.ReadFile(file); err != nil {
		return nil, "", fmt.Errorf("%s cannot be read: %w", path, err)
	}
	sum := sha256.Sum256(data)
	return data, hex.EncodeToString(sum[:]), nil
}

// Update compares and replaces under a lock on the object's folder, which other processes take too.
func (s *FileStore) Update(ctx context.Context, path string, data []byte, version string) error {
	if err := CheckSize(path, data); err != nil {
		return err
	}
	file, err := s.file(path)
	if err != nil {
		return err
	}
	dir := filepath.Dir(file)
	if err := durable.MkdirAll(dir, 0o755); err != nil {
		return cannotWrite(path, err)
	}
	lock, err := os.Open(dir)
	if err != nil {
		return cannotWrite(path, err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return cannotWrite(path, err)
	}
	_, now, err := s.Read(ctx, path)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	if now != version {
		return fmt.Errorf("%s: %w", path, ErrChanged)
	}
	if err := renameio.WriteFile(file, data, 0o644, renameio.WithTempDir(dir)); err != nil {
		return cannotWrite(path, err)
	}
	return durable.SyncDir(dir)
}

func (s *FileStore) List(ctx context.Context, path string) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	dir, err := s.file(path)
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
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

func cannotWrite(path string, err error) error {
	return fmt.Errorf("%s cannot be written; check the folder's owner and the room on its disk, and run this again: %w", path, err)
}
