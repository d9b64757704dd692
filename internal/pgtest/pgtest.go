// Package pgtest runs a PostgreSQL server of its own, for tests: on a Unix socket, or on an address with TLS besides.
package pgtest

import (
	"bytes"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
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

	"github.com/kmehsm/kmehsm/internal/freeport"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// A Server is one that runs.
type Server struct {
	dir       string // its data, and its socket
	Port      int    // of an address too, if it has TLS
	address   string // that, or empty
	space     string // the file of the network namespace in which it runs, if that is not the test's
	settings  []string
	archive   string // the folder of its WAL, if it archives that
	process   *testproc.Process
	databases atomic.Int64
}

// Start makes a cluster and starts its server, which ends with the test.
func Start(t testing.TB) *Server {
	t.Helper()
	s := initialise(t)
	s.Run(t)
	return s
}

// StartIn is Start with a folder that stays, for those who know what else is in it; empty: one that ends with the test.
func StartIn(t testing.TB, dir string) *Server {
	t.Helper()
	if dir == "" {
		return Start(t)
	}
	must.Do(t, os.MkdirAll(dir, 0o700))
	own(t, dir)
	s := in(t, dir)
	if _, err := os.Stat(filepath.Join(dir, "PG_VERSION")); errors.Is(err, fs.ErrNotExist) {
		s.initdb(t)
	}
	s.Run(t)
	return s
}

// StartTLS is Start for a server that has a port of an address too, on which it has the certificate and the key of two
// PEM files.
func StartTLS(t testing.TB, address, certificate, key string) *Server {
	t.Helper()
	s := initialise(t)
	s.Port = must.Get[int](t)(freeport.On(address))
	hba := must.Get[*os.File](t)(os.OpenFile(filepath.Join(s.dir, "pg_hba.conf"), os.O_WRONLY|os.O_APPEND, 0))
	_, err := hba.WriteString("hostssl all,replication all all trust\n")
	must.Do(t, errors.Join(err, hba.Close()))
	for name, from := range map[string]string{"server.crt": certificate, "server.key": key} {
		data := must.Get[[]byte](t)(os.ReadFile(from))
		to := filepath.Join(s.dir, name)
		must.Do(t, os.WriteFile(to, data, 0o600))
		own(t, to)
	}
	s.listen(address)
	s.Run(t)
	return s
}

// listen gives the server an address with TLS, from its next start on.
func (s *Server) listen(address string) {
	s.address = address
	s.settings = []string{"-c", "listen_addresses=" + address, "-c", "ssl=on"}
}

// StartArchiving is Start for a server whose WAL is archived, so that its databases can be brought back as they were at
// any moment: see Base and At.
func StartArchiving(t testing.TB) *Server {
	t.Helper()
	s := initialise(t)
	s.archive = folder(t).dir
	s.settings = append(s.settings, "-c", "archive_mode=on", "-c", "archive_command=cp %p "+s.archive+"/%f")
	s.Run(t)
	return s
}

// Base is a base backup of a server, which archives its WAL if it is for At; more are options of pg_basebackup.
func (s *Server) Base(t testing.TB, more ...string) *Server {
	t.Helper()
	base := folder(t)
	s.copyTo(t, base, more...)
	return base
}

// copyTo copies all that a server has to an empty folder.
func (s *Server) copyTo(t testing.TB, base *Server, more ...string) {
	t.Helper()
	if out, err := s.command(t, "pg_basebackup", append(more, "-D", base.dir, "-h", s.dir, "-p", strconv.Itoa(s.Port),
		"-U", "postgres", "-c", "fast", "--no-sync")...).CombinedOutput(); err != nil {
		t.Fatalf("pg_basebackup: %v\n%s", err, out)
	}
	// The server's socket is in its folder, and so is the lock of that.
	must.Do(t, os.Remove(filepath.Join(base.dir, fmt.Sprintf(".s.PGSQL.%d.lock", s.Port))))
}

// At starts a base backup of s as a server of its own, with all databases as they were at a moment after which
// something was written.
func (s *Server) At(t testing.TB, base *Server, moment time.Time) {
	t.Helper()
	s.Exec(t, "CREATE TABLE later (n INTEGER)") // with it, the archive goes on behind what was written last
	db := must.Get[*sql.DB](t)(sql.Open("pgx", s.url("postgres")))
	defer db.Close()
	var last string
	must.Do(t, db.QueryRowContext(t.Context(), "SELECT pg_walfile_name(pg_switch_wal())").Scan(&last))
	testproc.Await(t, last+" is archived", func() bool {
		_, err := os.Stat(filepath.Join(s.archive, last))
		return err == nil
	})
	signal := filepath.Join(base.dir, "recovery.signal")
	must.Do(t, os.WriteFile(signal, nil, 0o600))
	own(t, signal)
	base.settings = append(base.settings, "-c", "restore_command=cp "+s.archive+"/%f %p", "-c",
		"recovery_target_time="+moment.UTC().Format("2006-01-02 15:04:05.000000+00"), "-c",
		"recovery_target_action=promote")
	base.Run(t)
	recovered := must.Get[*sql.DB](t)(sql.Open("pgx", base.url("postgres")))
	defer recovered.Close()
	testproc.Await(t, "the recovery ends", func() bool {
		var still bool
		err := recovered.QueryRowContext(t.Context(), "SELECT pg_is_in_recovery()").Scan(&still)
		return err == nil && !still
	})
}

// Dumped is another database of the server, with what pg_dump and pg_restore bring there from one.
func (s *Server) Dumped(t testing.TB, database string) string {
	t.Helper()
	file, to := filepath.Join(s.dir, "dump"), s.Database(t)
	for _, c := range [][]string{{"pg_dump", "--format=custom", "--file=" + file, database},
		{"pg_restore", "--exit-on-error", "--dbname=" + to, file}} {
		if out, err := s.command(t, c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", c, err, out)
		}
	}
	return to
}

func initialise(t testing.TB) *Server {
	t.Helper()
	s := folder(t)
	s.initdb(t)
	return s
}

func (s *Server) initdb(t testing.TB) {
	t.Helper()
	if out, err := s.command(t, "initdb", "-D", s.dir, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C",
		"--no-sync").CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
}

// folder makes the folder of a server, which ends with the test.
func folder(t testing.TB) *Server {
	t.Helper()
	// Not t.TempDir(), whose parents the server's user may not enter.
	dir := must.Get[string](t)(os.MkdirTemp("", "pgtest-"))
	t.Cleanup(func() { os.RemoveAll(dir) })
	own(t, dir)
	return in(t, dir)
}

func in(t testing.TB, dir string) *Server {
	t.Helper()
	if !strings.Contains(t.Name(), "Postgres") {
		t.Fatal("a test that needs PostgreSQL says Postgres in its name: make check leaves it out")
	}
	s := &Server{dir: dir, Port: 5432, settings: []string{"-c", "listen_addresses="}}
	if socket := filepath.Join(dir, ".s.PGSQL.00000"); len(socket) > 107 {
		t.Fatalf("the path of PostgreSQL's socket, %s, has more than 107 bytes: set TMPDIR to a shorter one", socket)
	}
	t.Cleanup(func() {
		if s.process != nil {
			s.process.Stop(syscall.SIGQUIT) // it removes its System V shared memory
		}
	})
	return s
}

// own gives a file to the server's user.
func own(t testing.TB, path string) {
	t.Helper()
	if c := credential(t); c != nil {
		must.Do(t, os.Chown(path, int(c.Uid), int(c.Gid)))
	}
}

// Run starts the server, again after Kill, and waits until it answers.
func (s *Server) Run(t testing.TB) {
	t.Helper()
	db := must.Get[*sql.DB](t)(sql.Open("pgx", s.url("postgres")))
	defer db.Close()
	args := append([]string{"-D", s.dir, "-p", strconv.Itoa(s.Port), "-k", s.dir, "-c", "max_connections=200", "-c",
		"dynamic_shared_memory_type=mmap", "-c", "wal_retrieve_retry_interval=500ms"}, s.settings...)
	s.process = testproc.Start(t, s.command(t, "postgres", args...), func(*testproc.Process) bool {
		return db.PingContext(t.Context()) == nil
	})
}

// Kill ends the server at once, as kill -9 does. It waits until the processes of its connections have seen that,
// and removes what they shared: while one of them has it, the server does not start again.
func (s *Server) Kill(t testing.TB) {
	t.Helper()
	lines := must.Get[[]byte](t)(os.ReadFile(filepath.Join(s.dir, "postmaster.pid")))
	var key, id int
	// of its System V shared memory
	if _, err := fmt.Sscan(strings.Split(string(lines), "\n")[6], &key, &id); err != nil {
		t.Fatalf("postmaster.pid: %v\n%s", err, lines)
	}
	s.process.Kill()
	for deadline := time.Now().Add(testproc.Patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		var memory unix.SysvShmDesc
		must.Get[int](t)(unix.SysvShmCtl(id, unix.IPC_STAT, &memory))
		if memory.Nattch == 0 {
			must.Get[int](t)(unix.SysvShmCtl(id, unix.IPC_RMID, nil))
			return
		}
	}
	t.Fatal("a connection of a killed PostgreSQL does not end")
}

// Database makes an empty database, and gives its connection string, as the superuser.
func (s *Server) Database(t testing.TB) string {
	t.Helper()
	name := fmt.Sprintf("t%d", s.databases.Add(1))
	s.Exec(t, "CREATE DATABASE "+name)
	return s.url(name)
}

// Named is Database for one that has a name, and may be there.
func (s *Server) Named(t testing.TB, name string) string {
	t.Helper()
	db := must.Get[*sql.DB](t)(sql.Open("pgx", s.url("postgres")))
	defer db.Close()
	var there bool
	must.Do(t, db.QueryRowContext(t.Context(), "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)",
		name).Scan(&there))
	if !there {
		s.Exec(t, "CREATE DATABASE "+name)
	}
	return s.url(name)
}

// Freeze stops the server where it is: connections stay, and nobody answers. Thaw lets it continue.
func (s *Server) Freeze(t testing.TB) {
	t.Helper()
	s.signal(t, syscall.SIGSTOP)
	testproc.Await(t, "the server is stopped, and starts no process for a connection", func() bool {
		state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.process.Cmd.Process.Pid))
		return err == nil && bytes.Contains(state, []byte(") T "))
	})
	s.signal(t, syscall.SIGSTOP) // to those that it had started meanwhile
}

