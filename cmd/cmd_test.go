// Package cmd_test runs the programs as their users do, by the scripts in testdata/script.
package cmd_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/faultmodule"
	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/internal/programs"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testkeys"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

func TestMain(m *testing.M) { testproc.Main(m.Run) }

// Each script begins with tokens of its own: factory, factory2, operator and operator2.
func TestScripts(t *testing.T) {
	t.Parallel()
	scripts(t, "testdata/script", nil)
}

// These have two empty databases besides, of which service is no owner.
func TestPostgresScripts(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t)
	server.Exec(t, "CREATE ROLE service LOGIN")
	scripts(t, "testdata/postgres", func(env *testscript.Env) {
		owner := server.Database(t)
		env.Setenv("OWNER", owner)
		env.Setenv("SERVICE", server.As(t, owner, "service"))
		restored := server.Database(t)
		env.Setenv("RESTORED", restored)
		env.Setenv("RESTORED_SERVICE", server.As(t, restored, "service"))
	})
}

// scripts runs those of a folder; more sets up what others do not need.
func scripts(t *testing.T, dir string, more func(*testscript.Env)) {
	private, public := fixtureKey(t)
	testscript.Run(t, testscript.Params{
		Dir: dir, RequireExplicitExec: true, WorkdirRoot: t.TempDir(), // its own stays where not all scripts run
		Setup: func(env *testscript.Env) error {
			tb := env.T().(testing.TB)
			env.Values[testKey{}] = tb
			testproc.ShowLogs(tb, filepath.Join(env.WorkDir, "*.log"))
			dir := filepath.Join(env.WorkDir, "softhsm")
			toks := softhsmtest.Make(tb, dir, "factory", "factory2", "operator", "operator2")
			conf := strings.SplitN(softhsmtest.Env(dir), "=", 2)
			env.Setenv(conf[0], conf[1])
			for label, tok := range toks {
				env.Setenv(strings.ToUpper(label), tok.URI)
				env.Setenv(strings.ToUpper(label)+"_SO", "file:"+tok.SOPINFile)
				env.Setenv(strings.ToUpper(label)+"_PINFILE", tok.PINFile)
			}
			env.Setenv("MODULE", toks["factory"].Module)
			env.Setenv("KMEHSM_TOKEN", toks["factory"].URI)
			env.Setenv("PATH", programs.Dir(tb)+":"+env.Getenv("PATH"))
			if err := errors.Join(os.WriteFile(filepath.Join(env.WorkDir, "fixture.key"), private, 0o600),
				os.WriteFile(filepath.Join(env.WorkDir, "fixture.pem"), public, 0o600)); err != nil {
				return err
			}
			if more != nil {
				more(env)
			}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": exits, "faultmodule": faultModule, "nss": nss, "collector": collector, "ready": ready,
			"says": says, "listed": listed,
			"json": isJSON, "prints": prints, "set": set, "appears": appears, "snapshot": snapshot, "same": same,
			"small": small, "flip": flip, "truncate": truncate, "thumbprint": thumbprint, "terminal": onTerminal,
		},
	})
}

// fixtureKey is a fixture's, as OpenSSL writes it: the private key and the public one.
func fixtureKey(t *testing.T) (private, public []byte) {
	t.Helper()
	key, err := testkeys.RSA(3072)
	if err != nil {
		t.Fatal(err)
	}
	if private, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
		t.Fatal(err)
	}
	if public, err = pemkey.Encode(&key.PublicKey); err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), public
}

