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
