// Command vaultrun starts a Vault server for tests and local work, initialises it once, and unseals it. It keeps the
// unseal key beside the data, so such a server must hold nothing of value.
//
// The server is the vault or bao on PATH, or else bin/vaultdev, which is Vault built from its source. It ends with this
// process, also if this process is killed; and this process ends with the server. When the server takes requests,
// vaultrun prints a line of JSON with its address and process id.
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
	"runtime"
	"strconv"
	"syscall"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/kmehsm/kmehsm/internal/freeport"
	"github.com/kmehsm/kmehsm/internal/version"
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
	ask := flag.Bool("version", false, "print tag, commit and Go's version")
	flag.Parse()
	if *ask {
		fmt.Println("vaultrun version", version.Text())
		return
	}
	err := errors.New("vaultrun takes no arguments, only flags")
	if flag.NArg() == 0 {
		err = run(o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "vaultrun:", err)
		os.Exit(1)
	}
}

// find gives the path of the server's program.
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

// configure writes the server's configuration, and gives its file and the server's address.
func configure(o options) (path, address string, err error) {
	if err := os.MkdirAll(filepath.Join(o.Dir, "raft"), 0o700); err != nil {
		return "", "", err
	}
	listen, err := settled(o.Listen)
	if err != nil {
		return "", "", err
	}
	cluster, err := settled("127.0.0.1:0")
	if err != nil {
		return "", "", err
	}
	address = "http://" + listen
	listener := map[string]any{"address": listen, "tls_disable": "true"}
	if o.Certificate != "" {
		address = "https://" + listen
		listener = map[string]any{"address": listen, "tls_cert_file": o.Certificate, "tls_key_file": o.Key}
		if o.ClientCA != "" {
			listener["tls_client_ca_file"] = o.ClientCA
		}
	}
	config, err := json.Marshal(map[string]any{
		"storage": map[string]any{"raft": map[string]any{"path": filepath.Join(o.Dir, "raft"),
			"node_id": filepath.Base(o.Dir), "performance_multiplier": "1"}},
		"listener":     map[string]any{"tcp": listener},
		"api_addr":     address,
		"cluster_addr": "https://" + cluster, "disable_mlock": true, "log_level": o.Level,
	})
	if err != nil {
		return "", "", err
	}
	path = filepath.Join(o.Dir, "config.json")
	return path, address, os.WriteFile(path, config, 0o600)
}

// run runs the server until it ends, and hands on the signals that end a process.
func run(o options) error {
	program, err := find()
	if err != nil {
		return err
	}
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return err
	}
	path, address, err := configure(o)
	if err != nil {
		return err
	}
	server := exec.Command(program, "server", "-config="+path)
	server.Stdout, server.Stderr = os.Stderr, os.Stderr
	// Linux sends Pdeathsig when the thread ends that has started the child. So this thread must last as long as the
	// process.
	runtime.LockOSThread()
	server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	if err := server.Start(); err != nil {
		return err
	}
	ended, opened := make(chan error, 1), make(chan error, 1)
	go func() { ended <- server.Wait() }()
	go func() { opened <- open(address, o) }()
	for open, stopped := false, false; ; {
		select {
		case s := <-signals:
			stopped = true
			server.Process.Signal(s)
		case err := <-ended:
			if err == nil && !open && !stopped {
				err = errors.New("it says nothing of why")
			}
			if err != nil {
				err = fmt.Errorf("the server has ended, its log is above: %w", err)
			}
			return err
		case err := <-opened:
			if err != nil {
				server.Process.Kill()
				return errors.Join(err, <-ended)
			}
			open = true
			fmt.Printf("{\"address\":%q,\"pid\":%d}\n", address, server.Process.Pid)
		}
	}
}

// settled is an address with a port of its own in the place of port 0.
func settled(listen string) (string, error) {
	host, port, err := net.SplitHostPort(listen)
	if err != nil || port != "0" {
		return listen, err
	}
	free, err := freeport.On(host)
	return net.JoinHostPort(host, strconv.Itoa(free)), err
}

type initFile struct {
	Address string `json:"address"`
	Token   string `json:"root_token"`
	Key     string `json:"unseal_key"` // hex
}

// open initialises the server once or has it join, unseals it, and waits until it takes requests.
func open(address string, o options) error {
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Second) // less than the minute that a test waits
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
	if o.Sealed {
		return nil
	}
	if err := unseal(ctx, client, address, o); err != nil {
		return err
	}
	return await(func(h *api.HealthResponse) bool { return !h.Sealed && (!h.Standby || o.Join != "") })
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
		if made, err = client.Sys().InitWithContext(ctx,
			&api.InitRequest{SecretShares: 1, SecretThreshold: 1}); err == nil {
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
