package durable

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/kmehsm/kmehsm/internal/usage"
)

// WriteNew writes a file for another party. If the file exists with the same content, nothing changes; with another
// content it is an error, because that may be the only copy.
func WriteNew(path string, data []byte, perm os.FileMode) error {
	if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, data) {
		return nil
	}
	if err := CheckNew(path); err != nil {
		return err
	}
	if err := WriteFile(path, data, perm); err != nil {
		return NotWritten(err)
	}
	return nil
}

// out is the setting that names a file for another party.
const out = "out"

// NotWritten is the error of a file for another party that cannot be written.
func NotWritten(err error) error {
	return usage.In(out, fmt.Errorf("the file cannot be written; make room, or name another: %w", err))
}

// CheckNew fails if path exists, or its folder does not. Call it before work whose result differs each time. Its errors
// are about the setting out.
func CheckNew(path string) error { return usage.In(out, checkNew(path)) }

func checkNew(path string) error {
	if folder, err := os.Stat(filepath.Dir(path)); err != nil || !folder.IsDir() {
		return usage.Errorf("there is no folder %s", filepath.Dir(path))
	}
	switch there, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return usage.Errorf("%w: name another file", err)
	case there.IsDir():
		return usage.Errorf("%s is a folder: name a file in it", path)
	}
	return fmt.Errorf("%s is there already, with another content: name another file, or move that one away", path)
}

// ReadFile reads a file that people have put there, with a limit on its size.
func ReadFile(path string) ([]byte, error) { return ReadUpTo(path, 16<<20) }

// ReadUpTo reads a file, whatever size it says that it has, with a limit on its bytes.
func ReadUpTo(path string, limit int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.IsDir() {
		return nil, fmt.Errorf("%s is a folder: name a file in it", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err == nil && len(data) > limit {
		err = fmt.Errorf("%s is larger than any file of ours", path)
	}
	return data, err
}
