package api_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/kmehsm/kmehsm/api"
	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// serve serves a service with a real store and no token on a socket; before may answer in its place. (mesim attaches
// through this client to all of it, in the scripts of package cmd.)
func serve(before func(w http.ResponseWriter, r *http.Request) (answered bool)) (url string, close func(), err error) {
	dir, err := os.MkdirTemp("", "client-")
	if err != nil {
		return "", nil, err
	}
	store, err := sqlstore.Open(context.Background(), sqlstore.InFolder(dir), kme.RandomSecret())
	if err != nil {
		return "", nil, err
	}
	own := os.Getuid()
	known, err := api.NewClients([]api.Client{{Name: "test", UID: &own, Roles: []api.Role{api.RoleHSS, api.RoleAdmin},
		PLMNs: []string{"00101"}}})
	if err != nil {
		return "", nil, err
	}
	service := binding.NewService(binding.Options{Store: store, Times: binding.DefaultTimes(),
		Log: slog.New(slog.DiscardHandler)})
	handler := api.NewHandler(api.Options{Service: service, Clients: known,
		Metrics: binding.NewMetrics(prometheus.NewRegistry()), Gather: http.NotFoundHandler(),
		Ready: func(context.Context) ([]string, error) { return nil, nil }})
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		return "", nil, err
	}
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{Protocols: protocols, ConnContext: api.ConnContext,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if before == nil || !before(w, r) {
				handler.ServeHTTP(w, r)
			}
		})}
	go server.Serve(l)
	return "unix:" + path, func() { server.Close(); store.Close(); os.RemoveAll(dir) }, nil
}

// An HSS asks for a vector, and finds that the subscription has no KME yet.
func Example() {
	url, stop, err := serve(nil)
	if err != nil {
		panic(err)
	}
	defer stop()

	c, err := client.New(client.Options{URLs: []string{url}}) // or https://HOST:PORT, with TLS
	if err != nil {
		panic(err)
	}
	defer c.Close()
	imsi, err := kme.ParseIMSI("001010123456789")
	if err != nil {
		panic(err)
	}
	vector, err := c.PrepareVector(context.Background(), imsi, client.Origin{}, client.RAND{1, 2, 3})
	if err != nil {
		panic(err)
	}
	fmt.Println("provisioning only:", vector.AttemptID != "")

	imei, err := kme.ParseIMEI("35209900000001")
	if err != nil {
		panic(err)
	}
	_, err = c.EstablishKME(context.Background(), imsi, client.Origin{}, imei, vector.AttemptID, make([]byte, 256))
	fmt.Println("a device of no lot:", errors.Is(err, client.Reason(kme.UnknownDevice)))
	// Output:
	// provisioning only: true
	// a device of no lot: true
}

