package filestore_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/directory/filestore"
	"github.com/kmehsm/kmehsm/directory/storetest"
)

func openStore(t *testing.T, dir string) *filestore.Store {
	t.Helper()
	s, err := filestore.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestStore(t *testing.T) {
	storetest.Run(t, func(t *testing.T) (directory.Store, directory.Store) {
		dir := t.TempDir()
		return openStore(t, dir), openStore(t, dir)
	})
}

// Those who read a directory may be other users: what replaces an object is for them too, whatever the umask.
func TestReadableForAll(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	dir := t.TempDir()
	s := openStore(t, dir)
	must(t, s.Create(t.Context(), "lots/a", []byte("a")))
	must(t, s.Update(t.Context(), "lots/b", []byte("b"), ""))
	for _, name := range []string{"a", "b"} {
		if info, err := os.Stat(filepath.Join(dir, "lots", name)); err != nil || info.Mode().Perm() != 0o644 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestPaths(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, filepath.Join(dir, "inside"))
	for _, path := range []string{"../x", "lots/../../x", "/etc/passwd", "", "lots/.tmp-x", "lots/./x",
		".hidden/../../x"} {
		if err := s.Create(t.Context(), path, []byte("x")); err == nil {
			t.Errorf("%q was created", path)
		}
		if _, _, err := s.Read(t.Context(), path); err == nil || errors.Is(err, directory.ErrNotFound) {
			t.Errorf("%q was read: %v", path, err)
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("%v was made", entries)
	}
}

// A folder that is not there is not an empty one.
func TestNoFolder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	s := openStore(t, dir)
	check := func() {
		t.Helper()
		_, listed := s.List(t.Context(), "lots")
		_, _, read := s.Read(t.Context(), "lots/L1/manifest")
		for _, err := range []error{listed, read} {
			if !errors.Is(err, fs.ErrNotExist) || errors.Is(err, directory.ErrNotFound) {
				t.Error(err)
			}
		}
	}
	check()
	if err := s.Create(t.Context(), "lots/L1/manifest", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if names, err := s.List(t.Context(), "lots"); err != nil || len(names) != 1 {
		t.Error(names, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	check()
	deep := openStore(t, filepath.Join(dir, "typo", "deep"))
	_, listed := deep.List(t.Context(), "lots")
	for _, err := range []error{listed, deep.Create(t.Context(), "lots/L1/manifest", []byte("x"))} {
		if err == nil || errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "there is no folder") {
			t.Errorf("a folder that could not be made: %v", err)
		}
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("its parents were made")
	}
}

func TestFolder(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	if err := s.Create(t.Context(), "lots/L1/manifest", []byte("x")); err != nil {
		t.Fatal(err)
	}
	// What a killed process left is no object.
	if err := os.WriteFile(filepath.Join(dir, "lots", "L1", ".tmp-1"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	entries, _ := os.ReadDir(filepath.Join(dir, "lots", "L1"))
	if len(entries) != 2 {
		t.Errorf("temporary files are left: %v", entries)
	}
	if names, err := s.List(t.Context(), "lots/L1"); err != nil || len(names) != 1 {
		t.Error(names, err)
	}
	if _, _, err := s.Read(t.Context(), "lots/L1"); err == nil || !strings.Contains(err.Error(), "no file") {
		t.Errorf("a folder was read: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "large"), make([]byte, 5<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Read(t.Context(), "large"); err == nil || !strings.Contains(err.Error(), "larger") {
		t.Errorf("a file of 5 MiB was read: %v", err)
	}
	if _, err := filestore.Open(filepath.Join(dir, "large")); err == nil {
		t.Error("a file was opened as a store")
	}
	blocked := openStore(t, filepath.Join(dir, "large", "below"))
	for what, err := range map[string]error{"create": blocked.Create(t.Context(), "lots/L1/manifest", nil),
		"update": blocked.Update(t.Context(), "lots/L1/revocations", nil, "")} {
		if err == nil || !strings.Contains(err.Error(), "cannot be written") {
			t.Errorf("%s where nothing can be written: %v", what, err)
		}
	}
}

// Whoever has the folder can make a file longer than it says.
func TestLongerThanItSays(t *testing.T) {
	const long = "/proc/kallsyms"
	if data, err := os.ReadFile(long); err != nil || len(data) <= directory.MaxObject {
		t.Skipf("this kernel has no long %s: %v", long, err)
	}
	dir := t.TempDir()
	s := openStore(t, dir)
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "lots/L1"), 0o755),
		os.Symlink(long, filepath.Join(dir, directory.ManifestPath("L1")))); err != nil {
		t.Fatal(err)
	}
	if data, _, err := s.Read(t.Context(), directory.ManifestPath("L1")); err == nil {
		t.Errorf("%d bytes were read", len(data))
	}
}
