package keysvcd

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/kmehsm/kmehsm/api"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/revocations"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/directories"
	"github.com/kmehsm/kmehsm/internal/keysvcd/settings"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/vaultstore"
)

// A state is what a reload changes: certificates, clients and lots. It is immutable, and a call sees one from
// its beginning to its end.
type state struct {
	tls          *tls.Config   // nil if the service does not listen
	certificates []certificate // those of tls
	clients      *api.Clients
	lots         *registry.Lots
	handler      *api.Handler // serves the lots for the clients
	eir          http.Handler // does so for AMFs; nil if there is none
	page         http.Handler // the operator page; nil if there is none
}

// live holds the state that is served.
type live struct {
	atomic.Pointer[state]
	started  *settings.Config // its settings hold, except those that a reload changes
	registry registry.Store
	open     func(*registry.Manufacturer) (*directory.Reader, error)
	options  api.Options // of the handler that serves, or of the first
	ready    func(context.Context, *binding.Service) (warnings []string, err error)
	page     func(*binding.Service, *state) http.Handler // makes that of a state
	log      *slog.Logger
	others   bool // the socket is open for other users
	// The database was rolled back at the start: until that is accepted, there are no lots.
	rolledBack bool
}

var errUnread = errors.New("the database was rolled back at the start, and its lots were not read since it was " +
	"accepted: the service reads them by itself; if its log says that the reload failed, mend that and send SIGHUP")

// apply builds the whole state of a configuration, and then serves it. On an error, nothing has changed. It is for one
// goroutine at a time.
func (l *live) apply(ctx context.Context, cfg *settings.Config) error {
	next := new(state)
	var err error
	if next.clients, err = settings.Clients(cfg); err != nil {
		return err
	}
	if l.started.Listen != "" || l.started.EIR.Listen != "" || l.started.OperatorPage.Listen != "" {
		// A client without a certificate is not served.
		next.tls, err = config.ServerTLS(cfg.TLS.Certificate, cfg.TLS.Key, cfg.TLS.ClientCA,
			tls.RequireAndVerifyClientCert)
		if err == nil {
			next.certificates, err = certificates(next.tls, cfg.TLS.ClientCA)
		}
		if err != nil {
			return err
		}
	}
	next.lots, err = registry.OpenLots(ctx, l.registry, l.open)
	unread := errors.Is(err, binding.ErrRolledBack) && l.rolledBack
	if unread {
		next.lots, err = new(registry.Lots), nil
	}
	if err != nil {
		return err
	}
	o := l.options
	o.Clients, o.Service = next.clients, o.Service.WithLots(next.lots)
	o.Ready = func(ctx context.Context) ([]string, error) {
		warnings, err := l.ready(ctx, o.Service)
		if err == nil && unread {
			err = errUnread
			l.log.WarnContext(ctx, "not ready", "cause", err.Error())
		}
		return warnings, err
	}
	next.handler = api.NewHandler(o)
	if l.started.EIR.Listen != "" {
		if next.eir, err = newEIR(l.started, next.handler, o.Service); err != nil {
			return fmt.Errorf("eir: %w", err)
		}
	}
	if l.started.OperatorPage.Listen != "" {
		next.page = api.For(api.RoleMonitor, o.Service, next.clients, l.page(o.Service, next))
	}
	others := next.clients.OtherUsers(os.Getuid())
	fixed := l.started.Fixed(cfg)
	l.options.Service = o.Service
	before := l.Swap(next)
	l.options.Streams.Serve(next.handler)
	if before == nil {
		l.others = others
	} else if others && !l.others && l.started.Socket != "" {
		fixed = append(fixed, "socket, which is not open yet for clients that are other users")
	}
	next.lots.LogWithdrawn(l.log)
	if len(fixed) > 0 {
		l.log.Warn("needs a restart: " + strings.Join(fixed, ", "))
	}
	return nil
}

// rest ends what the state that is served does in the background: it needs the store, which is about to be closed.
func (l *live) rest() { new(registry.Lots).Follow(l.Load().lots) }

// reload applies the present content of the configuration file.
func (l *live) reload(ctx context.Context, from settings.Source) error {
	cfg, report := settings.Read(from)
	if err := report.Err(); err != nil {
		return err
	}
	return l.apply(ctx, cfg)
}

func (l *live) ServeHTTP(w http.ResponseWriter, r *http.Request) { l.Load().handler.ServeHTTP(w, r) }

// OpenLots gives the lots of a store for a command: their directories are read without a cache. The lists of revoked
// devices are those that a service with this state folder believes; overdue ones are logged. fallback is the directory
// of manufacturers that were enrolled without one.
func OpenLots(
	ctx context.Context, store *sqlstore.Store, state, fallback string, login vaultstore.Login, log *slog.Logger,
) (*registry.Lots, error) {
	options := func(manufacturer string) directory.ReaderOptions {
		return directory.ReaderOptions{
			Memory:  revocations.ReadOnly(store, manufacturer, revocationsIn(state)),
			Overdue: func(d directory.Overdue) { warnOverdue(log, manufacturer, d) },
		}
	}
	return registry.OpenLots(ctx, store, opener(ctx, fallback, login, options, log))
}

// revocationsIn is where a service keeps its last lists of revoked devices.
func revocationsIn(state string) string { return filepath.Join(state, "revocations") }

func warnOverdue(log *slog.Logger, manufacturer string, d directory.Overdue) {
	log.Warn("a list of revoked devices is overdue; the last one stands", "manufacturer", manufacturer,
		"lot", d.Lot, "why", d.Why, "since", d.Since, "cause", d.Cause.Error())
}

// opener gives the reader of a manufacturer's directory: the same one after each reload, with its cache and login. It
// is for one goroutine at a time.
func opener(ctx context.Context, fallback string, login vaultstore.Login,
	options func(manufacturer string) directory.ReaderOptions, log *slog.Logger,
) func(m *registry.Manufacturer) (*directory.Reader, error) {
	stores, readers := map[string]directory.Store{}, map[string]*directory.Reader{}
	return func(m *registry.Manufacturer) (*directory.Reader, error) {
		name := cmp.Or(m.Directory, fallback)
		if name == "" {
			return nil, usage.Errorf("manufacturer %s was enrolled without a directory: name one with directory in "+
				"the configuration or --directory, or enroll again with --directory", m.KeyID)
		}
		key := m.KeyID + " " + name
		if readers[key] != nil {
			return readers[key], nil
		}
		if stores[name] == nil {
			store, err := directories.Open(ctx, name, login, log)
			if err != nil {
				return nil, err
			}
			stores[name] = store
		}
		verifier, err := directory.ParseVerifier([]byte(m.PEM))
		if err != nil {
			return nil, err
		}
		readers[key] = directory.NewReader(stores[name], verifier, options(m.KeyID))
		return readers[key], nil
	}
}
