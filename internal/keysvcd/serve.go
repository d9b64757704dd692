// Package keysvcd is the daemon behind keysvc serve: what it is made of, and what a reload changes.
package keysvcd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/maypok86/otter/v2/stats"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/kmehsm/kmehsm/api"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/limits"
	"github.com/kmehsm/kmehsm/binding/mark"
	"github.com/kmehsm/kmehsm/binding/refusals"
	"github.com/kmehsm/kmehsm/binding/revocations"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/keysvcd/operator"
	"github.com/kmehsm/kmehsm/internal/keysvcd/settings"
	"github.com/kmehsm/kmehsm/internal/operatorpage"
	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/internal/scheduling"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/internal/version"
)

// A daemon serves from tokens and a store. While it serves, only live changes.
type daemon struct {
	*live
	from        settings.Source // of the configuration
	tokens      *hsmkeys.OperatorPool
	store       *sqlstore.Store
	service     *binding.Service // without lots: see live
	warnings    []string         // of tokens; they stay the same until the process ends
	unaudited   atomic.Bool      // the audit log cannot be written
	accepted    chan struct{}    // receives when a rolled-back database is accepted
	hup         <-chan os.Signal // SIGHUPs, also those of before it serves
	leaving     *leaving
	connections *api.Connections // of all servers
}

// Serve serves the HSS as a configuration says, and logs to w. When ctx ends, it says that it is not ready any more,
// serves for the drain delay, finishes the calls under way and returns. SIGHUP reloads lots, clients and certificates;
// one that comes while the service begins does so when it serves.
func Serve(ctx context.Context, from settings.Source, w io.Writer) error {
	hup := make(chan os.Signal, 1) // at once: a SIGHUP that nobody takes ends the process
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	cfg, log, err := begin(from, w)
	if err != nil {
		return err
	}
	leaving := &leaving{told: ctx}
	ctx, stop := leaving.stay(cfg.DrainDelay, log)
	defer stop()
	// The collector takes 8% of busy cores by default, and 5% so; with a limit, memory does not grow fivefold for that.
	if os.Getenv("GOGC") == "" && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetGCPercent(400)
		debug.SetMemoryLimit((cfg.CacheMB + 256) << 20)
	}
	registry := prometheus.NewRegistry()
	metrics := binding.NewMetrics(registry)
	tokens, err := openTokens(ctx, cfg, metrics, log)
	if err != nil {
		return err
	}
	defer tokens.Close()
	store, closeStore, err := openStore(ctx, cfg, tokens)
	if err != nil {
		return err
	}
	defer closeStore()
	// A rolled-back store is served, too: each call is refused with that reason until it is accepted.
	rolledBack := mark.Check(ctx, store, tokens)
	if rolledBack != nil && !errors.Is(rolledBack, binding.ErrRolledBack) {
		return rolledBack
	}
	refused, err := operator.ReadRefusals(cfg.State)
	if err != nil {
		log.Warn("the last refusals are forgotten", "cause", err.Error())
		refused = new(refusals.Memory)
	}
	history, err := newHistory(&cfg.Equipment, store, registry, log)
	if err != nil {
		return err
	}
	d := &daemon{
		from: from, tokens: tokens, store: store, accepted: make(chan struct{}, 1), leaving: leaving, hup: hup,
		service: binding.NewService(binding.Options{
			Token: tokens, Store: store, Times: cfg.Times(), Metrics: metrics, Log: log,
			Refusals:  refused,
			Equipment: cfg.Equipment.Policy(), Listings: store, History: history.History,
			Limits: limits.Limits{
				Calls: cmp.Or(cfg.Calls, 32*tokens.Sessions()), IMEIRate: cfg.IMEIRate, IMEIBurst: cfg.IMEIBurst,
			},
		}),
	}
	if d.warnings, err = weaknesses(ctx, tokens.Tokens(), registry, log); err != nil {
		return err
	}
	unsafe, err := store.Warnings(ctx)
	if err != nil {
		return err
	}
	for _, what := range unsafe {
		log.Warn("the store is not kept as it should be", "warning", what)
	}
	hits := stats.NewCounter()
	cache := directory.NewCache(cfg.CacheMB<<20, hits)
	observe(registry, tokens.Tokens(), store, hits)
	traces, stopTraces, err := tracing(ctx, cfg.OTLP)
	if err != nil {
		return err
	}
	defer func() {
		flush, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if err := stopTraces(flush); err != nil {
			log.Warn("the last traces were not sent", "cause", err.Error())
		}
	}()
	pageKey, err := tokens.Derive(ctx, "pages")
	if err != nil {
		return err
	}
	overdue, bound := newOverdue(registry), new(census)
	d.live = &live{
		started: cfg, registry: store, ready: d.ready, log: log, rolledBack: rolledBack != nil,
		open: opener(ctx, cfg.Directory, cfg.Login(), readerOptions(cfg, store, cache, overdue, log), log),
		options: api.Options{Service: d.service, Metrics: metrics, Outer: traces, PageKey: pageKey,
			Leaving: leaving.begun, Streams: api.NewStreams(),
			Gather: promhttp.HandlerFor(registry, promhttp.HandlerOpts{})},
	}
	lastDay := operatorpage.NewHistory(time.Now(), metrics.Totals())
	count := func() { lastDay.Add(time.Now(), metrics.Totals()) }
	d.live.page = func(service *binding.Service, s *state) http.Handler {
		return operatorpage.New(operatorpage.Options{
			Service: service, History: lastDay, Count: count, View: api.View, Version: version.Text(),
			Health: func(ctx context.Context) operatorpage.Health { return d.health(ctx, s, service, bound) },
		})
	}
	d.connections = api.NewConnections(d.service, func() *api.Clients { return d.Load().clients }, cfg.Connections)
	if err := d.apply(ctx, cfg); err != nil {
		return err
	}
	defer d.rest()
	registry.MustRegister(&changing{live: d.live, bound: bound})
	listeners, err := d.listen()
	if err != nil {
		return err
	}
	var addresses []string
	for _, l := range listeners { // with the ports that port 0 became
		addresses = append(addresses, l.Addr().String())
	}
	if rolledBack != nil {
		log.Error("no call is served", "cause", rolledBack.Error())
	}
	defer d.keepMark(ctx)()
	defer d.keepAuditLog(ctx, cfg.AuditLog)()
	defer d.keepRefusals(ctx, refused)()
	defer d.rememberLotKeys(ctx)()
	defer d.followListings(ctx)()
	defer history.run(ctx)()
	defer beside(ctx, func(ctx context.Context) {
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Minute):
				count()
			}
		}
	})()
	defer beside(ctx, func(ctx context.Context) { bound.keep(ctx, store, log) })()
	log.Info("serving", "token", tokens.String(), "ranges", d.Load().lots.Len(), "addresses", addresses)
	return d.run(ctx, listeners)
}

