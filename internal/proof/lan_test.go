package proof

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmehsm/kmehsm/internal/programs"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// ownNetwork is in the environment of a test that has a network of its own.
const ownNetwork = "KMEHSM_TEST_OWN_NETWORK"

// inOwnNetwork says whether the test has a network namespace of its own. If it has not, it is run again in one, and all
// that it says there is said here. It ends before this one is ended, so that it can say where it waits.
func inOwnNetwork(t *testing.T) bool {
	t.Helper()
	if os.Getenv(ownNetwork) != "" {
		return true
	}
	apart := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	probe := exec.Command("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
	probe.SysProcAttr = apart
	if out, err := probe.CombinedOutput(); errors.Is(err, exec.ErrNotFound) {
		t.Fatal("there is no ip: scripts/deps.sh test installs it")
	} else if err != nil {
		t.Fatalf("network namespaces are not to be had here, as root has them: make test leaves this test out, and "+
			"says so: %v %s", err, out)
	}
	programs.Dir(t)
	var timeout time.Duration // none
	if until, ok := t.Deadline(); ok {
		timeout = time.Until(until) * 9 / 10
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout="+timeout.String())
	cmd.Env, cmd.SysProcAttr = append(os.Environ(), ownNetwork+"=1"), apart
	said := new(testproc.Log)
	cmd.Stdout, cmd.Stderr = said, said
	err := testproc.Start(t, cmd, nil).Wait()
	t.Logf("in a network of its own:\n%s", said)
	if err != nil {
		t.Errorf("in a network of its own: %v", err)
	}
	return false
}

// A lan is hosts with a router between them, which drops without a word what it is told to. The test's own process is
// the host 0; each host has the address of its number, and may have more.
type lan struct {
	t      *testing.T
	spaces []string // of each host, and the router's
}

func address(host int) string { return fmt.Sprintf("10.99.%d.2", host) }

func newLAN(t *testing.T, hosts int) *lan {
	l := &lan{t: t}
	for range hosts + 1 {
		file := make(chan *os.File)
		go func() {
			runtime.LockOSThread() // and so it ends with this function
			if len(l.spaces) > 0 {
				if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
					t.Error(err)
				}
			}
			f, err := os.Open("/proc/thread-self/ns/net")
			if err != nil {
				t.Error(err)
			}
			file <- f
		}()
		f := <-file
		if t.Failed() {
			t.FailNow()
		}
		t.Cleanup(func() { f.Close() })
		l.spaces = append(l.spaces, fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()))
	}
	router := l.spaces[hosts]
	l.run(router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
	for i := range hosts {
		near, far := fmt.Sprintf("host%d", i), fmt.Sprintf("port%d", i)
		l.ip(l.spaces[0], fmt.Sprintf("link add %s type veth peer name %s", near, far),
			"link set "+far+" netns "+router,
			"link set "+near+" netns "+l.spaces[i])
		l.ip(router, fmt.Sprintf("addr add 10.99.%d.1/24 dev %s", i, far), "link set "+far+" up")
		l.ip(l.spaces[i], "link set lo up", fmt.Sprintf("addr add %s/24 dev %s", address(i), near),
			"link set "+near+" up", fmt.Sprintf("route add default via 10.99.%d.1", i))
	}
	return l
}

// also gives a host another address.
func (l *lan) also(host int, address string) {
	l.t.Helper()
	l.ip(l.spaces[host], fmt.Sprintf("addr add %s/24 dev host%d", address, host))
}

func (l *lan) command(space string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=" + space}, args...)...)
}

// on has a command run on a host.
func (l *lan) on(host int, cmd *exec.Cmd) *exec.Cmd {
	inside := l.command(l.spaces[host], cmd.Args...)
	inside.Args[len(inside.Args)-len(cmd.Args)] = cmd.Path
	inside.Args[0], inside.Dir, inside.Env = filepath.Base(cmd.Path), cmd.Dir, cmd.Env
	return inside
}

func (l *lan) run(space string, args ...string) {
	l.t.Helper()
	if out, err := l.command(space, args...).CombinedOutput(); err != nil {
		l.t.Fatalf("%v: %v\n%s", args, err, out)
	}
}

func (l *lan) ip(space string, lines ...string) {
	l.t.Helper()
	cmd := l.command(space, "ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Join(lines, "\n"))
	if out, err := cmd.CombinedOutput(); err != nil {
		l.t.Fatalf("%v: %v\n%s", lines, err, out)
	}
}

// cut has the router drop what two addresses send each other, until mend.
func (l *lan) cut(a, b string) (mend func()) {
	l.t.Helper()
	rules := func(what string) {
		l.ip(l.spaces[len(l.spaces)-1], fmt.Sprintf("rule %s from %s to %s blackhole", what, a, b),
			fmt.Sprintf("rule %s from %s to %s blackhole", what, b, a))
	}
	rules("add")
	return func() { rules("del") }
}
