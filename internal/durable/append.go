package durable

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
)

// AppendLine appends a line to a file, which it makes if there is none, and returns when the line would survive a loss
// of power. next makes the line of the last one, both without their line ends. Others who append to the file wait. A
// line that a crash cut short never counted, and is removed.
func AppendLine(path string, perm os.FileMode, next func(last []byte) ([]byte, error)) (err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, perm)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("%s cannot be locked: %w", path, err)
	}
	last, end, err := lastLine(f)
	if err != nil {
		return err
	}
	line, err := next(last)
	if err != nil {
		return err
	}
	if err := f.Truncate(end); err != nil {
		return err
	}
	if _, err := f.WriteAt(append(line, '\n'), end); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// lastLine is the last whole line, and where it ends.
func lastLine(f *os.File) (line []byte, end int64, err error) {
	info, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	for size := int64(4096); ; size *= 4 {
		from := max(info.Size()-size, 0)
		tail := make([]byte, info.Size()-from)
		if _, err := f.ReadAt(tail, from); err != nil && !errors.Is(err, io.EOF) {
			return nil, 0, err
		}
		stop := bytes.LastIndexByte(tail, '\n')
		start := -1
		if stop > 0 {
			start = bytes.LastIndexByte(tail[:stop], '\n')
		}
		switch {
		case stop >= 0 && (start >= 0 || from == 0):
			return tail[start+1 : stop], from + int64(stop) + 1, nil
		case from == 0:
			return nil, 0, nil
		}
	}
}
