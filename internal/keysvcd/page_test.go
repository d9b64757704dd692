package keysvcd

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/certtest"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/keysvcd/settings"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// The operator page is on a listener of its own, shows the health of what serves, and nothing of the API is there; and
// the page is not at the API's.
func TestOperatorPage(t *testing.T) {
	dir := certtest.Make(t, "127.0.0.1", "monitor.example", "hss.example")
	tok := softhsmtest.Token(t)
	initialise(t, tok, filepath.Join(dir, "state"))
	path := filepath.Join(dir, "keysvc.yaml")
	text := fmt.Sprintf("token: %q\nstate: state\nlisten: 127.0.0.1:0\ndrain_delay: 0s\n"+
		"operator_page: {listen: 127.0.0.1:0}\n"+
		"tls: {certificate: 127.0.0.1.pem, key: 127.0.0.1.key, client_ca: ca.pem}\n"+
		"clients: [{name: ops, san: monitor.example, roles: [monitor], plmns: [all]}, "+
		"{name: hss, san: hss.example, roles: [hss], plmns: [all]}]\n", tok.URI)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	log, ended := new(testproc.Log), make(chan error, 1)
	go func() { ended <- Serve(ctx, settings.Source{Path: path}, log) }()
	var serving [][]string
	testproc.Await(t, "it serves", func() bool {
		if len(ended) > 0 {
			t.Fatalf("it has ended: %v\n%s", <-ended, log)
		}
		serving = regexp.MustCompile(`127\.0\.0\.1:[1-9]\d*`).FindAllStringSubmatch(log.String(), -1)
		return len(serving) >= 2
	})
	service, page := serving[0][0], serving[1][0]
	get := func(name, address, path string) (int, string) {
		t.Helper()
		config, err := config.ClientTLS(filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".key"),
			filepath.Join(dir, "ca.pem"))
		if err != nil {
			t.Fatal(err)
		}
		c := &http.Client{Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}}
		r, err := c.Get("https://" + address + path)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		body, _ := io.ReadAll(r.Body)
		return r.StatusCode, string(body)
	}
	status, body := get("monitor.example", page, "/")
	body = strings.Join(strings.Fields(body), " ")
	for _, want := range []string{"▲</span> Works, with 2 warnings", tok.Label, "sqlite", "CN=127.0.0.1", "CN=ca",
		"■</span> less than a day left", "No lot was imported"} {
		if status != http.StatusOK || !strings.Contains(body, want) {
			t.Errorf("the page, %d, has no %q: %s", status, want, body)
		}
	}
	for _, c := range []struct {
		name, address, path string
		want                int
	}{
		{"monitor.example", page, "/?kind=IMSI&number=001010000000001", 200},
		{"hss.example", page, "/", 403},
		{"monitor.example", page, "/readyz", 404},
		{"monitor.example", page, "/kme.v1.KeyService/GetBinding", 404},
		{"monitor.example", service, "/readyz", 200},
		{"monitor.example", service, "/page.css", 404},
		{"monitor.example", service, "/", 404},
	} {
		if status, body := get(c.name, c.address, c.path); status != c.want {
			t.Errorf("%s gets %s at %s: %d %s", c.name, c.path, c.address, status, body)
		}
	}
	old := &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}
	if _, err := tls.Dial("tcp", page, old); err == nil {
		t.Error("the page is offered over TLS 1.2")
	}
	stop()
	if err := <-ended; err != nil {
		t.Errorf("the end: %v\n%s", err, log)
	}
}
