// Package settings is the configuration of keysvc serve: the meaning, default and rule of each setting, and the check
// of a file and its store. It opens no token or directory, changes nothing, and serves nothing.
package settings

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"reflect"
	"slices"
	"time"

	"github.com/kmehsm/kmehsm/api"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/directories"
	"github.com/kmehsm/kmehsm/vaultstore"
)

// A Config is a configuration file, complete and checked. What each setting means, its default and what it may be
// stand in settings.
type Config struct {
	Token     string   `yaml:"token"`
	Tokens    []string `yaml:"tokens"` // Token alone, if the file has none
	State     string   `yaml:"state" path:""`
	Directory string   `yaml:"directory" path:"file:"`
	Listen    string   `yaml:"listen"`
	TLS       struct {
		Certificate string `yaml:"certificate" path:""`
		Key         string `yaml:"key" path:""`
		ClientCA    string `yaml:"client_ca" path:""`
	} `yaml:"tls"`
	EIR struct {
		Listen    string `yaml:"listen"`
		TokenKey  string `yaml:"token_key" path:""`
		Instance  string `yaml:"instance"`
		NRF       string `yaml:"nrf"`
		NRFCA     string `yaml:"nrf_ca" path:""`
		Advertise string `yaml:"advertise"`
	} `yaml:"eir"`
	Socket       string `yaml:"socket" path:""`
	OperatorPage struct {
		Listen string `yaml:"listen"`
	} `yaml:"operator_page"`
	Clients          []api.Client      `yaml:"clients"`
	Store            string            `yaml:"store" path:"sqlite:"`
	AuditLog         string            `yaml:"audit_log" path:""`
	AttemptTTL       time.Duration     `yaml:"attempt_ttl"`
	PendingTTL       time.Duration     `yaml:"pending_ttl"`
	PendingVectors   int               `yaml:"pending_vectors"`
	RevocationTTL    time.Duration     `yaml:"revocation_ttl"`
	MaxRevocationAge time.Duration     `yaml:"max_revocation_age"`
	DrainDelay       time.Duration     `yaml:"drain_delay"`
	HSMTimeout       time.Duration     `yaml:"hsm_timeout"`
	Verify           string            `yaml:"verify"`
	Connections      int               `yaml:"connections"`
	Calls            int               `yaml:"calls"`
	IMEIRate         float64           `yaml:"imei_rate"`
	IMEIBurst        int               `yaml:"imei_burst"`
	CacheMB          int64             `yaml:"cache_mb"`
	LogLevel         slog.Level        `yaml:"log_level"`
	OTLP             string            `yaml:"otlp"`
	LogIdentities    string            `yaml:"log_identities"`
	Vault            directories.Vault `yaml:"vault"`

	Equipment Equipment `yaml:"equipment"`
}

// maxSocket is the longest path that Linux takes for a Unix socket (unix(7)).
const maxSocket = 107

// hostPort is the rule of where to listen.
const hostPort = "HOST:PORT, with a port from 0 to 65535"

var times = binding.DefaultTimes()

