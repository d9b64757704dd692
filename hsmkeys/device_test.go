package hsmkeys

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"testing"

	"github.com/miekg/pkcs11"
	"github.com/tink-crypto/tink-go/v2/kwp/subtle"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/kme"
)

// A wrapped device key, unwrapped by another implementation, is the key that was published.
func TestDeviceKey(t *testing.T) {
	ctx := t.Context()
	factory, _ := newFactory(t, nil)
	enrolment := must[[]byte](t)(factory.WrapEnrolled(ctx, testInjection))
	key := must[[]byte](t)(rsa.DecryptOAEP(sha1.New(), nil, fixtureKey(), enrolment, nil))
	kwp := must[*subtle.KWP](t)(subtle.NewKWP(key))
	seen := map[string]bool{}
	for _, suite := range kme.Suites {
		for range 3 {
			pub, wrapped, err := factory.MakeDeviceKey(ctx, suite, testInjection)
			if err != nil {
				t.Fatal(err)
			}
			if err := suite.CheckDevice(pub); err != nil {
				t.Error(err)
			}
			private := must[any](t)(x509.ParsePKCS8PrivateKey(must[[]byte](t)(kwp.Unwrap(wrapped)))).(crypto.Signer)
			if !private.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(pub) {
				t.Error("the wrapped private key is not that of the public key")
			}
			spki := must[[]byte](t)(x509.MarshalPKIXPublicKey(pub))
			if seen[string(spki)] {
				t.Error("two devices have one key")
			}
			seen[string(spki)] = true
		}
	}
	if n := countObjects(t, factory, ck.Attributes{ck.Attr(pkcs11.CKA_TOKEN, false)}); n != 0 {
		t.Errorf("%d session objects are left", n)
	}
}

func TestSigner(t *testing.T) {
	factory, _ := newFactory(t, nil)
	signer := must[crypto.Signer](t)(factory.Signer(testSigning))
	digest := sha256.Sum256([]byte("manifest"))
	sig := must[[]byte](t)(signer.Sign(rand.Reader, digest[:], crypto.SHA256))
	if !ecdsa.VerifyASN1(signer.Public().(*ecdsa.PublicKey), digest[:], sig) {
		t.Error("the signature does not verify")
	}
	if _, err := factory.Signer(Key{Role: RoleSigning, Name: "none"}); !errors.Is(err, ErrNoKey) {
		t.Error(err)
	}
}
