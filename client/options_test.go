package client_test

import (
	"crypto/tls"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/client"
)

func TestNewRefuses(t *testing.T) {
	certificate := &tls.Config{Certificates: make([]tls.Certificate, 1)}
	for want, o := range map[string]client.Options{
		"unix:PATH, not \"\"":  {},
		"not \"http://x\"":     {URL: "http://x", TLS: certificate},
		"not \"https://\"":     {URL: "https://", TLS: certificate},
		"not \"unix:\"":        {URL: "unix:"},
		"a client certificate": {URL: "https://x"},
	} {
		if _, err := client.New(o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v does not say %q", o, err, want)
		}
	}
	if _, err := client.New(client.Options{URL: "https://x:1", TLS: certificate}); err != nil {
		t.Error(err)
	}
}
