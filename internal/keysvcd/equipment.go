package keysvcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/webhook"
)

// An equipmentConfig says how CheckEquipment answers, and what becomes of what it was asked.
type equipmentConfig struct {
	Lists             string        `yaml:"lists"`
	OtherDevice       string        `yaml:"other_device"`
	OtherSubscription string        `yaml:"other_subscription"`
	NotInLot          string        `yaml:"not_in_lot"`
	History           time.Duration `yaml:"history"`
	HistoryRows       int           `yaml:"history_rows"`
	Webhook           struct {
		URL        string `yaml:"url"`
		SecretFile string `yaml:"secret_file" path:""`
		CA         string `yaml:"ca" path:""`
	} `yaml:"webhook"`
}

// equipmentSettings are those of an equipmentConfig.
func equipmentSettings() []config.Setting[Config] {
	p := binding.DefaultEquipmentPolicy()
	status := func(s binding.EquipmentStatus) string { return strings.ToLower(string(s)) }
	colours := []string{"whitelisted", "greylisted", "blacklisted"}
	one := func(name, example, help string, may []string, of func(e *equipmentConfig) string) config.Setting[Config] {
		return config.Setting[Config]{Name: "equipment." + name, Example: example, Help: help,
			Rule: strings.Join(may[:len(may)-1], ", ") + " or " + may[len(may)-1],
			OK:   func(c *Config) bool { return slices.Contains(may, of(&c.Equipment)) }}
	}
	return []config.Setting[Config]{
		{Name: "equipment", Default: fmt.Sprintf("{lists: first, other_device: %s, other_subscription: %s, "+
			"not_in_lot: %s, history: 9600h, history_rows: 10000000}", status(p.OtherDevice),
			status(p.OtherSubscription), status(p.NotInLot)), Example: "{lists: first}",
			Help: "how CheckEquipment answers (docs/equipment.md), and what is kept of it:"},
		one("lists", "first", "what keysvc equipment add has listed comes first; or last", []string{"first", "last"},
			func(e *equipmentConfig) string { return e.Lists }),
		one("other_device", status(p.OtherDevice),
			"a device with an IMSI that is bound to another: whitelisted, greylisted or blacklisted", colours,
			func(e *equipmentConfig) string { return e.OtherDevice }),
		one("other_subscription", status(p.OtherSubscription), "one that is proven for other IMSIs only", colours,
			func(e *equipmentConfig) string { return e.OtherSubscription }),
		one("not_in_lot", status(p.NotInLot), "one that cannot prove itself; also unknown",
			append(slices.Clip(colours), "unknown"), func(e *equipmentConfig) string { return e.NotInLot }),
		{Name: "equipment.history", Example: "9600h",
			Help: "for how long it is kept which IMSI was seen with which IMEI (0s: not at all)",
			Rule: "0s, or a time from 1h on",
			OK: func(c *Config) bool {
				return c.Equipment.History == 0 || c.Equipment.History >= time.Hour
			}},
		{Name: "equipment.history_rows", Example: "10000000", Help: "of it at most", Rule: "a whole number above zero",
			OK: func(c *Config) bool { return c.Equipment.HistoryRows > 0 }},
		{Name: "equipment.webhook", Example: "{url: https://..., secret_file: FILE}",
			Help: "is told of each IMSI that is in another device; with ca: FILE, a CA of its own"},
	}
}

// check reports what is at odds with something else.
func (e *equipmentConfig) check(r *config.Report) {
	if !r.Good("equipment") {
		return
	}
	w := e.Webhook
	err := webhook.CheckURL(w.URL)
	switch {
	case w.URL == "" && w.SecretFile == "" && w.CA == "":
	case err != nil:
		r.Add("equipment.webhook.url", fmt.Sprintf("equipment.webhook.url: %v", err), "")
	case w.SecretFile == "":
		r.Add("equipment.webhook", "equipment.webhook has no secret_file",
			"without it, nobody can tell who has sent an event: echo whsec_$(openssl rand -base64 32) >FILE")
	case e.History == 0:
		r.Add("equipment.history", "equipment.webhook needs equipment.history", "that knows the device before")
	}
}

