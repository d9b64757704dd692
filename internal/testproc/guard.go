// Package testproc starts other programs for tests, and sees to it that a test leaves no process, no socket and no
// folder behind, however it ends.
package testproc

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// guarded is in the environment of what runs below a guard.
const guarded = "KMEHSM_TEST_GUARDED"

// Main runs a package's tests below a guard, and exits. It is for TestMain:
//
//	func TestMain(m *testing.M) { testproc.Main(m.Run) }
//
// The guard is this process. It runs the tests in a child, with a TMPDIR of their own. When the child has ended,
// also by a panic, a timeout or a signal, the guard ends every process that is left of it and removes the TMPDIR.
// Tests that passed and leave one of these fail.
func Main(run func() int) {
	if os.Getenv(guarded) != "" {
		os.Exit(run())
	}
	code, err := guard()
	if err != nil {
		fmt.Fprintln(os.Stderr, "testproc:", err)
		code = max(code, 1)
	}
	syscall.Exit(code) // os.Exit has the race detector wait a second for what other goroutines still do
}

func guard() (code int, err error) {
	dir, err := os.MkdirTemp("", "t") // short: the path of a socket has 107 bytes at most
	if err != nil {
		return 1, err
	}
	defer remove(dir)
	if err := os.Chmod(dir, 0o711); err != nil { // PostgreSQL, which does not run as root, has its folder in there
		return 1, err
	}
	if err := errors.Join(os.Setenv("TMPDIR", dir), os.Setenv(guarded, "1")); err != nil {
		return 1, err
	}
	program, err := os.Executable()
	if err != nil {
		return 1, err
	}
	// Whoever of the tests' processes loses its parent becomes a child of this process.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return 1, err
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	runtime.LockOSThread() // Pdeathsig comes when the thread ends that started the child
	tests, err := os.StartProcess(program, os.Args, &os.ProcAttr{
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Sys:   &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	})
	if err != nil {
		return 1, err
	}
	go func() {
		for s := range signals {
			tests.Signal(s)
		}
	}()
	var status syscall.WaitStatus
	for pid := 0; pid != tests.Pid; {
		if pid, err = syscall.Wait4(-1, &status, 0, nil); err != nil && err != syscall.EINTR {
			return 1, err
		}
	}
	if status.Signaled() {
		endAll(0)
		return 1, fmt.Errorf("the tests were ended by a signal: %s", status.Signal())
	}
	if status.ExitStatus() != 0 {
		endAll(0)
		return status.ExitStatus(), nil
	}
	left := endAll(20 * time.Second)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 1, err
	}
	for _, e := range entries {
		left = append(left, filepath.Join(dir, e.Name()))
	}
	if len(left) > 0 {
		return 1, fmt.Errorf("the tests passed, and left:\n%s", strings.Join(left, "\n"))
	}
	return 0, nil
}

// endAll gives this process's children some time to end by themselves, ends those that do not, and returns these.
func endAll(patience time.Duration) (ended []string) {
	asked := map[int]bool{}
	for begin := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		var err error
		for pid := 1; pid > 0; {
			pid, err = syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
		}
		if err == syscall.ECHILD { // children may miss one while another ends (proc(5))
			return ended
		}
		late := time.Since(begin) - patience
		for pid, name := range children() {
			switch {
			case late > 10*time.Second:
				syscall.Kill(pid, syscall.SIGKILL)
			case late > 0 && !asked[pid]:
				asked[pid] = true
				ended = append(ended, fmt.Sprintf("process %d: %s", pid, name))
				syscall.Kill(pid, syscall.SIGTERM)
			}
		}
	}
}

// children are this process's, and their command lines.
func children() map[int]string {
	all := map[int]string{}
	lists, _ := filepath.Glob("/proc/self/task/*/children") // a child is its thread's
	for _, list := range lists {
		pids, _ := os.ReadFile(list)
		for field := range strings.FieldsSeq(string(pids)) {
			line, _ := os.ReadFile(filepath.Join("/proc", field, "cmdline"))
			pid, _ := strconv.Atoi(field)
			all[pid] = strings.ReplaceAll(strings.TrimRight(string(line), "\x00"), "\x00", " ")
		}
	}
	return all
}

// remove removes a folder, with what is mounted in it.
func remove(dir string) {
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		if at := strings.Fields(line)[1]; strings.HasPrefix(at, dir+"/") {
			syscall.Unmount(at, unix.MNT_DETACH)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		fmt.Fprintln(os.Stderr, "testproc:", err)
	}
}
