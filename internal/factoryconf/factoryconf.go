// Package factoryconf is the configuration of factory's commands.
package factoryconf

import (
	"fmt"
	"slices"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/directories"
	"github.com/kmehsm/kmehsm/kme"
)

// A Config is what flags are if they are not given. What each setting means, its default and what it may be stand in
// schema.
type Config struct {
	Token        string            `yaml:"token"`
	State        string            `yaml:"state" path:""`
	Directory    string            `yaml:"directory" path:"file:"`
	Vault        directories.Vault `yaml:"vault"`
	Manufacturer string            `yaml:"manufacturer" path:""`
	Injection    string            `yaml:"injection" path:"" flag:"injection,out"`
	Fixture      string            `yaml:"fixture"`
	Workers      int               `yaml:"workers"`
	Bits         int               `yaml:"bits"`
	Suite        string            `yaml:"suite"`
	ShardSize    int               `yaml:"shard_size"`
	Primes       string            `yaml:"primes"`
	ValidFor     time.Duration     `yaml:"valid_for"`
	Listen       string            `yaml:"listen"`
	TLS          struct {
		Certificate string `yaml:"certificate" path:""`
		Key         string `yaml:"key" path:""`
		ClientCA    string `yaml:"client_ca" path:"" flag:"client-ca"`
	} `yaml:"tls"`
	Stations []string      `yaml:"stations" flag:"station"`
	Line     string        `yaml:"line"`
	Timeout  time.Duration `yaml:"timeout"`
}

var schema = config.Schema[Config]{See: "factory check", Settings: []config.Setting[Config]{
	{Name: "token", Example: "pkcs11:token=factory?module-path=...&pin-source=file:...", Secret: true,
		Help: "or KMEHSM_TOKEN"},
	{Name: "state", Default: "var/factory", Example: "/var/lib/kmehsm-factory", Help: "the line's own folder"},
	{Name: "directory", Example: "file:/srv/directory", Help: "the public-key directory",
		Rule: "file:DIR or vault:MOUNT",
		OK:   func(c *Config) bool { return directories.Check(c.Directory) == nil }},
	{Name: "vault", Example: "{role_id: ID, secret_id_file: FILE, secret_id_wrapped: false}",
		Help: "or cert_role: for a directory in Vault"},
	{Name: "manufacturer", Example: "manufacturer.pem",
		Help: "the manufacturer's public key (default: manufacturer.pem in the state folder)"},
	{Name: "injection", Example: "/srv/injection",
		Help: "the folder of the injection packages (default: injection in the state folder)"},
	{Name: "fixture", Example: "f1", Help: "that packages are for (default: the one that is enrolled)",
		Rule: "a name of letters, digits, dots and dashes",
		OK:   func(c *Config) bool { return directory.CheckName(c.Fixture) == nil }},
	{Name: "workers", Example: "8", Help: "shards in work at once (default: twice the sessions of the token)",
		Rule: "a whole number above zero", OK: func(c *Config) bool { return c.Workers > 0 }},
	{Name: "bits", Example: "3072", Help: "of a new lot's modulus",
		Rule: "2048, 3072 or 4096", OK: func(c *Config) bool {
			return slices.Contains([]int{2048, 3072, 4096}, c.Bits)
		}},
	{Name: "suite", Example: string(kme.SuiteECDSA), Help: "of a new lot: how its devices sign",
		Rule: "tr33868-ecdsa-p256, tr33868-rsa2048 or bound-ecdsa-p256-oaep",
		OK: func(c *Config) bool {
			_, err := kme.ParseSuite(c.Suite)
			return err == nil
		}},
	{Name: "shard_size", Example: "256", Help: "of a new lot: devices in an injection package",
		Rule: "a whole number from 1 to 1024",
		OK:   func(c *Config) bool { return c.ShardSize >= 1 && c.ShardSize <= 1024 }},
	{Name: "primes", Example: "auto", Help: "of a new lot", Rule: "auto or x931", OK: func(c *Config) bool {
		_, err := factory.ParsePrimes(c.Primes)
		return err == nil
	}},
	{Name: "valid_for", Example: directory.DefaultValidity.String(),
		Help: "for how long a list of revoked devices of a new lot is good",
		Rule: "a time, such as 720h",
		OK:   func(c *Config) bool { return directory.CheckValidity(c.ValidFor) == nil }},
	{Name: "listen", Example: "0.0.0.0:8444", Help: "where factory station serve serves, with tls",
		Rule: "HOST:PORT, with a port from 0 to 65535",
		OK:   func(c *Config) bool { return config.IsAddress(c.Listen) }},
	{Name: "tls", Example: "{certificate: server.pem, key: server.key, client_ca: stations.pem}"},
	{Name: "stations", Example: "[station-1, station-2]", Help: "by the common names of their certificates"},
	{Name: "line", Example: "hall 3, line 2", Help: "its name on the wall screen (default: the machine's)"},
	{Name: "timeout", Example: "10m", Help: "after which a device that its station did not report is overdue",
		Rule: "a time of a second at least, such as 10m",
		OK:   func(c *Config) bool { return c.Timeout >= time.Second }},
}}

// Help documents the settings, as a commented configuration.
func Help() string { return schema.Help() }

// Read gives the settings of a file, and what is wrong with them without a look at anything else.
func Read(path string, given config.Given) (*Config, *config.Report) {
	c, r := schema.Read(path, given)
	if err := c.Vault.Login().Validate(); err != nil {
		r.Add("vault", err.Error(), "")
	}
	for _, name := range c.Stations {
		if err := directory.CheckName(name); err != nil {
			r.Add("stations", err.Error(), "")
		}
	}
	return c, r
}

// Check finds all that is wrong with a configuration, without a look into the token or the directory. running says that
// factory station serve may have its address already.
func Check(path string, given config.Given, running bool) *config.Report {
	c, r := Read(path, given)
	if c.Token == "" {
		r.Warn("token", "there is no token", "put it here, or into KMEHSM_TOKEN, or give --token to each command")
	} else if r.Good("token") {
		r.Token("token", c.Token)
		r.PIN("token", c.Token)
	}
	state := factory.State{Dir: c.State}
	r.Folder("state", "the line's folder", state.Dir, "run factory init, or name another")
	if c.Manufacturer != "" {
		key := r.File("manufacturer", "the manufacturer's public key", c.Manufacturer)
		if _, err := directory.ParseVerifier(key); err != nil && key != nil {
			r.Add("manufacturer", fmt.Sprintf("%s: %v", c.Manufacturer, err), "factory init writes it")
		}
	}
	if c.Injection != "" {
		r.Made("injection", "the folder of the injection packages", c.Injection)
	}
	directories.Inspect(r, c.Directory)
	if c.Vault.SecretIDFile != "" {
		r.Secret("vault.secret_id_file", "the AppRole's secret id", c.Vault.SecretIDFile)
	}
	if c.Listen == "" {
		return r
	}
	switch tls := c.TLS; {
	case !r.Good("tls"):
	case tls.Certificate == "" || tls.Key == "" || tls.ClientCA == "":
		r.Add("tls", "listen needs tls with certificate, key and client_ca", "stations are served by mutual TLS alone")
	default:
		r.ServerTLS(tls.Certificate, tls.Key, tls.ClientCA)
	}
	if !running {
		r.Addresses(config.Address{Setting: "listen", At: c.Listen})
	}
	return r
}