// schema has the settings in the order of the help. Those that belong to a setting above are indented: api.NewClients
// and vaultstore.Login check them.
var schema = config.Schema[Config]{See: "keysvc serve", Settings: slices.Concat([]config.Setting[Config]{
	{Name: "token", Example: "pkcs11:token=operator?module-path=...&pin-source=file:...", Secret: true,
		Help: "or KMEHSM_TOKEN"},
	{Name: "tokens", Example: "[pkcs11:..., pkcs11:...]", Secret: true,
		Help: "or several tokens with the same keys: they share the load, and one may fail"},
	{Name: "state", Default: "var/keysvc", Example: "/var/lib/kmehsm",
		Help: "the folder of the database, as --state of the other commands"},
	{Name: "directory", Example: "file:/srv/directory", Help: "for manufacturers enrolled without one",
		Rule: "file:DIR or vault:MOUNT",
		OK:   func(c *Config) bool { return directories.Check(c.Directory) == nil }},
	{Name: "listen", Example: "127.0.0.1:8443", Help: "mutual TLS 1.3; with tls",
		Rule: hostPort, OK: func(c *Config) bool { return config.IsAddress(c.Listen) }},
	{Name: "tls", Example: "{certificate: server.pem, key: server.key, client_ca: clients.pem}"},
	{Name: "eir", Example: "{listen: 127.0.0.1:8444, token_key: nrf.pem}",
		Help: `an equipment identity register for AMFs (N5g-eir), with tls, for clients with the role eir or hss. With
			token_key, the NRF's public keys, each request also needs an access token`},
}, eirSettings, []config.Setting[Config]{
	{Name: "socket", Example: "/run/kmehsm/keysvc.sock", Help: "for the clients with a uid",
		Rule: fmt.Sprintf("a path of %d bytes at most", maxSocket),
		OK:   func(c *Config) bool { return len(c.Socket) <= maxSocket }},
	{Name: "operator_page", Example: "{listen: 127.0.0.1:8444}",
		Help: "a read-only page for the browsers of clients with the role monitor; mutual TLS 1.3, with tls",
		Rule: "{listen: HOST:PORT}, with a port from 0 to 65535",
		OK:   func(c *Config) bool { return config.IsAddress(c.OperatorPage.Listen) }},
	{Name: "clients",
		Help: `who may call; listen needs it. Without it, only the service's own user may call, on the socket, in every
			role but kme-export`},
	{Name: "  - name", Example: "hss-1", Help: "for the log"},
	{Name: "    san", Example: "hss-1.example", Help: "a DNS name or URI of its certificate"},
	{Name: "    roles", Example: "[hss]",
		Help: `hss, eir (CheckEquipment alone), admin, monitor (sees bindings and the operator page), metrics (reads GET
			/metrics), kme-export`},
	{Name: "    plmns", Example: `["00101"]`,
		Help: "or [all]; an IMSI belongs to the longest PLMN that is named anywhere in this file"},
	{Name: "    provision_from", Example: "[home]",
		Help: `origins that may provision: home (names of the IMSI's own PLMN, mme.epc.mnc001.mcc001.3gppnetwork.org),
			any, "26202" (that PLMN's), names of hosts, "*.example.net"`},
	{Name: "    rate", Example: "500", Help: "at most this number of calls a second"},
	{Name: "  - {name", Example: "ops, uid: 1000, roles: [admin], plmns: [all]}",
		Help: "a client on the socket, by its user's number"},
	{Name: "store", Example: "postgres://keysvc@db/keysvc?sslmode=verify-full", Secret: true,
		Help: "for several instances; its password: PGPASSFILE (default: SQLite in the state folder)",
		Rule: "sqlite:PATH or postgres://USER@HOST/DATABASE",
		OK:   func(c *Config) bool { return sqlstore.CheckName(c.Store) == nil }},
	{Name: "audit_log", Example: "/var/lib/kmehsm-audit",
		Help: `each entry of the ledger is copied to this folder within a second. If the database is restored from a
			backup, keysvc store accept-rollback takes later decisions from it. Use another disk than the database's;
			each instance needs its own folder (default: none)`},
	{Name: "attempt_ttl", Default: fmt.Sprintf("%gm", times.Attempt.Minutes()),
		Help: "how long a device has for EstablishKME after PrepareVector",
		Rule: "a time above zero, such as 5m", OK: func(c *Config) bool { return c.AttemptTTL > 0 }},
	{Name: "pending_ttl", Default: fmt.Sprintf("%gh", times.Pending.Hours()),
		Help: "how long a device has to show its KME after EstablishKME",
		Rule: "a time above zero, such as 1h", OK: func(c *Config) bool { return c.PendingTTL > 0 }},
	{Name: "pending_vectors", Default: fmt.Sprint(times.PendingVectors),
		Help: "how many PrepareVectors a pending binding may answer until then", Rule: "a whole number above zero",
		OK: func(c *Config) bool { return c.PendingVectors > 0 }},
	{Name: "revocation_ttl", Default: "1m",
		Help: "how often lists of revoked devices are read again, in the background",
		Rule: "a time above zero, such as 1m", OK: func(c *Config) bool { return c.RevocationTTL > 0 }},
	{Name: "max_revocation_age", Default: "0s",
		Help: `if a list of revoked devices was last read, or the next one was due, longer ago than this, devices of its
			lot are not served, bound or not (0s: the last list is used, however old)`,
		Rule: "0s, or a time of more than twice revocation_ttl, such as 72h",
		OK:   func(c *Config) bool { return c.MaxRevocationAge == 0 || c.MaxRevocationAge/2 > c.RevocationTTL }},
	{Name: "connections", Default: "1000",
		Help: "open connections of each client, and of all callers who are none; more are closed",
		Rule: "a whole number above zero", OK: func(c *Config) bool { return c.Connections > 0 }},
	{Name: "calls", Example: "128",
		Help: `requests that use or wait for the HSM; more are refused, but each client is guaranteed its share
			(default: 32 for each session)`,
		Rule: "a whole number, or 0 for 32 of each session", OK: func(c *Config) bool { return c.Calls >= 0 }},
	{Name: "imei_rate", Default: "10",
		Help: "payloads a second of one IMSI, and accepted payloads a second of one IMEI; more are refused",
		Rule: "a number above zero", OK: func(c *Config) bool {
			return c.IMEIRate > 0 && c.IMEIRate <= math.MaxFloat64
		}},
	{Name: "imei_burst", Default: "1000", Help: "how many of these may come at once",
		Rule: "a whole number above zero", OK: func(c *Config) bool { return c.IMEIBurst > 0 }},
	{Name: "verify", Default: "token",
		Help: "or software, if the doctor says that the token cannot validate KME_SIG",
		Rule: "token or software", OK: func(c *Config) bool { return c.Verify == "token" || c.Verify == "software" }},
	{Name: "hsm_timeout", Default: "5s", Help: "a call that hangs in the token's module is given up after this time",
		Rule: "a time above zero and up to 1m, such as 5s",
		OK:   func(c *Config) bool { return c.HSMTimeout > 0 && c.HSMTimeout <= time.Minute }},
	{Name: "drain_delay", Default: "10s",
		Help: `how long calls are served after SIGTERM, while /readyz and gRPC health say no. keysvc does not wait if
			nobody has asked either for as long`,
		Rule: "0s or more, such as 10s", OK: func(c *Config) bool { return c.DrainDelay >= 0 }},
	{Name: "cache_mb", Default: "64", Help: "memory for cached public keys, of all manufacturers together",
		Rule: "a whole number from 1 to 1048576", OK: func(c *Config) bool {
			return c.CacheMB > 0 && c.CacheMB <= 1<<20
		}},
	{Name: "vault", Example: "{role_id: ID, secret_id_file: FILE, secret_id_wrapped: false}",
		Help: "or cert_role: for directories in Vault"},
	{Name: "otlp", Example: "http://127.0.0.1:4318", Secret: true,
		Help: "a collector of OpenTelemetry traces (default: none)",
		Rule: "http://HOST:PORT or https://HOST:PORT",
		OK:   func(c *Config) bool { return config.IsURL(c.OTLP, "http", "https") }},
	{Name: "log_identities", Default: "plain",
		Help: "or hashed: each IMSI and IMEI is replaced by its HMAC under log.key in the state folder",
		Rule: "plain or hashed", OK: func(c *Config) bool {
			return c.LogIdentities == "plain" || c.LogIdentities == "hashed"
		}},
	{Name: "log_level", Default: "info", Help: "debug, info, warn or error", Rule: "debug, info, warn or error"},
}, equipmentSettings())}

