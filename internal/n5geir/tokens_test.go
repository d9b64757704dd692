package n5geir

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testkeys"
)

const instance = "5e0b0ba0-1c26-4d5a-8a2c-36d4f2a2a001"

func newEC(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	return must.Get[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(curve, rand.Reader))
}

func publicPEM(t testing.TB, pub any) []byte {
	t.Helper()
	der := must.Get[[]byte](t)(x509.MarshalPKIXPublicKey(pub))
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

// token is an NRF's.
func token(t testing.TB, alg jose.SignatureAlgorithm, key any, claims map[string]any) string {
	t.Helper()
	s := must.Get[jose.Signer](t)(jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key},
		(&jose.SignerOptions{}).WithType("JWT")))
	return must.Get[string](t)(jwt.Signed(s).Claims(claims).Serialize())
}

// good are the claims of a token for every EIR.
func good() map[string]any {
	return map[string]any{"iss": "nrf", "sub": "amf", "aud": nfType, "scope": scope,
		"exp": time.Now().Add(time.Hour).Unix()}
}

func with(changes map[string]any) map[string]any {
	c := good()
	maps.Copy(c, changes)
	for k, v := range c {
		if v == nil {
			delete(c, k)
		}
	}
	return c
}

func TestTokens(t *testing.T) {
	ec, other := newEC(t, elliptic.P256()), newEC(t, elliptic.P256())
	rs := must.Get[*rsa.PrivateKey](t)(testkeys.RSA(2048))
	tokens := must.Get[*Tokens](t)(ParseTokens(append(publicPEM(t, ec.Public()), publicPEM(t, rs.Public())...),
		instance))
	now := time.Now()
	tokens.now = func() time.Time { return now } // however long the test takes
	unsigned := "eyJhbGciOiJub25lIn0." + strings.Split(token(t, jose.ES256, ec, good()), ".")[1] + "."
	damaged := token(t, jose.ES256, ec, good())
	damaged = damaged[:len(damaged)-3] + "AAA"

	for _, c := range []struct {
		name, header string
		code         int
	}{
		{"ES256", "Bearer " + token(t, jose.ES256, ec, good()), 200},
		{"RS256", "bearer " + token(t, jose.RS256, rs, good()), 200},
		{"for our instance", "Bearer " + token(t, jose.ES256, ec, with(map[string]any{
			"aud": []string{"other", instance}})), 200},
		{"of several scopes", "Bearer " + token(t, jose.ES256, ec, with(map[string]any{"scope": "nudm-sdm " + scope})),
			200},
		{"just over, as clocks go", "Bearer " + token(t, jose.ES256, ec, with(map[string]any{
			"exp": now.Add(-leeway / 2).Unix()})), 200},
		{"none", "", 401},
		{"empty", "Bearer ", 401},
		{"of another kind", "Basic " + token(t, jose.ES256, ec, good()), 401},
		{"no JWT", "Bearer a.b.c", 401},
		{"unsigned", "Bearer " + unsigned, 401},
		{"damaged", "Bearer " + damaged, 401},
		{"of another key", "Bearer " + token(t, jose.ES256, other, good()), 401},
		{"of another algorithm", "Bearer " + token(t, jose.PS256, rs, good()), 401},
		{"of the public key as HMAC", "Bearer " + token(t, jose.HS256, publicPEM(t, ec.Public()), good()), 401},
		{"for others", "Bearer " + token(t, jose.ES256, ec, with(map[string]any{"aud": "UDM"})), 401},
		{"for another instance", "Bearer " + token(t, jose.ES256, ec, with(map[string]any{"aud": []string{"x"}})), 401},
		{"for nobody", "Bearer " + token(t, jose.ES256, ec, with(map[string]any{"aud": nil})), 401},
		{"for a set", "Bearer " + token(t, jose.ES256, ec, with(map[string]any{"producerNfSetId": "set1"})), 401},
		{"for a service set", "Bearer " + token(t, jose.ES256, ec, with(map[string]any{
			"producerNfServiceSetId": "set1"})), 401},
		{"over", "Bearer " + token(t, jose.ES256, ec, with(map[string]any{"exp": now.Add(-2 * leeway).Unix()})), 401},
		{"without an end", "Bearer " + token(t, jose.ES256, ec, with(map[string]any{"exp": nil})), 401},
		{"whose end is a text", "Bearer " + token(t, jose.ES256, ec, with(map[string]any{"exp": "2030"})), 401},
		{"not yet", "Bearer " + token(t, jose.ES256, ec, with(map[string]any{"nbf": now.Add(2 * leeway).Unix()})), 401},
		{"of no issuer", "Bearer " + token(t, jose.ES256, ec, with(map[string]any{"iss": nil})), 401},
		{"of no subject", "Bearer " + token(t, jose.ES256, ec, with(map[string]any{"sub": nil})), 401},
		{"too long", "Bearer " + token(t, jose.ES256, ec, with(map[string]any{"x": strings.Repeat("x", maxToken)})),
			401},
		{"of another scope", "Bearer " + token(t, jose.ES256, ec, with(map[string]any{"scope": "nudm-sdm"})), 403},
		{"of a longer scope", "Bearer " + token(t, jose.ES256, ec, with(map[string]any{"scope": scope + ":x"})), 403},
		{"of no scope", "Bearer " + token(t, jose.ES256, ec, with(map[string]any{"scope": nil})), 403},
	} {
		var why error
		checked := 0
		o := Options{Tokens: tokens, Refused: func(_ *http.Request, err error) { why = err },
			Check: func(*http.Request, *kmev1.CheckEquipmentRequest) (*kmev1.CheckEquipmentResponse, error) {
				checked++
				return &kmev1.CheckEquipmentResponse{Status: kmev1.EquipmentStatus_WHITELISTED}, nil
			}}
		var header []string
		if c.header != "" {
			header = []string{"Authorization: " + c.header}
		}
		a := asked(t, o, "GET", path+"?"+pei, header...)
		if a.Code != c.code || (checked == 1) != (c.code == 200) || (why != nil) != (c.code != 200) ||
			(c.code == 200) != (a.Header().Get("WWW-Authenticate") == "") {
			t.Errorf("a token %s: %d, %s, checked %d times, %v", c.name, a.Code, a.Body, checked, why)
		}
		if token := strings.TrimPrefix(c.header, "Bearer "); why != nil && len(token) > 20 &&
			strings.Contains(why.Error(), token) {
			t.Errorf("the token is in the log: %v", why)
		}
		if a.Code == http.StatusUnauthorized && strings.Contains(a.Body.String(), "exp") {
			t.Errorf("a token %s: %s says why", c.name, a.Body)
		}
		both := asked(t, o, "GET", path+"?"+pei, "Authorization: "+c.header, "Authorization: "+c.header)
		if both.Code != 401 {
			t.Errorf("a token %s, twice: %d", c.name, both.Code)
		}
	}
}

