package durable

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// LockName is the file in a folder that is locked. Unlock removes it.
const LockName = ".lock"

// Lock keeps other processes that lock the same folder out until unlock, or the end of this process. It does not wait;
// whoever is kept out is told who holds the lock.
func Lock(dir string) (unlock func(), err error) {
	return LockFile(filepath.Join(dir, LockName), func(holder string) error {
		return fmt.Errorf("another process is at work in %s: %s; wait until it has ended", dir, holder)
	})
}

// LockFile is Lock with another file. held makes the error if another process holds the lock.
func LockFile(path string, held func(holder string) error) (unlock func(), err error) {
	var f *os.File
	for {
		if f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
			return nil, fmt.Errorf("%s cannot be locked: %w", filepath.Dir(path), err)
		}
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
			defer f.Close()
			if !errors.Is(err, syscall.EWOULDBLOCK) {
				return nil, fmt.Errorf("%s cannot be locked: %w", filepath.Dir(path), err)
			}
			holder := make([]byte, 512)
			n, _ := f.Read(holder)
			return nil, held(cmp.Or(strings.TrimSpace(string(holder[:n])), "one that has just begun"))
		}
		if isAt(f, path) {
			break
		}
		f.Close() // whoever held the lock has removed the file after it was opened here
	}
	// Only for people: the lock is the kernel's, and ends with the process.
	host, _ := os.Hostname()
	text := fmt.Sprintf("process %d on %s, since %s\n", os.Getpid(), host, time.Now().Format(time.RFC3339))
	if err := errors.Join(f.Truncate(0), first(f.WriteAt([]byte(text), 0))); err != nil {
		os.Remove(path)
		f.Close()
		return nil, fmt.Errorf("%s cannot be locked: %w", filepath.Dir(path), err)
	}
	return func() { os.Remove(path); f.Close() }, nil
}

// isAt says whether an open file is the one at a path.
func isAt(f *os.File, path string) bool {
	mine, err := f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(path)
	return err == nil && os.SameFile(mine, there)
}

func first(_ int, err error) error { return err }
