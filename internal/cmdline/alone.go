package cmdline

import (
	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/internal/durable"
)

// Alone makes an action one that no other process runs in the same --state folder. Commands that make keys are: two at
// once could make a key twice.
func Alone(action cli.ActionFunc) cli.ActionFunc {
	return func(c *cli.Context) error {
		if err := durable.MkdirAll(c.String("state"), 0o755); err != nil {
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