func (e *equipmentConfig) policy() *binding.EquipmentPolicy {
	status := func(s string) binding.EquipmentStatus { return binding.EquipmentStatus(strings.ToUpper(s)) }
	return &binding.EquipmentPolicy{ListsLast: e.Lists == "last", OtherDevice: status(e.OtherDevice),
		OtherSubscription: status(e.OtherSubscription), NotInLot: status(e.NotInLot)}
}

// An equipmentHistory is what becomes of the devices that are seen: History is nil if it is not kept.
type equipmentHistory struct {
	*binding.History
	webhook *webhook.Sender // nil if there is none
}

// moved is the type of the webhook's events. What they have is a binding.Move.
const moved = "com.github.kmehsm.equipment.moved.v1"

func newHistory(
	cfg *equipmentConfig, store binding.Sightings, registry prometheus.Registerer, log *slog.Logger,
) (h equipmentHistory, err error) {
	if cfg.History == 0 {
		return h, nil
	}
	o := binding.HistoryOptions{Store: store, Keep: cfg.History, Most: cfg.HistoryRows, Now: time.Now, Log: log,
		Registry: registry}
	if cfg.Webhook.URL != "" {
		if h.webhook, err = newWebhook(cfg, registry, log); err != nil {
			return h, fmt.Errorf("equipment.webhook: %w", err)
		}
		o.Moved = func(m binding.Move) { h.webhook.Send(moved, "imsi-"+m.IMSI.String(), m) }
	}
	h.History = binding.NewHistory(o)
	return h, nil
}

func newWebhook(
	cfg *equipmentConfig, registry prometheus.Registerer, log *slog.Logger,
) (*webhook.Sender, error) {
	file := cfg.Webhook.SecretFile
	secret := func() ([]byte, error) {
		text, err := cmdline.ReadFile(file)
		if err != nil {
			return nil, err
		}
		secret, err := webhook.ParseSecret(string(text))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		return secret, nil
	}
	if _, err := secret(); err != nil {
		return nil, err
	}
	clientTLS := &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.Webhook.CA != "" {
		pem, err := cmdline.ReadFile(cfg.Webhook.CA)
		if err != nil {
			return nil, err
		}
		clientTLS.RootCAs = x509.NewCertPool()
		if !clientTLS.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s has no certificate in it, as PEM", cfg.Webhook.CA)
		}
	}
	host, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	return webhook.New(webhook.Options{URL: cfg.Webhook.URL, Secret: secret, Source: "//" + host + "/keysvc",
		Client: &http.Client{Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: clientTLS}},
		Log:    log, Registry: registry}), nil
}

// run writes and sends until stop is called, which is after the last call has ended.
func (h equipmentHistory) run(ctx context.Context, d *daemon) (stop func()) {
	if h.History == nil {
		return func() {}
	}
	start := func(run func(context.Context)) (stop func()) {
		ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		var ended sync.WaitGroup
		ended.Go(func() {
			for ctx.Err() == nil { // after a panic too
				d.safely(ctx, func() error { run(ctx); return nil })
			}
		})
		return func() { cancel(); ended.Wait() }
	}
	stopHistory, stopWebhook := start(h.Run), func() {}
	if h.webhook != nil {
		stopWebhook = start(h.webhook.Run)
	}
	return func() { stopHistory(); stopWebhook() } // the last moves are sent
}

// listsEvery is how long it takes at most until a service answers by what keysvc equipment has changed.
const listsEvery = 5 * time.Second

// followListings has the operator's list read, now and again and again, until stop is called. One that is damaged is
// no reason not to serve: CheckEquipment is refused then.
func (d *daemon) followListings(ctx context.Context) (stop func()) {
	d.service.LoadListings(ctx) // what has failed is in the log
	following, cancel := context.WithCancel(ctx)
	var ended sync.WaitGroup
	ended.Go(func() {
		for following.Err() == nil {
			d.safely(ctx, func() error { d.service.FollowListings(following, listsEvery); return nil })
		}
	})
	return func() { cancel(); ended.Wait() }
}
