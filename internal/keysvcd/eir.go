package keysvcd

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"time"

	"github.com/kmehsm/kmehsm/api"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/n5geir"
)

// uuid is the form of an NF instance id (TS 29.571 clause 5.3.2).
var uuid = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

func (c *Config) checkEIR() error {
	e := &c.EIR
	if e.Listen == "" {
		if *e != (Config{}).EIR {
			return errors.New("listen says where to serve, as HOST:PORT")
		}
		return nil
	}
	isHostPort := func(s string) bool { _, _, err := net.SplitHostPort(s); return err == nil }
	nrf, err := url.Parse(e.NRF)
	switch {
	case !isHostPort(e.Listen):
		return fmt.Errorf("listen is HOST:PORT, not %q", e.Listen)
	case c.TLS.Certificate == "" || c.TLS.Key == "" || c.TLS.ClientCA == "" || len(c.Clients) == 0:
		return errors.New("it needs tls with certificate, key and client_ca, and clients: it is never offered " +
			"without mutual TLS")
	case e.Instance != "" && !uuid.MatchString(e.Instance):
		return fmt.Errorf("instance is a UUID in lower case, not %q: uuidgen makes one", e.Instance)
	case e.NRF == "" && (e.NRFCA != "" || e.Advertise != ""):
		return errors.New("nrf_ca and advertise are for registration at an NRF: nrf names it")
	case e.NRF == "":
		return nil
	case err != nil || nrf.Scheme != "https" || nrf.Host == "":
		return fmt.Errorf("nrf is https://HOST:PORT, not %q", e.NRF)
	case e.Instance == "" || !isHostPort(e.Advertise):
		return errors.New("registration at an NRF needs instance, a UUID of its own, and advertise, HOST:PORT where " +
			"AMFs reach it")
	}
	return nil
}

// newEIR serves N5g-eir for the callers of a handler.
func newEIR(cfg *Config, h *api.Handler, service *binding.Service) (http.Handler, error) {
	o := n5geir.Options{Check: h.CheckEquipment, Refused: func(r *http.Request, why error) {
		ctx := binding.WithActor(r.Context(), binding.Actor{Address: r.RemoteAddr})
		service.Unauthenticated(ctx, "token", "cause", why.Error())
	}}
	if cfg.EIR.TokenKey != "" {
		keys, err := os.ReadFile(cfg.EIR.TokenKey)
		if err == nil {
			o.Tokens, err = n5geir.ParseTokens(keys, cfg.EIR.Instance)
		}
		if err != nil {
			return nil, fmt.Errorf("token_key: %w", err)
		}
	}
	return n5geir.Handler(o), nil
}

// listenEIR listens for AMFs, who speak HTTP/2 (TS 29.500 clause 5.2).
func listenEIR(cfg *Config, served *live) ([]net.Listener, error) {
	if cfg.EIR.Listen == "" {
		return nil, nil
	}
	l, err := config.Listen(cfg.EIR.Listen)
	if err != nil {
		return nil, err
	}
	return []net.Listener{tls.NewListener(l, &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			c := served.Load().tls.Clone()
			c.NextProtos = []string{"h2"}
			return c, nil
		},
	})}, nil
}

func (d *daemon) eirServer() *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	return &http.Server{
		Handler:     http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { d.Load().eir.ServeHTTP(w, r) }),
		ConnContext: api.ConnContext, ConnState: api.ConnState(d.service), Protocols: protocols,
		ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 10 * time.Second, IdleTimeout: 5 * time.Minute,
		MaxHeaderBytes: 32 << 10, ErrorLog: slog.NewLogLogger(d.log.Handler(), slog.LevelDebug),
	}
}

// keepRegistered keeps us registered at the NRF until ctx ends.
func (d *daemon) keepRegistered(ctx context.Context) error {
	cfg := d.started
	c, err := cmdline.ClientTLS(cfg.TLS.Certificate, cfg.TLS.Key, cmp.Or(cfg.EIR.NRFCA, cfg.TLS.ClientCA))
	if err != nil {
		return fmt.Errorf("eir: nrf: %w", err)
	}
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { // that of the last reload
		return &d.Load().tls.Certificates[0], nil
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	r := n5geir.Registration{URL: cfg.EIR.NRF, Instance: cfg.EIR.Instance, Address: cfg.EIR.Advertise,
		Tokens: cfg.EIR.TokenKey != "", Log: d.log,
		Client: &http.Client{Transport: &http.Transport{TLSClientConfig: c, Protocols: protocols}}}
	r.Run(ctx)
	return nil
}