func open(t *testing.T, o client.Options, before func(http.ResponseWriter, *http.Request) bool) *client.Client {
	t.Helper()
	url, stop, err := serve(before)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	o.URLs = []string{url}
	c, err := client.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func imsi(t *testing.T, s string) kme.IMSI {
	t.Helper()
	i, err := kme.ParseIMSI(s)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func TestCalls(t *testing.T) {
	c := open(t, client.Options{Timeout: testproc.Patience}, nil)
	ctx, one := t.Context(), imsi(t, "001010123456789")
	is := func(err error, reason kme.Reason) {
		t.Helper()
		if !errors.Is(err, client.Reason(reason)) || errors.Is(err, client.Reason("OTHER")) {
			t.Errorf("%v, want %s", err, reason)
		}
	}
	_, err := c.GetBinding(ctx, one)
	is(err, kme.NotBound)
	_, err = c.RestoreRAND(ctx, one, client.Origin{}, client.RAND{})
	is(err, kme.NotBound)
	_, err = c.RevokeBinding(ctx, one)
	is(err, kme.NotBound)
	report, err := c.ReportAuthentication(ctx, one, client.Origin{}, true)
	is(err, kme.NotBound)
	if report != (client.Report{}) {
		t.Error(report)
	}
	_, err = c.PrepareVector(ctx, imsi(t, "001020123456789"), client.Origin{}, client.RAND{})
	is(err, kme.CallerNotAllowed)
	imei, err := kme.ParseIMEI("35209900000001")
	if err != nil {
		t.Fatal(err)
	}
	for _, asked := range []kme.IMSI{one, {}} {
		e, err := c.CheckEquipment(ctx, imei, asked)
		if want := (client.Equipment{Status: kmev1.EquipmentStatus_WHITELISTED,
			Reason: kmev1.EquipmentReason_NOT_IN_LOT}); err != nil || e != want {
			t.Errorf("CheckEquipment for %q: %+v, %v", asked, e, err)
		}
	}
	_, err = c.CheckEquipment(ctx, kme.IMEI{}, one)
	is(err, kme.Malformed)
	_, err = c.CheckEquipment(ctx, imei, imsi(t, "001020123456789"))
	is(err, kme.CallerNotAllowed)
	opened, err := c.OpenProvisioning(ctx, one, time.Minute)
	if err != nil || opened.AttemptId == "" || time.Until(opened.ExpiresAt.AsTime()) < 50*time.Second {
		t.Errorf("%v, %v", opened, err)
	}
	rand := client.RAND{9: 9}
	if v, err := c.PrepareVector(ctx, one, client.Origin{}, rand); err != nil || v.RANDs[0] != rand ||
		v.AttemptID != opened.AttemptId {
		t.Errorf("%+v, %v", v, err)
	}
}

// Calls are made again where that is safe, and only then.
func TestRetries(t *testing.T) {
	unavailable := `{"code":"unavailable","message":"m"}`
	for _, c := range []struct {
		name  string
		call  func(ctx context.Context, c *client.Client, i kme.IMSI) error
		times int64
	}{
		{"PrepareVector", func(ctx context.Context, c *client.Client, i kme.IMSI) error {
			_, err := c.PrepareVector(ctx, i, client.Origin{}, client.RAND{})
			return err
		}, 3},
		{"report ok", func(ctx context.Context, c *client.Client, i kme.IMSI) error {
			_, err := c.ReportAuthentication(ctx, i, client.Origin{}, true)
			return err
		}, 3},
		{"report not ok", func(ctx context.Context, c *client.Client, i kme.IMSI) error {
			_, err := c.ReportAuthentication(ctx, i, client.Origin{}, false)
			return err
		}, 1},
		{"OpenProvisioning", func(ctx context.Context, c *client.Client, i kme.IMSI) error {
			_, err := c.OpenProvisioning(ctx, i, time.Minute)
			return err
		}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			var n atomic.Int64
			o := client.Options{Timeout: testproc.Patience}
			client := open(t, o, func(w http.ResponseWriter, _ *http.Request) bool {
				n.Add(1)
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(http.StatusServiceUnavailable)
				w.Write([]byte(unavailable))
				return true
			})
			if err := c.call(t.Context(), client, imsi(t, "001010123456789")); err == nil || n.Load() != c.times {
				t.Errorf("%v after %d calls, want %d", err, n.Load(), c.times)
			}
		})
	}
	// The third try is answered.
	var n atomic.Int64
	c := open(t, client.Options{Timeout: testproc.Patience}, func(w http.ResponseWriter, _ *http.Request) bool {
		if n.Add(1) == 3 {
			return false
		}
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	})
	if v, err := c.PrepareVector(t.Context(), imsi(t, "001010123456789"), client.Origin{}, client.RAND{}); err != nil ||
		v.AttemptID == "" {
		t.Errorf("%+v, %v", v, err)
	}
	// No call is longer than its time-out, nor than its context's deadline, and the service learns of it.
	told := false
	for timeout := 200 * time.Millisecond; !told; timeout *= 2 { // until one ends while it is under way
		deadline := make(chan uint32, 1)
		c = open(t, client.Options{Timeout: timeout}, func(_ http.ResponseWriter, r *http.Request) bool {
			first := new(kmev1.StreamRequest)
			prefix := make([]byte, 5)
			if _, err := io.ReadFull(r.Body, prefix); err != nil {
				return true // it was given up before it was sent
			}
			message := make([]byte, binary.BigEndian.Uint32(prefix[1:]))
			_, err := io.ReadFull(r.Body, message)
			if err := errors.Join(err, proto.Unmarshal(message, first)); err != nil || len(first.Calls) != 1 {
				t.Errorf("%v, %v", first, err)
				return true
			}
			deadline <- first.Calls[0].GetTimeoutMs()
			<-r.Context().Done()
			return true
		})
		_, err := c.GetBinding(t.Context(), imsi(t, "001010123456789"))
		select {
		case ms := <-deadline:
			if told = true; ms == 0 || time.Duration(ms)*time.Millisecond > timeout {
				t.Errorf("the service was given %d ms of %s", ms, timeout)
			}
		default:
		}
		if connect.CodeOf(err) != connect.CodeDeadlineExceeded || timeout > testproc.Patience {
			t.Fatalf("with %s: %v", timeout, err)
		}
		c.Close() // the stream goes on for other calls
	}
}

// Calls that come at the same time: each caller has its own answer, and one who has gone waits for nobody.
func TestAtOnce(t *testing.T) {
	const n = 50
	hold := make(chan struct{})
	c := open(t, client.Options{Timeout: 2 * testproc.Patience}, func(http.ResponseWriter, *http.Request) bool {
		<-hold
		return false
	})
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			want, mine := kme.NoAttempt, fmt.Sprintf("0010101234567%02d", i)
			if i%5 == 4 {
				want, mine = kme.CallerNotAllowed, fmt.Sprintf("0010201234567%02d", i)
			}
			imei, err := kme.ParseIMEI("35209900000001")
			if err != nil {
				t.Error(err)
			}
			if _, err := c.EstablishKME(t.Context(), imsi(t, mine), client.Origin{}, imei, "none",
				make([]byte, 256)); !errors.Is(err, client.Reason(want)) {
				t.Errorf("%s: %v, want %s", mine, err, want)
			}
		})
	}
	close(hold)
	all.Wait()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	hold = make(chan struct{})
	defer close(hold)
	start := time.Now()
	for range 20 {
		all.Go(func() {
			_, err := c.EstablishKME(ctx, imsi(t, "001010123456789"), client.Origin{}, kme.IMEI{}, "none", nil)
			if err == nil || time.Since(start) > testproc.Patience {
				t.Errorf("%v after %s", err, time.Since(start))
			}
		})
	}
	all.Wait()
}
