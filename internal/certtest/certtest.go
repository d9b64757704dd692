// Package certtest makes certificates for tests.
package certtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/must"
)

// Make makes a CA, ca.pem, and a certificate of it for each name, NAME.pem with NAME.key: for an IP address, or for a
// name in DNS.
func Make(t testing.TB, names ...string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	var ca *x509.Certificate
	var caKey *ecdsa.PrivateKey
	for i, name := range append([]string{"ca"}, names...) {
		key := must.Get[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		c := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: name},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: i == 0,
			BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
		if ip := net.ParseIP(name); ip != nil {
			c.IPAddresses = []net.IP{ip}
		} else {
			c.DNSNames = []string{name}
		}
		if i == 0 {
			ca, caKey = c, key
		}
		der := must.Get[[]byte](t)(x509.CreateCertificate(rand.Reader, c, ca, key.Public(), caKey))
		pkcs8 := must.Get[[]byte](t)(x509.MarshalPKCS8PrivateKey(key))
		for file, block := range map[string]*pem.Block{name + ".pem": {Type: "CERTIFICATE", Bytes: der},
			name + ".key": {Type: "PRIVATE KEY", Bytes: pkcs8}} {
			must.Do(t, os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600))
		}
	}
	return dir
}
