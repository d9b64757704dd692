package api

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/strict"
)

// Connections bounds how many open connections each client has: without a bound, one of them could take all files and
// the memory of the process. All strangers together are bounded as one client. A connection counts when it begins to
// speak HTTP; before that, its certificate is not proven, and the time-outs of the server end it.
type Connections struct {
	service *binding.Service
	clients func() *Clients // those of this moment
	most    int

	mu   sync.Mutex
	of   map[net.Conn]string // guarded by mu: the name of its client; empty for a stranger
	open map[string]int      // guarded by mu: how many of has, by name
}

// NewConnections allows each client so many.
func NewConnections(service *binding.Service, clients func() *Clients, most int) *Connections {
	return &Connections{service: service, clients: clients, most: most, of: map[net.Conn]string{},
		open: map[string]int{}}
}

// State counts connections, closes those that are too many, and logs and counts failed TLS handshakes. It is for
// http.Server. Over HTTP/1, a connection that is closed has sent a request, which may be done all the same.
func (c *Connections) State(conn net.Conn, state http.ConnState) {
	switch state {
	case http.StateActive:
		c.count(conn)
	case http.StateClosed:
		c.mu.Lock()
		if name, counted := c.of[conn]; counted {
			delete(c.of, conn)
			if c.open[name]--; c.open[name] == 0 {
				delete(c.open, name)
			}
		}
		c.mu.Unlock()
		c.handshakeFailed(conn)
	}
}

// count counts a connection once.
func (c *Connections) count(conn net.Conn) {
	c.mu.Lock()
	_, counted := c.of[conn]
	c.mu.Unlock()
	if counted {
		return
	}
	raw, encrypted := conn, (*tls.ConnectionState)(nil)
	if t, ok := conn.(*tls.Conn); ok {
		state := t.ConnectionState()
		raw, encrypted = t.NetConn(), &state
	}
	who, actor := whoIs(encrypted, uidOf(conn), conn.RemoteAddr().String())
	ctx := c.clients().know(context.Background(), who, actor)
	name := binding.ActorOf(ctx).Client
	c.mu.Lock()
	full := c.open[name] >= c.most
	if !full {
		c.of[conn] = name
		c.open[name]++
	}
	c.mu.Unlock()
	if !full {
		return
	}
	raw.Close() // without a last word of TLS, for which it might wait
	if clientOf(ctx) == nil {
		stranger(ctx, c.service, "cause", "strangers have as many connections as they may have")
		return
	}
	c.service.Refused(ctx, overloaded("this client has as many connections as it may have"))
}

// handshakeFailed logs and counts a TLS handshake that has failed.
func (c *Connections) handshakeFailed(conn net.Conn) {
	t, ok := conn.(*tls.Conn)
	if !ok {
		return
	}
	err := t.Handshake() // it has ended: this gives its error
	var transport *net.OpError
	switch broken := errors.As(err, &transport) && (transport.Op == "read" || transport.Op == "write"); {
	case err == nil, errors.Is(err, io.EOF), broken:
		// a peer that is gone or slow was not refused
		return
	}
	why, attrs := "handshake", []any{"cause", strict.Short(err.Error())}
	actor := binding.Actor{Address: conn.RemoteAddr().String()}
	var unverified *tls.CertificateVerificationError
	if errors.As(err, &unverified) && len(unverified.UnverifiedCertificates) > 0 {
		shown := unverified.UnverifiedCertificates[0]
		why, attrs, actor.Certificate = "certificate", append(attrs, describe(shown)...), fingerprint(shown)
	}
	c.service.Unauthenticated(binding.WithActor(context.Background(), actor), why, attrs...)
}
