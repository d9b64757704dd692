package durable

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// Lock keeps other processes that lock the same folder out until unlock, or the end of this process. It does not wait.
func Lock(dir string) (unlock func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(d.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		d.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("another process is at work in %s: wait until it has ended", dir)
		}
		return nil, fmt.Errorf("%s cannot be locked: %w", dir, err)
	}
	return func() { d.Close() }, nil
}
