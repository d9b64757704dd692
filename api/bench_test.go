package api_test

import (
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kmehsm/kmehsm/api"
	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/internal/certtest"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// A boundStore has every IMSI bound, and asks no database.
type boundStore struct{ binding.Store }

func (boundStore) Subscription(_ context.Context, imsi kme.IMSI, _ time.Time) (*binding.Subscription, error) {
	return &binding.Subscription{Active: &binding.Binding{IMSI: imsi, Lot: "L1", State: "ACTIVE"}}, nil
}

const benchFolder = "KMEHSM_BENCH_FOLDER"

// TestServeForBenchmark is the server of BenchmarkCalls, in a process of its own, until its input ends.
func TestServeForBenchmark(t *testing.T) {
	dir := os.Getenv(benchFolder)
	if dir == "" {
		t.Skip("only for BenchmarkCalls")
	}
	certificate := func(name string) string { return filepath.Join(dir, name) }
	config, err := config.ServerTLS(certificate("127.0.0.1.pem"), certificate("127.0.0.1.key"),
		certificate("ca.pem"), tls.RequireAndVerifyClientCert)
	if err != nil {
		t.Fatal(err)
	}
	clients, err := api.NewClients([]api.Client{{Name: "hss", SAN: "hss.example", Roles: []api.Role{api.RoleHSS},
		PLMNs: []string{"00101"}}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	service := binding.NewService(binding.Options{Store: boundStore{}, Times: binding.DefaultTimes(),
		Log: slog.New(slog.DiscardHandler)})
	server := &http.Server{ConnContext: api.ConnContext, TLSConfig: config, Handler: api.NewHandler(api.Options{
		Service: service, Clients: clients, Metrics: binding.NewMetrics(prometheus.NewRegistry()),
		Gather: http.NotFoundHandler()})}
	os.Stdout.WriteString(l.Addr().String() + "\n")
	go server.ServeTLS(l, "", "")
	io.Copy(io.Discard, os.Stdin)
	server.Close()
}

// A call that does nothing, over mutual TLS, with one and with 64 under way: what the way to the service costs, on both
// sides and on the server's. (A call needs a store; this one makes up its answer.)
func BenchmarkCalls(b *testing.B) {
	dir := certtest.Make(b, "127.0.0.1", "hss.example")
	cmd := exec.Command(os.Args[0], "-test.run=^TestServeForBenchmark$", "-test.v=false")
	cmd.Env = append(os.Environ(), benchFolder+"="+dir)
	input, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	defer cmd.Wait()
	defer input.Close()
	line := make([]byte, 64)
	n, err := output.Read(line)
	if err != nil {
		b.Fatal(err)
	}
	url := "https://" + strings.TrimSpace(string(line[:n]))
	config, err := config.ClientTLS(filepath.Join(dir, "hss.example.pem"), filepath.Join(dir, "hss.example.key"),
		filepath.Join(dir, "ca.pem"))
	if err != nil {
		b.Fatal(err)
	}
	c, err := client.New(client.Options{URLs: []string{url}, TLS: config, Timeout: testproc.Patience})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	transport := &http.Transport{TLSClientConfig: config, Protocols: protocols}
	defer transport.CloseIdleConnections()
	alone := kmev1connect.NewKeyServiceClient(&http.Client{Transport: transport}, url)
	one, err := kme.ParseIMSI("001010123456789")
	if err != nil {
		b.Fatal(err)
	}
	for name, call := range map[string]func(context.Context) error{
		"stream": func(ctx context.Context) error { _, err := c.GetBinding(ctx, one); return err },
		"alone": func(ctx context.Context) error {
			_, err := alone.GetBinding(ctx, connect.NewRequest(&kmev1.GetBindingRequest{Imsi: one.String()}))
			return err
		},
	} {
		for _, atOnce := range []int{1, 64} {
			b.Run(name+"/"+strconv.Itoa(atOnce), func(b *testing.B) {
				before := cpu(b, cmd.Process.Pid)
				b.ReportAllocs()
				defer testproc.ReportCPU(b)()
				var next atomic.Int64
				var all sync.WaitGroup
				for range atOnce {
					all.Go(func() {
						for next.Add(1) <= int64(b.N) {
							if err := call(b.Context()); err != nil {
								b.Error(err)
							}
						}
					})
				}
				all.Wait()
				spent := cpu(b, cmd.Process.Pid) - before
				b.ReportMetric(float64(spent.Microseconds())/float64(b.N), "server-cpu-us/op")
			})
		}
	}
}

// cpu is the time that all cores have spent on a process.
func cpu(b *testing.B, pid int) (spent time.Duration) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		b.Fatal(err)
	}
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every Linux
	for _, field := range strings.Fields(string(text))[13:15] {
		n, err := strconv.Atoi(field)
		if err != nil {
			b.Fatal(err)
		}
		spent += time.Duration(n) * tick
	}
	return spent
}
