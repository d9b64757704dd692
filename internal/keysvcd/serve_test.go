package keysvcd

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/keysvcd/operator"
	"github.com/kmehsm/kmehsm/internal/keysvcd/settings"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// initialise does what keysvc init does: it makes a token the operator's, and a store in a folder.
func initialise(t *testing.T, tok softhsmtest.Tok, state string) {
	t.Helper()
	first := newInit(tok, state)
	withToken(t, tok, func(token *hsmkeys.OperatorToken) error { _, err := first.Run(t.Context(), token); return err })
}

func withToken(t *testing.T, tok softhsmtest.Tok, f func(*hsmkeys.OperatorToken) error) {
	t.Helper()
	must.Do(t, operator.WithToken(t.Context(), tok.URI, f))
}

func newInit(tok softhsmtest.Tok, state string) operator.Init {
	return operator.Init{URI: tok.URI, State: state, Store: sqlstore.InFolder(state), AcceptWeak: true}
}

// get is what a daemon answers on its socket.
func get(socket, what string) (status int, body string) {
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", socket) }}}
	r, err := c.Get("http://keysvc" + what)
	if err != nil {
		return 0, err.Error()
	}
	defer r.Body.Close()
	text, _ := io.ReadAll(r.Body)
	return r.StatusCode, string(text)
}