// Thaw is described at Freeze.
func (s *Server) Thaw(t testing.TB) { s.signal(t, syscall.SIGCONT) }

// signal goes to all of the server's processes, each of which is a process group of its own.
func (s *Server) signal(t testing.TB, signal syscall.Signal) {
	t.Helper()
	for _, pid := range s.pids(t) {
		if err := syscall.Kill(pid, signal); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
	}
}

// pids are those of the server, first, and of its connections.
func (s *Server) pids(t testing.TB) []int {
	t.Helper()
	all := []int{s.process.Cmd.Process.Pid}
	main := strconv.Itoa(all[0])
	children := must.Get[[]byte](t)(os.ReadFile("/proc/" + main + "/task/" + main + "/children"))
	for pid := range strings.FieldsSeq(string(children)) {
		all = append(all, must.Get[int](t)(strconv.Atoi(pid)))
	}
	return all
}

// As is the connection string of a database as another role, that must be there.
func (s *Server) As(t testing.TB, database, role string) string {
	t.Helper()
	u := must.Get[*url.URL](t)(url.Parse(database))
	u.User = url.User(role)
	return u.String()
}

// Standby makes a standby of a server without TLS, and starts it. From then on, what the server confirms is on the
// disks of both.
func (s *Server) Standby(t testing.TB) *Server {
	t.Helper()
	standby := folder(t)
	standby.Follow(t, s)
	return standby
}

