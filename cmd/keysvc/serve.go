package main

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"syscall"
	"time"

	"github.com/maypok86/otter/v2/stats"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/urfave/cli/v2"
	"golang.org/x/sync/errgroup"

	"github.com/kmehsm/kmehsm/api"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/mark"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/internal/scheduling"
	"github.com/kmehsm/kmehsm/vaultstore"
)

// opener gives the reader of a manufacturer's directory, the same one however often lots are taken up anew: what it has
// cached stays, and so does the login. It is for one goroutine at a time.
// own changes the options of one manufacturer's reader; nil changes none.
func opener(ctx context.Context, fallback string, login vaultstore.Login, o directory.ReaderOptions,
	own func(manufacturer string, o *directory.ReaderOptions), log *slog.Logger,
) func(m *binding.Manufacturer) (*directory.Reader, error) {
	stores, readers := map[string]directory.Store{}, map[string]*directory.Reader{}
	return func(m *binding.Manufacturer) (*directory.Reader, error) {
		name := cmp.Or(m.Directory, fallback)
		if name == "" {
			return nil, cmdline.Usagef("manufacturer %s was enrolled without a directory: name one with directory in the configuration or --directory, or enroll again with --directory", m.KeyID)
		}
		key := m.KeyID + " " + name
		if readers[key] != nil {
			return readers[key], nil
		}
		if stores[name] == nil {
			store, err := cmdline.OpenDirectory(ctx, name, login, log)
			if err != nil {
				return nil, err
			}
			stores[name] = store
		}
		verifier, err := directory.ParseVerifier([]byte(m.PEM))
		if err != nil {
			return nil, err
		}
		o := o
		if own != nil {
			own(m.KeyID, &o)
		}
		readers[key] = directory.NewReader(stores[name], verifier, o)
		return readers[key], nil
	}
}

