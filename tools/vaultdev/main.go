// Command vaultdev is a real Vault server for tests and local work: one node, unsealed with a key that it keeps beside its
// data. It is built from Vault's own source, and is for nothing that anything of worth depends on.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	kv "github.com/hashicorp/vault-plugin-secrets-kv"
	"github.com/hashicorp/vault/audit"
	"github.com/hashicorp/vault/builtin/credential/approle"
	"github.com/hashicorp/vault/builtin/credential/cert"
	vaulthttp "github.com/hashicorp/vault/http"
	"github.com/hashicorp/vault/internalshared/configutil"
	"github.com/hashicorp/vault/physical/raft"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/physical"
	"github.com/hashicorp/vault/sdk/physical/inmem"
	"github.com/hashicorp/vault/vault"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:8200", "where to serve; port 0 for a free one")
	dir := flag.String("dir", "var/vault", "data, init.json with root token and unseal key, and audit.log")
	storage := flag.String("storage", "raft", "raft, or inmem to forget everything at the end")
	certFile := flag.String("tls-cert", "", "serve TLS with this certificate")
	keyFile := flag.String("tls-key", "", "the certificate's key")
	clientCA := flag.String("tls-client-ca", "", "ask clients for certificates of this CA")
	sealed := flag.Bool("sealed", false, "stay sealed")
	level := flag.String("log-level", "warn", "trace, debug, info, warn or error")
	flag.Parse()
	if err := run(*listen, *dir, *storage, *certFile, *keyFile, *clientCA, *level, *sealed); err != nil {
		fmt.Fprintln(os.Stderr, "vaultdev:", err)
		os.Exit(1)
	}
}

func run(listen, dir, storage, certFile, keyFile, clientCA, level string, sealed bool) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, "raft"), 0o700); err != nil {
		return err
	}
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	defer ln.Close()
	address := "http://" + ln.Addr().String()
	if certFile != "" {
		address = "https://" + ln.Addr().String()
		if ln, err = withTLS(ln, certFile, keyFile, clientCA); err != nil {
			return err
		}
	}

	log := hclog.New(&hclog.LoggerOptions{Level: hclog.LevelFromString(level), Output: os.Stderr})
	var backend physical.Backend
	if storage == "raft" {
		backend, err = raft.NewRaftBackend(map[string]string{"path": filepath.Join(dir, "raft"), "node_id": "vaultdev", "performance_multiplier": "1"}, log)
	} else {
		backend, err = inmem.NewInmem(nil, log)
	}
	if err != nil {
		return err
	}
	// Raft wants a listener for its peers, though there are none.
	peers, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	clusterAddr := peers.Addr().(*net.TCPAddr)
	peers.Close()
	config := &vault.CoreConfig{
		Physical: backend, Logger: log, DisableMlock: true, BuiltinRegistry: registry{},
		LogicalBackends:    map[string]logical.Factory{"kv": kv.Factory},
		CredentialBackends: map[string]logical.Factory{"approle": approle.Factory, "cert": cert.Factory},
		AuditBackends:      map[string]audit.Factory{"file": audit.NewFileBackend},
		RedirectAddr:       address, ClusterAddr: "https://" + clusterAddr.String(),
	}
	if ha, ok := backend.(physical.HABackend); ok {
		config.HAPhysical = ha
	}
	core, err := vault.NewCore(config)
	if err != nil {
		return err
	}
	handler := vaulthttp.Handler.Handler(&vault.HandlerProperties{Core: core, ListenerConfig: &configutil.Listener{}})
	core.SetClusterListenerAddrs([]*net.TCPAddr{clusterAddr})
	core.SetClusterHandler(handler)
	server := &http.Server{Handler: handler}
	served := make(chan error, 1)
	go func() { served <- server.Serve(ln) }()
	if !sealed {
		if err := open(ctx, core, filepath.Join(dir, "init.json"), address); err != nil {
			return err
		}
	}
	fmt.Printf("{\"address\":%q}\n", address)
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	server.Close()
	return core.ShutdownWait()
}

func withTLS(ln net.Listener, certFile, keyFile, clientCA string) (net.Listener, error) {
	certificate, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}}
	if clientCA != "" {
		pem, err := os.ReadFile(clientCA)
		if err != nil {
			return nil, err
		}
		config.ClientCAs, config.ClientAuth = x509.NewCertPool(), tls.RequestClientCert
		config.ClientCAs.AppendCertsFromPEM(pem)
	}
	return tls.NewListener(ln, config), nil
}

type initFile struct {
	Address string `json:"address"`
	Token   string `json:"root_token"`
	Key     string `json:"unseal_key"` // hex
}

// open initialises the server once, and unseals it.
func open(ctx context.Context, core *vault.Core, path, address string) error {
	var file initFile
	initialized, err := core.Initialized(ctx)
	if err != nil {
		return err
	}
	if initialized {
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(data, &file); err != nil {
			return err
		}
	} else {
		one := &vault.SealConfig{SecretShares: 1, SecretThreshold: 1}
		result, err := core.Initialize(ctx, &vault.InitParams{BarrierConfig: one})
		if err != nil {
			return err
		}
		file.Token, file.Key = result.RootToken, hex.EncodeToString(result.SecretShares[0])
	}
	file.Address = address
	data, err := json.Marshal(file)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		return err
	}
	key, err := hex.DecodeString(file.Key)
	if err != nil {
		return err
	}
	if ok, err := core.Unseal(key); err != nil || !ok {
		return errors.Join(err, errors.New("the server stays sealed"))
	}
	// A node alone still has to elect itself.
	for standby := true; standby; {
		if standby, err = core.Standby(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil
}

// registry says which plug-ins are built in: those that run gives the core.
type registry struct{}

var builtin = map[string]consts.PluginType{"kv": consts.PluginTypeSecrets, "approle": consts.PluginTypeCredential, "cert": consts.PluginTypeCredential}

var factories = map[string]logical.Factory{"kv": kv.Factory, "approle": approle.Factory, "cert": cert.Factory}

func (registry) Contains(name string, t consts.PluginType) bool {
	have, ok := builtin[name]
	return ok && have == t
}

func (r registry) Get(name string, t consts.PluginType) (func() (any, error), bool) {
	if !r.Contains(name, t) {
		return nil, false
	}
	return func() (any, error) { return factories[name], nil }, true
}

func (registry) Keys(t consts.PluginType) (names []string) {
	for name, have := range builtin {
		if have == t {
			names = append(names, name)
		}
	}
	return names
}

func (r registry) DeprecationStatus(name string, t consts.PluginType) (consts.DeprecationStatus, bool) {
	if r.Contains(name, t) {
		return consts.Supported, true
	}
	return consts.Unknown, false
}

func (registry) IsBuiltinEntPlugin(string, consts.PluginType) bool { return false }
