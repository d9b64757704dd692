package deploy_test

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/programs"
)

// make install puts programs, man pages, completion, units and users below PREFIX, and configurations into /etc; what
// it installs names no other place. A second install keeps a configuration.
func TestInstall(t *testing.T) {
	bin := t.TempDir()
	for _, name := range []string{"factory", "keysvc", "mesim"} {
		must.Do(t, os.Symlink(filepath.Join(must.Get[string](t)(filepath.Abs(programs.Dir(t))), name),
			filepath.Join(bin, name)))
	}
	must.Do(t, os.WriteFile(filepath.Join(bin, "kme.fdx"), nil, 0o644)) // which nothing looks into
	install := func(prefix, to string) (string, error) {
		cmd := exec.CommandContext(t.Context(), "../scripts/install.sh", bin)
		cmd.Env = append(os.Environ(), "DESTDIR="+to, "PREFIX="+prefix)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	var to string
	for given, prefix := range map[string]string{"": "/usr/local", "/opt/kme": "/opt/kme"} {
		to = t.TempDir()
		if out, err := install(given, to); err != nil {
			t.Fatalf("PREFIX=%s: %v: %s", given, err, out)
		}
		want := []string{"/etc/freeDiameter/kme.conf", "/etc/kmehsm/factory.yaml", "/etc/kmehsm/keysvc.yaml",
			prefix + "/lib/freeDiameter/kme.fdx", prefix + "/share/kmehsm/softhsm-setup.sh",
			prefix + "/lib/systemd/system/factory-station.service", prefix + "/lib/systemd/system/keysvc.service"}
		for _, p := range []string{"factory", "keysvc"} {
			want = append(want, prefix+"/lib/sysusers.d/kmehsm-"+p+".conf", prefix+"/lib/tmpfiles.d/kmehsm-"+p+".conf")
		}
		for _, p := range []string{"factory", "keysvc", "mesim"} {
			want = append(want, prefix+"/bin/"+p, prefix+"/share/man/man1/"+p+".1.gz",
				prefix+"/share/bash-completion/completions/"+p, prefix+"/share/zsh/site-functions/_"+p,
				prefix+"/share/fish/vendor_completions.d/"+p+".fish")
		}
		slices.Sort(want)
		var have []string
		program := regexp.MustCompile(`(/[\w./-]*)?/bin/(?:factory|keysvc|mesim)\b`)
		must.Do(t, filepath.WalkDir(to, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			name := strings.TrimPrefix(path, to)
			have = append(have, name)
			if strings.HasPrefix(name, prefix+"/bin/") {
				return nil
			}
			read := exec.CommandContext(t.Context(), "zcat", "--force", path)
			for _, m := range program.FindAllStringSubmatch(string(must.Get[[]byte](t)(read.Output())), -1) {
				if m[1] != prefix {
					t.Errorf("PREFIX=%s: %s names %s", given, name, m[0])
				}
			}
			return nil
		}))
		if !slices.Equal(have, want) {
			t.Errorf("PREFIX=%s: there is\n%q, want\n%q", given, have, want)
		}
		for unit, program := range map[string]string{"keysvc": "keysvc serve",
			"factory-station": "factory station serve"} {
			text := string(must.Get[[]byte](t)(os.ReadFile(to + prefix + "/lib/systemd/system/" + unit + ".service")))
			if !strings.Contains(text, "\nExecStart="+prefix+"/bin/"+program+" ") {
				t.Errorf("PREFIX=%s: %s.service starts something else:\n%s", given, unit, text)
			}
		}
	}
	config := to + "/etc/kmehsm/keysvc.yaml"
	must.Do(t, os.WriteFile(config, []byte("# mine\n"), 0o640))
	out, err := install("/usr", to)
	if own := must.Get[[]byte](t)(os.ReadFile(config)); err != nil || string(own) != "# mine\n" {
		t.Errorf("a second install: %v: %s; keysvc.yaml has %s", err, out, own)
	}
	out, err = install("local", to)
	if err == nil || !strings.Contains(out, "PREFIX=local is not an absolute path") {
		t.Errorf("PREFIX=local: %v: %s", err, out)
	}
}
