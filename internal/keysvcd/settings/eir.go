package settings

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"regexp"
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