// Help documents the settings, as a commented configuration.
func Help() string { return schema.Help() }

// A Source says where a configuration comes from.
type Source struct {
	Path  string       // of the file
	Given config.Given // these override the file
}

// Read gives the configuration of a source, and what is wrong with it by itself. If anything is wrong, it must not be
// used.
func Read(from Source) (*Config, *config.Report) {
	c, r := readFile(from)
	c.Store = cmp.Or(c.Store, sqlstore.InFolder(c.State))
	c.check(r)
	return c, r
}

// ReadDefaults gives the values of flags that a command was not given. The configuration need not be complete enough to
// serve.
func ReadDefaults(from Source) (*Config, *config.Report) {
	c, r := readFile(from)
	c.Token = c.Tokens[0]
	return c, r
}

func readFile(from Source) (*Config, *config.Report) {
	c, r := schema.Read(from.Path, from.Given)
	if _, ok := from.Given["token"]; ok || len(c.Tokens) == 0 {
		if len(c.Tokens) > 0 {
			r.Warn("tokens", "the tokens of the file are not used: the command line or the environment has another",
				"unset KMEHSM_TOKEN if the file is right")
		}
		c.Tokens = []string{c.Token}
	}
	if err := c.Vault.Login().Validate(); err != nil {
		r.Add("vault", err.Error(), "")
	}
	return c, r
}

