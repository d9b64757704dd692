package keysvcd

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/api"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/vaultstore"
)

// A Config is a configuration file, complete and checked. What each setting means, its default and what it may be
// stand in settings.
type Config struct {
	Token     string   `yaml:"token"`
	Tokens    []string `yaml:"tokens"` // Token, where the file has none
	State     string   `yaml:"state"`
	Directory string   `yaml:"directory"`
	Listen    string   `yaml:"listen"`
	TLS       struct {
		Certificate string `yaml:"certificate"`
		Key         string `yaml:"key"`
		ClientCA    string `yaml:"client_ca"`
	} `yaml:"tls"`
	Socket           string        `yaml:"socket"`
	Clients          []api.Client  `yaml:"clients"`
	Store            string        `yaml:"store"`
	AttemptTTL       time.Duration `yaml:"attempt_ttl"`
	PendingTTL       time.Duration `yaml:"pending_ttl"`
	PendingVectors   int           `yaml:"pending_vectors"`
	RevocationTTL    time.Duration `yaml:"revocation_ttl"`
	MaxRevocationAge time.Duration `yaml:"max_revocation_age"`
	HSMTimeout       time.Duration `yaml:"hsm_timeout"`
	Verify           string        `yaml:"verify"`
	Calls            int           `yaml:"calls"`
	IMEIRate         float64       `yaml:"imei_rate"`
	IMEIBurst        int           `yaml:"imei_burst"`
	CacheMB          int64         `yaml:"cache_mb"`
	LogLevel         slog.Level    `yaml:"log_level"`
	OTLP             string        `yaml:"otlp"`
	LogIdentities    string        `yaml:"log_identities"`
	Vault            struct {
		RoleID          string `yaml:"role_id"`
		SecretIDFile    string `yaml:"secret_id_file"`
		SecretIDWrapped bool   `yaml:"secret_id_wrapped"`
		CertRole        string `yaml:"cert_role"`
	} `yaml:"vault"`
}

// A setting documents a field of Config, and says what it may be.
type setting struct {
	name    string // as in the file
	def     string // the default, in YAML; empty: the zero value
	example string // in the place of the default in the help
	help    string
	rule    string               // what it may be, where that is not all that its type has
	ok      func(c *Config) bool // says whether it keeps to the rule
	secret  bool                 // its value may have a password or a PIN in it: no error shows it
}

// maxSocket is the longest path that Linux takes for a Unix socket (unix(7)).
const maxSocket = 107

var times = binding.DefaultTimes()

