package testproc

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmehsm/kmehsm/internal/must"
)

func TestMain(m *testing.M) { Main(m.Run) }

// inner has the name of a way to end, and the file for process ids, in the process that TestLeavesNothing starts.
const inner = "TESTPROC_INNER"

// A test has a server, a daemon that has left its parent and its process group, a socket and a folder; and ends.
func TestEnds(t *testing.T) {
	end, pids, found := strings.Cut(os.Getenv(inner), ":")
	if !found {
		t.Skip("it is for TestLeavesNothing")
	}
	server := Start(t, exec.Command("sleep", "600"), nil)
	daemon, err := exec.Command("sh", "-c", "setsid sleep 600 >/dev/null 2>&1 & echo $!").Output()
	if err != nil {
		t.Fatal(err)
	}
	daemonPID, _ := strconv.Atoi(strings.TrimSpace(string(daemon)))
	dir, err := os.MkdirTemp("", "left")
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir) // a socket's path is short
	if _, err := net.Listen("unix", "s"); err != nil {
		t.Fatal(err)
	}
	all := fmt.Sprintln(os.Getppid(), os.Getpid(), server.Cmd.Process.Pid, daemonPID)
	if err := os.WriteFile(pids, []byte(all), 0o600); err != nil {
		t.Fatal(err)
	}
	switch end {
	case "fails":
		t.Fatal("as it must")
	case "panics":
		panic("as it must")
	case "panics elsewhere":
		go panic("as it must")
		select {}
	case "exits":
		os.Exit(0)
	case "is killed":
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
	case "leaves a folder":
		syscall.Kill(daemonPID, syscall.SIGKILL)
	case "leaves a process":
		os.RemoveAll(dir)
	case "passes":
		os.RemoveAll(dir)
		syscall.Kill(daemonPID, syscall.SIGKILL)
	default: // times out or is interrupted
		select {}
	}
}

func TestLeavesNothing(t *testing.T) {
	t.Parallel()
	empty := exec.Command(os.Args[0], "-test.run=^$")
	empty.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	begin := time.Now()
	must.Do(t, empty.Run())
	enough := max(10*time.Second, 20*time.Since(begin)) // for a test that times out only then
	for end, want := range map[string]string{
		"passes": "PASS", "fails": "as it must", "panics": "as it must", "panics elsewhere": "as it must",
		"exits": "unexpected call to os.Exit", "is killed": "killed", "times out": "test timed out",
		"is interrupted": "interrupt", "and its guard is killed": "",
		"leaves a folder":  "the tests passed, and left:\n/",
		"leaves a process": "the tests passed, and left:\nprocess ",
	} {
		t.Run(end, func(t *testing.T) {
			t.Parallel()
			dir, pids := t.TempDir(), filepath.Join(t.TempDir(), "pids")
			cmd := exec.Command(os.Args[0], "-test.paniconexit0", "-test.run=^TestEnds$")
			if end == "times out" {
				cmd.Args = append(cmd.Args, "-test.timeout="+enough.String())
			}
			cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool {
				return strings.HasPrefix(v, guarded+"=")
			}), "TMPDIR="+dir, inner+"="+end+":"+pids)
			var all []int
			p := Start(t, cmd, func(*Process) bool {
				data, _ := os.ReadFile(pids)
				for f := range strings.FieldsSeq(string(data)) {
					pid, _ := strconv.Atoi(f)
					all = append(all, pid)
				}
				return len(all) > 0
			})
			if len(all) != 4 || all[0] != cmd.Process.Pid {
				t.Fatalf("processes %v", all)
			}
			switch end {
			case "is interrupted":
				cmd.Process.Signal(syscall.SIGINT)
			case "and its guard is killed":
				cmd.Process.Kill()
				defer syscall.Kill(all[3], syscall.SIGKILL)
				all = all[:3] // its other guard is the one of this test
			}
			if err := p.Wait(); (err == nil) != (end == "passes") || !strings.Contains(p.Log.String(), want) {
				t.Errorf("%v: %s", err, p.Log)
			}
			for _, pid := range all {
				for deadline := time.Now().Add(Patience); syscall.Kill(pid, 0) == nil; time.Sleep(time.Millisecond) {
					if time.Now().After(deadline) {
						t.Fatalf("process %d is left", pid)
					}
				}
			}
			if left, err := os.ReadDir(dir); end != "and its guard is killed" && (err != nil || len(left) > 0) {
				t.Errorf("folders are left: %v, %v", left, err)
			}
		})
	}
}

// A T is a test that may fail.
type failing struct {
	testing.TB
	text strings.Builder
	end  []func()
}

