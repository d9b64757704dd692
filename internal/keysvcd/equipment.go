package keysvcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kmehsm/kmehsm/binding/sightings"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/keysvcd/settings"
	"github.com/kmehsm/kmehsm/internal/webhook"
)

// An equipmentHistory notes with which devices subscriptions are seen, and sends events. History is nil if it is not
// kept.
type equipmentHistory struct {
	*sightings.History
	webhook *webhook.Sender // nil if there is none
}

// moved is the type of the webhook's events. What they have is a binding.Move.
const moved = "com.github.kmehsm.equipment.moved.v1"

func newHistory(
	cfg *settings.Equipment, store sightings.Store, registry prometheus.Registerer, log *slog.Logger,
) (h equipmentHistory, err error) {
	if cfg.History == 0 {
		return h, nil
	}
	o := sightings.Options{Store: store, Keep: cfg.History, Most: cfg.HistoryRows, Now: time.Now, Log: log,
		Registry: registry}
	if cfg.Webhook.URL != "" {
		if h.webhook, err = newWebhook(cfg, registry, log); err != nil {
			return h, fmt.Errorf("equipment.webhook: %w", err)
		}
		o.Moved = func(m sightings.Move) { h.webhook.Send(moved, "imsi-"+m.IMSI.String(), m) }
	}
	h.History = sightings.New(o)
	return h, nil
}

func newWebhook(
	cfg *settings.Equipment, registry prometheus.Registerer, log *slog.Logger,
) (*webhook.Sender, error) {
	file := cfg.Webhook.SecretFile
	secret := func() ([]byte, error) {
		text, err := durable.ReadFile(file)
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
		pem, err := durable.ReadFile(cfg.Webhook.CA)
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
func (h equipmentHistory) run(ctx context.Context) (stop func()) {
	if h.History == nil {
		return func() {}
	}
	ctx = context.WithoutCancel(ctx)
	stopHistory, stopWebhook := beside(ctx, h.Run), func() {}
	if h.webhook != nil {
		stopWebhook = beside(ctx, h.webhook.Run)
	}
	return func() { stopHistory(); stopWebhook() } // the last moves are sent
}

// listsEvery is after how long, at most, a service knows what keysvc equipment has changed.
const listsEvery = 5 * time.Second

// followListings reads the operator's list now, and again and again until stop is called. If the list is damaged,
// CheckEquipment is refused, and everything else is served.
func (d *daemon) followListings(ctx context.Context) (stop func()) {
	d.service.LoadListings(ctx) // a failure is logged there
	return beside(ctx, func(ctx context.Context) { d.service.FollowListings(ctx, listsEvery) })
}
