package directories

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"testing"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/internal/usage"
)

func TestMain(m *testing.M) { testproc.Main(m.Run) }

func TestNames(t *testing.T) {
	dir := t.TempDir()
	for name, want := range map[string]struct {
		good, there bool
		mount       string
	}{
		"file:" + dir:          {true, true, ""},
		"file:" + dir + "/not": {true, false, ""},
		"vault:keys":           {true, true, "keys"},
		"vault:a/b c":          {false, true, ""},
		"file:":                {false, false, ""},
		"vault:":               {false, true, ""},
		dir:                    {false, true, ""},
	} {
		if got := Check(name) == nil; got != want.good {
			t.Errorf("%s: good: %v", name, got)
		}
		if got := There(name) == nil; got != want.there {
			t.Errorf("%s: there: %v", name, got)
		}
		if got := Mount(name); got != want.mount {
			t.Errorf("%s: mount %q", name, got)
		}
	}
}

// A certificate that is for servers alone is not shown to Vault.
func TestCheckVault(t *testing.T) {
	key := must.Get[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	path := filepath.Join(t.TempDir(), "c.pem")
	must.Do(t, os.WriteFile(path+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY",
		Bytes: must.Get[[]byte](t)(x509.MarshalPKCS8PrivateKey(key))}), 0o600))
	t.Setenv("VAULT_CLIENT_CERT", path)
	t.Setenv("VAULT_CLIENT_KEY", path+".key")
	if err := CheckVault(); !errors.As(err, new(usage.Error)) {
		t.Errorf("no certificate: %v", err)
	}
	for _, purpose := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		c := &x509.Certificate{SerialNumber: big.NewInt(1), ExtKeyUsage: []x509.ExtKeyUsage{purpose}}
		der := must.Get[[]byte](t)(x509.CreateCertificate(rand.Reader, c, c, key.Public(), key))
		must.Do(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
		err := CheckVault()
		if (err == nil) != (purpose == x509.ExtKeyUsageClientAuth) || err != nil && !errors.As(err, new(usage.Error)) {
			t.Errorf("%v: %v", purpose, err)
		}
	}
}
