package p11

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/miekg/pkcs11"
)

// A Slot is what a module says about a slot and its token without a login.
type Slot struct {
	ID           uint     `json:"slot"`
	Description  string   `json:"description"`
	Present      bool     `json:"present"` // there is a token in it
	Label        string   `json:"label,omitempty"`
	Serial       string   `json:"serial,omitempty"`
	Manufacturer string   `json:"manufacturer,omitempty"`
	Model        string   `json:"model,omitempty"`
	Firmware     string   `json:"firmware,omitempty"`
	Initialised  bool     `json:"initialised"`
	UserPIN      bool     `json:"user_pin"`               // it is set
	PINs         []string `json:"pins,omitempty"`         // what is not as it should be, see [SayPINs]
	FreePublic   *uint    `json:"free_public,omitempty"`  // bytes, where the token says so
	FreePrivate  *uint    `json:"free_private,omitempty"` // likewise
	Problem      string   `json:"problem,omitempty"`      // why the token cannot be asked
	URI          string   `json:"uri,omitempty"`          // RFC 7512; its pin-source is to be put in
}

// pinFlags are the flags about a token's PINs (PKCS #11 v2.40 section 3.2, CK_TOKEN_INFO).
var pinFlags = []struct {
	flag uint
	says string
}{
	{flag: pkcs11.CKF_USER_PIN_COUNT_LOW, says: "a wrong user PIN was tried since the last right one"},
	{flag: pkcs11.CKF_USER_PIN_FINAL_TRY, says: "the next wrong user PIN locks the token"},
	{flag: pkcs11.CKF_USER_PIN_LOCKED, says: "the user PIN is locked: the security officer must set a new one"},
	{flag: pkcs11.CKF_USER_PIN_TO_BE_CHANGED, says: "the user PIN is its maker's, or has expired: change it"},
	{flag: pkcs11.CKF_SO_PIN_COUNT_LOW, says: "a wrong security officer's PIN was tried since the last right one"},
	{flag: pkcs11.CKF_SO_PIN_FINAL_TRY, says: "the next wrong security officer's PIN locks the token"},
	{flag: pkcs11.CKF_SO_PIN_LOCKED, says: "the security officer's PIN is locked: nobody can be enrolled any more"},
	{flag: pkcs11.CKF_SO_PIN_TO_BE_CHANGED,
		says: "the security officer's PIN is its maker's, or has expired: change it"},
}

// SayPINs says what is wrong with a token's PINs, by its flags.
func SayPINs(flags uint) (all []string) {
	for _, f := range pinFlags {
		if flags&f.flag != 0 {
			all = append(all, f.says)
		}
	}
	return all
}

// ModuleOf gives the module that a token's URI names, and the string for its C_Initialize.
func ModuleOf(tokenURI string) (path, reserved string, err error) {
	u, err := parseURI(tokenURI)
	if err != nil {
		return "", "", err
	}
	return u.module, u.reserved, nil
}

// Slots asks a module for its slots and tokens, without a login; reserved is as in a URI's x-init-reserved.
func Slots(path, reserved string) ([]Slot, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("the PKCS #11 module cannot be read: %w: check the path, and that the token's driver "+
			"is installed", err)
	}
	path, err := filepath.Abs(path) // the URIs must work in any folder
	if err != nil {
		return nil, err
	}
	m, err := loadModule(path)
	if err != nil {
		return nil, err
	}
	if err := m.initialize(reserved); err != nil {
		return nil, fmt.Errorf("the PKCS #11 module %s cannot be used: %w: is its token connected, its configuration "+
			"right, for SoftHSM %s, and does it want %s in a token's URI?", path, err, softhsmConf(), initReserved)
	}
	all, err := m.slots(path, reserved)
	return all, errors.Join(err, m.finalize())
}

func (m *module) slots(path, reserved string) ([]Slot, error) {
	ids, err := m.GetSlotList(false)
	if err != nil {
		return nil, Explain("list the module's slots", err)
	}
	all := make([]Slot, len(ids))
	for i, id := range ids {
		s := &all[i]
		s.ID = id
		info, err := m.GetSlotInfo(id)
		if err != nil {
			s.Problem = Explain("ask for the slot", err).Error()
			continue
		}
		s.Description, s.Present = Trim(info.SlotDescription), info.Flags&pkcs11.CKF_TOKEN_PRESENT != 0
		if !s.Present {
			continue
		}
		t, err := m.GetTokenInfo(id)
		if err != nil {
			s.Problem = Explain("ask the token what it is", err).Error()
			continue
		}
		s.Label, s.Serial, s.Model = Trim(t.Label), Trim(t.SerialNumber), Trim(t.Model)
		s.Manufacturer = Trim(t.ManufacturerID)
		s.Firmware = fmt.Sprintf("%d.%d", t.FirmwareVersion.Major, t.FirmwareVersion.Minor)
		s.Initialised = t.Flags&pkcs11.CKF_TOKEN_INITIALIZED != 0
		s.UserPIN = t.Flags&pkcs11.CKF_USER_PIN_INITIALIZED != 0
		s.FreePublic, s.FreePrivate = free(t.FreePublicMemory), free(t.FreePrivateMemory)
		if s.Initialised { // without that, the flags mean nothing
			s.PINs = SayPINs(t.Flags)
			s.URI = tokenURI(s.Label, s.Serial, path, reserved)
		}
	}
	return all, nil
}

// free is how much memory there is; nil if the token does not say.
func free(n uint) *uint {
	if !told(n) {
		return nil
	}
	return &n
}

// tokenURI is the RFC 7512 URI of a token. Its pin-source has yet to name a file.
func tokenURI(label, serial, module, reserved string) string {
	var names []string
	for _, a := range [][2]string{{"token", label}, {"serial", serial}} {
		if a[1] != "" {
			names = append(names, a[0]+"="+escape(a[1]))
		}
	}
	uri := "pkcs11:" + strings.Join(names, ";") + "?module-path=" + strings.ReplaceAll(escape(module), "%2F", "/")
	if reserved != "" {
		uri += "&" + initReserved + "=" + escape(reserved)
	}
	return uri + "&pin-source=file:/PATH/TO/PIN"
}

// escape escapes all but letters, digits and -_.~, which no part of a URI takes for something else.
func escape(text string) string { return strings.ReplaceAll(url.QueryEscape(text), "+", "%20") }
