package doctor

import (
	"fmt"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
)

// Keys are only read, as an auditor would: nothing is tried with them.

// A keyShape says how a role's keys are on a side. The doctor compares their attributes with it.
type keyShape struct {
	made     bool   // in this token, and not imported; so CKA_LOCAL and CKA_ALWAYS_SENSITIVE are set
	restored bool   // it may come from a backup, too
	stays    bool   // it never was EXTRACTABLE
	usages   []uint // all that it is for
}

var shapes = map[keyspec.Side]map[keyspec.Role]keyShape{
	keyspec.Factory: {
		keyspec.RoleSigning:   {made: true, stays: true, usages: []uint{pkcs11.CKA_SIGN}},
		keyspec.RoleInjection: {made: true, usages: []uint{pkcs11.CKA_WRAP}},
		keyspec.RoleKEK:       {made: true, usages: []uint{pkcs11.CKA_WRAP}},
		keyspec.RoleLot:       {made: true, usages: []uint{pkcs11.CKA_DECRYPT}},
	},
	keyspec.Operator: {
		keyspec.RoleStorage:   {made: true, restored: true, usages: []uint{pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP}},
		keyspec.RoleLedger:    {made: true, restored: true, usages: []uint{pkcs11.CKA_SIGN}},
		keyspec.RoleTransport: {made: true, stays: true, usages: []uint{pkcs11.CKA_UNWRAP}},
		keyspec.RoleKEK:       {usages: []uint{pkcs11.CKA_UNWRAP}},
		keyspec.RoleLot:       {usages: []uint{pkcs11.CKA_DECRYPT}},
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
		found, err := x.s.Find(ck.Attributes{ck.Attr(pkcs11.CKA_CLASS, class), ck.Attr(pkcs11.CKA_TOKEN, true)})
		if x.away(err) {
			return
		}
		for _, h := range found {
			k, label, err := keyspec.Whose(x.s, h)
			if x.away(err) {
				return
			}
			shape, ours := shapes[x.side][k.Role]
			switch {
			case ours:
				x.key(class, h, label, k.Role, shape)
			case keyspec.IsOurs(label):
				x.report = append(x.report, Finding{
					Check: fmt.Sprintf("key %q", label), For: "nothing that is known", Required: true,
					Consequence: x.unknown(label),
				})
			}
		}
	}
}

// unknown says what to do about a key whose label looks like ours, but whose role is unknown.
func (x *trial) unknown(label string) string {
	switch {
	case x.side == keyspec.Operator && strings.HasPrefix(label, keyspec.RestoreLabel):
		return "it waits for keysvc backup restore, which destroys it; if no backup is under way, remove it with the " +
			"token's own tool"
	case x.side == keyspec.Operator && strings.HasPrefix(label, keyspec.RotationLabel):
		return "unless a rotation is under way, an interrupted one has left it: run keysvc storage rotate again, " +
			"which destroys it"
	}
	return "it has a label as keys of ours have, and is none of the " + string(x.side) +
		"'s: remove it with the token's own tool"
}

// key compares a key with what its role asks for.
func (x *trial) key(class uint, h pkcs11.ObjectHandle, label string, role keyspec.Role, want keyShape) {
	f := Finding{Check: fmt.Sprintf("key %q", label), For: "imported", OK: true, Required: true}
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
	expect := func(attribute uint, should bool) {
		value, there := x.flag(h, attribute)
		if name := attributeNames[attribute]; there {
			f.Attributes[name] = value
			if value != should {
				wrong = append(wrong, fmt.Sprintf("%s is %v", name, value))
			}
		} else if should {
			unsaid = append(unsaid, name)
		}
	}

	expect(pkcs11.CKA_SENSITIVE, true)
	leaves := get(pkcs11.CKA_EXTRACTABLE)
	if want.stays || !want.made {
		expect(pkcs11.CKA_EXTRACTABLE, false)
	} else if trusted := get(pkcs11.CKA_WRAP_WITH_TRUSTED); leaves && !trusted {
		wrong = append(wrong, "it is CKA_EXTRACTABLE, and not CKA_WRAP_WITH_TRUSTED: it leaves under any key")
	}
	expect(pkcs11.CKA_TRUSTED, slices.Contains(trustedRoles[x.side], role))
	known := ck.Usages
	if class == pkcs11.CKO_PRIVATE_KEY {
		known = ck.PrivateUsages
	}
	for _, u := range known {
		expect(u, slices.Contains(want.usages, u))
	}
	anyhow := false // it unwraps by every mechanism
	if slices.Contains(want.usages, pkcs11.CKA_UNWRAP) {
		size, err := x.s.Size(h, pkcs11.CKA_ALLOWED_MECHANISMS)
		anyhow = !x.away(err) && (err != nil || size == 0)
		if size, err := x.s.Size(h, pkcs11.CKA_UNWRAP_TEMPLATE); !x.away(err) && (err != nil || size == 0) {
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
	case role == keyspec.RoleTransport:
		f.OK, f.Required = false, false
		f.Consequence = "it waits for its enrolment; if none is under way, end it: keysvc transport list, keysvc " +
			"transport destroy"
	case anyhow:
		f.OK, f.Required = false, false
		f.Consequence = "it unwraps by every mechanism of the token, for it has no CKA_ALLOWED_MECHANISMS: if it was " +
			"made by an earlier release, replace it: keysvc storage rotate; for a KEK, enroll again"
	case want.made && !made:
		f.OK, f.Required = false, false
		f.Consequence = "it was not made in this token: right only for a key that was restored from a backup"
	}
	x.report = append(x.report, f)
}
