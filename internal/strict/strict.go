// Package strict reads input of others: JSON that has one meaning, base64url in the form of JOSE, a reason of one line,
// and a text that is short enough for a log.
package strict

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
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

// Parse takes exactly one JSON document, and no field that into does not have. The names of fields are in lower case,
// and none is there twice in an object: encoding/json would take the last, in whatever case, and others the first.
func Parse(data []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("there is more than one JSON document")
	}
	return checkNames(data)
}

// checkNames refuses a name of a field that is there twice, or in another form than ours, in a valid document. There, a
// string is a name if a colon follows.
func checkNames(data []byte) error {
	var open []map[string]bool // the names of each object that has begun; nil for an array
	for i := 0; i < len(data); i++ {
		switch data[i] {
		case '{':
			open = append(open, map[string]bool{})
		case '[':
			open = append(open, nil)
		case '}', ']':
			open = open[:len(open)-1]
		case '"':
			begin := i + 1
			for i = begin; data[i] != '"'; i++ {
				if data[i] == '\\' {
					i++
				}
			}
			if !bytes.HasPrefix(bytes.TrimLeft(data[i+1:], " \t\r\n"), []byte(":")) {
				continue
			}
			name, names := string(data[begin:i]), open[len(open)-1]
			if strings.ContainsFunc(name, func(c rune) bool { return c == '\\' || c > '~' || 'A' <= c && c <= 'Z' }) {
				return fmt.Errorf("the field %q is not written in plain lower case", name)
			}
			if names[name] {
				return fmt.Errorf("the field %q is there twice", name)
			}
			names[name] = true
		}
	}
	return nil
}

// Reason gives why somebody does something, as it is published and shown.
func Reason(reason string) (string, error) {
	reason = strings.TrimSpace(reason)
	if reason == "" || len(reason) > 200 || !utf8.ValidString(reason) || strings.ContainsFunc(reason, Hidden) {
		return "", errors.New("the reason has 1 to 200 bytes of text, in one line")
	}
	return reason, nil
}

// Short gives as much of a text as a line of a log shows: so nobody whose calls are refused fills a disk with them.
func Short(text string) string {
	const most = 256
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "") + "..."
}

// Hidden says whether a character has no sign of its own, but makes others appear elsewhere: in another line, over
// others, or in another direction (Unicode's Bidi_Control).
func Hidden(r rune) bool {
	return unicode.IsControl(r) || unicode.In(r, unicode.Bidi_Control, unicode.Zl, unicode.Zp)
}
