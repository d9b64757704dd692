package api

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/testproc"
)

// A client has so many open connections, and no more; it takes none of another's. What it closes it has again.
func TestConnections(t *testing.T) {
	own := os.Getuid()
	later := time.Now().Add(time.Hour)
	for name, c := range map[string]struct {
		http2, encrypted bool
		client           string
	}{
		"HTTP/1":               {false, true, "hss-1"},
		"HTTP/2":               {true, true, "hss-1"},
		"HTTP/1 on the socket": {false, false, "ops"},
		"HTTP/2 on the socket": {true, false, "ops"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFront(t,
				Client{Name: "hss-1", SAN: "hss.example", Roles: []Role{RoleHSS}, PLMNs: []string{all}},
				Client{Name: "hss-2", SAN: "other.example", Roles: []Role{RoleHSS}, PLMNs: []string{all}},
				Client{Name: "ops", UID: &own, Roles: []Role{RoleAdmin}, PLMNs: []string{all}})
			f.connections.most = 2
			// connect makes a request on a new connection, which stays open until end.
			connect := func(san string, encrypted bool) (works bool, end func()) {
				transport := &http.Transport{Protocols: new(http.Protocols)}
				transport.Protocols.SetHTTP1(!c.http2)
				transport.Protocols.SetHTTP2(c.http2 && encrypted)
				transport.Protocols.SetUnencryptedHTTP2(c.http2 && !encrypted)
				url := f.url
				if encrypted {
					transport.TLSClientConfig = &tls.Config{InsecureSkipVerify: true,
						Certificates: []tls.Certificate{f.ca.client(t, san, later)}}
				} else {
					url = "http://keysvc"
					transport.DialContext = func(context.Context, string, string) (net.Conn, error) {
						return net.Dial("unix", f.socket)
					}
				}
				t.Cleanup(transport.CloseIdleConnections)
				r, err := (&http.Client{Transport: transport}).Get(url + "/healthz")
				if err != nil {
					return false, nil
				}
				io.Copy(io.Discard, r.Body)
				r.Body.Close()
				return r.StatusCode == http.StatusOK, transport.CloseIdleConnections
			}
			mine := func() (bool, func()) { return connect("hss.example", c.encrypted) }
			_, end := mine()
			if works, _ := mine(); !works {
				t.Error("the second connection does not work")
			}
			for range 2 {
				if works, _ := mine(); works {
					t.Error("a third connection works")
				}
				var log []map[string]any
				testproc.Await(t, "a line", func() bool { log = f.log.take(t); return len(log) > 0 })
				if actor, _ := log[0]["actor"].(map[string]any); log[0]["reason"] != "OVERLOADED" ||
					actor["client"] != c.client {
					t.Errorf("the log has %v", log)
				}
			}
			if works, _ := connect("other.example", true); !works {
				t.Error("another client's connection does not work")
			}
			end()
			testproc.Await(t, "a connection instead of one that was closed", func() bool {
				works, _ := mine()
				return works
			})
			if works, _ := mine(); works {
				t.Error("a third connection works after one was closed")
			}
			// Strangers have a bound of their own, all together.
			for n, want := range []bool{true, true, false} {
				if works, _ := connect([]string{"a", "b", "c"}[n], true); works != want {
					t.Errorf("stranger %d: %v", n, works)
				}
			}
		})
	}
}