// settings are in the order of the help. Those that belong to a setting above are indented: api.NewClients and
// vaultstore.Login check them.
var settings = []setting{
	{name: "token", example: "pkcs11:token=operator?module-path=...&pin-source=file:...", secret: true,
		help: "or KMEHSM_TOKEN"},
	{name: "tokens", example: "[pkcs11:..., pkcs11:...]", secret: true,
		help: "or several, copies of each other, which share the load and stand in for each other"},
	{name: "state", def: "var/keysvc", example: "/var/lib/kmehsm",
		help: "the folder of the database, as --state of the other commands"},
	{name: "directory", example: "file:/srv/directory", help: "for manufacturers enrolled without one",
		rule: "file:DIR or vault:MOUNT",
		ok:   func(c *Config) bool { return c.Directory == "" || cmdline.CheckDirectory(c.Directory) == nil }},
	{name: "listen", example: "127.0.0.1:8443", help: "mutual TLS 1.3; with tls",
		rule: "HOST:PORT",
		ok:   func(c *Config) bool { _, _, err := net.SplitHostPort(c.Listen); return c.Listen == "" || err == nil }},
	{name: "tls", example: "{certificate: server.pem, key: server.key, client_ca: clients.pem}"},
	{name: "socket", example: "/run/kmehsm/keysvc.sock", help: "for the clients with a uid",
		rule: fmt.Sprintf("a path of %d bytes at most", maxSocket),
		ok:   func(c *Config) bool { return len(c.Socket) <= maxSocket }},
	{name: "clients",
		help: `who may call, which listen needs; without this, on the socket alone, the service's own user, for all but
			kme-export`},
	{name: "  - name", example: "hss-1", help: "for the log"},
	{name: "    san", example: "hss-1.example", help: "a DNS name or URI of its certificate"},
	{name: "    roles", example: "[hss]",
		help: "hss, admin, monitor (sees bindings), metrics (reads GET /metrics), kme-export"},
	{name: "    plmns", example: `["00101"]`,
		help: "or [all]; an IMSI is of the longest PLMN that is named anywhere here"},
	{name: "    provision_from", example: "[home]",
		help: `origins that may provision: home (names of the IMSI's own PLMN, mme.epc.mnc001.mcc001.3gppnetwork.org),
			any, "26202" (that PLMN's), names of hosts, "*.example.net"`},
	{name: "    rate", example: "500", help: "for at most so many calls a second"},
	{name: "  - {name", example: "ops, uid: 1000, roles: [admin], plmns: [all]}",
		help: "one of the socket, by its user's number"},
	{name: "store", example: "postgres://keysvc@db/keysvc?sslmode=verify-full", secret: true,
		help: "for several instances; its password: PGPASSFILE (default: SQLite in the state folder)",
		rule: "sqlite:PATH or postgres://USER@HOST/DATABASE",
		ok:   func(c *Config) bool { return sqlstore.CheckName(c.Store) == nil }},
	{name: "attempt_ttl", def: fmt.Sprintf("%gm", times.Attempt.Minutes()),
		help: "how long a device has for EstablishKME after PrepareVector",
		rule: "a time above zero, such as 5m", ok: func(c *Config) bool { return c.AttemptTTL > 0 }},
	{name: "pending_ttl", def: fmt.Sprintf("%gh", times.Pending.Hours()),
		help: "how long a device has to show its KME after EstablishKME",
		rule: "a time above zero, such as 1h", ok: func(c *Config) bool { return c.PendingTTL > 0 }},
	{name: "pending_vectors", def: fmt.Sprint(times.PendingVectors),
		help: "how many PrepareVectors it may take for that", rule: "a whole number above zero",
		ok: func(c *Config) bool { return c.PendingVectors > 0 }},
	{name: "revocation_ttl", def: "1m", help: "after which a list of revoked devices is read again, in the background",
		rule: "a time above zero, such as 1m", ok: func(c *Config) bool { return c.RevocationTTL > 0 }},
	{name: "max_revocation_age", def: "0s",
		help: `of a list that cannot be read again, or is past its next_update: beyond it, the devices of its lot are
			not served, bound or not (0s: the last list stands)`,
		rule: "0s, or a time of more than twice revocation_ttl, such as 72h",
		ok:   func(c *Config) bool { return c.MaxRevocationAge == 0 || c.MaxRevocationAge/2 > c.RevocationTTL }},
	{name: "calls", example: "128",
		help: `that are at the HSM or wait for it; more are refused, but not those of a client that has less than its
			share (default: 32 for each session)`,
		rule: "a whole number, or 0 for 32 of each session", ok: func(c *Config) bool { return c.Calls >= 0 }},
	{name: "imei_rate", def: "10",
		help: "payloads a second of one IMSI, accepted ones of one IMEI; more are refused",
		rule: "a number above zero", ok: func(c *Config) bool {
			return c.IMEIRate > 0 && c.IMEIRate <= math.MaxFloat64
		}},
	{name: "imei_burst", def: "1000", help: "of these at once",
		rule: "a whole number above zero", ok: func(c *Config) bool { return c.IMEIBurst > 0 }},
	{name: "verify", def: "token", help: "or software, where the doctor says that the token cannot validate KME_SIG",
		rule: "token or software", ok: func(c *Config) bool { return c.Verify == "token" || c.Verify == "software" }},
	{name: "hsm_timeout", def: "5s", help: "after which a call that hangs in the token's module is given up",
		rule: "a time above zero, such as 5s", ok: func(c *Config) bool { return c.HSMTimeout > 0 }},
	{name: "cache_mb", def: "64", help: "memory for cached public keys, of all manufacturers together",
		rule: "a whole number from 1 to 1048576", ok: func(c *Config) bool {
			return c.CacheMB > 0 && c.CacheMB <= 1<<20
		}},
	{name: "vault", example: "{role_id: ID, secret_id_file: FILE, secret_id_wrapped: false}",
		help: "or cert_role: for directories in Vault"},
	{name: "otlp", example: "http://127.0.0.1:4318", secret: true,
		help: "a collector of OpenTelemetry traces (default: none)",
		rule: "http://HOST:PORT or https://HOST:PORT",
		ok: func(c *Config) bool {
			u, err := url.Parse(c.OTLP)
			return c.OTLP == "" || err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Host != ""
		}},
	{name: "log_identities", def: "plain",
		help: "or hashed: IMSI and IMEI as HMACs under log.key in the state folder, the same for the same",
		rule: "plain or hashed", ok: func(c *Config) bool {
			return c.LogIdentities == "plain" || c.LogIdentities == "hashed"
		}},
	{name: "log_level", def: "info", help: "debug, info, warn or error", rule: "debug, info, warn or error"},
}

