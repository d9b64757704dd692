package cmdline

import (
	"errors"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/internal/durable"
)

// Alone makes an action one that no other process runs in the same --state folder, which is there. Commands that make
// keys are: two at once could make a key twice.
func Alone(action cli.ActionFunc) cli.ActionFunc {
	return func(c *cli.Context) error {
		if err := CheckState(c); err != nil {
			return err
		}
		unlock, err := durable.Lock(c.String("state"))
		if err != nil {
			return err
		}
		defer unlock()
		return action(c)
	}
}

// AloneMaking is Alone for the commands that make the --state folder. One that fails leaves no empty one.
func AloneMaking(action cli.ActionFunc) cli.ActionFunc {
	return func(c *cli.Context) error {
		var made []string // the innermost first
		for dir := c.String("state"); ; dir = filepath.Dir(dir) {
			if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
				break
			}
			made = append(made, dir)
		}
		if err := durable.MkdirAll(c.String("state"), 0o755); err != nil {
			return err
		}
		err := Alone(action)(c)
		if err != nil {
			for _, dir := range made {
				os.Remove(dir) // only an empty one goes
			}
		}
		return err
	}
}

// CheckState fails if there is no --state folder. Only init makes one: whoever looks into a wrong place is told so.
func CheckState(c *cli.Context) error { return CheckFolder(c.App.Name, c.String("state")) }

// CheckFolder fails if a program's own folder is not there, or is another user's.
func CheckFolder(program, dir string) error {
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Usagef("there is no folder %s: run %s init first; or, if it is elsewhere, name it with state", dir,
			program)
	case err != nil:
		return Usage(err)
	case !info.IsDir():
		return Usagef("%s is a file: name with state the folder that %s init has made", dir, program)
	}
	return checkOwner(program, dir, info, os.Geteuid())
}

// CheckOwner refuses to let root work in another user's folder: what it made there, the service could not use. A folder
// that is not there is nobody's.
func CheckOwner(program, dir string) error {
	info, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return Usage(err)
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
	return Usagef("the folder %s is user %s's, and the service could not use what root makes in it: run this as that "+
		"user (runuser -u %[2]s -- %s ...), or, if the service runs as root, chown -R root %[1]s", dir, name, program)
}
