package keysvcd

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/kmehsm/kmehsm/internal/testproc"
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

// A client that does not read holds neither its request nor its connection for long.
func TestClientDoesNotRead(t *testing.T) {
	const http2 = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + "\x00\x00\x00\x04\x00\x00\x00\x00\x00" + // no settings
		"\x00\x00\x06\x01\x05\x00\x00\x00\x01\x82\x86\x84\x41\x01x" // GET / of host x, RFC 7541 appendix A
	for name, c := range map[string]struct {
		request string
		reads   bool // the client reads frames, and gives its stream no window; then its connection stays
	}{
		"HTTP/1": {"GET / HTTP/1.1\r\nHost: x\r\n\r\n", false}, "HTTP/2": {http2, false},
		"HTTP/2, without window": {http2, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ended, closed := make(chan error, 1), make(chan struct{})
				d := &daemon{live: &live{log: slog.New(slog.DiscardHandler)}}
				server := d.newServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
					for {
						if _, err := w.Write(make([]byte, 1<<16)); err != nil {
							ended <- err
							return
						}
					}
				}))
				server.ConnState = func(_ net.Conn, s http.ConnState) {
					if s == http.StateClosed {
						close(closed)
					}
				}
				near, far := net.Pipe()
				listener := &pipe{Conn: far, ended: make(chan struct{})}
				var all sync.WaitGroup
				all.Go(func() { server.Serve(listener) })
				if _, err := io.WriteString(near, c.request); err != nil {
					t.Error(err)
				}
				if c.reads {
					all.Go(func() { io.Copy(io.Discard, near) })
				}
				<-ended // else every goroutine waits for ever, which synctest reports
				if !c.reads {
					<-closed
				}
				near.Close()
				server.Close()
				all.Wait()
			})
		})
	}
}

// A pipe is a listener with one connection.
type pipe struct {
	net.Conn
	once, end sync.Once
	ended     chan struct{}
}

func (p *pipe) Accept() (c net.Conn, err error) {
	p.once.Do(func() { c = p.Conn })
	if c == nil {
		<-p.ended
		return nil, net.ErrClosed
	}
	return c, nil
}

func (p *pipe) Close() error   { p.end.Do(func() { close(p.ended) }); return nil }
func (p *pipe) Addr() net.Addr { return p.LocalAddr() }

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
