package ck

import (
	"slices"

	"github.com/miekg/pkcs11"
)

// Attributes are a template, or a part of one.
type Attributes = []*pkcs11.Attribute

// Attr is an attribute with its value.
func Attr(typ uint, value any) *pkcs11.Attribute { return pkcs11.NewAttribute(typ, value) }

// Usages are all usages of private and secret keys. A template sets or clears each of them: tokens choose what it
// leaves out, and SoftHSM chooses true.
var Usages = []uint{
	pkcs11.CKA_SIGN, pkcs11.CKA_VERIFY, pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT,
	pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP, pkcs11.CKA_DERIVE,
}

// PrivateUsages are the usages that a private key object has an attribute for.
var PrivateUsages = []uint{pkcs11.CKA_SIGN, pkcs11.CKA_DECRYPT, pkcs11.CKA_UNWRAP, pkcs11.CKA_DERIVE}

// Use allows exactly the usages named, of those that the kind of object knows.
func Use(known []uint, allowed ...uint) Attributes {
	var a Attributes
	for _, u := range known {
		a = append(a, Attr(u, slices.Contains(allowed, u)))
	}
	return a
}

// Guarded is common to all private and secret keys.
func Guarded(extractable bool) Attributes {
	return Attributes{
		Attr(pkcs11.CKA_PRIVATE, true), Attr(pkcs11.CKA_SENSITIVE, true), Attr(pkcs11.CKA_EXTRACTABLE, extractable),
	}
}

// Unextractable is a key that never leaves its token.
var Unextractable = Attributes{Attr(pkcs11.CKA_SENSITIVE, true), Attr(pkcs11.CKA_EXTRACTABLE, false)}

// Frozen makes a template that of an object which nobody can change or copy. Without it, whoever has the user PIN could
// add DECRYPT to a key that only wraps, and decrypt with it what it wrapped. MODIFIABLE comes last: SoftHSM sets
// attributes in their order, and of an unwrapped key it sets none after that one.
func Frozen(parts ...Attributes) Attributes {
	return append(Join(parts...), Attr(pkcs11.CKA_COPYABLE, false), Attr(pkcs11.CKA_MODIFIABLE, false))
}

// InSession makes a template of an object that ends with its session.
func InSession(parts ...Attributes) Attributes {
	return append(Join(parts...), Attr(pkcs11.CKA_TOKEN, false))
}

// Join joins parts to one template.
func Join(parts ...Attributes) Attributes { return slices.Concat(parts...) }

// Nested is an array attribute, such as CKA_UNWRAP_TEMPLATE, with its members. They cannot be nested again.
func Nested(typ uint, members ...Attributes) Attributes {
	all := Join(members...)
	return append(Attributes{{Type: typ, Value: []byte{byte(len(all))}}}, all...)
}

// Mechanisms allows a key the mechanisms named, and no other. Its value is an array of CK_ULONG, not a template.
func Mechanisms(allowed ...uint) Attributes {
	var value []byte
	for _, m := range allowed {
		value = append(value, Attr(pkcs11.CKA_ALLOWED_MECHANISMS, m).Value...)
	}
	return Attributes{{Type: pkcs11.CKA_ALLOWED_MECHANISMS, Value: value}}
}

// With is a template with other values of some attributes.
func With(template Attributes, changes ...*pkcs11.Attribute) Attributes {
	out := slices.Clone(template)
	for _, c := range changes {
		at := slices.IndexFunc(out, func(a *pkcs11.Attribute) bool { return a.Type == c.Type })
		if at < 0 {
			out = append(out, c)
		} else {
			out[at] = c
		}
	}
	return out
}

// Without is a template without some attributes.
func Without(template Attributes, types ...uint) Attributes {
	left := func(a *pkcs11.Attribute) bool { return slices.Contains(types, a.Type) }
	return slices.DeleteFunc(slices.Clone(template), left)
}

// IsTrue says of a boolean attribute's value whether it is CK_TRUE.
func IsTrue(value []byte) bool { return len(value) == 1 && value[0] == 1 }

// Mechanism makes a mechanism without a parameter, for calls of Session.Ctx.
func Mechanism(m uint) []*pkcs11.Mechanism { return []*pkcs11.Mechanism{pkcs11.NewMechanism(m, nil)} }
