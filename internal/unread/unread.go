// Package unread tests servers with a client that does not read.
package unread

import (
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/kmehsm/kmehsm/internal/must"
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

// Check tests that a client that does not read holds neither its request nor its connection for long. The server may
// have TLS.
func Check(t *testing.T, newServer func(http.Handler) *http.Server) {
	for name, c := range map[string]struct {
		protocol string
		reads    bool // the client reads frames, and gives its stream no window; then its connection stays
	}{
		"HTTP/1": {protocol: "http/1.1"}, "HTTP/2": {protocol: "h2"},
		"HTTP/2, without window": {protocol: "h2", reads: true},
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
				}))
				server.ConnState = func(_ net.Conn, s http.ConnState) {
					if s == http.StateClosed {
						close(closed)
					}
				}
				near, far := net.Pipe()
				client, listener := near, &pipe{Conn: far, ended: make(chan struct{})}
				https := server.TLSConfig != nil // Serve would set it
				var all sync.WaitGroup
				if !https {
					all.Go(func() { server.Serve(listener) })
				} else {
					all.Go(func() { server.ServeTLS(listener, "", "") })
					client = tls.Client(near, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{c.protocol}})
				}
				must.Get[int](t)(io.WriteString(client, request(c.protocol, https)))
				if c.reads {
					all.Go(func() { io.Copy(io.Discard, client) })
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

// request is GET / of host x.
func request(protocol string, https bool) string {
	if protocol != "h2" {
		return "GET / HTTP/1.1\r\nHost: x\r\n\r\n"
	}
	scheme := "\x86" // RFC 7541 appendix A
	if https {
		scheme = "\x87"
	}
	return "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + "\x00\x00\x00\x04\x00\x00\x00\x00\x00" + // no settings
		"\x00\x00\x06\x01\x05\x00\x00\x00\x01\x82\x84" + scheme + "\x41\x01x"
}
