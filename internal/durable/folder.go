package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/kmehsm/kmehsm/internal/usage"
)

// CheckFolder fails if a program's own folder is not there, or is another user's.
func CheckFolder(program, dir string) error {
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return usage.Errorf("there is no folder %s: run %s init first; or, if it is elsewhere, name it with state", dir,
			program)
	case err != nil:
		return usage.Mark(err)
	case !info.IsDir():
		return usage.Errorf("%s is a file: name with state the folder that %s init has made", dir, program)
	}
	return checkOwner(program, dir, info, os.Geteuid())
}

// CheckNotOf fails if a folder has a file that only another program makes: KMEHSM_STATE is read by both.
func CheckNotOf(program, dir, file string) error {
	if _, err := os.Stat(filepath.Join(dir, file)); err != nil {
		return nil
	}
	return usage.In("state", usage.Errorf("the folder %s is %s's: name another; KMEHSM_STATE is for one program", dir,
		program))
}

// Closed fails if every user of the machine may read a secret's file. The error does not say what to do.
func Closed(name string, info fs.FileInfo) error {
	if mode := info.Mode().Perm(); mode&0o007 != 0 {
		return fmt.Errorf("%s is open to every user of the machine (mode %04o)", name, mode)
	}
	return nil
}

// CheckOwner fails if root would work in another user's folder: the service could not use what root makes there. A
// folder that does not exist is no error.
func CheckOwner(program, dir string) error {
	info, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return usage.Mark(err)
	}
	return checkOwner(program, dir, info, os.Geteuid())
}

func checkOwner(program, dir string, info fs.FileInfo, euid int) error {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok || euid != 0 || stat.Uid == 0 {
		return nil
	}
	name := strconv.Itoa(int(stat.Uid))
	if owner, err := user.LookupId(name); err == nil {
		name = owner.Username
	}
	return usage.Errorf("the folder %s is user %s's, and the service could not use what root makes in it: run this as "+
		"that user (runuser -u %[2]s -- %s ...), or, if the service runs as root, chown -R root %[1]s", dir, name,
		program)
}
