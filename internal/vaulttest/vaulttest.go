// Package vaulttest gives tests a real Vault server, started by bin/vaultrun.
package vaulttest

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/hashicorp/vault/api"

	"github.com/kmehsm/kmehsm/internal/freeport"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// A Server is a Vault.
type Server struct {
	Addr  string // http://127.0.0.1:port, or https; the same after a restart
	Root  string // a token that may do everything
	Dir   string // the server's own folder; empty if it was there before
	flags []string

	process *testproc.Process
}

// Any is the server of VAULT_ADDR and VAULT_TOKEN, where they are set, else one as of Start. A test that takes any
// server may use nothing of it but its API; what the test mounts there must be new, and is removed at the end.
func Any(t testing.TB) *Server {
	t.Helper()
	s := &Server{Addr: os.Getenv("VAULT_ADDR"), Root: os.Getenv("VAULT_TOKEN")}
	if s.Addr == "" || s.Root == "" {
		return Start(t)
	}
	sys := s.Client(t, s.Root).Sys()
	before, err := sys.ListMounts()
	if err != nil {
		t.Fatalf("the server of VAULT_ADDR: %v", err)
	}
	for _, ours := range []string{"kme/", "other/", "old/"} {
		if before[ours] != nil {
			t.Fatalf("the server of VAULT_ADDR has a mount %s already: the tests do not touch it", ours)
		}
	}
	known := must.Get[[]string](t)(sys.ListPolicies())
	t.Cleanup(func() {
		after, err := sys.ListMounts()
		for path := range after {
			if before[path] == nil {
				err = errors.Join(err, sys.Unmount(path))
			}
		}
		policies, perr := sys.ListPolicies()
		for _, name := range policies {
			if !slices.Contains(known, name) {
				perr = errors.Join(perr, sys.DeletePolicy(name))
			}
		}
		if err := errors.Join(err, perr); err != nil {
			t.Error(err)
		}
	})
	return s
}

// Start starts an unsealed server on Raft storage, which ends with the test, with more flags of vaultrun's.
func Start(t testing.TB, flags ...string) *Server {
	t.Helper()
	return StartIn(t, t.TempDir(), flags...)
}

// StartIn is Start in a folder, which may have the data of an earlier server.
func StartIn(t testing.TB, dir string, flags ...string) *Server {
	t.Helper()
	s := &Server{Dir: dir, flags: flags}
	// Its port is the test's, also while the server is away.
	s.start(t, fmt.Sprintf("127.0.0.1:%d", must.Get[int](t)(freeport.On("127.0.0.1"))))
	return s
}

func (s *Server) start(t testing.TB, listen string, more ...string) {
	t.Helper()
	if !strings.Contains(t.Name(), "Vault") {
		t.Fatal("a test that needs Vault says so in its name: make check leaves it out")
	}
	_, here, _, _ := runtime.Caller(0)
	root := filepath.Join(filepath.Dir(here), "..", "..")
	program := filepath.Join(root, "bin", "vaultrun")
	// Not by package os: then go test would keep no result of these tests, since make vaultdev gives the program a new
	// time even if it leaves it as it is. The sources are what a result depends on.
	if err := syscall.Access(program, 1); err != nil {
		t.Fatal("there is no bin/vaultrun: run make vaultdev")
	}
	for _, sources := range []string{"vaultrun", "vaultdev"} {
		must.Get[[]os.DirEntry](t)(os.ReadDir(filepath.Join(root, "tools", sources)))
	}
	cmd := exec.Command(program, slices.Concat([]string{"-listen", listen, "-dir", s.Dir, "-log-level", "error"},
		s.flags, more)...)
	out := new(testproc.Log)
	cmd.Stdout = out
	s.process = testproc.Start(t, cmd, func(*testproc.Process) bool { return strings.Contains(out.String(), "\n") })
	var said struct{ Address string }
	must.Do(t, json.Unmarshal([]byte(out.String()), &said))
	s.Addr = said.Address
	data := must.Get[[]byte](t)(os.ReadFile(filepath.Join(s.Dir, "init.json")))
	var file struct {
		Token string `json:"root_token"`
	}
	must.Do(t, json.Unmarshal(data, &file))
	s.Root = file.Token
}

// Join starts another server, a standby of s's cluster.
func (s *Server) Join(t testing.TB) *Server {
	t.Helper()
	return Start(t, "-join", filepath.Join(s.Dir, "init.json"))
}

// Kill ends the server as a loss of power would.
func (s *Server) Kill() { s.process.Kill() }

// Freeze stops the server where it is: its kernel goes on taking connections, and nobody answers. Thaw lets it
// continue.
func (s *Server) Freeze(t testing.TB) { s.signal(t, syscall.SIGSTOP) }

// Thaw is described at Freeze.
func (s *Server) Thaw(t testing.TB) { s.signal(t, syscall.SIGCONT) }

func (s *Server) signal(t testing.TB, signal syscall.Signal) {
	t.Helper()
	must.Do(t, syscall.Kill(-s.process.Cmd.Process.Pid, signal)) // vaultrun and the server are one group
}

// Restart starts a killed server again at its address; sealed leaves it sealed.
func (s *Server) Restart(t testing.TB, sealed bool) {
	t.Helper()
	var more []string
	if sealed {
		more = []string{"-sealed"}
	}
	_, listen, _ := strings.Cut(s.Addr, "://")
	s.start(t, listen, more...)
}

// Client talks to the server with a token, and does not try again what fails.
func (s *Server) Client(t testing.TB, token string) *api.Client {
	t.Helper()
	config := api.DefaultConfig()
	config.Address, config.MaxRetries = s.Addr, 0
	if at := slices.Index(s.flags, "-tls-cert"); at >= 0 {
		must.Do(t, config.ConfigureTLS(&api.TLSConfig{CACert: s.flags[at+1]}))
	}
	c := must.Get[*api.Client](t)(api.NewClient(config))
	c.SetToken(token)
	return c
}

// Mount makes a KV mount of a version.
func (s *Server) Mount(t testing.TB, path, version string) {
	t.Helper()
	must.Do(t, s.Client(t, s.Root).Sys().Mount(path,
		&api.MountInput{Type: "kv", Options: map[string]string{"version": version}}))
}