func TestParseTokensRefuses(t *testing.T) {
	ec := publicPEM(t, newEC(t, elliptic.P256()).Public())
	weak := must.Get[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 1024))
	private := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY",
		Bytes: must.Get[[]byte](t)(x509.MarshalPKCS8PrivateKey(weak))})
	for want, keys := range map[string][]byte{
		"of which none is damaged": nil,
		"none is damaged":          append(ec, ec[:len(ec)/2]...),
		"ECDSA on P-256":           publicPEM(t, newEC(t, elliptic.P384()).Public()),
		"RSA of 2048 bits":         publicPEM(t, weak.Public()),
		"a PRIVATE KEY":            private,
		"cannot be read":           pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{1}}),
	} {
		if _, err := ParseTokens(keys, ""); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %q", err, want)
		}
	}
	tokens := must.Get[*Tokens](t)(ParseTokens(ec, ""))
	if _, err := tokens.claims(""); err == nil || errors.Is(err, errNotRegistered) {
		t.Error(err)
	}
}

func FuzzToken(f *testing.F) {
	ec := newEC(f, elliptic.P256())
	tokens := must.Get[*Tokens](f)(ParseTokens(publicPEM(f, ec.Public()), instance))
	signed := token(f, jose.ES256, ec, good())
	f.Add(signed)
	f.Add("a.b.c")
	f.Fuzz(func(t *testing.T, text string) {
		if _, err := tokens.claims(text); err == nil && text != signed {
			t.Errorf("%q is good", text)
		}
	})
}
