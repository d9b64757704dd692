package ck

import (
	"slices"

	"github.com/miekg/pkcs11"
)

// Optional has attributes that some tokens do not support, and without which our objects still work. NSS softoken has
// none of them in token objects: C_GenerateKey with one of them is CKR_GENERAL_ERROR. The doctor sees what keys lose by
// that when it copies one, and when it unwraps by other mechanisms.
var Optional = Join(Attributes{Attr(pkcs11.CKA_COPYABLE, false), Attr(pkcs11.CKA_DESTROYABLE, false)},
	Mechanisms(pkcs11.CKM_AES_KEY_WRAP))

// Refused has the return codes for a template that a token does not support. None says which attribute is meant, and
// some have other meanings, too.
var Refused = []pkcs11.Error{
	pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, pkcs11.CKR_ATTRIBUTE_READ_ONLY,
	pkcs11.CKR_TEMPLATE_INCONSISTENT, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED,
}

// Fitting makes an object by a template without the optional attributes that the token does not support. If a token
// refuses the whole template, it finds these out by trying each optional attribute on an object for that purpose.
func (s *Session) Fitting(
	a Attributes, make func(Attributes) (pkcs11.ObjectHandle, error),
) (pkcs11.ObjectHandle, error) {
	lacks := s.lacks.Load()
	h, err := make(leavingOut(a, lacks))
	if err == nil || !IsCKR(err, Refused...) {
		return h, err
	}
	for i, o := range Optional {
		if lacks&(1<<i) == 0 && has(a, o.Type) && s.lacking(o) {
			lacks |= 1 << i
		}
	}
	if lacks == s.lacks.Load() {
		return h, err
	}
	s.lacks.Or(lacks)
	return make(leavingOut(a, lacks))
}

func has(a Attributes, typ uint) bool {
	return slices.ContainsFunc(a, func(e *pkcs11.Attribute) bool { return e.Type == typ })
}

// leavingOut leaves out those of Optional that are in lacks.
func leavingOut(a Attributes, lacks uint32) Attributes {
	for i, o := range Optional {
		if lacks&(1<<i) != 0 && has(a, o.Type) {
			a = Without(a, o.Type)
		}
	}
	return a
}

// lacking tries whether the token refuses a token object just because of an attribute. It tries more than once: after a
// passing fault, a key would be made without its protection for good.
func (s *Session) lacking(attribute *pkcs11.Attribute) bool {
	try := func(more ...*pkcs11.Attribute) error {
		h, err := s.Ctx.GenerateKey(s.ID, Mechanism(pkcs11.CKM_AES_KEY_GEN),
			Join(Use(Usages), more, Unextractable, Attributes{
				Attr(pkcs11.CKA_TOKEN, true), Attr(pkcs11.CKA_PRIVATE, false),
				Attr(pkcs11.CKA_LABEL, "kme trial"), Attr(pkcs11.CKA_VALUE_LEN, 32),
			}))
		if err == nil {
			err = s.Destroy(h)
		}
		return err
	}
	refused := func() bool { return IsCKR(try(attribute), Refused...) }
	return refused() && try() == nil && refused()
}
