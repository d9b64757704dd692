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

// Identify asks the token what it is. The caller adds whose the token is, and what was accepted.
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
	id.PINs = p11.SayPINs(info.Flags)
	return id, nil
}

// ReportPINs reports what the token says of its PINs.
func (id Identity) ReportPINs() Finding {
	const what, means = "nothing is wrong with the PINs", "whoever has a PIN has what it gives"
	return Finding{Check: what, For: means, OK: len(id.PINs) == 0, Consequence: strings.Join(id.PINs, "; ")}
}