func (f *failing) Helper()           {}
func (f *failing) Cleanup(g func())  { f.end = append(f.end, g) }
func (f *failing) Failed() bool      { return true }
func (f *failing) Fatal(args ...any) { f.Fatalf("%s", fmt.Sprint(args...)) }
func (f *failing) Fatalf(format string, args ...any) {
	f.Logf(format, args...)
	panic(f)
}
func (f *failing) Logf(format string, args ...any) { fmt.Fprintf(&f.text, format+"\n", args...) }

// started is what a test says that starts a program which writes something, and does not come up.
func started(script string, patience time.Duration) string {
	f := new(failing)
	func() {
		defer func() { recover() }()
		startWithin(f, exec.Command("sh", "-c", script), func(p *Process) bool {
			for p.Log.String() == "" && !p.Ended() {
				time.Sleep(time.Millisecond)
			}
			return false
		}, patience)
	}()
	for _, g := range f.end {
		g()
	}
	return f.text.String()
}

// A server that does not come up, or ends, fails its test with the server's own words.
func TestDoesNotComeUp(t *testing.T) {
	if said := started("echo no port >&2; exit 3", Patience); !strings.Contains(said,
		"sh ended before it was ready: exit status 3") || !strings.Contains(said, "no port") {
		t.Errorf("a server that ends: %s", said)
	}
	if said := started("echo I wait; sleep 600 & sleep 600", time.Second); !strings.Contains(said,
		"sh is not ready after 1s") || !strings.Contains(said, "I wait") {
		t.Errorf("a server that waits: %s", said)
	}
}

// A program that is ready, and ends, after it was asked whether it is ready, was ready.
func TestReadyAndEnded(t *testing.T) {
	asked := false
	Start(t, exec.Command("true"), func(p *Process) bool {
		if !asked {
			asked = true
			p.Wait()
			return false
		}
		return true
	})
}

// onThread runs f in a goroutine that ends with its thread, which is not the process's first: that one never ends.
func onThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			onThread(f)
		} else {
			f()
		}
	}()
	<-done
}

// A program lives on when the thread ends that has asked for it.
func TestOutlivesThread(t *testing.T) {
	cat, thread := exec.Command("cat"), 0
	stdin := must.Get[io.WriteCloser](t)(cat.StdinPipe())
	var p *Process
	onThread(func() { p, thread = Start(t, cat, nil), unix.Gettid() })
	Await(t, "the end of the thread", func() bool { return unix.Tgkill(os.Getpid(), thread, 0) == syscall.ESRCH })
	stdin.Write([]byte("alive")) // Pdeathsig would come first
	Await(t, "an answer or the end", func() bool { return p.Log.String() != "" || p.Ended() })
	if p.Log.String() != "alive" {
		t.Errorf("the program has ended with the thread: %v", p.Wait())
	}
}

// A step that gets a signal, or whose parent ends, has all that it started end, and leaves-nothing.sh look.
func TestStepHandsOn(t *testing.T) {
	t.Parallel()
	scripts := must.Get[string](t)(filepath.Abs("../../scripts"))
	for name, signal := range map[string]syscall.Signal{
		"SIGINT": syscall.SIGINT, "SIGTERM": syscall.SIGTERM, "its parent ends": syscall.SIGKILL,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const tests = `sh -c 'echo $$ $TMPDIR >begun; exec sleep 600'`
			line := "exec " + scripts + "/step.sh tests " + scripts + "/leaves-nothing.sh " + tests
			if signal == syscall.SIGKILL {
				line = strings.Replace(line, "exec", "setsid", 1) + "; :" // not of the group that ends with this test
			}
			cmd := exec.Command("sh", "-c", line)
			cmd.Dir = t.TempDir()
			var child int
			var dir string
			p := Start(t, cmd, func(*Process) bool {
				text, _ := os.ReadFile(filepath.Join(cmd.Dir, "begun"))
				n, _ := fmt.Sscan(string(text), &child, &dir)
				return n == 2
			})
			cmd.Process.Signal(signal)
			Await(t, "the end of all", func() bool {
				_, err := os.Stat(dir)
				return syscall.Kill(child, 0) != nil && os.IsNotExist(err)
			})
			if err := p.Wait(); err == nil {
				t.Error("the step says that it has passed")
			}
		})
	}
}

// Every package whose tests make folders or start programs runs them below a guard.
func TestEverywhere(t *testing.T) {
	packages := TestFiles(t)
	guards, needs := regexp.MustCompile(`testproc\.Main\(|softhsmtest\.Main|\bMain\(m`), regexp.MustCompile(
		`TempDir\(\)|MkdirTemp\(|exec\.Command|(pg|vault)test\.`)
	for folder, text := range packages {
		if needs.MatchString(text) && !guards.MatchString(text) {
			t.Errorf("%s has no TestMain with testproc.Main", folder)
		}
	}
	if len(packages) < 10 {
		t.Errorf("only %d packages were seen", len(packages))
	}
}
