package n5geir

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

const (
	scope  = "n5g-eir-eic" // the service's name
	nfType = "5G_EIR"
	// maxToken is above any token of an NRF.
	maxToken = 8 << 10
	// leeway is how far the clocks of NRF and keysvc may be apart.
	leeway = 30 * time.Second
)

// Tokens are the access tokens of an NRF (TS 29.510 clause 6.3.5.2, TS 33.501 clause 13.4.1). They do not change.
type Tokens struct {
	keys     []any
	instance string // ours, which tokens may be for
	now      func() time.Time
}

// ParseTokens takes the public keys of an NRF, in PEM, and our NF instance id.
func ParseTokens(keys []byte, instance string) (*Tokens, error) {
	t := &Tokens{instance: instance, now: time.Now}
	for block, rest := pem.Decode(keys); block != nil; block, rest = pem.Decode(rest) {
		key, err := parseKey(block)
		if err != nil {
			return nil, err
		}
		t.keys = append(t.keys, key)
	}
	if len(t.keys) == 0 || len(t.keys) != strings.Count(string(keys), "-----BEGIN ") {
		return nil, errors.New("the NRF's keys are a file of PUBLIC KEYs or CERTIFICATEs in PEM, of which none is " +
			"damaged")
	}
	return t, nil
}

// parseKey gives the key that verifies ES256 or RS256 (RFC 7518 sections 3.3 and 3.4).
func parseKey(block *pem.Block) (key any, err error) {
	switch block.Type {
	case "PUBLIC KEY":
		key, err = x509.ParsePKIXPublicKey(block.Bytes)
	case "CERTIFICATE":
		var c *x509.Certificate
		if c, err = x509.ParseCertificate(block.Bytes); err == nil {
			key = c.PublicKey
		}
	}
	if err != nil {
		return nil, fmt.Errorf("a %s of the NRF's keys cannot be read: %w", block.Type, err)
	}
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() {
			return k, nil
		}
	case *rsa.PublicKey:
		if k.N.BitLen() >= 2048 {
			return k, nil
		}
	}
	return nil, fmt.Errorf("a %s of the NRF's keys is neither ECDSA on P-256 nor RSA of 2048 bits or more", block.Type)
}

// check refuses a request without a valid token. why is for the log only.
func (t *Tokens) check(h http.Header) (*problem, error) {
	if t == nil {
		return nil, nil
	}
	values := h.Values("Authorization")
	if len(values) == 0 {
		return unauthorized(http.StatusUnauthorized, ""), errors.New("there is no access token")
	}
	kind, token, _ := strings.Cut(values[0], " ")
	if len(values) > 1 || !strings.EqualFold(kind, "Bearer") || len(token) > maxToken {
		return unauthorized(http.StatusUnauthorized, "invalid_token"), errors.New("this is no access token")
	}
	c, err := t.claims(token)
	switch {
	case err != nil:
		return unauthorized(http.StatusUnauthorized, "invalid_token"), err
	case !slices.Contains(strings.Split(c.Scope, " "), scope):
		return unauthorized(http.StatusForbidden, "insufficient_scope"),
			fmt.Errorf("the access token of %s has scope %q, without %s", c.Subject, c.Scope, scope)
	}
	return nil, nil
}

// A claims is what is looked at of AccessTokenClaims (TS 29.510 clause 6.3.5.2.4).
type claims struct {
	jwt.Claims
	Scope string `json:"scope"`
	// A token for one set of producers is not for us, who are of none.
	ProducerNfSetID        string `json:"producerNfSetId"`
	ProducerNfServiceSetID string `json:"producerNfServiceSetId"`
}

// claims gives the claims of a token that is valid now, made by the NRF, and for us or for all EIRs.
func (t *Tokens) claims(token string) (c claims, err error) {
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256, jose.RS256})
	if err != nil {
		return c, err
	}
	for _, key := range t.keys {
		if err = parsed.Claims(key, &c); err == nil {
			break
		}
	}
	switch {
	case err != nil:
		return c, err
	case c.Issuer == "" || c.Subject == "" || c.Expiry == nil:
		return c, errors.New("the access token lacks iss, sub or exp")
	case !c.Audience.Contains(nfType) && (t.instance == "" || !c.Audience.Contains(t.instance)):
		return c, fmt.Errorf("the access token is for %q", c.Audience)
	case c.ProducerNfSetID != "" || c.ProducerNfServiceSetID != "":
		return c, errors.New("the access token is for a set of producers, and this is of none")
	}
	return c, c.ValidateWithLeeway(jwt.Expected{Time: t.now()}, leeway)
}

// unauthorized is RFC 6750 section 3.
func unauthorized(status int, reason string) *problem {
	challenge := `Bearer realm="N5g-eir", scope="` + scope + `"`
	if reason != "" {
		challenge += `, error="` + reason + `"`
	}
	return &problem{Status: status, Detail: reason, header: map[string]string{"WWW-Authenticate": challenge}}
}
