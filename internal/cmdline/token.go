package cmdline

import (
	"path/filepath"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/hsmkeys"
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

// WithToken runs f with the token that --token names.
func WithToken(c *cli.Context, f func(*hsmkeys.Token) error) error {
	token, err := hsmkeys.Open(c.Context, c.String("token"))
	if err != nil {
		return err
	}
	defer token.Close()
	return f(token)
}

// WritePublicKey writes a public key to the --out folder, or to the --state folder without one.
func WritePublicKey(c *cli.Context, name string, pem []byte) (path string, err error) {
	dir := c.String("out")
	if dir == "" {
		dir = c.String("state")
	}
	if err := durable.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	path = filepath.Join(dir, name)
	return path, durable.WriteFile(path, pem, 0o644)
}
