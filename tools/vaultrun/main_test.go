package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/testproc"
)

// The test binary is also vaultrun, and the server that vaultrun starts: the vault on its PATH is a link to it.
func TestMain(m *testing.M) {
	switch {
	case filepath.Base(os.Args[0]) == "vault":
		serve()
	case os.Getenv("VAULTRUN_TEST") == "where threads end":
		go func() { main(); os.Exit(0) }()
		for {
			var all sync.WaitGroup
			for range 100 {
				all.Go(func() {
					runtime.LockOSThread() // and so the thread ends with the goroutine
					time.Sleep(10 * time.Millisecond)
				})
			}
			all.Wait()
			fmt.Fprintln(os.Stderr, "threads have ended")
		}
	case os.Getenv("VAULTRUN_TEST") != "":
		main()
	default:
		testproc.Main(m.Run)
	}
}

// serve answers as far as vaultrun asks.
func serve() {
	var config struct {
		Listener struct{ TCP struct{ Address string } }
	}
	data, err := os.ReadFile(strings.TrimPrefix(os.Args[2], "-config="))
	if err == nil {
		err = json.Unmarshal(data, &config)
	}
	if err != nil {
		panic(err)
	}
	if os.Getenv("VAULTRUN_TEST") == "broken" {
		fmt.Fprintln(os.Stderr, "a server's last words")
		os.Exit(1)
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	go func() { <-stop; os.Exit(0) }() // as Vault does
	var initialized, unsealed bool
	panic(http.ListenAndServe(config.Listener.TCP.Address,
		http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch r.Method + r.URL.Path {
			case "PUT/v1/sys/init":
				initialized = true
				fmt.Fprint(w, `{"keys":["00"],"root_token":"root"}`)
			case "PUT/v1/sys/unseal":
				unsealed = true
				fmt.Fprint(w, `{"sealed":false}`)
			default:
				fmt.Fprintf(w, `{"initialized":%v,"sealed":%v}`, initialized, !unsealed)
			}
		})))
}

// start starts vaultrun, and gives the address that it says. The server is well, or broken.
func start(t *testing.T, how string) (vaultrun *testproc.Process, address string) {
	t.Helper()
	link := t.TempDir()
	if err := os.Symlink(os.Args[0], filepath.Join(link, "vault")); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-listen", "127.0.0.1:0", "-dir", t.TempDir())
	cmd.Env = append(os.Environ(), "VAULTRUN_TEST="+how, "PATH="+link)
	out := new(testproc.Log)
	cmd.Stdout = out
	vaultrun = testproc.Start(t, cmd, func(p *testproc.Process) bool {
		return json.Unmarshal([]byte(out.String()), &struct{ Address *string }{&address}) == nil ||
			how == "broken" && p.Ended()
	})
	return vaultrun, address
}

func answers(address string) bool {
	r, err := http.Get(address)
	if err == nil {
		r.Body.Close()
	}
	return err == nil
}

// Of many starts at the same time, each says its server's address; and the server ends at once when vaultrun is killed.
func TestManyStarts(t *testing.T) {
	for i := range 8 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			for range 25 {
				vaultrun, address := start(t, "well")
				if !answers(address) {
					t.Fatal("the server does not answer")
				}
				vaultrun.Cmd.Process.Kill() // and not its process group
				for deadline := time.Now().Add(testproc.Patience); answers(address); time.Sleep(time.Millisecond) {
					if time.Now().After(deadline) {
						t.Fatal("the server outlives vaultrun")
					}
				}
				vaultrun.Wait()
			}
		})
	}
}

// vaultrun hands on a signal, and ends as its server does.
func TestStop(t *testing.T) {
	vaultrun, address := start(t, "well")
	if err := vaultrun.Stop(syscall.SIGTERM); err != nil || answers(address) {
		t.Errorf("%v\n%s", err, vaultrun.Log)
	}
	vaultrun, _ = start(t, "well")
	server, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", vaultrun.Cmd.Process.Pid))
	for _, list := range server {
		data, _ := os.ReadFile(list)
		for pid := range strings.FieldsSeq(string(data)) {
			n, _ := strconv.Atoi(pid)
			syscall.Kill(n, syscall.SIGKILL)
		}
	}
	if err := vaultrun.Wait(); err == nil ||
		!strings.Contains(vaultrun.Log.String(), "the server has ended, its log is above: signal: killed") {
		t.Errorf("its server was killed: %v\n%s", err, vaultrun.Log)
	}
}

// The server lives on when threads of vaultrun end.
func TestThreadsEnd(t *testing.T) {
	vaultrun, _ := start(t, "where threads end")
	before := strings.Count(vaultrun.Log.String(), "threads have ended")
	testproc.Await(t, "threads end", func() bool {
		return vaultrun.Ended() || strings.Count(vaultrun.Log.String(), "threads have ended") > before+2
	})
	if err := vaultrun.Stop(syscall.SIGTERM); err != nil {
		t.Errorf("%v\n%s", err, vaultrun.Log)
	}
}

// A server that does not come up ends vaultrun, with the server's own words.
func TestBroken(t *testing.T) {
	vaultrun, _ := start(t, "broken")
	if err := vaultrun.Wait(); err == nil || !strings.Contains(vaultrun.Log.String(), "a server's last words") ||
		!strings.Contains(vaultrun.Log.String(), "the server has ended") {
		t.Errorf("%v\n%s", err, vaultrun.Log)
	}
}

func TestVersion(t *testing.T) {
	cmd := exec.Command(os.Args[0], "--version")
	cmd.Env = append(os.Environ(), "VAULTRUN_TEST=well")
	if out, err := cmd.Output(); err != nil || !strings.HasPrefix(string(out), "vaultrun version ") ||
		!strings.HasSuffix(string(out), runtime.Version()+"\n") {
		t.Errorf("%q, %v", out, err)
	}
}
