package keysvcd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kmehsm/kmehsm/api"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/keysvcd/settings"
)

// A served is a listener and its server.
type served struct {
	net.Listener
	server *http.Server
}

// listen opens all listeners.
func (d *daemon) listen() (all []served, err error) {
	own := func() *tls.Config { return d.Load().tls }
	http2 := func() *tls.Config {
		c := d.Load().tls.Clone()
		c.NextProtos = []string{"h2"}
		return c
	}
	unix := func(path string) (net.Listener, error) { return listenUnix(path, d.others) }
	page := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { d.Load().page.ServeHTTP(w, r) })
	for _, at := range []struct {
		address string
		open    func(address string) (net.Listener, error)
		server  *http.Server
	}{
		{address: d.started.Listen, open: secure(own), server: d.newServer(d.live)},
		{address: d.started.OperatorPage.Listen, open: secure(own), server: d.newServer(page)},
		{address: d.started.Socket, open: unix, server: d.newServer(d.live)},
		{address: d.started.EIR.Listen, open: secure(http2), server: d.eirServer()},
	} {
		if at.address == "" {
			continue
		}
		l, err := at.open(at.address)
		if err != nil {
			for _, l := range all {
				err = errors.Join(err, l.Close())
			}
			return nil, err
		}
		all = append(all, served{Listener: l, server: at.server})
	}
	return all, nil
}

// secure listens with TLS 1.3. now is asked at each connection, so that a reload changes the certificates.
func secure(now func() *tls.Config) func(address string) (net.Listener, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return now(), nil }}
	return func(address string) (net.Listener, error) {
		l, err := config.Listen(address)
		if err != nil {
			return nil, err
		}
		return tls.NewListener(l, c), nil
	}
}

// listenUnix opens a socket for its own user only, or for others, who are distinguished by their uid. It replaces a
// socket that a killed service has left, and none that is served.
func listenUnix(path string, others bool) (net.Listener, error) {
	if err := config.SocketFree(path); err != nil {
		return nil, err
	}
	if info, err := os.Lstat(path); err == nil && info.Mode()&os.ModeSocket != 0 {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	if err := durable.Mkdir(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("the folder of the socket: %w", err)
	}
	// On Linux, the file gets the mode of the unbound socket, less the umask, as soon as it exists. The umask is not
	// changed: it is the whole process's, and other files may be made at the same moment.
	var chmod error
	private := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		err := c.Control(func(fd uintptr) { chmod = syscall.Fchmod(int(fd), 0o600) })
		return errors.Join(err, chmod)
	}}
	l, err := private.Listen(context.Background(), "unix", path)
	if err != nil || !others {
		return l, err
	}
	if err := os.Chmod(path, 0o666); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// An accepting listener logs why it does not accept a connection, such as too many open files. Its server tries again.
type accepting struct {
	net.Listener
	log *slog.Logger
}

func (a accepting) Accept() (net.Conn, error) {
	c, err := a.Listener.Accept()
	if err != nil && !errors.Is(err, net.ErrClosed) {
		a.log.Warn("no connection is accepted; it is tried again", "cause", err.Error())
	}
	return c, err
}

// newServer makes a server that ends a request, and a connection, whose client does not read. Two minutes are above any
// call; streams have a time of their own.
func (d *daemon) newServer(handler http.Handler) *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true) // on the socket, where gRPC comes without TLS
	return &http.Server{
		Handler: handler, ConnContext: api.ConnContext, ConnState: d.connections.State, Protocols: protocols,
		MaxHeaderBytes: 32 << 10, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second,
		WriteTimeout: 2 * time.Minute, IdleTimeout: 5 * time.Minute,
		ErrorLog: slog.NewLogLogger(d.log.Handler(), slog.LevelDebug),
		HTTP2: &http.HTTP2Config{
			// Four streams that are not read leave half of their connection's buffer to its other calls.
			MaxReceiveBufferPerConnection: 1 << 20, MaxReceiveBufferPerStream: 128 << 10,
			WriteByteTimeout: 30 * time.Second, // WriteTimeout ends a stream alone
		},
	}
}

// run serves until ctx ends, and then finishes the calls under way. It reloads at SIGHUP, and when a database that was
// rolled back is accepted.
func (d *daemon) run(ctx context.Context, listeners []served) error {
	g, gctx := errgroup.WithContext(ctx)
	if d.started.EIR.NRF != "" {
		r, err := d.registration()
		if err != nil {
			return err
		}
		registered, deregister := context.WithCancel(gctx)
		defer context.AfterFunc(d.leaving.told, deregister)()
		defer beside(registered, r.Run)()
	}
	for _, l := range listeners {
		g.Go(func() error {
			err := l.server.Serve(accepting{Listener: l.Listener, log: d.log})
			if !errors.Is(err, http.ErrServerClosed) {
				return err
			}
			return nil
		})
	}
	reloading := make(chan struct{})
	go func() {
		defer close(reloading)
		d.keepCurrent(gctx)
	}()
	g.Go(func() error {
		<-gctx.Done()
		d.log.Info("draining")
		d.options.Streams.Drain()
		time.Sleep(farewell)
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), settings.MaxDrain)
		defer cancel()
		var all errgroup.Group
		for _, l := range listeners {
			all.Go(func() error { return l.server.Shutdown(drain) })
		}
		err := all.Wait()
		select {
		case <-reloading:
		case <-time.After(reloadPatience):
		}
		return err
	})
	return g.Wait()
}

// reloadPatience is how long a service that ends waits for a reload, which may hang for ever, as in a file of a server
// that is away.
const reloadPatience = 5 * time.Second

// keepCurrent reloads when it is told to, and removes expired attempts, until ctx ends.
func (d *daemon) keepCurrent(ctx context.Context) {
	minute := time.NewTicker(time.Minute)
	defer minute.Stop()
	reload := func() {
		if err := safely(func() error { return d.reload(ctx, d.from) }); err != nil {
			d.log.Error("reload failed; what was served before goes on", "cause", err.Error())
		} else {
			d.log.Info("reloaded")
		}
	}
	for {
		select {
		case <-d.hup:
			reload()
		case <-d.accepted:
			reload()
		case <-minute.C:
			err := safely(func() error { return d.store.DropExpired(ctx, time.Now()) })
			if err != nil && ctx.Err() == nil {
				d.log.Warn("expired attempts were not removed", "cause", err.Error())
			}
		case <-ctx.Done():
			return
		}
	}
}
