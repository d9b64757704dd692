package station

import (
	"crypto/tls"
	"io"
	"log"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/kmehsm/kmehsm/internal/certtest"
)

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

// A client that does not read holds neither its request nor its connection for long.
func TestClientDoesNotRead(t *testing.T) {
	dir := certtest.Make(t, "127.0.0.1")
	own := must(tls.LoadX509KeyPair(filepath.Join(dir, "127.0.0.1.pem"), filepath.Join(dir, "127.0.0.1.key")))
	const http2 = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + "\x00\x00\x00\x04\x00\x00\x00\x00\x00" + // no settings
		"\x00\x00\x06\x01\x05\x00\x00\x00\x01\x82\x84\x87\x41\x01x" // GET / of host x, RFC 7541 appendix A
	for name, c := range map[string]struct {
		protocol, request string
		reads, stays      bool // the client reads frames, and gives its stream no window; then its connection stays
	}{
		"HTTP/1":                 {"http/1.1", "GET / HTTP/1.1\r\nHost: x\r\n\r\n", false, false},
		"HTTP/2":                 {"h2", http2, false, false},
		"HTTP/2, without window": {"h2", http2, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ended, closed := make(chan error, 1), make(chan struct{})
				server := newServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
					for {
						if _, err := w.Write(make([]byte, 1<<16)); err != nil {
							ended <- err
							return
						}
					}
				}), &tls.Config{Certificates: []tls.Certificate{own}, SessionTicketsDisabled: true},
					log.New(io.Discard, "", 0))
				server.ConnState = func(_ net.Conn, s http.ConnState) {
					if s == http.StateClosed {
						close(closed)
					}
				}
				near, far := net.Pipe()
				listener := &pipe{Conn: far, ended: make(chan struct{})}
				var all sync.WaitGroup
				all.Go(func() { server.ServeTLS(listener, "", "") })
				client := tls.Client(near, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{c.protocol}})
				must(io.WriteString(client, c.request))
				if c.reads {
					all.Go(func() { io.Copy(io.Discard, client) })
				}
				<-ended // else every goroutine waits for ever, which synctest reports
				if !c.stays {
					<-closed
				}
				near.Close()
				server.Close()
				all.Wait()
			})
		})
	}
}
