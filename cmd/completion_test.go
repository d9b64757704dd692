package cmd_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/programs"
	"github.com/kmehsm/kmehsm/internal/pty"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// Each shell loads its completion of keysvc, and Ctrl-T adds the line that is typed to the file lines, and clears it.
var completing = map[string]struct {
	rc, rcFile string
	args       []string
}{
	"bash": {rcFile: ".bashrc", args: []string{"-i"}, rc: `
source <(keysvc completion bash)
say() { printf '%s\n' "$READLINE_LINE" >>lines; READLINE_LINE= READLINE_POINT=0; }
bind -x '"\C-t": say'
PS1=READY
`},
	"zsh": {rcFile: ".zshrc", args: []string{"-d", "-i"}, rc: `
autoload -Uz compinit && compinit -D -u
source <(keysvc completion zsh)
say() { print -r -- $BUFFER >>lines; BUFFER= }
zle -N say
bindkey -e
bindkey '^T' say
PS1=READY
`},
	"fish": {rcFile: ".config/fish/config.fish", args: []string{"-i"}, rc: `
keysvc completion fish | source
function fish_prompt; echo READY; end
bind \ct 'commandline >>lines; commandline ""'
`},
}

// In each shell, the tab key completes commands, flags and files.
func TestCompletionInShells(t *testing.T) {
	t.Parallel()
	want := []string{"keysvc binding", "keysvc lot import", "keysvc binding list --imei", "keysvc lot import grant.jws",
		"keysvc equipment add 35209900 --reason"}
	for name, shell := range completing {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path, err := exec.LookPath(name)
			if err != nil {
				t.Fatalf("%v: scripts/deps.sh check installs it", err)
			}
			dir := t.TempDir()
			for file, text := range map[string]string{shell.rcFile: shell.rc, "grant.jws": ""} {
				file = filepath.Join(dir, file)
				if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700),
					os.WriteFile(file, []byte(text), 0o600)); err != nil {
					t.Fatal(err)
				}
			}
			master, slave, err := pty.Open(80)
			if err != nil {
				t.Fatal(err)
			}
			defer master.Close()
			program := exec.Command(path, shell.args...)
			program.Dir = dir
			program.Env = []string{"HOME=" + dir, "TMPDIR=" + dir, "XDG_RUNTIME_DIR=" + dir, "TERM=xterm",
				"PATH=" + programs.Dir(t) + ":" + os.Getenv("PATH")}
			program.Stdin, program.Stdout, program.Stderr = slave, slave, slave
			program.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
			err = program.Start()
			slave.Close()
			if err != nil {
				t.Fatal(err)
			}
			deadline := time.AfterFunc(testproc.Patience, func() { program.Process.Kill() })
			defer deadline.Stop()
			var shown bytes.Buffer
			typed := false
			for buf := make([]byte, 4096); ; {
				n, err := master.Read(buf)
				shown.Write(buf[:n])
				if !typed && strings.Contains(shown.String(), "READY") {
					typed = true
					for _, line := range want {
						master.WriteString(line[:len(line)-3] + "\t\x14")
					}
					master.WriteString("exit\r")
				}
				if err != nil { // EIO when the shell has closed it
					break
				}
			}
			err = program.Wait()
			text, _ := os.ReadFile(filepath.Join(dir, "lines"))
			var got []string
			for line := range strings.Lines(string(text)) {
				got = append(got, strings.TrimSpace(line))
			}
			if !slices.Equal(got, want) {
				t.Errorf("%q, %v, want %q; on the terminal:\n%q", got, err, want, &shown)
			}
		})
	}
}
