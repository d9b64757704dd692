package keyspec

import (
	"encoding/asn1"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
)

// OAEP is RSA-OAEP with SHA-1 and MGF1-SHA-1, JOSE's "RSA-OAEP" (RFC 7518 section 4.3): the one parameter set that
// every token has. OAEP does not rest on collision resistance, so SHA-1's weakness does not reach it (RFC 8017 appendix
// B.1 keeps it for that reason). Its parameters are in ck/direct.go.
const OAEP = pkcs11.CKM_RSA_PKCS_OAEP

// WrappedRoom is above the size of any wrapped key of ours: an RSA-4096 key as PKCS #8 in AES-KWP has some 2,400 bytes.
const WrappedRoom = 4096

var (
	P256Params, _ = asn1.Marshal(asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7})
	rsaExponent   = []byte{1, 0, 1} // kme.PublicExponent
)

// Traits are differences between tokens. The templates of keys depend on them.
type Traits struct {
	UnwrapTemplate bool // keys may have a CKA_UNWRAP_TEMPLATE; if not, they are made without
	LeavesTrusted  bool // WRAP_WITH_TRUSTED holds, and the user makes no key TRUSTED; if not, no key may leave
}

// Unwraps says what a key unwraps.
func (t Traits) Unwraps(what ck.Attributes) ck.Attributes {
	if !t.UnwrapTemplate {
		return nil
	}
	return ck.Nested(pkcs11.CKA_UNWRAP_TEMPLATE, what)
}

// Leaves is common to keys that leave the token in a backup, if the token can have one.
func (t Traits) Leaves() ck.Attributes {
	if !t.LeavesTrusted {
		return ck.Unextractable
	}
	return LeavesUnderTrusted
}

// LeavesUnderTrusted is common to keys that leave a token under a TRUSTED key, and under no other.
var LeavesUnderTrusted = ck.Attributes{
	ck.Attr(pkcs11.CKA_SENSITIVE, true), ck.Attr(pkcs11.CKA_EXTRACTABLE, true),
	ck.Attr(pkcs11.CKA_WRAP_WITH_TRUSTED, true),
}

// What our keys are used by. By CKA_ALLOWED_MECHANISMS, a token refuses all else: with CKM_AES_CBC_PAD or CKM_RSA_PKCS,
// C_UnwrapKey says whether a padding is right, which is a padding oracle (docs/decisions/0054-mechanisms.md). It holds
// both names of AES-KWP, since a token's next firmware may have the other one.
var (
	ByOAEP    = ck.Mechanisms(OAEP)
	ByKWP     = ck.Mechanisms(pkcs11.CKM_AES_KEY_WRAP_PAD, p11.AESKWP)
	BySealing = ck.Mechanisms(pkcs11.CKM_AES_KEY_WRAP)
	ByRawRSA  = ck.Mechanisms(pkcs11.CKM_RSA_X_509)
	byECDSA   = ck.Mechanisms(pkcs11.CKM_ECDSA)
	byHMAC    = ck.Mechanisms(pkcs11.CKM_SHA256_HMAC)
)

// Named is common to token objects, which are found again by their CKA_ID.
func Named(k Key) ck.Attributes {
	return ck.Attributes{
		ck.Attr(pkcs11.CKA_TOKEN, true), ck.Attr(pkcs11.CKA_ID, k.ID()), ck.Attr(pkcs11.CKA_LABEL, k.Label()),
	}
}

// The templates of a manufacturer's signing key, on P-256.
func SigningPublic(k Key) ck.Attributes {
	return ck.Frozen(Named(k), ck.Attributes{
		ck.Attr(pkcs11.CKA_EC_PARAMS, P256Params), ck.Attr(pkcs11.CKA_PRIVATE, false),
		ck.Attr(pkcs11.CKA_VERIFY, true), ck.Attr(pkcs11.CKA_ENCRYPT, false), ck.Attr(pkcs11.CKA_WRAP, false),
	})
}

func SigningPrivate(k Key) ck.Attributes {
	return ck.Frozen(Named(k), ck.Guarded(false), ck.Use(ck.PrivateUsages, pkcs11.CKA_SIGN), byECDSA)
}

// Lot is the template of a lot key in a factory's token. The object stays modifiable, because sealing changes it. Until
// then, WRAP_WITH_TRUSTED protects it.
var Lot = ck.Join(ck.Guarded(true), ck.Use(ck.PrivateUsages, pkcs11.CKA_DECRYPT), ByRawRSA, ck.Attributes{
	ck.Attr(pkcs11.CKA_WRAP_WITH_TRUSTED, true), ck.Attr(pkcs11.CKA_COPYABLE, false),
})