// Help documents the settings, as a commented configuration.
func Help() string {
	const column, width = 39, 116
	var text strings.Builder
	text.WriteString("The configuration (a relative path in it is relative to its folder):\n")
	for _, s := range settings {
		line := fmt.Sprintf("    %-*s", column-7, s.name+": "+cmp.Or(s.example, s.def))
		for i, word := range strings.Fields(s.help) {
			if i == 0 {
				line += "   #"
			} else if len(line)+1+len(word) > width {
				text.WriteString("\n" + line)
				line = fmt.Sprintf("%*s#", column, "")
			}
			line += " " + word
		}
		text.WriteString("\n" + line)
	}
	return text.String()
}

// readConfig gives the configuration that a file has.
func readConfig(path string) (*Config, error) {
	data, err := cmdline.ReadFile(path)
	if err != nil {
		return nil, err
	}
	c, err := parseConfig(data)
	if err == nil {
		err = c.complete(filepath.Dir(path))
	}
	if err == nil {
		err = c.check()
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// parseConfig gives the defaults, and in their place what a document says.
func parseConfig(data []byte) (*Config, error) {
	c := &Config{Token: os.Getenv("KMEHSM_TOKEN")}
	for _, s := range settings {
		if s.def == "" {
			continue
		}
		if err := decodeDocument([]byte(s.name+": "+s.def), c); err != nil {
			return nil, err
		}
	}
	return c, decodeDocument(data, c)
}

func (c *Config) times() binding.Times {
	return binding.Times{Attempt: c.AttemptTTL, Pending: c.PendingTTL, PendingVectors: c.PendingVectors, Now: time.Now}
}

// complete puts in what follows from other settings, the environment and the configuration's own folder.
func (c *Config) complete(dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	paths := []*string{&c.State, &c.TLS.Certificate, &c.TLS.Key, &c.TLS.ClientCA, &c.Socket, &c.Vault.SecretIDFile}
	for _, p := range paths {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	if len(c.Tokens) == 0 {
		c.Tokens = []string{c.Token}
	}
	c.Store = cmp.Or(c.Store, os.Getenv("KMEHSM_STORE"), sqlstore.InFolder(c.State))
	return nil
}

// check says which setting is not what it may be.
func (c *Config) check() error {
	for _, s := range settings {
		if s.ok != nil && !s.ok(c) {
			return notAllowed(s.name, "", fmt.Sprint(fieldOf(reflect.ValueOf(c).Elem(), s.name)))
		}
	}
	switch {
	case c.Listen == "" && c.Socket == "":
		return errors.New("neither listen nor socket says where to serve")
	case c.Listen != "" && (c.TLS.Certificate == "" || c.TLS.Key == "" || c.TLS.ClientCA == ""):
		return errors.New("listen needs tls with certificate, key and client_ca: it is never offered without " +
			"mutual TLS")
	case c.Listen != "" && len(c.Clients) == 0:
		return errors.New(
			`listen needs clients, who may call: clients: [{name: hss-1, san: hss-1.example, roles: [hss], ` +
				`plmns: ["00101"]}], where san is a DNS name or URI of its certificate`)
	}
	if err := c.login().Validate(); err != nil {
		return fmt.Errorf("vault: %w", err)
	}
	if _, err := knownClients(c); err != nil {
		return fmt.Errorf("clients: %w", err)
	}
	for _, uri := range c.Tokens {
		if err := hsmkeys.CheckURI(uri); err != nil {
			return fmt.Errorf("token: %w", err)
		}
	}
	return nil
}

// login is the one to Vault.
func (c *Config) login() vaultstore.Login {
	return vaultstore.Login{
		RoleID: c.Vault.RoleID, SecretIDFile: c.Vault.SecretIDFile, Wrapped: c.Vault.SecretIDWrapped,
		CertRole: c.Vault.CertRole, Wait: true,
	}
}
