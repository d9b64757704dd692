package deploy_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/programs"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// composeGo loads a compose file as docker compose does. It is a module of its own: nothing of it enters the product.
const composeGo = "github.com/compose-spec/compose-go/v2/cmd@v2.9.0"

// A service is what compose.yaml makes of the image.
type service struct {
	Build       struct{ Context, Dockerfile string }
	Healthcheck struct{ Test []string }
	Volumes     []struct{ Source, Target string }
}

// compose is the one service of compose.yaml, as compose-go understands it.
func compose(t *testing.T) service {
	t.Helper()
	cmd := exec.Command("go", "run", composeGo, "compose.yaml")
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=")
	var log strings.Builder
	cmd.Stderr = &log
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("compose.yaml: %v\n%s", err, &log)
	}
	var file struct {
		Services map[string]service
		Volumes  map[string]any
	}
	must.Do(t, yaml.Unmarshal(out, &file))
	s, ok := file.Services["keysvc"]
	if !ok || len(file.Services) != 1 {
		t.Fatalf("compose.yaml has the services %v", file.Services)
	}
	for _, v := range s.Volumes {
		if _, ok := file.Volumes[v.Source]; !ok {
			t.Errorf("compose.yaml mounts the volume %s, and does not declare it", v.Source)
		}
	}
	return s
}

// containerfile is the arguments of each instruction.
func containerfile(t *testing.T) map[string][]string {
	t.Helper()
	text, err := os.ReadFile("Containerfile")
	must.Do(t, err)
	known := []string{"FROM", "COPY", "RUN", "USER", "WORKDIR", "ENV", "VOLUME", "CMD"}
	all := map[string][]string{}
	for line := range strings.Lines(strings.ReplaceAll(string(text), "\\\n", "")) {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		name, arguments, _ := strings.Cut(line, " ")
		if !slices.Contains(known, name) {
			t.Errorf("the Containerfile has %s, which no test looks at", name)
		}
		all[name] = append(all[name], strings.TrimSpace(arguments))
	}
	for _, name := range known {
		if len(all[name]) != 1 {
			t.Fatalf("the Containerfile has %d %s, not 1", len(all[name]), name)
		}
	}
	return all
}

// compose.yaml is valid, and fits the Containerfile; that fits the packages, their user and their folder.
func TestCompose(t *testing.T) {
	s, image := compose(t), containerfile(t)
	if dir, err := filepath.Abs("../bin/packages"); err != nil || s.Build.Context != dir {
		t.Errorf("the image is built of %s; make packages makes %s (%v)", s.Build.Context, dir, err)
	}
	if file := filepath.Join("../bin/packages", s.Build.Dockerfile); file != "../deploy/Containerfile" {
		t.Errorf("the image is built after %s", file)
	}
	home := "/var/lib/kmehsm"
	if len(s.Volumes) != 1 || s.Volumes[0].Target != home || image["VOLUME"][0] != home ||
		image["WORKDIR"][0] != home {
		t.Errorf("volumes %v of compose.yaml, %v and WORKDIR %v of the Containerfile are not all %s", s.Volumes,
			image["VOLUME"], image["WORKDIR"], home)
	}
	users, err := os.ReadFile("package/kmehsm-keysvc.sysusers")
	must.Do(t, err)
	if user := image["USER"][0]; !strings.Contains(string(users), "u "+user+" ") {
		t.Errorf("no package makes the user %s", user)
	}
	// Packages are made under these names, and what runs in the container is in one that is installed.
	made, err := os.ReadFile("../scripts/packages.sh")
	must.Do(t, err)
	copied := strings.Fields(image["COPY"][0])
	for _, name := range copied[:len(copied)-1] {
		p, ok := strings.CutSuffix(name, "_*.deb")
		if !ok || !regexp.MustCompile(`(?m)^package \S+ `+p+` `).Match(made) {
			t.Errorf("COPY %s: make packages makes no such file", name)
		}
	}
	if to := copied[len(copied)-1]; !strings.Contains(image["RUN"][0], " "+to+"kmehsm-*.deb ") {
		t.Errorf("RUN does not install what COPY puts in %s", to)
	}
	if out, err := exec.Command("sh", "-n", "-c", image["RUN"][0]).CombinedOutput(); err != nil {
		t.Errorf("RUN: %v\n%s", err, out)
	}
	if len(s.Healthcheck.Test) < 2 || s.Healthcheck.Test[0] != "CMD" {
		t.Fatalf("the health check is %v", s.Healthcheck.Test)
	}
	for _, command := range []string{s.Healthcheck.Test[1], "softhsm2", "openssl"} {
		if !slices.Contains(strings.Fields(image["RUN"][0]), command) {
			t.Errorf("the image has no %s", command)
		}
	}
}

// The command of the image, run here, makes a token and its keys, and serves, and does so again in the same folder. The
// health check says when.
func TestContainerServes(t *testing.T) {
	s, image := compose(t), containerfile(t)
	var command []string
	must.Do(t, json.Unmarshal([]byte(image["CMD"][0]), &command))
	setup, err := filepath.Abs("../softhsm-setup.sh")
	must.Do(t, err)
	dir, err := os.MkdirTemp("", "") // t.TempDir may be too long for a socket's path
	must.Do(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must.Do(t, os.Mkdir(dir+"/lib", 0o700))
	here := strings.NewReplacer("/usr/share/kmehsm/softhsm-setup.sh", setup, "/var/lib/kmehsm", dir+"/lib",
		"/run/kmehsm", dir)
	for range 2 {
		cmd := exec.Command(command[0], command[1:]...)
		for i := range cmd.Args {
			cmd.Args[i] = here.Replace(cmd.Args[i])
		}
		cmd.Dir = dir + "/lib"
		cmd.Env = append(os.Environ(), "PATH="+programs.Dir(t)+":"+os.Getenv("PATH"), here.Replace(image["ENV"][0]))
		p := testproc.Start(t, cmd, func(*testproc.Process) bool {
			check := exec.Command(s.Healthcheck.Test[1], s.Healthcheck.Test[2:]...)
			for i := range check.Args {
				check.Args[i] = here.Replace(check.Args[i])
			}
			return check.Run() == nil
		})
		p.Kill()
	}
}
