package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/kmehsm/kmehsm/api"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/vaultstore"
)

const configHelp = `The configuration (a relative path in it is relative to its folder):

    token: pkcs11:token=operator?module-path=...&pin-source=file:...   # or KMEHSM_TOKEN
    tokens: [pkcs11:..., pkcs11:...]   # or several, copies of each other, which share the load and stand in for
                                       # each other
    state: /var/lib/kmehsm             # the folder of the database, as --state of the other commands
    directory: file:/srv/directory     # for manufacturers enrolled without one
    listen: 127.0.0.1:8443             # mutual TLS 1.3; with tls
    tls: {certificate: server.pem, key: server.key, client_ca: clients.pem}
    socket: /run/kmehsm/keysvc.sock    # for the clients with a uid
    clients:                           # who may call, which listen needs; without this, on the socket alone, the
                                       # service's own user, for all but kme-export
      - {name: hss-1, san: hss-1.example, roles: [hss], plmns: ["00101"]}   # san: a DNS name or URI of its certificate
                                       # rate: 500 for at most so many calls a second
      - {name: ops, uid: 1000, roles: [admin], plmns: [all]}   # roles: hss, admin, monitor (sees bindings), metrics
                                       # (reads GET /metrics), kme-export; an IMSI is of the longest PLMN that is
                                       # named anywhere here
                                       # provision_from: [home]: origins that may provision: home (names of the IMSI's
                                       # own PLMN, mme.epc.mnc001.mcc001.3gppnetwork.org), any, "26202" (that
                                       # PLMN's), names of hosts, "*.example.net"
    store: postgres://keysvc@db/keysvc?sslmode=verify-full   # for several instances; its password: PGPASSFILE
                                       # (default: SQLite in the state folder)
    attempt_ttl: 5m                    # how long a device has for EstablishKME after PrepareVector
    pending_ttl: 1h                    # how long a device has to show its KME after EstablishKME
    pending_vectors: 3                 # how many PrepareVectors it may take for that
    revocation_ttl: 1m                 # after which a list of revoked devices is read again, in the background
    max_revocation_age: 0s             # of a list that cannot be read again, or is past its next_update: beyond it, the
                                       # devices of its lot are not served, bound or not (0s: the last list stands)
    calls: 128                         # that are at the HSM or wait for it; more are refused, but not those of a
                                       # client that has less than its share (default: 32 for each session)
    imei_rate: 10                      # payloads a second of one IMSI, accepted ones of one IMEI; imei_burst: 1000
                                       # at once; more are refused
    verify: token                      # or software, where the doctor says that the token cannot validate KME_SIG
    hsm_timeout: 5s                    # after which a call that hangs in the token's module is given up
    cache_mb: 64                       # memory for cached public keys
    vault: {role_id: ID, secret_id_file: FILE, secret_id_wrapped: false}   # for directories in Vault, or {cert_role: ROLE}
    otlp: http://127.0.0.1:4318        # a collector of OpenTelemetry traces (default: none)
    log_identities: plain              # or hashed: IMSI and IMEI as HMACs under log.key in the state folder, the
                                       # same for the same
    log_level: info                    # debug, info, warn or error`

