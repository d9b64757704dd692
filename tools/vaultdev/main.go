// Command vaultdev is Vault's server, built from its source, for tests and local work only. It is called as Vault's own
// command: vaultdev server -config=FILE. The file is JSON, with Raft storage and one TCP listener.
package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"syscall"

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
	"github.com/hashicorp/vault/vault"
)

// A configFile is the part of Vault's configuration that vaultdev knows.
type configFile struct {
	Storage struct {
		Raft map[string]string `json:"raft"`
	} `json:"storage"`
	Listener struct {
		TCP struct {
			Address    string `json:"address"`
			TLSDisable string `json:"tls_disable"`
			CertFile   string `json:"tls_cert_file"`
			KeyFile    string `json:"tls_key_file"`
			ClientCA   string `json:"tls_client_ca_file"`
		} `json:"tcp"`
	} `json:"listener"`
	APIAddr      string `json:"api_addr"`
	ClusterAddr  string `json:"cluster_addr"`
	DisableMlock bool   `json:"disable_mlock"`
	LogLevel     string `json:"log_level"`
}

func main() {
	flags := flag.NewFlagSet("vaultdev server", flag.ExitOnError)
	path := flags.String("config", "", "the configuration, JSON")
	if len(os.Args) == 2 && os.Args[1] == "--version" {
		if info, ok := debug.ReadBuildInfo(); ok {
			fmt.Println("vaultdev version", info.Main.Version, info.GoVersion)
		}
		return
	}
	if len(os.Args) < 2 || os.Args[1] != "server" {
		fmt.Fprintln(os.Stderr, "usage: vaultdev server -config=FILE")
		os.Exit(2)
	}
	flags.Parse(os.Args[2:])
	if err := run(*path); err != nil {
		fmt.Fprintln(os.Stderr, "vaultdev:", err)
		os.Exit(1)
	}
}

func run(path string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var c configFile
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return err
	}
	tcp := c.Listener.TCP
	ln, err := net.Listen("tcp", tcp.Address)
	if err != nil {
		return err
	}
	defer ln.Close()
	if tcp.CertFile != "" {
		if ln, err = withTLS(ln, tcp.CertFile, tcp.KeyFile, tcp.ClientCA); err != nil {
			return err
		}
	}
	cluster, err := url.Parse(c.ClusterAddr)
	if err != nil {
		return err
	}
	clusterAddr, err := net.ResolveTCPAddr("tcp", cluster.Host)
	if err != nil {
		return err
	}
	log := hclog.New(&hclog.LoggerOptions{Level: hclog.LevelFromString(c.LogLevel), Output: os.Stderr})
	backend, err := raft.NewRaftBackend(c.Storage.Raft, log)
	if err != nil {
		return err
	}
	core, err := vault.NewCore(&vault.CoreConfig{
		Physical: backend, HAPhysical: backend.(physical.HABackend), Logger: log, DisableMlock: c.DisableMlock,
		BuiltinRegistry: builtin, LogicalBackends: builtin[consts.PluginTypeSecrets],
		CredentialBackends: builtin[consts.PluginTypeCredential],
		AuditBackends:      map[string]audit.Factory{"file": audit.NewFileBackend},
		RedirectAddr:       c.APIAddr, ClusterAddr: c.ClusterAddr,
	})
	if err != nil {
		return err
	}
	handler := vaulthttp.Handler.Handler(&vault.HandlerProperties{Core: core, ListenerConfig: &configutil.Listener{}})
	core.SetClusterListenerAddrs([]*net.TCPAddr{clusterAddr})
	core.SetClusterHandler(handler)
	server := &http.Server{Handler: handler}
	served := make(chan error, 1)
	go func() { served <- server.Serve(ln) }()
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
	config := &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12,
		NextProtos: []string{"h2", "http/1.1"}}
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

// A registry has the plug-ins that are built in.
type registry map[consts.PluginType]map[string]logical.Factory

var builtin = registry{
	consts.PluginTypeSecrets:    {"kv": kv.Factory},
	consts.PluginTypeCredential: {"approle": approle.Factory, "cert": cert.Factory},
}

func (r registry) Contains(name string, t consts.PluginType) bool { return r[t][name] != nil }

func (r registry) Get(name string, t consts.PluginType) (func() (any, error), bool) {
	factory, ok := r[t][name]
	return func() (any, error) { return factory, nil }, ok
}

func (r registry) Keys(t consts.PluginType) []string { return slices.Collect(maps.Keys(r[t])) }

func (r registry) DeprecationStatus(name string, t consts.PluginType) (consts.DeprecationStatus, bool) {
	if r.Contains(name, t) {
		return consts.Supported, true
	}
	return consts.Unknown, false
}

func (registry) IsBuiltinEntPlugin(string, consts.PluginType) bool { return false }
