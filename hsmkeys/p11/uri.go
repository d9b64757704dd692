package p11

import (
	"errors"
	"fmt"
	"os"
	"strings"

	pkcs11uri "github.com/stefanberger/go-pkcs11uri"

	"github.com/kmehsm/kmehsm/hsmkeys/pinsource"
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

// CheckPIN says whether the user PIN that a token's URI names can be read. The token is not asked.
func CheckPIN(s string) error {
	u, err := parseURI(s)
	if err == nil {
		_, err = pinsource.Read(u.pinSource)
	}
	return err
}
