// Command vaultrun starts a Vault server for tests and local work, initialises it once, and unseals it with a key that it
// keeps beside the data: nothing of worth may depend on such a server.
//
// The server is the vault or bao on PATH, else bin/vaultdev, Vault built from its source. vaultrun becomes it, so that
// who stops or kills this process stops or kills the server. The first line on standard output, once the server takes
// requests, is its address as JSON.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/hashicorp/vault/api"
)

type options struct {
	Listen, Dir, Certificate, Key, ClientCA, Level, Join string

	Sealed bool
}

func main() {
	var o options
	flag.StringVar(&o.Listen, "listen", "127.0.0.1:8200", "where to serve; port 0 for a free one")
	flag.StringVar(&o.Dir, "dir", "var/vault", "Raft data, and init.json with root token and unseal key")
	flag.StringVar(&o.Certificate, "tls-cert", "", "serve TLS with this certificate")
	flag.StringVar(&o.Key, "tls-key", "", "the certificate's key")
	flag.StringVar(&o.ClientCA, "tls-client-ca", "", "ask clients for certificates of this CA")
	flag.StringVar(&o.Level, "log-level", "warn", "trace, debug, info, warn or error")
	flag.StringVar(&o.Join, "join", "", "join the cluster of the server whose init.json this is")
	flag.BoolVar(&o.Sealed, "sealed", false, "stay sealed")
	flag.Parse()
	err := errors.New("vaultrun takes no arguments, only flags")
	if address := os.Getenv("VAULTRUN_OPEN"); address != "" {
		err = open(address, o)
	} else if flag.NArg() == 0 {
		err = become(o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "vaultrun:", err)
		os.Exit(1)
	}
}

// find is the server's program and whether it is ours.
func find() (string, error) {
	for _, name := range []string{"vault", "bao"} {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	path := filepath.Join(filepath.Dir(self), "vaultdev")
	if _, err := os.Stat(path); err != nil {
		return "", errors.New("there is no vault and no bao on PATH, and no bin/vaultdev: run make vaultdev")
	}
	return path, nil
}

// become writes the server's configuration, leaves a child that opens the server, and turns into the server.
func become(o options) error {
	program, err := find()
	if err != nil {
		return err
	}
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(o.Dir, "raft"), 0o700); err != nil {
		return err
	}
	listen, err := freePort(o.Listen)
	if err != nil {
		return err
	}
	cluster, err := freePort("127.0.0.1:0")
	if err != nil {
		return err
	}
	address := "http://" + listen
	listener := map[string]any{"address": listen, "tls_disable": "true"}
	if o.Certificate != "" {
		address = "https://" + listen
		listener = map[string]any{"address": listen, "tls_cert_file": o.Certificate, "tls_key_file": o.Key}
		if o.ClientCA != "" {
			listener["tls_client_ca_file"] = o.ClientCA
		}
	}
	config, err := json.Marshal(map[string]any{
		"storage":      map[string]any{"raft": map[string]any{"path": filepath.Join(o.Dir, "raft"), "node_id": filepath.Base(o.Dir), "performance_multiplier": "1"}},
		"listener":     map[string]any{"tcp": listener},
		"api_addr":     address,
		"cluster_addr": "https://" + cluster, "disable_mlock": true, "log_level": o.Level,
	})
	if err != nil {
		return err
	}
	path := filepath.Join(o.Dir, "config.json")
	if err := os.WriteFile(path, config, 0o600); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	child := exec.Command(self, os.Args[1:]...)
	child.Stdout, child.Stderr, child.Env = os.Stdout, os.Stderr, append(os.Environ(), "VAULTRUN_OPEN="+address)
	child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM} // with the server, since this process becomes it
	if err := child.Start(); err != nil {
		return err
	}
	// The server's own greeting goes to where its log goes.
	if err := syscall.Dup3(2, 1, 0); err != nil {
		return err
	}
	return syscall.Exec(program, []string{program, "server", "-config=" + path}, os.Environ())
}

// freePort settles the port of an address.
func freePort(listen string) (string, error) {
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

type initFile struct {
	Address string `json:"address"`
	Token   string `json:"root_token"`
	Key     string `json:"unseal_key"` // hex
}

// open initialises the server once or has it join, unseals it, and says when it takes requests.
func open(address string, o options) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	config := api.DefaultConfig()
	config.Address, config.MaxRetries = address, 0
	if o.Certificate != "" {
		if err := config.ConfigureTLS(&api.TLSConfig{CACert: o.Certificate}); err != nil {
			return err
		}
	}
	client, err := api.NewClient(config)
	if err != nil {
		return err
	}
	client.ClearToken()
	await := func(ok func(*api.HealthResponse) bool) error {
		for {
			health, err := client.Sys().HealthWithContext(ctx)
			if err == nil && ok(health) {
				return nil
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("the server at %s does not open: %w", address, errors.Join(ctx.Err(), err))
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	if err := await(func(*api.HealthResponse) bool { return true }); err != nil {
		return err
	}
	if !o.Sealed {
		if err := unseal(ctx, client, address, o); err != nil {
			return err
		}
		if err := await(func(h *api.HealthResponse) bool { return !h.Sealed && (!h.Standby || o.Join != "") }); err != nil {
			return err
		}
	}
	fmt.Printf("{\"address\":%q}\n", address)
	return nil
}

func unseal(ctx context.Context, client *api.Client, address string, o options) error {
	var file initFile
	path := filepath.Join(o.Dir, "init.json")
	initialized, err := client.Sys().InitStatusWithContext(ctx)
	if err != nil {
		return err
	}
	switch {
	case initialized:
		file, err = readInit(path)
	case o.Join != "":
		var leader initFile
		if leader, err = readInit(o.Join); err != nil {
			return err
		}
		file.Token, file.Key = leader.Token, leader.Key
		_, err = client.Sys().RaftJoinWithContext(ctx, &api.RaftJoinRequest{LeaderAPIAddr: leader.Address})
	default:
		var made *api.InitResponse
		if made, err = client.Sys().InitWithContext(ctx, &api.InitRequest{SecretShares: 1, SecretThreshold: 1}); err == nil {
			file.Token, file.Key = made.RootToken, made.Keys[0]
		}
	}
	if err != nil {
		return err
	}
	file.Address = address
	data, err := json.Marshal(file)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		return err
	}
	_, err = client.Sys().UnsealWithContext(ctx, file.Key)
	return err
}

func readInit(path string) (file initFile, err error) {
	data, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(data, &file)
	}
	return file, err
}
