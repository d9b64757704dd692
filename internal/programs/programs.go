// Package programs builds factory, keysvc and mesim for tests that run them.
package programs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// Main builds the programs into a new folder, whose name it puts into bin, and runs the tests.
func Main(m *testing.M, bin *string) {
	os.Exit(func() int {
		var err error
		if *bin, err = os.MkdirTemp("", "kmehsm-programs-"); err == nil {
			defer os.RemoveAll(*bin)
			err = build(*bin)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

const cmd = "github.com/kmehsm/kmehsm/cmd/..."

func build(bin string) error {
	if out, err := exec.Command("go", "build", "-o", bin+"/", cmd).CombinedOutput(); err != nil {
		return fmt.Errorf("%s%w", out, err)
	}
	// go test keeps a result until something changes that the test has read itself. Of a folder that is every file's size and time.
	folders, err := exec.Command("go", "list", "-deps", "-f", "{{with .Module}}{{if .Main}}{{$.Dir}}{{end}}{{end}}", cmd).Output()
	for _, folder := range strings.Fields(string(folders)) {
		_, rerr := os.ReadDir(folder)
		err = errors.Join(err, rerr)
	}
	return err
}
