package settings

import (
	"context"
	"crypto/x509"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/directories"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/n5geir"
	"github.com/kmehsm/kmehsm/internal/webhook"
)

const (
	MaxDrain    = 30 * time.Second // for the calls under way, after drain_delay
	StopTimeout = 45 * time.Second // TimeoutStopSec of keysvc.service
)

// Check finds all that is wrong with a configuration, and with its store's schema, without a look into the token or a
// directory. It changes nothing. running says that a service may be using its addresses. If one serves the socket, that
// is noticed without running.
func Check(ctx context.Context, from Source, running bool) *config.Report {
	cfg, r := Read(from)
	cfg.Inspect(r)
	if r.Good(cfg.storeSetting()) {
		cfg.lookAtStore(ctx, r)
	}
	if r.Good("drain_delay") && cfg.DrainDelay+MaxDrain >= StopTimeout {
		r.Warn("drain_delay", fmt.Sprintf("%s and up to %s for the calls under way: keysvc.service kills after %s",
			cfg.DrainDelay, MaxDrain, StopTimeout), fmt.Sprintf("choose less than %s, or set a longer "+
			"TimeoutStopSec (systemctl edit keysvc)", StopTimeout-MaxDrain))
	}
	if running {
		return r
	}
	if pid := servedByKeysvc(cfg.Socket); pid != 0 {
		r.Warn("socket", fmt.Sprintf("a keysvc runs, as process %d, and serves %s", pid, cfg.Socket),
			"its addresses were not checked; keysvc check --running does not look at them either")
	} else {
		cfg.addresses(r)
	}
	return r
}

// servedByKeysvc is the process that serves a socket, if it is a keysvc; else 0.
func servedByKeysvc(socket string) (pid int) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return 0
	}
	defer c.Close()
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0
	}
	raw.Control(func(fd uintptr) {
		if peer, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(peer.Pid)
		}
	})
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil || strings.TrimSpace(string(name)) != "keysvc" {
		return 0
	}
	return pid
}

// Inspect reports what is wrong with the files that the configuration names.
func (c *Config) Inspect(r *config.Report) {
	tls := c.TLS
	served := c.Listen != "" || c.EIR.Listen != "" || c.OperatorPage.Listen != ""
	if served && c.hasTLS() {
		r.ServerTLS(tls.Certificate, tls.Key, tls.ClientCA)
		if own, err := config.ReadCertificates(tls.Certificate); err == nil && c.EIR.NRF != "" {
			r.Purpose("tls.certificate", "the certificate for the NRF "+tls.Certificate, own[0],
				x509.ExtKeyUsageClientAuth)
		}
	}
	if c.EIR.TokenKey != "" {
		if keys := r.File("eir.token_key", "the NRF's keys", c.EIR.TokenKey); keys != nil {
			if _, err := n5geir.ParseTokens(keys, c.EIR.Instance); err != nil {
				r.Add("eir.token_key", err.Error(), "")
			}
		}
	}
	if c.EIR.NRFCA != "" {
		r.Authority("eir.nrf_ca", "the NRF's CA", c.EIR.NRFCA)
	}
	for _, uri := range c.Tokens {
		r.PIN(c.tokenSetting(), uri)
	}
	if c.Vault.SecretIDFile != "" {
		r.Secret("vault.secret_id_file", "the AppRole's secret id", c.Vault.SecretIDFile)
	}
	if w := c.Equipment.Webhook; w.SecretFile != "" {
		secret := r.Secret("equipment.webhook.secret_file", "the webhook's secret", w.SecretFile)
		if _, err := webhook.ParseSecret(string(secret)); err != nil && secret != nil {
			r.Add("equipment.webhook.secret_file", fmt.Sprintf("%s: %v", w.SecretFile, err), "")
		}
	}
	if w := c.Equipment.Webhook; w.CA != "" {
		r.Authority("equipment.webhook.ca", "the webhook's CA", w.CA)
	}
	if info, err := os.Stat(c.State); err == nil && !info.IsDir() {
		r.Add("state", c.State+" is a file", "name the folder that keysvc init has made")
	}
	if c.AuditLog != "" && durable.CanMkdir(c.AuditLog) != nil {
		r.Folder("audit_log", "the folder of the audit log", c.AuditLog, "mount it, make it, or name another")
	}
	directories.Inspect(r, c.Directory)
	if path, ok := strings.CutPrefix(c.Store, "sqlite:"); ok && r.Good(c.storeSetting()) {
		r.Parent(c.storeSetting(), "the database", path)
	}
	if u, err := url.Parse(c.Store); err == nil && u.User != nil && r.Path != "" {
		if _, has := u.User.Password(); has {
			r.Secret("store", "the configuration, with the store's password in it,", r.Path)
		}
	}
	if c.Socket != "" {
		r.Made("socket", "the folder of the socket", filepath.Dir(c.Socket))
		if info, err := os.Lstat(c.Socket); err == nil && info.Mode()&os.ModeSocket == 0 {
			r.Add("socket", c.Socket+" is there, and no socket", "move it away, or choose another path")
		}
	}
}

// storePatience is for how long Check waits for a store.
const storePatience = 10 * time.Second

// lookAtStore reports a store that is not there, or that this release cannot work with.
func (c *Config) lookAtStore(ctx context.Context, r *config.Report) {
	short, cancel := context.WithTimeout(ctx, storePatience)
	defer cancel()
	switch there, err := sqlstore.Look(short, c.Store); {
	case err != nil:
		r.Add(c.storeSetting(), err.Error(), "")
	case !there && sqlstore.File(c.Store) != "":
		r.Warn(c.storeSetting(), "there is no store at "+sqlstore.File(c.Store)+" yet", "run keysvc init")
	case !there:
		r.Warn("store", "the store in PostgreSQL has no tables yet", "run keysvc store upgrade")
	}
}

// addresses reports those that another process has.
func (c *Config) addresses(r *config.Report) {
	r.Addresses(c.listeners()...)
	if c.Socket != "" && r.Good("socket") {
		if err := config.SocketFree(c.Socket); err != nil {
			r.Add("socket", err.Error(), config.Running)
		}
	}
}