// StandbyIn is Standby for a server with TLS. The standby has its port and its certificate, on an address of the
// network namespace that a file names, and comes to the server from there.
func (s *Server) StandbyIn(t testing.TB, space, address string) *Server {
	t.Helper()
	standby := s.Base(t, "-R")
	standby.space, standby.Port = space, s.Port
	standby.listen(address)
	standby.settings = append(standby.settings, "-c", fmt.Sprintf(
		"primary_conninfo=host=%s port=%d user=postgres sslmode=require", s.address, s.Port))
	standby.Run(t)
	s.Set(t, "synchronous_standby_names", "*")
	return standby
}

// Place is where a standby will be: see Follow. It is a folder that ends with the test: dir, or one of its own if that
// is empty.
func Place(t testing.TB, dir string) *Server {
	t.Helper()
	if dir == "" {
		return folder(t)
	}
	must.Do(t, os.MkdirAll(dir, 0o700))
	t.Cleanup(func() { os.RemoveAll(dir) })
	own(t, dir)
	return in(t, dir)
}

// Follow makes a server that does not run the standby of another one, and starts it. What was in its folder is gone: it
// has a copy of what the other has.
func (s *Server) Follow(t testing.TB, primary *Server) {
	t.Helper()
	for _, e := range must.Get[[]os.DirEntry](t)(os.ReadDir(s.dir)) {
		must.Do(t, os.RemoveAll(filepath.Join(s.dir, e.Name())))
	}
	primary.copyTo(t, s, "-R")
	s.Run(t)
	primary.Set(t, "synchronous_standby_names", "*")
}