// The daemon serves from a token and a database, reloads at SIGHUP, and ends when it is told to.
func TestServe(t *testing.T) {
	dir, own := t.TempDir(), os.Getuid()
	socket, path := filepath.Join(dir, "s"), filepath.Join(dir, "keysvc.yaml")
	tok := softhsmtest.Token(t)
	write := func(uid int, more string) {
		t.Helper()
		text := fmt.Sprintf("token: %q\nstate: state\nsocket: s\ndrain_delay: 5s\n"+
			"clients: [{name: me, uid: %d, roles: [hss, metrics], plmns: [all]}]\n%s", tok.URI, uid, more)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(own, "")
	if err := Serve(t.Context(), settings.Source{Path: path}, io.Discard); err == nil ||
		!strings.Contains(err.Error(), "run keysvc init first") {
		t.Fatalf("without a state folder: %v", err)
	}
	state := filepath.Join(dir, "state")
	if err := os.Mkdir(state, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Serve(t.Context(), settings.Source{Path: path}, io.Discard); err == nil ||
		!strings.Contains(err.Error(), "no keys yet: run keysvc init first") {
		t.Fatalf("a token without keys: %v", err)
	}
	initialise(t, tok, state)

	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	log, ended := new(testproc.Log), make(chan error, 1)
	go func() { ended <- Serve(ctx, settings.Source{Path: path}, log) }()
	get := func(what string) (status int, body string) { return get(socket, what) }
	testproc.Await(t, "it serves", func() bool {
		if len(ended) > 0 {
			t.Fatalf("it has ended: %v\n%s", <-ended, log)
		}
		status, _ := get("/readyz")
		return status == http.StatusOK
	})
	other := newInit(tok, filepath.Join(dir, "other"))
	other.NewStore = true
	withToken(t, tok, func(token *hsmkeys.OperatorToken) error { _, err := other.Run(t.Context(), token); return err })
	second := func(what, was, is, want string) {
		t.Helper()
		text, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(path+"2", bytes.ReplaceAll(text, []byte(was), []byte(is)), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		short, cancel := context.WithTimeout(t.Context(), testproc.Patience)
		defer cancel()
		err = Serve(short, settings.Source{Path: path + "2"}, io.Discard)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("a second daemon on the same %s: %v", what, err)
		}
	}
	second("database", "socket: s", "socket: s2", "serves from "+filepath.Join(state, "keysvc.db")+" already")
	second("socket", "state: state", "state: other", "another process serves")
	c, err := client.New(client.Options{URLs: []string{"unix:" + socket}, Timeout: testproc.Patience})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	imsi, err := kme.ParseIMSI("001010000000001")
	if err != nil {
		t.Fatal(err)
	}
	if v, err := c.PrepareVector(t.Context(), imsi, client.Origin{}, client.RAND{1}); err != nil || v.AttemptID == "" {
		t.Errorf("PrepareVector: %+v, %v", v, err)
	}
	metrics := ""
	// The store has a second to answer each time.
	testproc.Await(t, "the bindings are counted, and the store is up, without a warning", func() bool {
		_, metrics = get("/metrics")
		return strings.Contains(metrics, "\nkme_bindings_counted_timestamp_seconds ") &&
			strings.Contains(metrics, "\nkme_store_up 1") && strings.Contains(metrics, "\nkme_store_warnings 0")
	})
	for _, want := range []string{"\nkme_hsm_up{", "\nkme_hsm_weaknesses{", "\nkme_directory_cache_hits_total 0",
		"\nkme_build_info{commit=", "\nkme_ledger_entries 0", "\nkme_attaches_total 0", "\nkme_established_total 0",
		`kme_bindings{state="ACTIVE"} 0`, `kme_bindings{state="PENDING"} 0`, `kme_bindings{state="REVOKED"} 0`,
		`kme_refusals_total{reason="ROLLED_BACK"} 0`,
		`kme_call_seconds_count{method="EstablishKME",reason="OK"} 0`,
		"\nprocess_open_fds ", `kme_hsm_operation_seconds_count{operation="derive a key",result="ok"}`} {
		if !strings.Contains(metrics, want) {
			t.Errorf("the metrics have no %q", want)
		}
	}

	// Without this, a SIGHUP that comes when the daemon has ended would end the tests.
	hups := make(chan os.Signal, 1)
	signal.Notify(hups, syscall.SIGHUP)
	defer signal.Stop(hups)
	reload := func(message string) {
		t.Helper()
		before := strings.Count(log.String(), message)
		testproc.Await(t, message, func() bool {
			syscall.Kill(os.Getpid(), syscall.SIGHUP)
			return strings.Count(log.String(), message) > before
		})
	}
	write(own+1, "listne: x\n")
	reload(`"reload failed; what was served before goes on"`)
	if _, err := c.PrepareVector(t.Context(), imsi, client.Origin{}, client.RAND{2}); err != nil {
		t.Errorf("after a reload that failed: %v", err)
	}
	write(own+1, "")
	reload(`"reloaded"`)
	if _, err := c.PrepareVector(t.Context(), imsi, client.Origin{}, client.RAND{3}); err == nil {
		t.Error("a client that was taken out by a reload is served")
	}

	// It says that it is not ready, and serves on for the drain delay.
	write(own, "")
	// Not by the log: a SIGHUP of before may have it say "reloaded" of what was there before.
	testproc.Await(t, "the client is served again", func() bool {
		syscall.Kill(os.Getpid(), syscall.SIGHUP)
		status, _ := get("/readyz")
		return status == http.StatusOK
	})
	stop()
	if status, _ := get("/readyz"); status != http.StatusServiceUnavailable {
		t.Errorf("/readyz of a service that ends soon: %d", status)
	}
	if _, err := c.PrepareVector(t.Context(), imsi, client.Origin{}, client.RAND{4}); err != nil {
		t.Errorf("a call of a service that ends soon: %v", err)
	}
	if err := <-ended; err != nil || !strings.Contains(log.String(), `"draining"`) {
		t.Errorf("the end: %v\n%s", err, log)
	}
	if _, err := os.Stat(socket); err == nil {
		t.Error("the socket is left")
	}
}

// A reload that hangs, as in a file of a server that is away, does not keep the service from its end.
func TestReloadHangs(t *testing.T) {
	dir := t.TempDir()
	socket, path := filepath.Join(dir, "s"), filepath.Join(dir, "keysvc.yaml")
	tok := softhsmtest.Token(t)
	must.Do(t, os.WriteFile(path, fmt.Appendf(nil, "token: %q\nstate: state\nsocket: s\ndrain_delay: 0s\n", tok.URI),
		0o600))
	must.Do(t, os.Mkdir(filepath.Join(dir, "state"), 0o700))
	initialise(t, tok, filepath.Join(dir, "state"))
	hups := make(chan os.Signal, 1) // see TestServe
	signal.Notify(hups, syscall.SIGHUP)
	defer signal.Stop(hups)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	log, ended := new(testproc.Log), make(chan error, 1)
	go func() { ended <- Serve(ctx, settings.Source{Path: path}, log) }()
	testproc.Await(t, "it serves", func() bool { status, _ := get(socket, "/readyz"); return status == http.StatusOK })
	must.Do(t, os.Remove(path))
	must.Do(t, syscall.Mkfifo(path, 0o600))
	var pipe *os.File
	testproc.Await(t, "the reload", func() (reading bool) {
		syscall.Kill(os.Getpid(), syscall.SIGHUP)
		var err error
		pipe, err = os.OpenFile(path, os.O_WRONLY|syscall.O_NONBLOCK, 0)
		return err == nil
	})
	defer pipe.Close() // ends the reload
	stop()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(testproc.Patience):
		t.Errorf("it has not ended:\n%s", log)
	}
}

// /readyz says what becomes of what is confirmed when PostgreSQL's server is lost: nothing, with a synchronous standby.
func TestPostgresReadyz(t *testing.T) {
	dir, tok, server := t.TempDir(), softhsmtest.Token(t), pgtest.Start(t)
	standby := server.Standby(t)
	init, socket, path := newInit(tok, filepath.Join(dir, "state")), filepath.Join(dir, "s"), filepath.Join(dir, "conf")
	must.Do(t, os.Mkdir(init.State, 0o700))
	init.Store = server.Database(t)
	withToken(t, tok, func(token *hsmkeys.OperatorToken) error { _, err := init.Run(t.Context(), token); return err })
	must.Do(t, os.WriteFile(path, fmt.Appendf(nil, "token: %q\nstate: state\nsocket: s\nstore: %q\n", tok.URI,
		init.Store), 0o600))
	ctx, stop := context.WithCancel(t.Context())
	log, ended := new(testproc.Log), make(chan error, 1)
	go func() { ended <- Serve(ctx, settings.Source{Path: path}, log) }()
	defer func() { stop(); must.Do(t, <-ended) }()
	says := func(when string, ok func(body string) bool) {
		t.Helper()
		testproc.Await(t, when, func() bool {
			if len(ended) > 0 {
				t.Fatalf("it has ended: %v\n%s", <-ended, log)
			}
			status, body := get(socket, "/readyz")
			return status == http.StatusOK && strings.HasPrefix(body, "ready\n") && ok(body)
		})
	}
	const lose = "\nbut the store could lose what was confirmed last when its server is lost: "
	says("with a synchronous standby", func(body string) bool { return !strings.Contains(body, lose) })
	server.Set(t, "synchronous_standby_names", "")
	says("with an asynchronous standby", func(body string) bool {
		return strings.Contains(body, lose+"its standbys are asynchronous")
	})
	server.Set(t, "synchronous_standby_names", "FIRST 2 (*)")
	says("with one standby of two", func(body string) bool {
		return strings.Contains(body, "\nbut no change of the store is confirmed: its server waits for 2 of the ")
	})
	server.Set(t, "synchronous_standby_names", "*")
	says("with a synchronous standby again", func(body string) bool { return !strings.Contains(body, "confirmed") })
	standby.Kill(t)
	says("without the standby that it waits for", func(body string) bool {
		return strings.Contains(body, "\nbut no change of the store is confirmed: ")
	})
}
