package keysvcd

import (
	"cmp"
	"crypto/tls"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/kmehsm/kmehsm/api"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/keysvcd/settings"
	"github.com/kmehsm/kmehsm/internal/n5geir"
)

// newEIR makes the handler of N5g-eir. Its clients are those of the other handler.
func newEIR(cfg *settings.Config, h *api.Handler, service *binding.Service) (http.Handler, error) {
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

// eirServer serves AMFs, who speak HTTP/2 (TS 29.500 clause 5.2).
func (d *daemon) eirServer() *http.Server {
	s := d.newServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { d.Load().eir.ServeHTTP(w, r) }))
	s.Protocols = new(http.Protocols)
	s.Protocols.SetHTTP2(true)
	s.ReadTimeout = 10 * time.Second
	return s
}

// registration is ours at the NRF.
func (d *daemon) registration() (*n5geir.Registration, error) {
	cfg := d.started
	c, err := config.ClientTLS(cfg.TLS.Certificate, cfg.TLS.Key, cmp.Or(cfg.EIR.NRFCA, cfg.TLS.ClientCA))
	if err != nil {
		return nil, fmt.Errorf("eir: nrf: %w", err)
	}
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { // the one of the last reload
		return &d.Load().tls.Certificates[0], nil
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	return &n5geir.Registration{URL: cfg.EIR.NRF, Instance: cfg.EIR.Instance, Address: cfg.EIR.Advertise,
		Tokens: cfg.EIR.TokenKey != "", Log: d.log,
		Client: &http.Client{Transport: &http.Transport{TLSClientConfig: c, Protocols: protocols}}}, nil
}