// StorageTemplate is the storage key's: a KME that is unwrapped with it always has the attributes that OpenPayload and
// EncryptRANDs give it.
func StorageTemplate(t Traits) ck.Attributes {
	return ck.Join(ck.Attributes{ck.Attr(pkcs11.CKA_PRIVATE, true)}, t.Leaves(),
		ck.Use(ck.Usages, pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP), BySealing, t.Unwraps(KME))
}

// LedgerTemplate is the ledger key's.
func LedgerTemplate(t Traits) ck.Attributes {
	return ck.Join(ck.Attributes{ck.Attr(pkcs11.CKA_PRIVATE, true)}, t.Leaves(),
		ck.Use(ck.Usages, pkcs11.CKA_SIGN), byHMAC)
}

// CarriedTemplate is that of a storage or ledger key that comes from another token.
func CarriedTemplate(t Traits, k Key) ck.Attributes {
	template, kind := LedgerTemplate(t), uint(pkcs11.CKK_GENERIC_SECRET)
	if k.Role == RoleStorage {
		template, kind = StorageTemplate(t), pkcs11.CKK_AES
	}
	return ck.Join(ck.Attributes{ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		ck.Attr(pkcs11.CKA_KEY_TYPE, kind)}, template)
}

// Restored is what storage and ledger key have in common: attributes that nobody who unwraps them can choose.
func Restored(t Traits) ck.Attributes {
	return ck.Join(t.Leaves(), ck.Attributes{ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY)},
		ck.Use([]uint{pkcs11.CKA_VERIFY, pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT, pkcs11.CKA_DERIVE}))
}

// The attributes of keys that are unwrapped and never leave the token again: nobody who unwraps them can choose others.
// A KEK cannot have a template of its own in here.
var (
	KME = unwrapped(pkcs11.CKO_SECRET_KEY, pkcs11.CKK_AES,
		ck.Use(ck.Usages, pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT))
	ImportedKEK = unwrapped(pkcs11.CKO_SECRET_KEY, pkcs11.CKK_AES, ck.Use(ck.Usages, pkcs11.CKA_UNWRAP))
	ImportedLot = unwrapped(pkcs11.CKO_PRIVATE_KEY, pkcs11.CKK_RSA, ck.Use(ck.PrivateUsages, pkcs11.CKA_DECRYPT))
)

func unwrapped(class, kind uint, usage ck.Attributes) ck.Attributes {
	return ck.Join(usage,
		ck.Attributes{ck.Attr(pkcs11.CKA_CLASS, class), ck.Attr(pkcs11.CKA_KEY_TYPE, kind)}, ck.Unextractable)
}

// A KME is a session object, for one use. It is not PRIVATE. That helps no other process, which cannot see session
// objects; and SoftHSM encrypts each attribute of a PRIVATE object in memory, which takes as long as the operation
// itself.
var (
	open = ck.Attributes{ck.Attr(pkcs11.CKA_TOKEN, false), ck.Attr(pkcs11.CKA_PRIVATE, false)}

	SealableKME = ck.Join(ck.Use(ck.Usages), ck.Attributes{
		ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), ck.Attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		ck.Attr(pkcs11.CKA_SENSITIVE, true), ck.Attr(pkcs11.CKA_EXTRACTABLE, true),
	}, open)
	UsableKME = ck.Join(KME, open)
)

// The two templates of a device's key pair on P-256; the private one does for RSA too. As a KME, it is not PRIVATE.
var (
	DevicePublic  = ck.Join(open, ck.Attributes{ck.Attr(pkcs11.CKA_EC_PARAMS, P256Params)})
	DevicePrivate = ck.Join(ck.Use(ck.PrivateUsages, pkcs11.CKA_SIGN), open, ck.Attributes{
		ck.Attr(pkcs11.CKA_SENSITIVE, true), ck.Attr(pkcs11.CKA_EXTRACTABLE, true),
		ck.Attr(pkcs11.CKA_WRAP_WITH_TRUSTED, false),
	})
)

// LotKeys fits the keys that a KEK wraps. DeviceKeys fits those that an injection key wraps; it fits no lot key.
var (
	LotKeys = ck.Attributes{
		ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), ck.Attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA),
	}
	DeviceKeys = ck.Attributes{
		ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), ck.Attr(pkcs11.CKA_WRAP_WITH_TRUSTED, false),
	}
)