// exits CODE PROGRAM ARGS... runs a program and demands its exit code, and that it does not panic. What it printed is
// for stdout and stderr to look at.
func exits(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	code := 0
	if exit, ok := err.(*exec.ExitError); ok {
		code = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	stderr := ts.ReadFile("stderr")
	if code != want {
		ts.Fatalf("exit code %d, want %d: %s", code, want, stderr)
	}
	if strings.Contains(stderr, "goroutine ") || strings.Contains(stderr, "panic") {
		ts.Fatalf("it panicked: %s", stderr)
	}
	if code != 0 && strings.TrimSpace(stderr) == "" {
		ts.Fatalf("it failed without a word")
	}
}

// thumbprint NAME FILE sets a variable to the thumbprint of a manufacturer's key or a transport
// key, as its owner reads it out.
func thumbprint(ts *testscript.TestScript, _ bool, args []string) {
	data := ts.ReadFile(args[1])
	var transport struct{ Key struct{ Kid string } }
	if v, err := directory.ParseVerifier([]byte(data)); err == nil {
		ts.Setenv(args[0], v.KeyID())
	} else {
		ts.Check(json.Unmarshal([]byte(data), &transport))
		ts.Setenv(args[0], transport.Key.Kid)
	}
}

// asked gives what a service answers on its socket; status 0 if it does not.
func asked(ts *testscript.TestScript, socket, path string) (status int, body string) {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", ts.MkAbs(socket))
		}}}
	r, err := client.Get("http://keysvc" + path)
	if err != nil {
		return 0, err.Error()
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		return 0, err.Error()
	}
	return r.StatusCode, string(text)
}

// await is testproc.Await for a script.
func await(ts *testscript.TestScript, what string, ok func() bool) {
	for deadline := time.Now().Add(testproc.Patience); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			ts.Fatalf("%s: not within %s", what, testproc.Patience)
		}
	}
}

// ready SOCKET waits for a service.
func ready(ts *testscript.TestScript, _ bool, args []string) {
	await(ts, args[0]+" becomes ready", func() bool {
		status, _ := asked(ts, args[0], "/readyz")
		return status == http.StatusOK
	})
}

// says SOCKET PATTERN waits until a service that is ready says so with the pattern; ! says, until it does without.
func says(ts *testscript.TestScript, neg bool, args []string) {
	pattern, body := regexp.MustCompile(args[1]), ""
	await(ts, fmt.Sprintf("/readyz says %s (not: %v)", pattern, neg), func() bool {
		var status int
		status, body = asked(ts, args[0], "/readyz")
		return status == http.StatusOK && pattern.MatchString(body) != neg
	})
	ts.Logf("%s", body)
}

// listed SOCKET waits until a service has read every list of revoked devices anew.
func listed(ts *testscript.TestScript, _ bool, args []string) {
	began, age := time.Now(), regexp.MustCompile(`(?m)^kme_revocations_age_seconds\{.*\} (.*)$`)
	await(ts, "the lists of revoked devices are read", func() bool {
		now := time.Now()
		_, metrics := asked(ts, args[0], "/metrics")
		lists := age.FindAllStringSubmatch(metrics, -1)
		return len(lists) > 0 && !slices.ContainsFunc(lists, func(list []string) bool {
			seconds, err := strconv.ParseFloat(list[1], 64)
			return err != nil || now.Sub(began).Seconds() <= seconds
		})
	})
}

// appears FILE PATTERN waits until a file has it.
func appears(ts *testscript.TestScript, _ bool, args []string) {
	pattern := regexp.MustCompile(args[1])
	for deadline := time.Now().Add(testproc.Patience); ; time.Sleep(20 * time.Millisecond) {
		text, err := os.ReadFile(ts.MkAbs(args[0]))
		if err == nil && pattern.Match(text) {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("there is no %s in %s: %v\n%s", pattern, args[0], err, text)
		}
	}
}

// json demands that standard output was one JSON document.
func isJSON(ts *testscript.TestScript, _ bool, _ []string) {
	d := json.NewDecoder(strings.NewReader(ts.ReadFile("stdout")))
	var v any
	ts.Check(d.Decode(&v))
	if _, err := d.Token(); err != io.EOF {
		ts.Fatalf("there is more than one JSON document")
	}
}

