package cmdline

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/internal/durable"
)

// Alone runs an action only if no other process runs one in the same --state folder, which must exist. It is for
// commands that make keys: two at once could make a key twice.
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
			return fmt.Errorf("the --state folder cannot be made; name another: %w", err)
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

// CheckState fails if there is no --state folder. Only init makes one: so a wrong path is an error.
func CheckState(c *cli.Context) error { return durable.CheckFolder(c.App.Name, c.String("state")) }
