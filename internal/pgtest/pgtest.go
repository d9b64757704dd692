// Package pgtest runs a PostgreSQL server of its own on 127.0.0.1, for tests.
package pgtest

import (
	"database/sql"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver
	"golang.org/x/sys/unix"

	"github.com/kmehsm/kmehsm/internal/testproc"
)

// A Server is one that runs.
type Server struct {
	dir, port string
	process   *testproc.Process
	databases atomic.Int64
}

// Start makes a cluster and starts its server, which ends with the test.
func Start(t testing.TB) *Server {
	t.Helper()
	if !strings.Contains(t.Name(), "Postgres") {
		t.Fatal("a test that needs PostgreSQL says Postgres in its name: make check leaves it out")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	l.Close()
	dir, err := os.MkdirTemp("", "pgtest-") // not t.TempDir(), whose parents the server's user may not enter
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &Server{dir: dir, port: port}
	if c := credential(t); c != nil {
		if err := os.Chown(dir, int(c.Uid), int(c.Gid)); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := s.command(t, "initdb", "-D", dir, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync").CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	s.Run(t)
	t.Cleanup(func() { s.process.Stop(syscall.SIGQUIT) }) // it removes its System V shared memory
	return s
}

// Run starts the server, again after Kill, and waits until it answers.
func (s *Server) Run(t testing.TB) {
	t.Helper()
	db, err := sql.Open("pgx", s.url("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	s.process = testproc.Start(t, s.command(t, "postgres", "-D", s.dir, "-p", s.port, "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=",
		"-c", "max_connections=200", "-c", "dynamic_shared_memory_type=mmap"), func(*testproc.Process) bool { return db.PingContext(t.Context()) == nil })
}

// Kill ends the server at once, as kill -9 does. It waits until the processes of its connections have seen that,
// and removes what they shared: while one of them has it, the server does not start again.
func (s *Server) Kill(t testing.TB) {
	t.Helper()
	lines, err := os.ReadFile(filepath.Join(s.dir, "postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	var key, id int
	if _, err := fmt.Sscan(strings.Split(string(lines), "\n")[6], &key, &id); err != nil { // of its System V shared memory
		t.Fatalf("postmaster.pid: %v\n%s", err, lines)
	}
	s.process.Kill()
	for deadline := time.Now().Add(testproc.Patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		var memory unix.SysvShmDesc
		if _, err := unix.SysvShmCtl(id, unix.IPC_STAT, &memory); err != nil {
			t.Fatal(err)
		}
		if memory.Nattch == 0 {
			if _, err := unix.SysvShmCtl(id, unix.IPC_RMID, nil); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatal("a connection of a killed PostgreSQL does not end")
}

// Database makes an empty database, and gives its connection string.
func (s *Server) Database(t testing.TB) string {
	t.Helper()
	db, err := sql.Open("pgx", s.url("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	name := fmt.Sprintf("t%d", s.databases.Add(1))
	if _, err := db.ExecContext(t.Context(), "CREATE DATABASE "+name); err != nil {
		t.Fatal(err)
	}
	return s.url(name)
}

func (s *Server) url(database string) string {
	return fmt.Sprintf("postgres://postgres@127.0.0.1:%s/%s?connect_timeout=2", s.port, database)
}

// command is one of PostgreSQL's programs, as a user that it accepts: not as root.
func (s *Server) command(t testing.TB, program string, args ...string) *exec.Cmd {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/" + program)
		if len(found) == 0 {
			t.Fatalf("%s: %v: scripts/deps.sh test installs it", program, err)
		}
		path = found[len(found)-1]
	}
	cmd := exec.Command(path, args...)
	cmd.Dir = s.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: credential(t)}
	return cmd
}

func credential(t testing.TB) *syscall.Credential {
	t.Helper()
	if os.Getuid() != 0 {
		return nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		u, err = user.Lookup("nobody")
	}
	if err != nil {
		t.Fatal(err)
	}
	uid, uerr := strconv.Atoi(u.Uid)
	gid, gerr := strconv.Atoi(u.Gid)
	if err := errors.Join(uerr, gerr); err != nil {
		t.Fatal(err)
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}
