// Package programs builds factory, keysvc and mesim for tests that run them.
package programs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// Main runs the tests, and removes what Dir has made.
func Main(m *testing.M) {
	testproc.Main(func() int {
		defer func() { os.RemoveAll(dir) }()
		return m.Run()
	})
}

// Dir is the folder of the programs, which are built at the first call.
func Dir(t testing.TB) string {
	t.Helper()
	must.Do(t, build())
	return dir
}

const cmd = "github.com/kmehsm/kmehsm/cmd/..."

var (
	dir   string
	build = sync.OnceValue(func() (err error) {
		if dir, err = os.MkdirTemp("", "kmehsm-programs-"); err != nil {
			return err
		}
		if out, err := exec.Command("go", "build", "-o", dir+"/", cmd).CombinedOutput(); err != nil {
			return fmt.Errorf("%s%w", out, err)
		}
		// go test keeps a result until something changes that a test, not TestMain, has read itself. Of a folder that
		// is every file's size and time.
		ours := "{{with .Module}}{{if .Main}}{{$.Dir}}{{end}}{{end}}"
		sources, err := exec.Command("go", "list", "-deps", "-f", ours, cmd).Output()
		for folder := range strings.FieldsSeq(string(sources)) {
			_, rerr := os.ReadDir(folder)
			err = errors.Join(err, rerr)
		}
		return err
	})
)