func (c *Config) Times() binding.Times {
	return binding.Times{Attempt: c.AttemptTTL, Pending: c.PendingTTL, PendingVectors: c.PendingVectors, Now: time.Now}
}

// check reports missing settings, and settings that contradict each other.
func (c *Config) check(r *config.Report) {
	if c.Listen == "" && c.Socket == "" && r.Good("listen") && r.Good("socket") {
		r.Add("listen", "neither listen nor socket says where to serve", "")
	}
	if c.Listen != "" && r.Good("tls") && !c.hasTLS() {
		r.Add("tls", "listen needs tls with certificate, key and client_ca", "it is never offered without mutual TLS")
	}
	if c.OperatorPage.Listen != "" && r.Good("operator_page") && (!c.hasTLS() || len(c.Clients) == 0) {
		r.Add("operator_page", "it needs tls with certificate, key and client_ca, and clients",
			"give one of them the role monitor: the page is never offered without mutual TLS")
	}
	if c.Listen != "" && r.Good("clients") && len(c.Clients) == 0 {
		r.Add("clients", "listen needs clients, who may call", `clients: [{name: hss-1, san: hss-1.example, roles: `+
			`[hss], plmns: ["00101"]}], where san is a DNS name or URI of its certificate`)
	}
	c.Equipment.check(r)
	c.checkEIR(r)
	r.Distinct(c.listeners()...)
	_, err := Clients(c)
	wrong, _ := errors.AsType[api.ClientErrors](err)
	setting := func(e api.ClientError) string { return fmt.Sprintf("clients[%d]", e.Index) }
	wrong = slices.DeleteFunc(wrong, func(e api.ClientError) bool { return !r.Good(setting(e)) }) // it was not read
	for _, e := range wrong {
		r.Add(setting(e), e.Error(), "")
	}
	if r.Good("token") && r.Good("tokens") {
		for _, uri := range c.Tokens {
			r.Token(c.tokenSetting(), uri)
		}
	}
}

// hasTLS says whether tls has all that mutual TLS needs.
func (c *Config) hasTLS() bool {
	return c.TLS.Certificate != "" && c.TLS.Key != "" && c.TLS.ClientCA != ""
}

// listeners are the addresses of all that is served over TCP.
func (c *Config) listeners() []config.Address {
	return []config.Address{{Setting: "listen", At: c.Listen}, {Setting: "eir.listen", At: c.EIR.Listen},
		{Setting: "operator_page.listen", At: c.OperatorPage.Listen}}
}

// tokenSetting is the setting that has the tokens.
func (c *Config) tokenSetting() string {
	if slices.Equal(c.Tokens, []string{c.Token}) {
		return "token"
	}
	return "tokens"
}

// storeSetting is the setting that says where the store is.
func (c *Config) storeSetting() string {
	if c.Store == sqlstore.InFolder(c.State) {
		return "state"
	}
	return "store"
}

// Login is the one to Vault.
func (c *Config) Login() vaultstore.Login {
	l := c.Vault.Login()
	l.Wait = true
	return l
}

// Fixed gives the settings that differ in another configuration, and that a reload does not change.
func (c *Config) Fixed(other *Config) (names []string) {
	reloaded := []string{"clients", "tls", "token"} // the last is in tokens, if it counts
	for _, f := range reflect.VisibleFields(reflect.TypeFor[Config]()) {
		name := f.Tag.Get("yaml")
		mine, theirs := reflect.ValueOf(c).Elem().FieldByIndex(f.Index), reflect.ValueOf(other).Elem().
			FieldByIndex(f.Index)
		if !slices.Contains(reloaded, name) && !reflect.DeepEqual(mine.Interface(), theirs.Interface()) {
			names = append(names, name)
		}
	}
	return names
}

// Clients are those of the configuration. On the socket alone, the service's own user needs no entry.
func Clients(cfg *Config) (*api.Clients, error) {
	if len(cfg.Clients) > 0 {
		return api.NewClients(cfg.Clients)
	}
	own := os.Getuid()
	return api.NewClients([]api.Client{{Name: "own user", UID: &own, PLMNs: []string{"all"},
		Roles: []api.Role{api.RoleHSS, api.RoleAdmin, api.RoleMonitor, api.RoleMetrics}}})
}
