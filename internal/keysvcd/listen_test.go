package keysvcd

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/kmehsm/kmehsm/api"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/internal/unread"
)

// The socket is for its own user alone, or for all, whatever the umask; and what others make in the same process at
// that moment has the mode that they want.
func TestListenUnix(t *testing.T) {
	dir, err := os.MkdirTemp("", "") // t.TempDir may be too long for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "socket")
	listened := make(chan struct{})
	var making sync.WaitGroup
	making.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-listened:
				return
			default:
			}
			made := filepath.Join(dir, fmt.Sprint(i))
			if err := os.Mkdir(made, 0o700); err != nil {
				t.Error(err)
				return
			}
			if info, err := os.Stat(made); err != nil || info.Mode().Perm() != 0o700 {
				t.Errorf("a folder that was made meanwhile: %v %v", info.Mode(), err)
				return
			}
			if err := os.Remove(made); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for i := range 500 {
		others := i%2 == 1
		l, err := listenUnix(path, others)
		if err != nil {
			t.Fatal(err)
		}
		want := map[bool]os.FileMode{false: 0o600, true: 0o666}[others]
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Fatalf("the socket: %v %v, not %v", info.Mode(), err, want)
		}
		l.Close()
	}
	close(listened)
	making.Wait()
}

// A service that has no file for one more connection says so, and serves again when it has.
func TestAcceptFails(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	log := new(testproc.Log)
	failing := &failingListener{Listener: l, fails: 2}
	server := &http.Server{Handler: http.NotFoundHandler(), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
	ended := make(chan error, 1)
	go func() {
		ended <- server.Serve(accepting{Listener: failing, log: slog.New(slog.NewTextHandler(log, nil))})
	}()
	r, err := http.Get("http://" + l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
	server.Close()
	<-ended
	if n := strings.Count(log.String(), syscall.EMFILE.Error()); n != 2 || strings.Contains(log.String(), "closed") {
		t.Errorf("two connections were not accepted:\n%s", log)
	}
}

func TestClientDoesNotRead(t *testing.T) {
	unread.Check(t, aDaemon(nil).newServer)
}

// A header takes memory before anybody is known: it has 32 KiB at most, and what net/http adds.
func TestLongHeader(t *testing.T) {
	s := httptest.NewUnstartedServer(nil)
	s.Config = aDaemon(nil).newServer(http.NotFoundHandler())
	s.Start()
	defer s.Close()
	for size, want := range map[int]int{16 << 10: http.StatusNotFound,
		64 << 10: http.StatusRequestHeaderFieldsTooLarge} {
		q := must.Get[*http.Request](t)(http.NewRequest(http.MethodGet, s.URL, nil))
		q.Header.Set("X", strings.Repeat("x", size))
		a := must.Get[*http.Response](t)(http.DefaultClient.Do(q))
		a.Body.Close()
		if a.StatusCode != want {
			t.Errorf("%d bytes: %s", size, a.Status)
		}
	}
}

// aDaemon is one that knows no clients.
func aDaemon(service *binding.Service) *daemon {
	return &daemon{live: &live{log: slog.New(slog.DiscardHandler)}, service: service,
		connections: api.NewConnections(service, func() *api.Clients { return new(api.Clients) }, 1000)}
}

// A failingListener accepts nothing a few times, as if there were too many open files.
type failingListener struct {
	net.Listener
	fails int
}

func (l *failingListener) Accept() (net.Conn, error) {
	if l.fails--; l.fails >= 0 {
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: syscall.EMFILE}
	}
	return l.Listener.Accept()
}
