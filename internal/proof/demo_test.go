package proof

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/kmehsm/kmehsm/internal/programs"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// The demo needs no terminal, its whole output may go to a file, and it leaves in var/demo all that others go on from,
// and nothing beside.
func TestDemo(t *testing.T) {
	t.Parallel()
	dir := t.TempDir() // a project folder of its own: the demo begins by removing var/demo
	testproc.ShowLogs(t, filepath.Join(dir, "var/demo/*.log"))
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{
		"bin": programs.Dir(t), "scripts": root + "/scripts", "softhsm-setup.sh": root + "/softhsm-setup.sh",
	} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	// go test keeps a result until something changes that the test has read itself.
	if _, err := os.ReadDir(root + "/scripts"); err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	demo := exec.Command("scripts/demo.sh")
	demo.Dir, demo.Env = dir, append(os.Environ(), "DEVICES=3", "BITS=2048", "DIRECTORY=file")
	demo.Stdout, demo.Stderr = out, out
	demo.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	runErr := demo.Run()
	printed, err := os.ReadFile(out.Name())
	if err != nil || runErr != nil {
		t.Fatalf("%v, %v\n%s", runErr, err, printed)
	}
	for _, step := range []string{
		"\n== 1.", "\n== 2.", "\n== 3.", "\n== 4.", "\n$ factory lot provision L1", "\n== 5.", "\n== 6.",
		"\n== 7.", "\n== Summary",
	} {
		if strings.Count(string(printed), step) != 1 {
			t.Errorf("the demo does not print %q once:\n%s", step, printed)
		}
	}

	beside, err := filepath.Glob(filepath.Join(dir, "var/*"))
	if err != nil || len(beside) != 1 {
		t.Errorf("the demo leaves %v, %v", beside, err)
	}
	for _, name := range []string{
		"softhsm/env", "keysvc", "keysvc.yaml", "factory/manufacturer.pem", "directory", "injection",
		"fixture.key", "fixture.pem",
		"fixture-enrolment.json", "grant.jws", "tls",
	} {
		if _, err := os.Stat(filepath.Join(dir, "var/demo", name)); err != nil {
			t.Error(err)
		}
	}
	w := &world{t: t, dir: dir, env: os.Environ(), wrap: func(uri string) string { return uri }}
	var log struct {
		Lines, Signed int
		Interrupted   []any
	}
	verified := w.run(softhsmtest.Tok{}, "factory", "log", "verify", "--state", "var/demo/factory", "--json")
	if err := json.Unmarshal([]byte(verified), &log); err != nil {
		t.Fatal(err)
	}
	// Each command that used the factory's token is two lines, begun and done.
	used := strings.Count(string(printed), "\n$ factory ") + 1 // and the grant that is refused
	if log.Lines != 2*used || log.Signed != log.Lines || len(log.Interrupted) != 0 {
		t.Errorf("the audit log of %d commands: %+v", used, log)
	}
	w.env = append(w.env, softhsmtest.Env(filepath.Join(dir, "var/demo/softhsm")))
	attackDemo(t, w, filepath.Join(dir, "var/demo"))
}
