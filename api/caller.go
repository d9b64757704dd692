package api

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/strict"
)

// A caller is who has sent a request. Its Actor is in the context, too.
type caller struct {
	client      *Client           // nil: it is not known
	certificate *x509.Certificate // that was verified; nil on the Unix socket
	uid         int               // at the other end of the Unix socket; -1 elsewhere
}

type (
	callerKey     struct{}
	connectionKey struct{}
)

// A connection has what all of its requests share.
type connection struct {
	uid     int          // of the user at the other end of a Unix socket; -1 elsewhere
	streams atomic.Int32 // open ones
}

// ConnContext remembers the user at the other end of a Unix socket, and counts streams. It is for http.Server.
func ConnContext(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connectionKey{}, &connection{uid: uidOf(c)})
}

// uidOf is the user at the other end of a Unix socket; -1 elsewhere.
func uidOf(c net.Conn) int {
	uid := -1
	if u, ok := c.(*net.UnixConn); ok {
		if raw, err := u.SyscallConn(); err == nil {
			raw.Control(func(fd uintptr) {
				if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
					uid = int(cred.Uid)
				}
			})
		}
	}
	return uid
}

// whoIs is the caller at the other end of a connection, who is not looked for among the clients yet.
func whoIs(encrypted *tls.ConnectionState, uid int, address string) (c caller, actor binding.Actor) {
	c, actor = caller{uid: -1}, binding.Actor{Address: address}
	if encrypted != nil && len(encrypted.VerifiedChains) > 0 {
		c.certificate = encrypted.VerifiedChains[0][0]
		actor.Certificate = fingerprint(c.certificate)
	} else if uid >= 0 {
		c.uid, actor.User, actor.Address = uid, fmt.Sprint("uid ", uid), ""
	}
	return c, actor
}

// identify puts caller and Actor into the context of each request.
func identify(clients *Clients, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		uid := -1
		if peer, ok := r.Context().Value(connectionKey{}).(*connection); ok {
			uid = peer.uid
		}
		c, actor := whoIs(r.TLS, uid, r.RemoteAddr)
		next.ServeHTTP(w, r.WithContext(clients.know(r.Context(), c, actor)))
	})
}

// know finds the client of a caller among these, and puts it into the context.
func (c *Clients) know(ctx context.Context, who caller, actor binding.Actor) context.Context {
	who.client, actor.Client, actor.Role = c.of(who.certificate, who.uid), "", ""
	if who.client != nil {
		actor.Client = who.client.Name
	}
	return binding.WithActor(context.WithValue(ctx, callerKey{}, &who), actor)
}

func callerOf(ctx context.Context) *caller { return ctx.Value(callerKey{}).(*caller) }
func clientOf(ctx context.Context) *Client { return callerOf(ctx).client }

// as puts a role into the Actor of a context.
func as(ctx context.Context, r Role) context.Context {
	actor := binding.ActorOf(ctx)
	actor.Role = string(r)
	return binding.WithActor(ctx, actor)
}

// fingerprint is a certificate's SHA-256, in hexadecimal.
func fingerprint(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}

// maxNames is how many names of a certificate the log has. One that nobody vouches for may have thousands.
const maxNames = 8

// describe gives a certificate's names, for the log. Its fingerprint is in the Actor.
func describe(c *x509.Certificate) []any {
	names := slices.Clone(c.DNSNames)
	for _, uri := range c.URIs {
		names = append(names, uri.String())
	}
	names = names[:min(len(names), maxNames)]
	for i := range names {
		names[i] = strict.Short(names[i])
	}
	return []any{"subject", strict.Short(c.Subject.String()), "names", names, "not_after", c.NotAfter}
}

// callOf names a request in the log: a call by its method, as in metrics; else the path.
func callOf(path string) []any {
	if method, ok := strings.CutPrefix(path, "/"+kmev1connect.KeyServiceName+"/"); ok {
		return []any{"call", strict.Short(method)}
	}
	return []any{"path", strict.Short(path)}
}

// stranger logs and counts an unknown caller.
func stranger(ctx context.Context, service *binding.Service, attrs ...any) {
	why := "user"
	if c := callerOf(ctx).certificate; c != nil {
		why, attrs = "client", append(attrs, describe(c)...)
	}
	service.Unauthenticated(ctx, why, attrs...)
}
