package p11

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	pkcs11uri "github.com/stefanberger/go-pkcs11uri"

	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/usage"
)

// A uri is what a token's RFC 7512 URI says. It holds no PIN, only where to find it.
type uri struct {
	module    string
	pinSource string
	reserved  string            // what the module wants at C_Initialize as pReserved
	token     map[string]string // path attributes that name the token, by their RFC 7512 names
}

// initReserved is a query attribute of our own (RFC 7512 section 2.4). p11-kit's module files call it so.
const initReserved = "x-init-reserved"

const uriExample = "for example pkcs11:token=LABEL?module-path=/usr/lib/softhsm/libsofthsm2.so" +
	"&pin-source=file:/etc/kmehsm/pin"

// tokenAttributes are the path attributes of RFC 7512 section 2.3 that name a token.
var tokenAttributes = []string{"token", "serial", "manufacturer", "model"}

// CheckURI refuses what is no token's URI. Its error has no PIN.
func CheckURI(s string) error {
	_, err := parseURI(s)
	return err
}

func parseURI(s string) (u *uri, err error) {
	defer func() { err = usage.Mark(err) }()
	if s == "" {
		return nil, usage.In("token", errors.New("no token: name one, here or in KMEHSM_TOKEN, by its RFC 7512 URI, "+
			uriExample))
	}
	p := pkcs11uri.New()
	if err := p.Parse(s); err != nil {
		// The parser's message may quote the URI, and with it a PIN.
		return nil, errors.New("the token's URI is not one of RFC 7512, " + uriExample)
	}
	if _, ok := p.GetQueryAttribute("pin-value", false); ok {
		return nil, errors.New("the token's URI has a pin-value: a PIN on a command line is open to every user of " +
			"the machine; put it in a file and name that with pin-source=file:/path")
	}
	u = &uri{token: map[string]string{}}
	u.module, _ = p.GetQueryAttribute("module-path", false)
	if u.module == "" {
		return nil, errors.New("the token's URI names no PKCS #11 module: add module-path, " + uriExample)
	}
	if _, err := os.Stat(u.module); err != nil {
		return nil, fmt.Errorf("the PKCS #11 module cannot be read: %w: check module-path, and that the token's "+
			"driver is installed", err)
	}
	u.pinSource, _ = p.GetQueryAttribute("pin-source", false)
	u.reserved, _ = p.GetQueryAttribute(initReserved, false)
	if strings.ContainsRune(u.reserved, 0) {
		return nil, fmt.Errorf("the %s of the token's URI has a zero byte: write it without", initReserved)
	}
	for _, name := range tokenAttributes {
		if v, ok := p.GetPathAttribute(name, false); ok {
			u.token[name] = v
		}
	}
	if u.token["token"] == "" && u.token["serial"] == "" {
		return nil, errors.New("the token's URI names no token: add token=LABEL or serial=NUMBER, " + uriExample)
	}
	return u, nil
}

// A PIN is a user's or a security officer's. Printed, it shows nothing of the PIN.
type PIN string

const redactedPIN = "[PIN]"

func (PIN) String() string               { return redactedPIN }
func (PIN) GoString() string             { return redactedPIN }
func (PIN) LogValue() slog.Value         { return slog.StringValue(redactedPIN) }
func (PIN) MarshalText() ([]byte, error) { return []byte(redactedPIN), nil }
func (PIN) Format(f fmt.State, _ rune)   { io.WriteString(f, redactedPIN) }

// ReadPIN takes a PIN from a pin-source: a file: URI or an absolute path (RFC 7512 section 2.4). One newline at the
// end belongs to the file, not to the PIN. Its errors never quote the file's content.
func ReadPIN(source string) (_ PIN, err error) {
	defer func() { err = usage.Mark(err) }()
	if source == "" {
		return "", errors.New("no PIN: add pin-source=file:/path to the token's URI")
	}
	path := source
	if rest, ok := strings.CutPrefix(source, "file:"); ok {
		p, err := url.PathUnescape(strings.TrimPrefix(rest, "//"))
		if err != nil {
			return "", errors.New("the pin-source is no valid file: URI")
		}
		path = p
	}
	if !filepath.IsAbs(path) {
		// It may be the PIN itself.
		return "", errors.New("the pin-source is neither file:/path nor an absolute path")
	}
	switch info, err := os.Stat(path); {
	case err != nil:
		return "", fmt.Errorf("the PIN cannot be read: %w", err)
	case info.IsDir():
		return "", fmt.Errorf("the PIN file %s is a folder: name the file in it", path)
	case durable.Closed(path, info) != nil:
		return "", fmt.Errorf("the PIN file %w: chmod 0600 it, and change the PIN if others had access",
			durable.Closed(path, info))
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("the PIN cannot be read: %w", err)
	}
	pin := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
	if pin == "" {
		return "", fmt.Errorf("the PIN file %s is empty", path)
	}
	return PIN(pin), nil
}

// CheckPIN says whether the user PIN that a token's URI names can be read. The token is not asked.
func CheckPIN(s string) error {
	u, err := parseURI(s)
	if err == nil {
		_, err = ReadPIN(u.pinSource)
	}
	return err
}
