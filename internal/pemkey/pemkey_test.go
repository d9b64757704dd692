package pemkey

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/testkeys"
)

func TestKeys(t *testing.T) {
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	r, err := testkeys.RSA(2048)
	if err != nil {
		t.Fatal(err)
	}
	ed, _, _ := ed25519.GenerateKey(rand.Reader)
	encode := func(pub any) string {
		b, err := Encode(pub)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if got, err := P256([]byte(encode(p256.Public()))); err != nil || !got.Equal(p256.Public()) {
		t.Error(got, err)
	}
	if got, err := RSA([]byte(encode(r.Public()) + "\n")); err != nil || !got.Equal(r.Public()) {
		t.Error(got, err)
	}
	der, _ := x509.MarshalPKCS8PrivateKey(p256)
	private := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	for name, c := range map[string]struct{ pem, want string }{
		"empty":       {"", "no PEM"},
		"garbage":     {"garbage", "no PEM"},
		"private":     {private, "private key"},
		"certificate": {string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), "CERTIFICATE"},
		"two":         {encode(p256.Public()) + encode(p256.Public()), "more than one"},
		"damaged":     {string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der[:20]})), "parsed"},
		"Ed25519":     {encode(ed), "another kind"},
		"P-384":       {encode(p384.Public()), "another kind"},
	} {
		for _, err := range []error{second(P256([]byte(c.pem))), second(RSA([]byte(c.pem)))} {
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %v does not say %q", name, err, c.want)
			}
		}
	}
}

func second[T any](_ T, err error) error { return err }