type config struct {
	Token     string   `yaml:"token"`
	Tokens    []string `yaml:"tokens"`
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
	PendingLimit     int           `yaml:"pending_vectors"`
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

// maxSocket is the longest path that Linux takes for a Unix socket (unix(7)).
const maxSocket = 107

// allowed says what a setting may be, where it is not all that its type has.
var allowed = map[string]string{
	"listen":             "HOST:PORT",
	"socket":             fmt.Sprintf("a path of %d bytes at most", maxSocket),
	"directory":          "file:DIR or vault:MOUNT",
	"store":              "sqlite:PATH or postgres://USER@HOST/DATABASE",
	"attempt_ttl":        "a time above zero, such as 5m",
	"pending_ttl":        "a time above zero, such as 1h",
	"pending_vectors":    "a whole number above zero",
	"revocation_ttl":     "a time above zero, such as 1m",
	"max_revocation_age": "0s, or a time of more than twice revocation_ttl, such as 72h",
	"hsm_timeout":        "a time above zero, such as 5s",
	"verify":             "token or software",
	"calls":              "a whole number, or 0 for 32 of each session",
	"imei_rate":          "a number above zero",
	"imei_burst":         "a whole number above zero",
	"cache_mb":           "a whole number from 1 to 1048576",
	"log_level":          "debug, info, warn or error",
	"otlp":               "http://HOST:PORT or https://HOST:PORT",
	"log_identities":     "plain or hashed",
}

// kinds says what a setting of a type may be.
var kinds = map[reflect.Kind]string{
	reflect.String: "a text", reflect.Bool: "true or false", reflect.Float64: "a number", reflect.Slice: "a list of texts",
	reflect.Pointer: "a whole number", // a uid
}

// secret are the settings whose value may have a password or a PIN in it.
var secret = []string{"store", "token", "tokens", "otlp"}

func notAllowed(name, want, value string) error {
	if want = cmp.Or(allowed[name], want); slices.Contains(secret, name) {
		return fmt.Errorf("%s is %s, not what is there", name, want)
	}
	return fmt.Errorf("%s is %s, not %q", name, want, value)
}

// decode reads the settings of a mapping into a struct. Yaml's own errors have a line, and not the setting.
func decode(prefix string, n *yaml.Node, to reflect.Value) error {
	if n.Kind != yaml.MappingNode {
		return fmt.Errorf("line %d: %s has settings in it: key: value", n.Line, cmp.Or(prefix, "the configuration"))
	}
	seen := map[string]bool{}
	for i := 0; i < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		name := key.Value
		if prefix != "" {
			name = prefix + "." + name
		}
		at := slices.IndexFunc(reflect.VisibleFields(to.Type()), func(f reflect.StructField) bool {
			return f.IsExported() && f.Tag.Get("yaml") == key.Value
		})
		switch {
		case at < 0:
			return fmt.Errorf("line %d: there is no setting %s: see keysvc serve --help", key.Line, name)
		case seen[name]:
			return fmt.Errorf("line %d: %s is there twice", key.Line, name)
		}
		seen[name] = true
		if err := decodeValue(name, value, to.Field(at)); err != nil {
			return err
		}
	}
	return nil
}

func decodeValue(name string, n *yaml.Node, to reflect.Value) error {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	switch {
	case to.Kind() == reflect.Struct:
		return decode(name, n, to)
	case to.Kind() == reflect.Slice && to.Type().Elem().Kind() == reflect.Struct && n.Kind == yaml.SequenceNode:
		to.Set(reflect.MakeSlice(to.Type(), len(n.Content), len(n.Content)))
		for i, e := range n.Content {
			if err := decodeValue(fmt.Sprintf("%s[%d]", name, i), e, to.Index(i)); err != nil {
				return err
			}
		}
		return nil
	}
	// Yaml cuts a fraction off.
	fraction := n.ShortTag() == "!!float" && to.Kind() != reflect.Float64 && to.Kind() != reflect.String
	if fraction || n.Decode(to.Addr().Interface()) != nil {
		value := n.Value
		if n.Kind != yaml.ScalarNode {
			value = "a list or a mapping"
		}
		return fmt.Errorf("line %d: %w", n.Line, notAllowed(name, kinds[to.Kind()], value))
	}
	return nil
}

