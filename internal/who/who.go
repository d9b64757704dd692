// Package who says who runs a command.
package who

import (
	"os"
	"os/user"
)

// Name is the operating system's user, and the machine.
func Name() string {
	name := "?"
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	host, _ := os.Hostname()
	return name + "@" + host
}
