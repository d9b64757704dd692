package api

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/base64"
	"encoding/json"
	"errors"
	"slices"
	"strings"

	"github.com/kmehsm/kmehsm/kme"
)

// pages makes and reads the tokens of ListBindings: the last IMSI of a page, encrypted, for one view of one client. All
// tokens have the same length. The AEAD chooses its nonces.
type pages struct{ cipher.AEAD }

func newPages(key kme.Secret) (p pages) {
	block, err := aes.NewCipher(key.Bytes())
	if err == nil {
		p.AEAD, err = cipher.NewGCMWithRandomNonce(block)
	}
	if err != nil { // the key does not have 32 bytes, which cannot be
		panic(err)
	}
	return p
}

const maxIMSI = 15

func (p pages) token(c *Client, imei kme.IMEI, after kme.IMSI) string {
	padded := after.String() + strings.Repeat(" ", maxIMSI-len(after.String()))
	return base64.RawURLEncoding.EncodeToString(p.Seal(nil, nil, []byte(padded), asked(c, imei)))
}

// after is the IMSI that a token has.
func (p pages) after(c *Client, imei kme.IMEI, token string) (string, error) {
	sealed, err := base64.RawURLEncoding.DecodeString(token)
	if err == nil {
		sealed, err = p.Open(nil, nil, sealed, asked(c, imei))
	}
	if err != nil {
		return "", malformed(errors.New("the page_token is none that this client was given for these bindings: begin " +
			"again without one"))
	}
	return strings.TrimRight(string(sealed), " "), nil
}

// asked is what a token is valid for: a client as configured, and the bindings that it asked for.
func asked(c *Client, imei kme.IMEI) []byte {
	out, err := json.Marshal([]any{c.Name, c.SAN, c.UID, slices.Sorted(slices.Values(c.PLMNs)), imei})
	if err != nil { // texts and numbers
		panic(err)
	}
	return out
}
