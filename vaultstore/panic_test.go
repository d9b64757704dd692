package vaultstore

import (
	"context"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/vault/api"
)

type transport func(*http.Request) (*http.Response, error)

func (t transport) RoundTrip(r *http.Request) (*http.Response, error) { return t(r) }

// A panic in what keeps the login alive, on a goroutine of its own, is an error like others: the login is tried again.
func TestLoginPanics(t *testing.T) {
	var logins atomic.Int64
	done := make(chan struct{})
	stop := sync.OnceFunc(func() { close(done) })
	config := api.DefaultConfig()
	config.Address = "http://127.0.0.1:1"
	config.MaxRetries = 0
	config.HttpClient = &http.Client{Transport: transport(func(r *http.Request) (*http.Response, error) {
		if strings.HasSuffix(r.URL.Path, "/login") && logins.Add(1) == 2 {
			stop()
			<-r.Context().Done()
			return nil, r.Context().Err()
		}
		panic("in the transport")
	})}
	client, err := api.NewClient(config)
	if err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	s := &session{client: client, login: Login{CertRole: "r"}, log: slog.New(slog.NewTextHandler(&log, nil))}
	ctx, cancel := context.WithCancel(t.Context())
	var kept sync.WaitGroup
	kept.Go(func() {
		s.keep(ctx, &api.Secret{Auth: &api.SecretAuth{ClientToken: "t", LeaseDuration: 1}})
	})
	<-done
	cancel()
	kept.Wait()
	for _, want := range []string{"not renewed any more", "it is tried again", "in the transport"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log does not say %q: %s", want, log.String())
		}
	}
}