func serve(c *cli.Context) error {
	if err := cmdline.Require(c, "config"); err != nil {
		return err
	}
	cfg, err := readConfig(c.String("config"))
	if err != nil {
		return cmdline.Usage(err)
	}
	log, err := newLog(c.App.ErrWriter, cfg)
	if err != nil {
		return err
	}
	slog.SetDefault(log) // for what others log: a panic on a goroutine of hsmkeys
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(200) // the collector takes 5% of busy cores otherwise, and half of that so
	}
	ctx := c.Context
	registry := prometheus.NewRegistry()
	metrics := binding.NewMetrics(registry)
	token, err := hsmkeys.OpenOperatorPool(ctx, cfg.Tokens, hsmkeys.Options{
		Observer: metrics, HangTimeout: cfg.HSMTimeout, VerifyInSoftware: cfg.Verify == "software", Changed: logChanges(log),
	})
	if err != nil {
		return err
	}
	defer token.Close()
	if err := scheduling.ForCalls(token.Sessions()); err != nil {
		log.Debug("the kernel keeps the scheduling policy as it is", "cause", err.Error())
	}
	if cfg.Verify == "software" {
		log.Warn("KME_SIG is validated in software, and not in the token, as the configuration says")
	}
	if err := token.Ping(ctx); errors.Is(err, hsmkeys.ErrNoKey) || errors.Is(err, hsmkeys.ErrNotDedicated) {
		return fmt.Errorf("%s has no keys yet: run keysvc init first", token)
	} else if err != nil {
		return err
	}
	rowKey, err := token.Derive(ctx, sqlstore.RowKey)
	if err != nil {
		return err
	}
	defer rowKey.Wipe()
	store, err := sqlstore.Open(ctx, cfg.Store, rowKey)
	if err != nil {
		return err
	}
	defer store.Close()
	// One that is rolled back is served all the same: each call is told so, until it is accepted.
	rolledBack := mark.Check(ctx, store, token)
	if rolledBack != nil && !errors.Is(rolledBack, binding.ErrRolledBack) {
		return rolledBack
	}

	cache := stats.NewCounter()
	overdue := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "kme_revocations_overdue_total",
		Help: "Tries to read a list of revoked devices that did not give a later one when it was time: the last one stands.",
	}, []string{"manufacturer", "why"})
	o := directory.ReaderOptions{
		CacheBytes: cfg.CacheMB << 20, RevocationTTL: cfg.RevocationTTL, MaxAge: cfg.MaxRevocationAge, Stats: cache,
	}
	open := opener(ctx, cfg.Directory, cfg.login(), o, func(manufacturer string, o *directory.ReaderOptions) {
		o.Memory = binding.RevocationMemory(store, manufacturer, filepath.Join(cfg.State, "revocations"))
		o.Overdue = func(d directory.Overdue) {
			overdue.WithLabelValues(manufacturer, string(d.Why)).Inc()
			log.Warn("a list of revoked devices is overdue; the last one stands", "manufacturer", manufacturer,
				"lot", d.Lot, "why", d.Why, "since", d.Since, "cause", d.Cause.Error())
		}
	}, log)
	registry := prometheus.NewRegistry()
	metrics := binding.NewMetrics(registry)
	service := binding.NewService(binding.Options{
		Token: token, Store: store, Times: cfg.times(), Metrics: metrics, Log: log,
		Limits: binding.Limits{Calls: cmp.Or(cfg.Calls, 32*token.Sessions()), IMEIRate: cfg.IMEIRate, IMEIBurst: cfg.IMEIBurst},
	})
	weak, err := weaknesses(ctx, token.Tokens(), registry, log)
	if err != nil {
		return err
	}
	unsafe, err := store.Warnings(ctx)
	if err != nil {
		return err
	}
	for _, what := range unsafe {
		log.Warn("the store is not kept as it should be", "warning", what)
	}
	registry.MustRegister(overdue)
	token.Observe(metrics)
	observeProcess(registry, token, store, cache)
	traces, stop, err := tracing(ctx, cfg.OTLP)
	if err != nil {
		return err
	}
	defer func() {
		flush, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if err := stop(flush); err != nil {
			log.Warn("the last traces were not sent", "cause", err.Error())
		}
	}()
	pageKey, err := token.Derive(ctx, "pages")
	if err != nil {
		return err
	}
	ready := func(ctx context.Context, service *binding.Service) (warnings []string, err error) {
		if err = token.Ping(ctx); err == nil {
			_, err = store.Lots(ctx)
		}
		if err != nil {
			log.WarnContext(ctx, "not ready", "cause", err.Error())
			return nil, err
		}
		warnings = slices.Concat(weak, unsafe)
		short, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		for manufacturer, err := range service.CheckDirectories(short) {
			log.WarnContext(ctx, "a directory is not available", "manufacturer", manufacturer, "cause", err.Error())
			warnings = append(warnings, "the directory of manufacturer "+manufacturer+" is not available; devices whose keys are cached go on")
		}
		for manufacturer, lists := range service.Overdue() {
			for _, d := range lists {
				const warning = "the list of revoked devices of lot %s of manufacturer %s is overdue (%s); %s"
				warnings = append(warnings, fmt.Sprintf(warning, d.Lot, manufacturer, d.Why, standing(d.Since)))
			}
		}
		return warnings, nil
	}
	served := &live{
		started: cfg, registry: store, open: open, ready: ready, log: log, rolledBack: rolledBack != nil,
		options: api.Options{Service: service, Metrics: metrics, Outer: traces, PageKey: pageKey,
			Gather: promhttp.HandlerFor(registry, promhttp.HandlerOpts{})},
	}
	if err := served.take(ctx, cfg); err != nil {
		return err
	}
	// safely does work that no call waits for. A panic is its error, and the service goes on.
	safely := func(work func() error) (err error) {
		defer func() {
			if panics.Of(err) != nil {
				service.Broken(ctx, err)
			}
		}()
		defer panics.Recover(&err)
		return work()
	}
	reload := func() error {
		return safely(func() error { return served.reload(ctx, c.String("config")) })
	}
	sweep := func(ctx context.Context) error {
		return safely(func() error { return store.DropExpired(ctx, time.Now()) })
	}
	listeners, err := listen(cfg, served)
	if err != nil {
		return err
	}
	addresses := make([]string, len(listeners))
	for i, l := range listeners {
		addresses[i] = l.Addr().String() // with the port that port 0 became
	}
	if rolledBack != nil {
		log.Error("no call is served", "cause", rolledBack.Error())
	}
	accepted := make(chan struct{}, 1)
	keeping, stopKeeping := context.WithCancel(context.WithoutCancel(ctx)) // until the calls under way have ended
	kept := make(chan struct{})
	go func() {
		defer close(kept)
		safely(func() error {
			mark.Keep(keeping, store, token, func() {
				select {
				case accepted <- struct{}{}:
				default:
				}
			}, log)
			return nil
		})
	}()
	defer func() { stopKeeping(); <-kept }()
	log.Info("serving", "token", token.String(), "ranges", served.Load().lots.Len(), "addresses", addresses)
	return run(ctx, served, service, listeners, accepted, reload, sweep, log)
}

