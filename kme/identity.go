package kme

import (
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

const (
	// SNRs is how many serial numbers a TAC has (3GPP TS 23.003 clause 6.2.1: six digits).
	SNRs = 1_000_000

	// IMEIDigits is how many digits the canonical form of an IMEI has.
	IMEIDigits = 14

	tacDigits = 8
)

// An IMEI is the identity of a device: the 14 digits of TAC and SNR. The check digit and the software
// version of the longer forms are not part of it. The zero IMEI is not valid.
type IMEI struct{ digits string }

// ParseIMEI accepts the three forms of 3GPP TS 23.003 clause 6.2: 14 digits; 15, whose last must be the
// right Luhn check digit; 16 (an IMEISV), whose last two are the software version and dropped.
func ParseIMEI(s string) (IMEI, error) {
	if !allDigits(s) {
		return IMEI{}, errors.New("an IMEI has digits only")
	}
	switch len(s) {
	case IMEIDigits, IMEIDigits + 2:
	case IMEIDigits + 1:
		if want := luhn(s[:IMEIDigits]); s[IMEIDigits] != want {
			return IMEI{}, fmt.Errorf("the IMEI's check digit is %c, but its other digits make %c: check for a "+
				"typing error", s[IMEIDigits], want)
		}
	default:
		return IMEI{}, fmt.Errorf("an IMEI has 14 digits, 15 with its check digit, or 16 with its software version; "+
			"this has %d", len(s))
	}
	return IMEI{digits: s[:IMEIDigits]}, nil
}

// ErrOtherIdentity is that a SUPI or PEI is well formed, and of a kind that is no IMSI or IMEI.
var ErrOtherIdentity = errors.New("another kind of identity")

// ParsePEI accepts the IMEIs among a 5G network's names of devices (3GPP TS 29.571 clause 5.3.2): "imei-" with 15
// digits and "imeisv-" with 16. The 15th digit of an IMEI is the check digit, or 0 as the device has sent it (TS 23.003
// clause 6.2.1). A MAC address or an EUI-64 is ErrOtherIdentity.
func ParsePEI(s string) (IMEI, error) {
	kind, digits, _ := strings.Cut(s, "-")
	switch {
	case kind == "imei" && len(digits) == IMEIDigits+1:
		return ParseIMEI(strings.TrimSuffix(digits, "0"))
	case kind == "imeisv" && len(digits) == IMEIDigits+2:
		return ParseIMEI(digits)
	case macOrEUI.MatchString(s):
		return IMEI{}, fmt.Errorf("the PEI is no IMEI: %w", ErrOtherIdentity)
	}
	return IMEI{}, errors.New(`a PEI is "imei-" and 15 digits, or "imeisv-" and 16`)
}

var macOrEUI = regexp.MustCompile(`^(mac(-[0-9a-fA-F]{2}){6}(-untrusted)?|eui(-[0-9a-fA-F]{2}){8})$`)

// NewIMEI is the IMEI of a serial number within a TAC.
func NewIMEI(tac TAC, snr int) (IMEI, error) {
	if tac == (TAC{}) || snr < 0 || snr >= SNRs {
		return IMEI{}, fmt.Errorf("no IMEI with TAC %q and serial number %d", tac.digits, snr)
	}
	return IMEI{digits: fmt.Sprintf("%s%06d", tac.digits, snr)}, nil
}

// String is the canonical form, 14 digits.
func (i IMEI) String() string { return i.digits }

// TAC is the type allocation code of the IMEI.
func (i IMEI) TAC() TAC {
	if i.digits == "" {
		return TAC{}
	}
	return TAC{digits: i.digits[:tacDigits]}
}

// SNR is the serial number within the TAC, 0 to 999999; -1 for the zero IMEI.
func (i IMEI) SNR() int {
	if i.digits == "" {
		return -1
	}
	n, _ := strconv.Atoi(i.digits[tacDigits:])
	return n
}

// MarshalText gives the canonical form.
func (i IMEI) MarshalText() ([]byte, error) { return []byte(i.digits), nil }
func (i IMEI) LogValue() slog.Value         { return slog.StringValue(i.digits) }

// UnmarshalText takes the canonical form only: in files and tables an IMEI has one spelling.
func (i *IMEI) UnmarshalText(b []byte) error {
	if len(b) != IMEIDigits {
		return fmt.Errorf("an IMEI here has %d digits", IMEIDigits)
	}
	return unmarshal(i, b, ParseIMEI)
}

// unmarshal parses into to, which an error leaves as it was.
func unmarshal[T any](to *T, text []byte, parse func(string) (T, error)) error {
	v, err := parse(string(text))
	if err == nil {
		*to = v
	}
	return err
}

// A TAC is the type allocation code of a device model: the first eight digits of its IMEIs.
type TAC struct{ digits string }

// ParseTAC accepts eight digits.
func ParseTAC(s string) (TAC, error) {
	if len(s) != tacDigits || !allDigits(s) {
		return TAC{}, fmt.Errorf("a TAC has %d digits", tacDigits)
	}
	return TAC{digits: s}, nil
}

func (t TAC) String() string               { return t.digits }
func (t TAC) MarshalText() ([]byte, error) { return []byte(t.digits), nil }

func (t *TAC) UnmarshalText(b []byte) error { return unmarshal(t, b, ParseTAC) }

// An IMSI is the identity of a subscription: MCC, MNC and MSIN, 6 to 15 digits (3GPP TS 23.003 clause
// 2.2; MCC has three digits and MNC two at least, so that shorter ones name no subscription). It is a type of
// its own because both it and an IMEI look like 15 digits. The zero IMSI is not valid.
type IMSI struct{ digits string }

// ParseIMSI accepts 6 to 15 digits.
func ParseIMSI(s string) (IMSI, error) {
	if len(s) < 6 || len(s) > 15 || !allDigits(s) {
		return IMSI{}, errors.New("an IMSI has 6 to 15 digits")
	}
	return IMSI{digits: s}, nil
}

// ParseSUPI accepts the IMSIs among a 5G network's names of subscriptions (3GPP TS 29.571 clause 5.3.2): "imsi-" and
// the IMSI. A network access identifier, or a GCI or GLI, is ErrOtherIdentity.
func ParseSUPI(s string) (IMSI, error) {
	kind, name, _ := strings.Cut(s, "-")
	switch {
	case kind == "imsi":
		return ParseIMSI(name)
	case slices.Contains([]string{"nai", "gci", "gli"}, kind) && name != "":
		return IMSI{}, fmt.Errorf("the SUPI is no IMSI: %w", ErrOtherIdentity)
	}
	return IMSI{}, errors.New(`a SUPI is "imsi-" and an IMSI`)
}

func (i IMSI) String() string               { return i.digits }
func (i IMSI) MarshalText() ([]byte, error) { return []byte(i.digits), nil }
func (i IMSI) LogValue() slog.Value         { return slog.StringValue(i.digits) }

func (i *IMSI) UnmarshalText(b []byte) error { return unmarshal(i, b, ParseIMSI) }

// An Origin names who at the other end of the network asked: the Origin-Host of an MME, the id of an AMF. Its zero
// value stands for the only peer of a caller that has one.
type Origin struct{ name string }

// maxOrigin is the length of the longest domain name (RFC 1035 clause 2.3.4), which a DiameterIdentity is.
const maxOrigin = 255

// ParseOrigin accepts up to 255 printable ASCII characters without spaces. Names of hosts have no case: it is kept in
// lower case.
func ParseOrigin(s string) (Origin, error) {
	if len(s) > maxOrigin {
		return Origin{}, fmt.Errorf("an origin has at most %d characters; this has %d", maxOrigin, len(s))
	}
	if strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return Origin{}, errors.New("an origin has printable ASCII characters only, and no spaces")
	}
	return Origin{name: strings.ToLower(s)}, nil
}

func (o Origin) String() string               { return o.name }
func (o Origin) MarshalText() ([]byte, error) { return []byte(o.name), nil }
func (o Origin) LogValue() slog.Value         { return slog.StringValue(o.name) }

func (o *Origin) UnmarshalText(b []byte) error { return unmarshal(o, b, ParseOrigin) }

// luhn is the check digit of the digits s (3GPP TS 23.003 annex B).
func luhn(s string) byte {
	sum := 0
	for i := range len(s) {
		d := int(s[len(s)-1-i] - '0')
		if i%2 == 0 { // the rightmost digit will stand left of the check digit
			if d *= 2; d > 9 {
				d -= 9
			}
		}
		sum += d
	}
	return '0' + byte((10-sum%10)%10)
}

func allDigits(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < '0' || r > '9' })
}
