// Package programs builds factory, keysvc and mesim for tests that run them.
package programs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/must"
)

// Dir is the folder of the programs, var/test/bin, which are built at the first call. It is the same for all packages,
// and stays: go build links nothing that is up to date there.
func Dir(t testing.TB) string {
	t.Helper()
	must.Do(t, build())
	return dir
}

const cmd = "github.com/kmehsm/kmehsm/cmd/..."

var (
	dir   string
	build = sync.OnceValue(func() error {
		_, here, _, _ := runtime.Caller(0)
		dir = filepath.Join(filepath.Dir(here), "..", "..", "var", "test", "bin")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		lock, err := os.Open(dir)
		if err != nil {
			return err
		}
		defer lock.Close()
		if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil { // one package at a time
			return err
		}
		if out, err := exec.Command("go", "build", "-trimpath", "-o", dir+"/", cmd).CombinedOutput(); err != nil {
			return fmt.Errorf("%s%w", out, err)
		}
		// go test keeps a result until something changes that a test, not TestMain, has read itself. Of a folder that
		// is every file's size and time. go build gives a program a new time even if it leaves it as it is: it says
		// nothing, and the sources say all.
		programs, err := os.ReadDir(dir)
		for _, p := range programs {
			err = errors.Join(err, os.Chtimes(filepath.Join(dir, p.Name()), time.Time{}, time.Unix(0, 0)))
		}
		if err != nil {
			return err
		}
		ours := "{{with .Module}}{{if .Main}}{{$.Dir}}{{end}}{{end}}"
		sources, err := exec.Command("go", "list", "-deps", "-f", ours, cmd).Output()
		for folder := range strings.FieldsSeq(string(sources)) {
			_, rerr := os.ReadDir(folder)
			err = errors.Join(err, rerr)
		}
		return err
	})
)