// weaknesses are what was accepted of the tokens at their keysvc init. They are said in the log, and counted, too.
func weaknesses(ctx context.Context, tokens []*hsmkeys.OperatorToken, registry prometheus.Registerer, log *slog.Logger) (all []string, err error) {
	count := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "kme_hsm_weaknesses", Help: "What the token does not do that the secrecy of keys rests on, accepted when it was initialised.",
	}, []string{"token"})
	registry.MustRegister(count)
	for _, token := range tokens {
		weak, err := token.Weak(ctx)
		if err != nil {
			return nil, err
		}
		count.WithLabelValues(token.Serial()).Set(float64(len(weak)))
		for _, what := range weak {
			log.Warn("the token does not keep keys as it should, which was accepted when it was initialised", "token", token.String(), "weakness", what)
			all = append(all, fmt.Sprintf("%s does not keep keys as it should, which was accepted when it was initialised: %s", token, what))
		}
	}
	return all, nil
}

// standing says what is served in the place of a list of revoked devices that is overdue.
func standing(since time.Time) string {
	if since.IsZero() {
		return "there is none yet: no device of the lot is newly bound, and whether one that is bound was revoked is not known"
	}
	return "that of " + since.UTC().Format(time.RFC3339) + " stands"
}

// newLog is JSON lines, a decision each. Hashed, IMSIs and IMEIs are keyed: there are too few of them for a hash that anybody can compute.
func newLog(w io.Writer, cfg *config) (*slog.Logger, error) {
	o := &slog.HandlerOptions{Level: cfg.LogLevel}
	if cfg.LogIdentities == "hashed" {
		key, err := logKey(cfg.State)
		if err != nil {
			return nil, err
		}
		hash := func(kind, value string) string {
			h := hmac.New(sha256.New, key)
			fmt.Fprint(h, kind, " ", value)
			return hex.EncodeToString(h.Sum(nil)[:12])
		}
		o.ReplaceAttr = func(_ []string, a slog.Attr) slog.Attr {
			switch a.Key {
			case "imsi", "imei":
				a.Value = slog.StringValue(hash(a.Key, a.Value.String()))
			case "cause": // of a row or a list, which it names by them
				a.Value = slog.StringValue(identity.ReplaceAllStringFunc(a.Value.String(), func(digits string) string {
					if len(digits) == 14 {
						return hash("imei", digits)
					}
					return hash("imsi", digits)
				}))
			}
			return a
		}
	}
	return slog.New(slog.NewJSONHandler(w, o)), nil
}

// identity finds an IMEI, of 14 digits here, and an IMSI, of 15.
var identity = regexp.MustCompile(`\b[0-9]{14,15}\b`)

// logKey is made once.
func logKey(state string) ([]byte, error) {
	path := filepath.Join(state, "log.key")
	key, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		key = make([]byte, 32)
		rand.Read(key)
		if err = durable.MkdirAll(state, 0o755); err == nil {
			err = durable.WriteFile(path, key, 0o600)
		}
	}
	if err == nil && len(key) != 32 {
		err = fmt.Errorf("%s is damaged: remove it, and later hashes are others than earlier ones", path)
	}
	return key, err
}

// logChanges says in the log when a token goes, and when it is back.
func logChanges(log *slog.Logger) func(token string, was, is hsmkeys.Health) {
	return func(token string, was, is hsmkeys.Health) {
		switch {
		case was.Cause == nil && is.Cause != nil:
			log.Error("the HSM is away; it is opened again as soon as it can be",
				"token", token, "cause", is.Cause.Error(), "hung", is.Hung)
		case was.Cause != nil && is.Cause == nil:
			log.Info("the HSM is back", "token", token, "reopened", is.Reinitialised)
		}
	}
}