func readConfig(path string) (*config, error) {
	data, err := cmdline.ReadFile(path)
	if err != nil {
		return nil, err
	}
	times := binding.DefaultTimes()
	c := &config{
		Token: os.Getenv("KMEHSM_TOKEN"), State: "var/keysvc",
		AttemptTTL: times.Attempt, PendingTTL: times.Pending, PendingLimit: times.PendingVectors, RevocationTTL: time.Minute,
		HSMTimeout: 5 * time.Second, IMEIRate: 10, IMEIBurst: 1000, LogIdentities: "plain", Verify: "token", CacheMB: 64,
	}
	var n, more yaml.Node
	d := yaml.NewDecoder(bytes.NewReader(data))
	switch err = d.Decode(&n); {
	case errors.Is(err, io.EOF): // an empty one
		err = nil
	case err == nil && d.Decode(&more) != io.EOF:
		err = errors.New("there is a second document, after ---: put all settings into one")
	case err == nil:
		err = decode("", n.Content[0], reflect.ValueOf(c).Elem())
	}
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

func (c *config) times() binding.Times {
	return binding.Times{Attempt: c.AttemptTTL, Pending: c.PendingTTL, PendingVectors: c.PendingLimit, Now: time.Now}
}

// complete puts in what follows from other settings, the environment and the configuration's own folder.
func (c *config) complete(dir string) error {
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

func (c *config) check() error {
	_, _, listenErr := net.SplitHostPort(c.Listen)
	otlp, otlpErr := url.Parse(c.OTLP)
	otlpOK := otlpErr == nil && (otlp.Scheme == "http" || otlp.Scheme == "https") && otlp.Host != ""
	for _, s := range []struct {
		name  string
		ok    bool
		value any
	}{
		{"listen", c.Listen == "" || listenErr == nil, c.Listen},
		{"socket", len(c.Socket) <= maxSocket, c.Socket},
		{"directory", c.Directory == "" || cmdline.CheckDirectory(c.Directory) == nil, c.Directory},
		{"store", sqlstore.CheckName(c.Store) == nil, ""},
		{"attempt_ttl", c.AttemptTTL > 0, c.AttemptTTL},
		{"pending_ttl", c.PendingTTL > 0, c.PendingTTL},
		{"pending_vectors", c.PendingLimit > 0, c.PendingLimit},
		{"revocation_ttl", c.RevocationTTL > 0, c.RevocationTTL},
		{"max_revocation_age", c.MaxRevocationAge == 0 || c.MaxRevocationAge/2 > c.RevocationTTL, c.MaxRevocationAge},
		{"hsm_timeout", c.HSMTimeout > 0, c.HSMTimeout},
		{"verify", slices.Contains([]string{"token", "software"}, c.Verify), c.Verify},
		{"calls", c.Calls >= 0, c.Calls},
		{"imei_rate", c.IMEIRate > 0 && c.IMEIRate <= math.MaxFloat64, c.IMEIRate},
		{"imei_burst", c.IMEIBurst > 0, c.IMEIBurst},
		{"cache_mb", c.CacheMB > 0 && c.CacheMB <= 1<<20, c.CacheMB},
		{"otlp", c.OTLP == "" || otlpOK, c.OTLP},
		{"log_identities", slices.Contains([]string{"plain", "hashed"}, c.LogIdentities), c.LogIdentities},
	} {
		if !s.ok {
			return notAllowed(s.name, "", fmt.Sprint(s.value))
		}
	}
	switch {
	case c.Listen == "" && c.Socket == "":
		return errors.New("neither listen nor socket says where to serve")
	case c.Listen != "" && (c.TLS.Certificate == "" || c.TLS.Key == "" || c.TLS.ClientCA == ""):
		return errors.New("listen needs tls with certificate, key and client_ca: it is never offered without mutual TLS")
	case c.Listen != "" && len(c.Clients) == 0:
		return errors.New(`listen needs clients, who may call: clients: [{name: hss-1, san: hss-1.example, roles: [hss], ` +
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
func (c *config) login() vaultstore.Login {
	return vaultstore.Login{
		RoleID: c.Vault.RoleID, SecretIDFile: c.Vault.SecretIDFile, Wrapped: c.Vault.SecretIDWrapped,
		CertRole: c.Vault.CertRole, Wait: true,
	}
}
