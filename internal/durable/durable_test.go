package durable

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestWriteFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	if err := MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := MkdirAll(dir, 0o700); err != nil {
		t.Errorf("a folder that is there: %v", err)
	}
	path := filepath.Join(dir, "f")
	for _, data := range []string{"first, and long", "second"} {
		if err := WriteFile(path, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		info, serr := os.Stat(path)
		if err != nil || serr != nil || string(got) != data || info.Mode().Perm() != 0o600 {
			t.Errorf("%q, %v, %v, %v", got, info.Mode(), err, serr)
		}
	}
	if err := WriteFile(filepath.Join(path, "below a file"), nil, 0o600); err == nil {
		t.Error("written below a file")
	}
	if err := MkdirAll(filepath.Join(path, "below a file"), 0o700); err == nil {
		t.Error("a folder made below a file")
	}
	if err := WriteFile(dir, nil, 0o600); err == nil {
		t.Error("a folder was replaced")
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestLock(t *testing.T) {
	dir := t.TempDir()
	unlock, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(dir); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("process %d on ", os.Getpid())) {
		t.Errorf("locked twice, or not said by whom: %v", err)
	}
	unlock()
	unlock, err = Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	unlock()
	if _, err := Lock(filepath.Join(dir, "none")); err == nil {
		t.Error("locked what is not there")
	}
}
