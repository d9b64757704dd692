package hsmkeys

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"
)

// Here is reported what an auditor asks of a token and of the keys in it. They are looked at; nothing is tried on them.

// An Identity is what a token says of itself.
type Identity struct {
	Manufacturer    string   `json:"manufacturer"`
	Model           string   `json:"model"`
	Serial          string   `json:"serial"`
	Label           string   `json:"label"`
	HardwareVersion string   `json:"hardware_version"`
	FirmwareVersion string   `json:"firmware_version"`
	Library         string   `json:"library"` // the PKCS #11 module
	LibraryVersion  string   `json:"library_version"`
	Cryptoki        string   `json:"cryptoki"`       // the version of PKCS #11 that the module implements
	PINs            []string `json:"pins,omitempty"` // what the token says of its PINs that is not as it should be
	Weak            []string `json:"weak,omitempty"` // what was accepted when it was initialised
	Dedicated       Side     `json:"role,omitempty"` // whose it is
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

// Identity asks the token what it is.
func (t *Token) Identity(ctx context.Context) (id Identity, err error) {
	return do(ctx, t, "ask the token what it is", func(s *session) (id Identity, err error) {
		info, err := s.GetTokenInfo(t.slot)
		if err != nil {
			return id, explain("ask the token what it is", err)
		}
		library, err := s.GetInfo()
		if err != nil {
			return id, explain("ask the module what it is", err)
		}
		version := func(v pkcs11.Version) string { return fmt.Sprintf("%d.%d", v.Major, v.Minor) }
		id = Identity{
			Manufacturer: trim(info.ManufacturerID), Model: trim(info.Model),
			Serial: t.Serial(), Label: trim(info.Label),
			HardwareVersion: version(info.HardwareVersion), FirmwareVersion: version(info.FirmwareVersion),
			Library:        strings.TrimSpace(trim(library.ManufacturerID) + " " + trim(library.LibraryDescription)),
			LibraryVersion: version(library.LibraryVersion), Cryptoki: version(library.CryptokiVersion),
		}
		for _, f := range pinFlags {
			if info.Flags&f.flag != 0 {
				id.PINs = append(id.PINs, f.says)
			}
		}
		if d, err := t.dedication(s); err == nil {
			id.Dedicated, id.Weak = d.Side, d.Weak
		}
		return id, nil
	})
}

// trim takes off what fills the fields of CK_TOKEN_INFO.
func trim(field string) string { return strings.TrimRight(field, " \x00") }

// A keyShape is how keys of a role are on a side, whose attributes the doctor compares.
type keyShape struct {
	made     bool   // in this token, and not taken in; so CKA_LOCAL and CKA_ALWAYS_SENSITIVE are set
	restored bool   // it may come from a backup, too
	stays    bool   // it never was EXTRACTABLE
	usages   []uint // all that it is for
}

var shapes = map[Side]map[Role]keyShape{
	Factory: {
		RoleSigning:   {made: true, stays: true, usages: []uint{pkcs11.CKA_SIGN}},
		RoleInjection: {made: true, usages: []uint{pkcs11.CKA_WRAP}},
		RoleKEK:       {made: true, usages: []uint{pkcs11.CKA_WRAP}},
		RoleLot:       {made: true, usages: []uint{pkcs11.CKA_DECRYPT}},
	},
	Operator: {
		RoleStorage:   {made: true, restored: true, usages: []uint{pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP}},
		RoleLedger:    {made: true, restored: true, usages: []uint{pkcs11.CKA_SIGN}},
		RoleTransport: {made: true, stays: true, usages: []uint{pkcs11.CKA_UNWRAP}},
		RoleKEK:       {usages: []uint{pkcs11.CKA_UNWRAP}},
		RoleLot:       {usages: []uint{pkcs11.CKA_DECRYPT}},
	},
}

// attributeNames are the names of those attributes that are compared.
var attributeNames = map[uint]string{
	pkcs11.CKA_LOCAL:             "CKA_LOCAL",
	pkcs11.CKA_ALWAYS_SENSITIVE:  "CKA_ALWAYS_SENSITIVE",
	pkcs11.CKA_NEVER_EXTRACTABLE: "CKA_NEVER_EXTRACTABLE",
	pkcs11.CKA_SENSITIVE:         "CKA_SENSITIVE",
	pkcs11.CKA_EXTRACTABLE:       "CKA_EXTRACTABLE",
	pkcs11.CKA_WRAP_WITH_TRUSTED: "CKA_WRAP_WITH_TRUSTED",
	pkcs11.CKA_TRUSTED:           "CKA_TRUSTED",
	pkcs11.CKA_SIGN:              "CKA_SIGN",
	pkcs11.CKA_VERIFY:            "CKA_VERIFY",
	pkcs11.CKA_ENCRYPT:           "CKA_ENCRYPT",
	pkcs11.CKA_DECRYPT:           "CKA_DECRYPT",
	pkcs11.CKA_WRAP:              "CKA_WRAP",
	pkcs11.CKA_UNWRAP:            "CKA_UNWRAP",
	pkcs11.CKA_DERIVE:            "CKA_DERIVE",
}

// keys reports every private and secret key of the token.
func (x *trial) keys() {
	for _, class := range []uint{pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_SECRET_KEY} {
		found, err := x.s.findObjects(attributes{attr(pkcs11.CKA_CLASS, class), attr(pkcs11.CKA_TOKEN, true)})
		if x.away(err) {
			return
		}
		for _, h := range found {
			k, label, err := x.s.whose(h)
			if x.away(err) {
				return
			}
			shape, ours := shapes[x.side][k.Role]
			switch {
			case ours:
				x.key(class, h, label, k.Role, shape)
			case strings.HasPrefix(label, "kme ") && label != dedicationLabel:
				x.report = append(x.report, Finding{
					Check: fmt.Sprintf("key %q", label), For: "nothing that is known", Required: true, Consequence: x.unknown(label),
				})
			}
		}
	}
}

// unknown says what to do about a key with a label as keys of ours have, which is of no role.
func (x *trial) unknown(label string) string {
	switch {
	case x.side == Operator && strings.HasPrefix(label, restoreLabel):
		return "it waits for keysvc backup restore, which destroys it; if no backup is under way, remove it with the token's own tool"
	case x.side == Operator && strings.HasPrefix(label, rotationLabel):
		return "unless a rotation is under way, an interrupted one has left it: run keysvc storage rotate again, which destroys it"
	}
	return "it has a label as keys of ours have, and is none of the " + string(x.side) + "'s: remove it with the token's own tool"
}

// key compares a key with what its role asks for.
func (x *trial) key(class uint, h pkcs11.ObjectHandle, label string, role Role, want keyShape) {
	f := Finding{Check: fmt.Sprintf("key %q", label), For: "taken in", OK: true, Required: true}
	if f.Attributes = map[string]bool{}; want.made {
		f.For = "made in this token"
	}
	var wrong, unsaid []string
	get := func(attribute uint) bool {
		value, there := x.flag(h, attribute)
		if there {
			f.Attributes[attributeNames[attribute]] = value
		}
		return value
	}
	expect := func(attribute uint, should bool) bool {
		value, there := x.flag(h, attribute)
		if name := attributeNames[attribute]; there {
			f.Attributes[name] = value
			if value != should {
				wrong = append(wrong, fmt.Sprintf("%s is %v", name, value))
			}
		} else if should {
			unsaid = append(unsaid, name)
		}
		return there && value == should
	}

	expect(pkcs11.CKA_SENSITIVE, true)
	leaves := get(pkcs11.CKA_EXTRACTABLE)
	if want.stays || !want.made {
		expect(pkcs11.CKA_EXTRACTABLE, false)
	} else if trusted := get(pkcs11.CKA_WRAP_WITH_TRUSTED); leaves && !trusted {
		wrong = append(wrong, "it is CKA_EXTRACTABLE, and not CKA_WRAP_WITH_TRUSTED: it leaves under any key")
	}
	expect(pkcs11.CKA_TRUSTED, slices.Contains(trustedRoles[x.side], role))
	known := usages
	if class == pkcs11.CKO_PRIVATE_KEY {
		known = privateUsages
	}
	for _, u := range known {
		expect(u, slices.Contains(want.usages, u))
	}
	if slices.Contains(want.usages, pkcs11.CKA_UNWRAP) {
		if size, err := x.s.size(h, pkcs11.CKA_UNWRAP_TEMPLATE); !x.away(err) && (err != nil || size == 0) {
			wrong = append(wrong, "it has no CKA_UNWRAP_TEMPLATE: what it unwraps can be had in clear")
		}
	}
	if names := x.readable(class, h); len(names) > 0 {
		wrong = append(wrong, "the token would give "+strings.Join(names, ", "))
	}
	// What the token says of the key's past.
	past := len(wrong)
	made := want.made
	if want.restored && !get(pkcs11.CKA_LOCAL) {
		made = false
	}
	expect(pkcs11.CKA_LOCAL, made)
	expect(pkcs11.CKA_ALWAYS_SENSITIVE, made)
	expect(pkcs11.CKA_NEVER_EXTRACTABLE, made && (want.stays || want.restored && !leaves))

	switch {
	case len(wrong) > 0:
		f.OK, f.Consequence = false, "it is not as "+string(role)+" keys are made: "+strings.Join(wrong, "; ")
		if past == 0 && want.made {
			f.Consequence += ": it may have been known outside the token; make another"
		}
	case len(unsaid) > 0:
		f.OK, f.Required, f.Consequence = false, false, "the token does not say "+strings.Join(unsaid, ", ")
	case want.made && !made:
		f.OK, f.Required = false, false
		f.Consequence = "it was not made in this token: right only for a key that was restored from a backup"
	case role == RoleTransport:
		f.OK, f.Required = false, false
		f.Consequence = "it waits for its enrolment; if none is under way, end it: keysvc transport list, keysvc transport destroy"
	}
	x.report = append(x.report, f)
}

// pins reports what the token says of its PINs.
func (id Identity) pins() Finding {
	const what, means = "nothing is wrong with the PINs", "whoever has a PIN has what it gives"
	return Finding{Check: what, For: means, OK: len(id.PINs) == 0, Consequence: strings.Join(id.PINs, "; ")}
}
