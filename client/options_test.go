package client_test

import (
	"crypto/tls"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/kme"
)

func TestNewRefuses(t *testing.T) {
	certificate := &tls.Config{Certificates: make([]tls.Certificate, 1)}
	for want, o := range map[string]client.Options{
		"unix:PATH, not \"\"":                          {URLs: []string{""}},
		"from 1 to 16 addresses of the service, not 0": {},
		"not 17":               {URLs: make([]string, 17)},
		"not \"http://x\"":     {URLs: []string{"http://x"}, TLS: certificate},
		"not \"https://\"":     {URLs: []string{"https://"}, TLS: certificate},
		"not \"unix:\"":        {URLs: []string{"unix:"}},
		"a client certificate": {URLs: []string{"https://x"}},
	} {
		if _, err := client.New(o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v does not say %q", o, err, want)
		}
	}
	if _, err := client.New(client.Options{URLs: []string{"https://x:1"}, TLS: certificate}); err != nil {
		t.Error(err)
	}
}

// Instances share what the caller has said of TLS, and so may several clients: no call changes it.
func TestTLSIsNotChanged(t *testing.T) {
	config := &tls.Config{Certificates: make([]tls.Certificate, 1)}
	c, err := client.New(client.Options{URLs: []string{"https://127.0.0.1:1"}, TLS: config, Tries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.GetBinding(t.Context(), kme.IMSI{}); err == nil {
		t.Error("a call was answered, and there is no service")
	}
	if len(config.NextProtos) > 0 {
		t.Errorf("a call has added %q to the caller's NextProtos", config.NextProtos)
	}
}