// Stop ends a server in order.
func (s *Server) Stop(t testing.TB) {
	t.Helper()
	must.Do(t, s.process.Stop(syscall.SIGINT))
}

// Set changes a setting of the server while it runs, also for the connections that it has.
func (s *Server) Set(t testing.TB, setting, value string) {
	t.Helper()
	s.Exec(t, fmt.Sprintf("ALTER SYSTEM SET %s = '%s'", setting, value))
	s.Exec(t, "SELECT pg_reload_conf()")
	db := must.Get[*sql.DB](t)(sql.Open("pgx", s.url("postgres")))
	defer db.Close()
	testproc.Await(t, setting+" changes", func() bool {
		var now string
		err := db.QueryRowContext(t.Context(), "SELECT current_setting($1)", setting).Scan(&now)
		return err == nil && now == value
	})
	s.signal(t, syscall.SIGHUP) // the server's own may come to a connection later than that
	// The checkpointer tells commits which standbys there are. It reads its settings before each of its rounds, and the
	// first of these checkpoints may be in a round that has begun before the signal.
	s.Exec(t, "CHECKPOINT")
	s.Exec(t, "CHECKPOINT")
}

// Promote makes a standby the server that takes changes. It waits until it does.
func (s *Server) Promote(t testing.TB) {
	t.Helper()
	s.Exec(t, "SELECT pg_promote()")
}

// Either is the connection string of a database that servers have, as a copy too: of the one that takes changes.
func Either(t testing.TB, database string, servers ...*Server) string {
	t.Helper()
	var hosts, ports []string
	for _, s := range servers {
		hosts, ports = append(hosts, s.dir), append(ports, strconv.Itoa(s.Port))
	}
	u := must.Get[*url.URL](t)(url.Parse(database))
	q := u.Query()
	q.Set("host", strings.Join(hosts, ","))
	q.Set("port", strings.Join(ports, ","))
	q.Set("target_session_attrs", "read-write")
	if len(servers) > 1 {
		q.Set("connect_timeout", "2") // one that is silent keeps nobody from the other
	}
	u.RawQuery = q.Encode()
	return u.String()
}

// Exec executes statements, as the superuser; ExecIn does so in a database that Database or As has named.
func (s *Server) Exec(t testing.TB, statements string) {
	t.Helper()
	s.ExecIn(t, s.url("postgres"), statements)
}

func (s *Server) ExecIn(t testing.TB, database, statements string) {
	t.Helper()
	db := must.Get[*sql.DB](t)(sql.Open("pgx", s.As(t, database, "postgres")))
	defer db.Close()
	if _, err := db.ExecContext(t.Context(), statements); err != nil {
		t.Fatalf("%s: %v", statements, err)
	}
}

func (s *Server) url(database string) string {
	return fmt.Sprintf("postgres://postgres@/%s?host=%s&port=%d&connect_timeout=20", database,
		url.QueryEscape(s.dir), s.Port)
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
	as := credential(t)
	cmd := exec.Command(path, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as}
	if s.space != "" { // only root enters one
		cmd = exec.Command("nsenter", append([]string{"--net=" + s.space, "setpriv", "--reuid", fmt.Sprint(as.Uid),
			"--regid", fmt.Sprint(as.Gid), "--clear-groups", "--pdeathsig", "TERM", path}, args...)...)
		cmd.Args[0] = program // for the test's log
	}
	cmd.Dir = s.dir
	cmd.Env = append(os.Environ(), "HOME="+s.dir) // libpq looks there for certificates
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
	must.Do(t, err)
	uid, uerr := strconv.Atoi(u.Uid)
	gid, gerr := strconv.Atoi(u.Gid)
	must.Do(t, errors.Join(uerr, gerr))
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}

// CPU is what the server's processes have used so far of all cores.
func (s *Server) CPU(t testing.TB) time.Duration {
	t.Helper()
	const tick = 10 * time.Millisecond // of proc(5), for every program on Linux
	var ticks int64
	// Its connections' processes, and in its own line those that have ended.
	for _, pid := range s.pids(t) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue // it has ended meanwhile
		}
		var own [4]int64 // user, system, and both of its children
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))[11:15]
		for i, f := range fields {
			if own[i], err = strconv.ParseInt(f, 10, 64); err != nil {
				t.Fatal(err)
			}
		}
		ticks += own[0] + own[1] + own[2] + own[3]
	}
	return time.Duration(ticks) * tick
}