// begin reads the configuration and makes the log. It finds what can be wrong before a token is opened.
func begin(from settings.Source, w io.Writer) (*settings.Config, *slog.Logger, error) {
	cfg, report := settings.Read(from)
	cfg.Inspect(report)
	if err := report.Err(); err != nil {
		return nil, nil, usage.Mark(err)
	}
	if err := durable.CheckFolder("keysvc", cfg.State); err != nil {
		return nil, nil, err
	}
	log, err := newLog(w, cfg)
	if err != nil {
		return nil, nil, err
	}
	starting(log, cfg)
	if err := config.SocketFree(cfg.Socket); err != nil {
		return nil, nil, err
	}
	for _, p := range report.Problems() { // warnings
		log.Warn("the configuration needs attention", "setting", p.Setting, "warning", p.What, "remedy", p.Remedy)
	}
	slog.SetDefault(log) // for panics, wherever they are recovered
	return cfg, log, nil
}

// openStore opens the store, which no other service may serve from if it is in SQLite.
func openStore(
	ctx context.Context, cfg *settings.Config, tokens *hsmkeys.OperatorPool,
) (store *sqlstore.Store, done func(), err error) {
	if store, err = operator.OpenStore(ctx, tokens, cfg.Store); err != nil {
		return nil, nil, err
	}
	unlock, err := operator.ServeAlone(cfg.Store)
	if err != nil {
		return nil, nil, errors.Join(err, store.Close())
	}
	return store, func() { store.Close(); unlock() }, nil
}

// openTokens opens the tokens of a configuration, and tests that they work.
func openTokens(
	ctx context.Context, cfg *settings.Config, o hsmkeys.Observer, log *slog.Logger,
) (*hsmkeys.OperatorPool, error) {
	tokens, err := hsmkeys.OpenOperatorPool(ctx, cfg.Tokens, hsmkeys.Options{
		Observer: o, HangTimeout: cfg.HSMTimeout, VerifyInSoftware: cfg.Verify == "software", Changed: logChanges(log),
	})
	if err != nil {
		return nil, err
	}
	if err := scheduling.ForCalls(tokens.Sessions()); err != nil {
		log.Debug("the kernel keeps the scheduling policy as it is", "cause", err.Error())
	}
	if cfg.Verify == "software" {
		log.Warn("KME_SIG is validated in software, and not in the token, as the configuration says")
	}
	err = tokens.Ping(ctx)
	if errors.Is(err, hsmkeys.ErrNoKey) || errors.Is(err, hsmkeys.ErrNotDedicated) {
		err = operator.NoKeys(tokens)
	}
	if err != nil {
		return nil, errors.Join(err, tokens.Close())
	}
	return tokens, nil
}

// readerOptions are those of each manufacturer's reader. All share one cache. Overdue lists are counted and logged.
func readerOptions(cfg *settings.Config, store *sqlstore.Store, cache *directory.Cache, overdue *prometheus.CounterVec,
	log *slog.Logger) func(manufacturer string) directory.ReaderOptions {
	return func(manufacturer string) directory.ReaderOptions {
		for _, why := range directory.Whys() { // so that the first is an increase
			overdue.WithLabelValues(manufacturer, string(why))
		}
		return directory.ReaderOptions{
			Cache: cache, RevocationTTL: cfg.RevocationTTL, MaxAge: cfg.MaxRevocationAge,
			Memory: revocations.Memory(store, manufacturer, revocationsIn(cfg.State)),
			Overdue: func(d directory.Overdue) {
				overdue.WithLabelValues(manufacturer, string(d.Why)).Inc()
				warnOverdue(log, manufacturer, d)
			},
		}
	}
}

