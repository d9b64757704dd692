package durable

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
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

// Only the last folder is made.
func TestMkdir(t *testing.T) {
	dir := t.TempDir()
	one := filepath.Join(dir, "one")
	for range 2 {
		if err := Mkdir(one, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nowhere", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"a/b", "file", "file/a", "file/a/b", "link", "link/a"} {
		if err := Mkdir(filepath.Join(dir, path), 0o700); err == nil {
			t.Errorf("%s was made", path)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 3 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// A folder that another process makes at this moment is no link.
func TestMkdirAtOnce(t *testing.T) {
	parent := t.TempDir()
	for round := range 1000 {
		dir := filepath.Join(parent, fmt.Sprint(round))
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				if err := Mkdir(dir, 0o700); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
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
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// Whoever opens the file that another is about to remove does not hold the lock of the next one.
func TestLockAlone(t *testing.T) {
	dir := t.TempDir()
	var holders, locked atomic.Int32
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for locked.Load() < 200 && !t.Failed() {
				unlock, err := Lock(dir)
				if err != nil {
					runtime.Gosched()
					continue
				}
				if n := holders.Add(1); n != 1 {
					t.Errorf("%d hold the lock", n)
				}
				runtime.Gosched()
				holders.Add(-1)
				locked.Add(1)
				unlock()
			}
		})
	}
	all.Wait()
}
