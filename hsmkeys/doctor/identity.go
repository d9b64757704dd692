package doctor

import (
	"fmt"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
)

// An Identity is what a token says of itself.
type Identity struct {
	Manufacturer    string       `json:"manufacturer"`
	Model           string       `json:"model"`
	Serial          string       `json:"serial"`
	Label           string       `json:"label"`
	HardwareVersion string       `json:"hardware_version"`
	FirmwareVersion string       `json:"firmware_version"`
	Library         string       `json:"library"` // the PKCS #11 module
	LibraryVersion  string       `json:"library_version"`
	Cryptoki        string       `json:"cryptoki"`       // the version of PKCS #11 that the module implements
	PINs            []string     `json:"pins,omitempty"` // what the token says of its PINs that is not as it should be
	Weak            []string     `json:"weak,omitempty"` // what was accepted when it was initialised
	Dedicated       keyspec.Side `json:"role,omitempty"` // whose it is
}

// pinFlags are what a token says of its PINs (PKCS #11 v2.40 section 3.2, CK_TOKEN_INFO).
var pinFlags = []struct {
	flag uint
	says string
}{
	{pkcs11.CKF_USER_PIN_COUNT_LOW, "a wrong user PIN was tried since the last right one"},
	{pkcs11.CKF_USER_PIN_FINAL_TRY, "the next wrong user PIN locks the token"},
	{pkcs11.CKF_USER_PIN_LOCKED, "the user PIN is locked: the security officer must set a new one"},
	{pkcs11.CKF_USER_PIN_TO_BE_CHANGED, "the user PIN is its maker's, or has expired: change it"},
	{pkcs11.CKF_SO_PIN_COUNT_LOW, "a wrong security officer's PIN was tried since the last right one"},
	{pkcs11.CKF_SO_PIN_FINAL_TRY, "the next wrong security officer's PIN locks the token"},
	{pkcs11.CKF_SO_PIN_LOCKED, "the security officer's PIN is locked: nobody can be enrolled any more"},
	{pkcs11.CKF_SO_PIN_TO_BE_CHANGED, "the security officer's PIN is its maker's, or has expired: change it"},
}

// Identify asks the token what it is. Whose it is, and what was accepted, the caller knows.
func Identify(t *p11.Token, s *p11.Session) (id Identity, err error) {
	info, library, err := t.Ask(s)
	if err != nil {
		return id, err
	}
	version := func(v pkcs11.Version) string { return fmt.Sprintf("%d.%d", v.Major, v.Minor) }
	id = Identity{
		Manufacturer: p11.Trim(info.ManufacturerID), Model: p11.Trim(info.Model),
		Serial: t.Serial(), Label: p11.Trim(info.Label),
		HardwareVersion: version(info.HardwareVersion), FirmwareVersion: version(info.FirmwareVersion),
		Library: strings.TrimSpace(p11.Trim(library.ManufacturerID) + " " +
			p11.Trim(library.LibraryDescription)),
		LibraryVersion: version(library.LibraryVersion), Cryptoki: version(library.CryptokiVersion),
	}
	for _, f := range pinFlags {
		if info.Flags&f.flag != 0 {
			id.PINs = append(id.PINs, f.says)
		}
	}
	return id, nil
}

// ReportPINs reports what the token says of its PINs.
func (id Identity) ReportPINs() Finding {
	const what, means = "nothing is wrong with the PINs", "whoever has a PIN has what it gives"
	return Finding{Check: what, For: means, OK: len(id.PINs) == 0, Consequence: strings.Join(id.PINs, "; ")}
}
