package durable

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// LockFile is the file in a folder that is locked.
const LockFile = ".lock"

// Lock keeps other processes that lock the same folder out until unlock, or the end of this process. It does not wait;
// whoever is kept out is told who holds the lock.
func Lock(dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, LockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%s cannot be locked: %w", dir, err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		defer f.Close()
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s cannot be locked: %w", dir, err)
		}
		holder := make([]byte, 512)
		n, _ := f.Read(holder)
		return nil, fmt.Errorf("another process is at work in %s: %s; wait until it has ended", dir,
			strings.TrimSpace(string(holder[:n])))
	}
	// Only for people: the lock is the kernel's, and ends with the process.
	host, _ := os.Hostname()
	text := fmt.Sprintf("process %d on %s, since %s\n", os.Getpid(), host, time.Now().Format(time.RFC3339))
	if err := errors.Join(f.Truncate(0), first(f.WriteAt([]byte(text), 0))); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s cannot be locked: %w", dir, err)
	}
	return func() { f.Truncate(0); f.Close() }, nil
}

func first(_ int, err error) error { return err }
