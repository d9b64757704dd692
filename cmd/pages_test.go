package cmd_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/internal/programs"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// The commands of these pages run as they are printed, one after the other in one shell, and show what the page says.
func TestPageCommands(t *testing.T) {
	t.Parallel()
	readme, ceremony, backup := read(t, "README.md"), read(t, "docs/ceremony.md"), read(t, "docs/backup.md")
	calls := read(t, "docs/calls.md")
	t.Run("readme", func(t *testing.T) {
		t.Parallel()
		left, err := os.ReadDir(runPage(t, readme))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range left {
			if f.Name() != "softhsm-setup.sh" {
				t.Errorf("%s is left beside var/, which the page has removed", f.Name())
			}
		}
	})
	t.Run("ceremony", func(t *testing.T) { t.Parallel(); runPage(t, ceremony) })
	t.Run("backup", func(t *testing.T) {
		t.Parallel()
		before, _, found := strings.Cut(readme, "**9. Stop and clean up.**")
		if !found {
			t.Fatal("README.md has no step 9")
		}
		runPage(t, before+"\n"+backup)
	})
	t.Run("calls", func(t *testing.T) {
		t.Parallel()
		before, _, found := strings.Cut(readme, "**9. Stop and clean up.**")
		if !found {
			t.Fatal("README.md has no step 9")
		}
		tools := t.TempDir()
		install := exec.Command("go", "install", "github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3")
		install.Dir, install.Env = tools, append(os.Environ(), "GOBIN="+tools, "GOWORK=off", "GOFLAGS=")
		if out, err := install.CombinedOutput(); err != nil {
			t.Logf("without grpcurl, which cannot be had: %v\n%s", err, out)
			curl, grpcurl, _ := strings.Cut(calls, "## With grpcurl")
			_, end, _ := strings.Cut(grpcurl, "In the end, ")
			calls = curl + end
		}
		runPage(t, before+"\n"+calls, tools)
	})
}

// The same for docs/backup-postgresql.md, which makes its own server.
func TestPostgresPageCommands(t *testing.T) {
	t.Parallel()
	before, _, _ := strings.Cut(read(t, "README.md"), "**9. Stop and clean up.**")
	token, _, found := strings.Cut(read(t, "docs/backup.md"), "\n## The database and the ledger")
	if !found {
		t.Fatal("docs/backup.md has no such section")
	}
	tools := t.TempDir()
	if os.Getuid() != 0 { // then the server's user is this one
		for name, does := range map[string]string{"runuser": `shift 3; exec "$@"`, "chown": ":"} {
			err := os.WriteFile(filepath.Join(tools, name), []byte("#!/bin/sh\n"+does+"\n"), 0o700)
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	runPage(t, before+"\n"+token+"\n"+read(t, "docs/backup-postgresql.md"), tools)
}

// docs/calls.md has every call: by curl, but for streams, and by grpcurl.
func TestEveryCall(t *testing.T) {
	page := read(t, "docs/calls.md")
	methods := kmev1.File_kme_v1_kme_proto.Services().ByName("KeyService").Methods()
	for i := range methods.Len() {
		name := string(methods.Get(i).Name())
		if !methods.Get(i).IsStreamingClient() && !strings.Contains(page, "call "+name+" ") {
			t.Errorf("the page has no %s by curl", name)
		}
		if !strings.Contains(page, "grpc "+name+" ") {
			t.Errorf("the page has no %s by grpcurl", name)
		}
	}
}

func read(t testing.TB, page string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", page))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// runPage runs a page's commands in a folder of their own: the blocks whose first line begins with "$ ". Lines below a
// command are what it shows: each is a line of the output, and "..." in it stands for what differs each time. tools are
// folders of programs that the page has besides. A command that does not end fails the test: an until-loop, which waits
// for a server, within testproc.Patience; one that works, within eight times that.
func runPage(t *testing.T, page string, tools ...string) (dir string) {
	t.Helper()
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	const mark = "end of what a command shows"
	var script strings.Builder
	var shown [][]string // of each command: the lines that the document has below it
	inBlock, continued := false, false
	for line := range strings.SplitSeq(page, "\n") {
		text, indented := strings.CutPrefix(line, "    ")
		command, isCommand := strings.CutPrefix(text, "$ ")
		switch inBlock = indented && (inBlock || isCommand); {
		case !inBlock:
			continue
		case isCommand:
			if shown = append(shown, nil); len(shown) > 1 {
				script.WriteString("echo '" + mark + "'\n")
			}
			script.WriteString(command + "\n")
		case continued:
			script.WriteString(text + "\n")
		default:
			shown[len(shown)-1] = append(shown[len(shown)-1], text)
		}
		continued = (isCommand || continued) && strings.HasSuffix(text, "\\")
	}
	if len(shown) < 15 {
		t.Fatalf("only %d commands were found", len(shown))
	}
	// A Unix socket's path has 108 octets at most: t.TempDir may be too long.
	if dir, err = os.MkdirTemp("", ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Symlink(filepath.Join(root, "softhsm-setup.sh"), filepath.Join(dir, "softhsm-setup.sh")); err != nil {
		t.Fatal(err)
	}
	// mktemp's folders are in there: that of docs/backup-postgresql.md's server, which runs as another user.
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	testproc.ShowLogs(t, filepath.Join(dir, "var/*.log"), filepath.Join(dir, "tmp.*/log"))
	const end = "trap 'kill $(jobs -p) 2>/dev/null || :' EXIT\n" // a service, where a command fails before it ends it
	shell := exec.Command("bash", "-eo", "pipefail", "-c", end+script.String())
	path := append([]string{programs.Dir(t)}, append(tools, os.Getenv("PATH"))...)
	out := new(testproc.Log)
	shell.Dir, shell.Env, shell.Stdout = dir, append(os.Environ(), "PATH="+strings.Join(path, ":"), "TMPDIR="+dir), out
	running := testproc.Start(t, shell, nil)
	commands := strings.Split(script.String(), "echo '"+mark+"'\n")
	for done, since := 0, time.Now(); !running.Ended(); time.Sleep(10 * time.Millisecond) {
		if n := strings.Count(out.String(), mark+"\n"); n > done {
			done, since = n, time.Now()
		}
		limit := 8 * testproc.Patience
		if strings.HasPrefix(commands[done], "until ") {
			limit = testproc.Patience
		}
		if time.Since(since) > limit {
			t.Fatalf("not within %s: %s\n%s", limit, commands[done], out)
		}
	}
	if err := running.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	outputs := strings.Split(out.String(), mark+"\n")
	if len(outputs) != len(shown) {
		t.Fatalf("%d commands were run, of %d", len(outputs), len(shown))
	}
	for i, lines := range shown {
		for _, line := range lines {
			pattern := "(?m)^" + strings.ReplaceAll(regexp.QuoteMeta(line), `\.\.\.`, ".*") + "$"
			if !regexp.MustCompile(pattern).MatchString(outputs[i]) {
				t.Errorf("the page shows %q; the command shows\n%s", line, outputs[i])
			}
		}
	}
	return dir
}
