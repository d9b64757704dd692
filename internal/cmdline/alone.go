package cmdline

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

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

// AloneMaking is Alone for the commands that make the --state folder.
func AloneMaking(action cli.ActionFunc) cli.ActionFunc {
	return func(c *cli.Context) error {
		if err := durable.MkdirAll(c.String("state"), 0o755); err != nil {
			return err
		}
		return Alone(action)(c)
	}
}

// CheckState fails if there is no --state folder. Only init makes one: whoever looks into a wrong place is told so.
func CheckState(c *cli.Context) error { return CheckFolder(c.App.Name, c.String("state")) }

// CheckFolder fails if a program's own folder is not there.
func CheckFolder(program, dir string) error {
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("there is no folder %s: run %s init first; or, if it is elsewhere, name it with state", dir,
			program)
	case err != nil:
		return err
	case !info.IsDir():
		return fmt.Errorf("%s is a file: name with state the folder that %s init has made", dir, program)
	}
	return nil
}