func contents(ts *testscript.TestScript) string {
	var b bytes.Buffer
	ts.Check(filepath.WalkDir(ts.MkAbs("."), func(path string, e fs.DirEntry, err error) error {
		// SoftHSM notes each opening and login of a token in two files, its library of kept keys which is next (doctor
		// makes keys that it destroys), SQLite tidies up at each opening of a database, and the audit log has refused
		// commands too.
		name := filepath.Base(path)
		if err != nil || e.IsDir() || !e.Type().IsRegular() || name == "generation" || name == "token.object" ||
			strings.HasSuffix(name, ".next") || strings.HasPrefix(name, "keysvc.db") ||
			strings.HasPrefix(name, "log.") || strings.HasPrefix(name, ".snapshot") {
			return err
		}
		data, err := os.ReadFile(path)
		fmt.Fprintf(&b, "%s %x\n", path, sha256.Sum256(data))
		return err
	}))
	return b.String()
}

// snapshot remembers every file, those of the tokens too; same demands that nothing has changed since.
func snapshot(ts *testscript.TestScript, _ bool, _ []string) {
	ts.Check(os.WriteFile(ts.MkAbs(".snapshot"), []byte(contents(ts)), 0o600))
}

func same(ts *testscript.TestScript, _ bool, _ []string) {
	was, is := strings.Split(ts.ReadFile(".snapshot"), "\n"), strings.Split(contents(ts), "\n")
	for _, line := range was {
		if !slices.Contains(is, line) {
			ts.Logf("before: %s", line)
		}
	}
	for _, line := range is {
		if !slices.Contains(was, line) {
			ts.Logf("now: %s", line)
		}
	}
	if !slices.Equal(was, is) {
		ts.Fatalf("something has changed")
	}
}

// small DIR [SIZE] mounts a file system there, of 64 kB if nothing is said, to fill up.
func small(ts *testscript.TestScript, _ bool, args []string) {
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o700))
	ts.Check(syscall.Mount("kmehsm-test", dir, "tmpfs", 0, "size="+append(args, "64k")[1]))
	ts.Defer(func() { syscall.Unmount(dir, 0) })
}

// faultmodule DIR builds the module of package faultmodule around SoftHSM, and sets what it reads.
func faultModule(ts *testscript.TestScript, _ bool, args []string) {
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o700))
	m, err := faultmodule.Build(dir, ts.Getenv("MODULE"))
	ts.Check(err)
	for _, v := range m.Env() {
		name, value, _ := strings.Cut(v, "=")
		ts.Setenv(name, value)
	}
	ts.Setenv("FAULTY", m.URI(ts.Getenv("OPERATOR")))
	ts.Setenv("FAULTY_FACTORY", m.URI(ts.Getenv("FACTORY")))
}

// nss makes two tokens of NSS softoken: NSS and NSS_FACTORY.
func nss(ts *testscript.TestScript, _ bool, _ []string) {
	t := ts.Value(testKey{}).(testing.TB)
	ts.Setenv("NSS", softhsmtest.NSS(t).URI)
	ts.Setenv("NSS_FACTORY", softhsmtest.NSS(t).URI)
	ts.Setenv(softhsmtest.NSSRounds, "1")
}

// testKey is the key of a script's test among its values.
type testKey struct{}

// collector FILE takes what is sent to $COLLECTOR, as an OpenTelemetry collector and a webhook do, and puts it into a
// file.
func collector(ts *testscript.TestScript, _ bool, args []string) {
	file, err := os.Create(ts.MkAbs(args[0]))
	ts.Check(err)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/traces" {
			body := io.Reader(r.Body)
			if r.Header.Get("Content-Encoding") == "gzip" {
				if zipped, err := gzip.NewReader(r.Body); err == nil {
					body = zipped
				}
			}
			io.Copy(file, body)
		}
	}))
	ts.Setenv("COLLECTOR", server.Listener.Addr().String())
	ts.Defer(func() { server.Close(); file.Close() })
}

// flip FILE changes a byte in the middle of a file; truncate FILE cuts it before that.
func flip(ts *testscript.TestScript, _ bool, args []string) {
	data := []byte(ts.ReadFile(args[0]))
	data[len(data)/2] ^= 1
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), data, 0o600))
}

func truncate(ts *testscript.TestScript, _ bool, args []string) {
	data := ts.ReadFile(args[0])
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(data[:len(data)*2/5]), 0o600))
}
