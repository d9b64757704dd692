package settings

import (
	"regexp"

	"github.com/kmehsm/kmehsm/internal/config"
)

// uuid is the form of an NF instance id (TS 29.571 clause 5.3.2).
var uuid = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// eirSettings are those of eir.
var eirSettings = []config.Setting[Config]{
	{Name: "eir.listen", Example: "127.0.0.1:8444", Help: "where AMFs ask", Rule: hostPort,
		OK: func(c *Config) bool { return config.IsAddress(c.EIR.Listen) }},
	{Name: "eir.instance", Example: "UUID", Help: "for registration at an NRF, this instance's own",
		Rule: "a UUID in lower case, as uuidgen makes one",
		OK:   func(c *Config) bool { return uuid.MatchString(c.EIR.Instance) }},
	{Name: "eir.nrf", Example: "https://HOST:PORT", Help: "the NRF; with nrf_ca: FILE, a CA of its own",
		Rule: "https://HOST:PORT", OK: func(c *Config) bool { return config.IsURL(c.EIR.NRF, "https") }},
	{Name: "eir.advertise", Example: "HOST:PORT", Help: "where AMFs reach this instance, for the NRF",
		Rule: "HOST:PORT, with a port from 1 to 65535",
		OK:   func(c *Config) bool { return config.IsReachable(c.EIR.Advertise) }},
}

// checkEIR reports what eir lacks.
func (c *Config) checkEIR(r *config.Report) {
	e := &c.EIR
	if *e == (Config{}).EIR || !r.Good("eir") {
		return
	}
	if e.Listen == "" {
		r.Add("eir.listen", "it is missing", "it says where to serve, as HOST:PORT")
	}
	if !c.hasTLS() || len(c.Clients) == 0 {
		r.Add("eir", "it needs tls with certificate, key and client_ca, and clients",
			"it is never offered without mutual TLS")
	}
	switch {
	case e.NRF == "" && (e.NRFCA != "" || e.Advertise != ""):
		r.Add("eir", "nrf_ca and advertise are for registration at an NRF", "nrf names it")
	case e.NRF != "" && (e.Instance == "" || e.Advertise == ""):
		r.Add("eir", "registration at an NRF needs eir.instance and eir.advertise", "a UUID of its own, and "+
			"HOST:PORT where AMFs reach it")
	}
}
