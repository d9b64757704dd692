package testproc

import (
	"bytes"
	"log"
	"log/slog"
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

// Patience is how long a test waits for another process.
const Patience = time.Minute

// A Process is a program that a test has started. It is the head of a process group of its own, which ends with the
// test, and itself also when the test's process is killed.
type Process struct {
	Cmd   *exec.Cmd
	Log   *Log          // what it writes to those of standard output and error that the test has not set
	ended chan struct{} // closed when the whole group has
	err   error         // of the program's end; set before ended is closed
}

// Start starts a program, and waits until it is ready: a test whose program is not, within Patience, fails. A test that
// fails says the end of the program's log, by the name of its first argument. A nil ready waits for nothing.
func Start(t testing.TB, cmd *exec.Cmd, ready func(p *Process) bool) *Process {
	t.Helper()
	return startWithin(t, cmd, ready, Patience)
}

func startWithin(t testing.TB, cmd *exec.Cmd, ready func(p *Process) bool, patience time.Duration) *Process {
	t.Helper()
	p := &Process{Cmd: cmd, Log: new(Log), ended: make(chan struct{})}
	if cmd.Stdout == nil {
		cmd.Stdout = p.Log
	}
	if cmd.Stderr == nil {
		cmd.Stderr = p.Log
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	cmd.SysProcAttr.Setpgid, cmd.SysProcAttr.Pdeathsig = true, syscall.SIGTERM
	must.Do(t, start(cmd))
	go func() {
		p.err = cmd.Wait()
		for syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) == nil {
			time.Sleep(time.Millisecond)
		}
		close(p.ended)
	}()
	name := filepath.Base(cmd.Args[0])
	t.Cleanup(func() {
		p.Kill()
		showEnd(t, name, p.Log.String())
	})
	for deadline := time.Now().Add(patience); ready != nil; time.Sleep(10 * time.Millisecond) {
		ended := p.Ended() // before ready is asked: a program may be ready, and end, in one moment
		if ready(p) {
			break
		}
		if ended {
			t.Fatalf("%s ended before it was ready: %v", name, p.err)
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s is not ready after %s", name, patience)
		}
	}
	return p
}

// ShowLogs has a test that fails say the end of each file that a pattern matches then: the logs of servers that a
// script starts. Call it between making their folder and starting the script.
func ShowLogs(t testing.TB, patterns ...string) {
	t.Cleanup(func() {
		for _, pattern := range patterns {
			files, _ := filepath.Glob(pattern)
			for _, file := range files {
				text, _ := os.ReadFile(file)
				showEnd(t, file, string(text))
			}
		}
	})
}

func showEnd(t testing.TB, name, log string) {
	if t.Failed() && log != "" {
		t.Logf("the end of the log of %s:\n%s", name, log[max(0, len(log)-16000):])
	}
}

// start starts a command in the one thread that lives as long as the process: Linux sends Pdeathsig when the thread
// ends that started the child.
func start(cmd *exec.Cmd) error {
	result := make(chan error)
	starter() <- func() { result <- cmd.Start() }
	return <-result
}

var starter = sync.OnceValue(func() chan<- func() {
	work := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range work {
			f()
		}
	}()
	return work
})

// Ended says whether the program has ended.
func (p *Process) Ended() bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

// Wait waits for the program's end, and gives its error.
func (p *Process) Wait() error {
	<-p.ended
	return p.err
}

// Stop asks the program to end by a signal, and gives the error of its end; one that does not end within Patience
// is killed.
func (p *Process) Stop(s syscall.Signal) error {
	p.Cmd.Process.Signal(s)
	select {
	case <-p.ended:
	case <-time.After(Patience):
		p.Kill()
	}
	return p.err
}

// Kill ends the program and its process group at once, as a loss of power would, and waits until they are gone.
func (p *Process) Kill() {
	if !p.Ended() { // the group's number is still its own
		syscall.Kill(-p.Cmd.Process.Pid, syscall.SIGKILL)
	}
	<-p.ended
}

// A Log is what a program writes and a test reads.
type Log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Logged has what this process logs by slog's default, for the rest of the test.
func Logged(t testing.TB) *Log {
	text, before, out, flags := new(Log), slog.Default(), log.Writer(), log.Flags()
	slog.SetDefault(slog.New(slog.NewJSONHandler(text, nil)))
	t.Cleanup(func() {
		slog.SetDefault(before)
		log.SetOutput(out) // slog has set it to the test's
		log.SetFlags(flags)
	})
	return text
}

// Await waits until ok, which must stay so, for as long as a busy machine may need.
func Await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(Patience); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s", what, Patience)
		}
	}
}

// ReportCPU reports the time that all cores spend on an operation from now until done, which whatever else the machine
// does changes least.
func ReportCPU(b *testing.B) (done func()) {
	used := func() (us float64) {
		var u syscall.Rusage
		must.Do(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
		return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e3
	}
	before := used()
	return func() { b.ReportMetric((used()-before)/float64(b.N), "cpu-us/op") }
}

// TestFiles gives the text of all tests of each package of the tree, by its folder. It enters no other folders: go test
// keeps no result of a test that has read a folder in which git or a build works.
func TestFiles(t testing.TB) map[string]string {
	t.Helper()
	packages := map[string]string{}
	dirs := must.Get[[]byte](t)(exec.Command("go", "list", "-f", "{{.Dir}}", "work").Output())
	for dir := range strings.Lines(string(dirs)) {
		dir = strings.TrimSpace(dir)
		for _, file := range must.Get[[]string](t)(filepath.Glob(filepath.Join(dir, "*_test.go"))) {
			packages[dir] += string(must.Get[[]byte](t)(os.ReadFile(file)))
		}
	}
	return packages
}
