package config

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A certificate is not used for what it is not for: the other side would refuse it, and only say that it is bad.
func TestPurpose(t *testing.T) {
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certificate, keyFile := filepath.Join(dir, "c.pem"), filepath.Join(dir, "k.pem")
	for _, c := range []struct {
		usage          []x509.ExtKeyUsage
		server, client bool
	}{
		{nil, true, true}, {[]x509.ExtKeyUsage{x509.ExtKeyUsageAny}, true, true},
		{[]x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, true, false},
		{[]x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, false, true},
		{[]x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection}, false, false},
	} {
		template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour),
			NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: c.usage}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		for path, block := range map[string]*pem.Block{certificate: {Type: "CERTIFICATE", Bytes: der},
			keyFile: {Type: "PRIVATE KEY", Bytes: private}} {
			if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		_, err = ServerTLS(certificate, keyFile, certificate, tls.RequireAndVerifyClientCert)
		if (err == nil) != c.server || err != nil && !strings.Contains(err.Error(), "is not for a server") {
			t.Errorf("%v, a server's: %v", c.usage, err)
		}
		_, err = ClientTLS(certificate, keyFile, certificate)
		if (err == nil) != c.client || err != nil && !strings.Contains(err.Error(), "is not for a client") {
			t.Errorf("%v, a client's: %v", c.usage, err)
		}
	}
}

// A certificate that has expired is not served with, and not taken up in the place of one that has not.
func TestServerTLSExpired(t *testing.T) {
	dir := t.TempDir()
	serve := func(until time.Time) error {
		t.Helper()
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: until.Add(-2 * time.Hour),
			NotAfter: until}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		private, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		certificate, keyFile := filepath.Join(dir, "c.pem"), filepath.Join(dir, "k.pem")
		for path, block := range map[string]*pem.Block{certificate: {Type: "CERTIFICATE", Bytes: der},
			keyFile: {Type: "PRIVATE KEY", Bytes: private}} {
			if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		_, err = ServerTLS(certificate, keyFile, certificate, tls.RequireAndVerifyClientCert)
		return err
	}
	if err := serve(time.Now().Add(time.Hour)); err != nil {
		t.Errorf("a certificate that is good for an hour: %v", err)
	}
	if err := serve(time.Now().Add(-time.Hour)); err == nil || !strings.Contains(err.Error(), "has expired") {
		t.Errorf("one that has expired: %v", err)
	}
}
