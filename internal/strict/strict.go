// Package strict reads input of others: JSON as one document without unknown fields, base64url in the form of JOSE, and
// a reason of one line.
package strict

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Base64 is bytes that JSON has as base64url without padding, as JOSE does (RFC 7515 section 2).
type Base64 []byte

func (b Base64) MarshalText() ([]byte, error) {
	return []byte(base64.RawURLEncoding.EncodeToString(b)), nil
}

// UnmarshalText takes the one form that bytes have: Go's decoder alone skips line breaks.
func (b *Base64) UnmarshalText(text []byte) error {
	v, err := base64.RawURLEncoding.Strict().DecodeString(string(text))
	if err != nil || bytes.ContainsAny(text, "\r\n") {
		return errors.New("not base64url without padding")
	}
	*b = v
	return nil
}

// Parse takes exactly one JSON document, and no field that into does not have.
func Parse(data []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("there is more than one JSON document")
	}
	return nil
}

// Reason gives why somebody does something, as it is published and shown.
func Reason(reason string) (string, error) {
	reason = strings.TrimSpace(reason)
	text := utf8.ValidString(reason) && !strings.ContainsFunc(reason, unicode.IsControl)
	if reason == "" || len(reason) > 200 || !text {
		return "", errors.New("the reason has 1 to 200 bytes of text, in one line")
	}
	return reason, nil
}
