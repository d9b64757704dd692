package proof

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/big"
	"os"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/kme"
)

func (w *world) plaintext(d device) *kme.Plaintext {
	w.t.Helper()
	p := &kme.Plaintext{KME: kme.RandomSecret(), RME: kme.RandomSecret()}
	var err error
	if p.Sig, err = w.manifest(d.lot).Suite.Sign(d.key, p.KME.Bytes()); err != nil {
		w.t.Fatal(err)
	}
	return p
}

func (w *world) encrypt(d device, p *kme.Plaintext) []byte {
	w.t.Helper()
	m := w.manifest(d.lot)
	c, err := m.Suite.Encrypt(&rsa.PublicKey{N: new(big.Int).SetBytes(m.N), E: 65537}, p)
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

// OpenSSL unwraps every device key, and finds the public key that was published; and it verifies every signed object.
func TestOpenSSLAgrees(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	w.setUp(bothSuites...)
	injection := hex.EncodeToString(w.injectionKey())
	for _, line := range w.lines() {
		// RFC 5649 section 3: the first half of the initial value is A65959A6.
		pkcs8 := w.openssl(line.DeviceKey.Wrapped, "enc", "-d", "-id-aes256-wrap-pad", "-K", injection,
			"-iv", "A65959A6")
		der := w.openssl(pkcs8, "pkey", "-inform", "DER", "-pubout", "-outform", "DER")
		pub, err := x509.ParsePKIXPublicKey(der)
		if err != nil {
			t.Fatal(err)
		}
		var fromToken map[string]string
		switch k := pub.(type) {
		case *ecdsa.PublicKey:
			point, err := k.Bytes()
			if err != nil {
				t.Fatal(err)
			}
			fromToken = map[string]string{"kty": "EC", "crv": "P-256", "x": b64(point[1:33]), "y": b64(point[33:])}
		case *rsa.PublicKey:
			fromToken = map[string]string{"kty": "RSA", "n": b64(k.N.Bytes()), "e": "AQAB"}
		}
		fromToken["kid"] = line.IMEI
		var published struct{ Keys []map[string]string }
		payload := w.verified(fmt.Sprintf("directory/lots/%s/shards/%06d", line.Lot, line.Shard))
		if err := json.Unmarshal(payload, &published); err != nil {
			t.Fatal(err)
		}
		var found map[string]string
		for _, k := range published.Keys {
			if k["kid"] == line.IMEI {
				found = k
			}
		}
		if fmt.Sprint(found) != fmt.Sprint(fromToken) || fmt.Sprint(line.PublicKey) != fmt.Sprint(fromToken) {
			t.Errorf("IMEI %s\npublished %v\ninjection %v\nunwrapped %v", line.IMEI, found, line.PublicKey, fromToken)
		}
	}
	for _, name := range []string{"directory/lots/LE/manifest", "directory/lots/LR/manifest", "enrolment.jws", "LE.jws",
		"LR.jws", "injection/LE/manifest.jws"} {
		if len(w.verified(name)) == 0 {
			t.Errorf("%s has no payload", name)
		}
	}
}

func b64(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// verified gives a JWS's payload, once openssl has verified it with manufacturer.pem.
func (w *world) verified(name string) []byte {
	w.t.Helper()
	signed, signature, _ := cutLast(string(w.readFile(name)), ".")
	raw, err := base64.RawURLEncoding.DecodeString(signature)
	if err != nil || len(raw) != 64 {
		w.t.Fatalf("%s: %v", name, err)
	}
	der, err := asn1.Marshal([]*big.Int{new(big.Int).SetBytes(raw[:32]), new(big.Int).SetBytes(raw[32:])})
	if err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(w.path("signature.der"), der, 0o600); err != nil {
		w.t.Fatal(err)
	}
	w.openssl([]byte(signed), "dgst", "-sha256", "-verify", "var/factory/manufacturer.pem", "-signature",
		"signature.der")
	header, payload, _ := strings.Cut(signed, ".")
	if h, err := base64.RawURLEncoding.DecodeString(header); err != nil ||
		!strings.Contains(string(h), `"alg":"ES256"`) {
		w.t.Errorf("%s has header %s", name, h)
	}
	b, err := base64.RawURLEncoding.DecodeString(payload)
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

func (w *world) manifest(lot string) (m struct {
	Suite kme.Suite     `json:"suite"`
	N     strict.Base64 `json:"n"`
}) {
	w.t.Helper()
	parts := strings.Split(string(w.readFile("injection/"+lot+"/manifest.jws")), ".")
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(payload, &m)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return m
}