// observeProcess has the health of tokens, store, cache and the process itself in the metrics.
func observeProcess(registry prometheus.Registerer, group *hsmkeys.OperatorPool, store *sqlstore.Store, cache *stats.Counter) {
	for _, token := range group.Tokens() {
		labels := prometheus.Labels{"token": token.Serial()}
		gauge := func(name, help string, f func(hsmkeys.Health) float64) {
			registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: labels}, func() float64 { return f(token.Health()) }))
		}
		gauge("kme_hsm_up", "1 while the token is there, 0 while it is not asked.", func(h hsmkeys.Health) float64 {
			if h.Cause != nil {
				return 0
			}
			return 1
		})
		gauge("kme_hsm_hung_calls", "Calls that were given up in the HSM's module and have not come back.", func(h hsmkeys.Health) float64 { return float64(h.Hung) })
		gauge("kme_hsm_sessions", "Sessions of the pool.", func(hsmkeys.Health) float64 { return float64(token.Sessions()) })
		counter := func(name, help string, f func(hsmkeys.Health) int64) {
			registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help, ConstLabels: labels},
				func() float64 { return float64(f(token.Health())) }))
		}
		counter("kme_hsm_reopened_total", "How often the token was opened again after it was away.",
			func(h hsmkeys.Health) int64 { return h.Reinitialised })
		counter("kme_hsm_panics_total", "Panics that ended work at the token; the log says where.",
			func(h hsmkeys.Health) int64 { return h.Panics })
	}
	registry.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "kme_store_up", Help: "1 while the store can be reached."}, func() float64 {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			if store.Ping(ctx) != nil {
				return 0
			}
			return 1
		}),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "kme_directory_cache_hits_total", Help: "Looked-up devices whose shard was in the cache."}, func() float64 { return float64(cache.Snapshot().Hits) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "kme_directory_cache_misses_total", Help: "Looked-up devices whose shard was not."}, func() float64 { return float64(cache.Snapshot().Misses) }),
	)
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
}

func listen(cfg *config, served *live) (listeners []net.Listener, err error) {
	defer func() {
		if err != nil {
			for _, l := range listeners {
				l.Close()
			}
		}
	}()
	if cfg.Listen != "" {
		l, err := net.Listen("tcp", cfg.Listen)
		if err != nil {
			return nil, err
		}
		listeners = append(listeners, tls.NewListener(l, &tls.Config{
			MinVersion:         tls.VersionTLS13,
			GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return served.Load().tls, nil },
		}))
	}
	if cfg.Socket != "" {
		l, err := listenUnix(cfg.Socket, served.others)
		if err != nil {
			return listeners, err
		}
		listeners = append(listeners, l)
	}
	return listeners, nil
}

// listenUnix offers a socket to its own user only, or to others, who are told apart by their uid. A socket that a killed service left is replaced; one that
// somebody serves is not.
func listenUnix(path string, others bool) (net.Listener, error) {
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return nil, fmt.Errorf("another process serves %s", path)
	}
	if info, err := os.Lstat(path); err == nil && info.Mode()&os.ModeSocket != 0 {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	mask := 0o177
	if others {
		mask = 0o111
	}
	old := syscall.Umask(mask) // from its first moment on, not only after a chmod
	l, err := net.Listen("unix", path)
	syscall.Umask(old)
	return l, err
}

// run serves until ctx ends, and then finishes the calls under way. It reloads at SIGHUP, and when a database that was
// rolled back is accepted.
func run(ctx context.Context, handler http.Handler, service *binding.Service, listeners []net.Listener,
	accepted <-chan struct{}, reload func() error, sweep func(context.Context) error, log *slog.Logger) error {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true) // on the socket, where gRPC comes without TLS
	server := &http.Server{
		Handler: handler, ConnContext: api.ConnContext, Protocols: protocols, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, IdleTimeout: 5 * time.Minute,
		ConnState: api.ConnState(service), ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	g, gctx := errgroup.WithContext(ctx)
	for _, l := range listeners {
		g.Go(func() error {
			if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return err
			}
			return nil
		})
	}
	g.Go(func() error {
		hup := make(chan os.Signal, 1)
		signal.Notify(hup, syscall.SIGHUP)
		defer signal.Stop(hup)
		minute := time.NewTicker(time.Minute)
		defer minute.Stop()
		again := func() {
			if err := reload(); err != nil {
				log.Error("reload failed; what was served before goes on", "cause", err.Error())
			} else {
				log.Info("reloaded")
			}
		}
		for {
			select {
			case <-hup:
				again()
			case <-accepted:
				again()
			case <-minute.C:
				if err := sweep(gctx); err != nil && gctx.Err() == nil {
					log.Warn("expired attempts were not removed", "cause", err.Error())
				}
			case <-gctx.Done():
				log.Info("draining")
				drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
				defer cancel()
				return server.Shutdown(drain)
			}
		}
	})
	return g.Wait()
}