// ready tests the token and the store. Failures that calls can live with are warnings.
func (d *daemon) ready(ctx context.Context, service *binding.Service) (warnings []string, err error) {
	if err = d.tokens.Ping(ctx); err == nil {
		_, err = d.store.Lots(ctx)
	}
	if err != nil {
		d.log.WarnContext(ctx, "not ready", "cause", err.Error())
		return nil, err
	}
	short, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	unsafe, err := d.store.Warnings(short)
	if err != nil {
		d.log.WarnContext(ctx, "not ready", "cause", err.Error())
		return nil, err
	}
	warnings = slices.Concat(d.warnings, unsafe)
	for manufacturer, err := range service.CheckDirectories(short) {
		d.log.WarnContext(ctx, "a directory is not available", "manufacturer", manufacturer, "cause", err.Error())
		warnings = append(warnings, "the directory of manufacturer "+manufacturer+
			" is not available; devices whose keys are cached go on")
	}
	if service.ListingsFailed() {
		warnings = append(warnings, "the operator's list of devices cannot be read; the log says why")
	}
	if d.unaudited.Load() {
		warnings = append(warnings, "the audit log cannot be written; the log says why")
	}
	for manufacturer, lists := range service.Overdue() {
		for _, o := range lists {
			const warning = "the list of revoked devices of lot %s of manufacturer %s is overdue (%s); %s"
			warnings = append(warnings, fmt.Sprintf(warning, o.Lot, manufacturer, o.Why, standing(o.Since)))
		}
	}
	return warnings, nil
}

// standing says what is served instead of an overdue list of revoked devices.
func standing(since time.Time) string {
	if since.IsZero() {
		return "there is none yet: no device of the lot is newly bound, and whether one that is bound was revoked is " +
			"not known"
	}
	return "that of " + since.UTC().Format(time.RFC3339) + " stands"
}

// keepMark keeps the tokens' high-water mark up to date. stop is called after the last call.
func (d *daemon) keepMark(ctx context.Context) (stop func()) {
	return beside(context.WithoutCancel(ctx), func(ctx context.Context) {
		mark.Keep(ctx, d.store, d.tokens, func() {
			select {
			case d.accepted <- struct{}{}:
			default:
			}
		}, d.log)
	})
}

// keepAuditLog copies the ledger to a folder, if one is configured. stop is called after the last call.
func (d *daemon) keepAuditLog(ctx context.Context, dir string) (stop func()) {
	if dir == "" {
		return func() {}
	}
	return beside(context.WithoutCancel(ctx), func(ctx context.Context) {
		mark.KeepAuditLog(ctx, d.store, dir, &d.unaudited, d.log)
	})
}

// beside does background work, which ends only with its context, until ctx ends or stop is called. A panic ends it,
// too: then it begins again. stop waits until it has ended.
func beside(ctx context.Context, work func(context.Context)) (stop func()) {
	working, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for safely(func() error { work(working); return nil }) != nil {
			select {
			case <-working.Done():
				return
			case <-time.After(time.Second):
			}
		}
	}()
	return func() { cancel(); <-ended }
}

// rememberLotKeys finds the lots' keys in the tokens, in the background. stop ends it early.
func (d *daemon) rememberLotKeys(ctx context.Context) (stop func()) {
	looking, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	for _, token := range d.tokens.Tokens() {
		all.Go(func() {
			err := safely(func() error { return d.rememberLotKeysOf(looking, token) })
			if err != nil && looking.Err() == nil {
				d.log.Warn("the lots' keys are looked for one by one", "token", token.String(), "cause", err.Error())
			}
		})
	}
	return func() { cancel(); all.Wait() }
}

// rememberLotKeysOf is rememberLotKeys of one token. It logs whether the token lacks any.
func (d *daemon) rememberLotKeysOf(ctx context.Context, token *hsmkeys.OperatorToken) error {
	n, err := token.RememberLotKeys(ctx)
	if err != nil {
		return err
	}
	var lacks []string
	for _, key := range d.Load().lots.Keys() {
		has, err := token.Has(ctx, key)
		if err != nil {
			return err
		}
		if !has {
			lacks = append(lacks, key.Name)
		}
	}
	if len(lacks) > 0 {
		d.log.Warn("the token does not have the keys of all lots", "token", token.String(), "lots", len(lacks), "lot",
			slices.Min(lacks))
	}
	d.log.Debug("the token's lot keys are known", "token", token.String(), "keys", n)
	return nil
}

// safely does background work. A panic becomes its error, and the service goes on.
func safely(work func() error) (err error) {
	defer panics.Recover(&err)
	return work()
}

// logChanges logs when a token goes away, and when it is back.
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
