package cmd_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/kmehsm/kmehsm/internal/pty"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// onTerminal CODE TYPED PROGRAM ARGS... runs a program on a pseudo-terminal, types something when it is asked to, and
// demands its exit code. What stood on the terminal is in the file terminal.
func onTerminal(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	typed, err := strconv.Unquote(`"` + args[1] + `"`) // for Ctrl-C
	ts.Check(err)
	master, slave, err := pty.Open(80)
	ts.Check(err)
	defer master.Close()
	program := exec.Command("env", append([]string{"PATH=" + ts.Getenv("PATH"),
		"KMEHSM_TOKEN=" + ts.Getenv("KMEHSM_TOKEN"), "SOFTHSM2_CONF=" + ts.Getenv("SOFTHSM2_CONF"), "TERM=xterm"},
		args[2:]...)...)
	program.Dir = ts.MkAbs(".")
	program.Stdin, program.Stdout, program.Stderr = slave, slave, slave
	program.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	err = program.Start()
	slave.Close()
	ts.Check(err)
	deadline := time.AfterFunc(testproc.Patience, func() { program.Process.Kill() })
	defer deadline.Stop()

	var shown bytes.Buffer
	asked := false
	for buf := make([]byte, 4096); ; {
		n, err := master.Read(buf)
		shown.Write(buf[:n])
		if !asked && strings.Contains(shown.String(), " to go on: ") {
			asked = true
			_, werr := io.WriteString(master, typed)
			ts.Check(werr)
		}
		if err != nil { // EIO when the last program has closed it
			break
		}
	}
	ts.Check(os.WriteFile(ts.MkAbs("terminal"), shown.Bytes(), 0o600))
	err = program.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		ts.Fatalf("%v", err)
	}
	if code := program.ProcessState.ExitCode(); code != want {
		ts.Fatalf("exit code %d, want %d: %s", code, want, &shown)
	}
}
