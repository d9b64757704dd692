package doctor

import (
	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
)

// A need is a mechanism that a role cannot do without, or that it prefers.
type need struct {
	mech     uint
	name     string
	flags    uint // what it must be able to do
	purpose  string
	fallback string // what is used instead; empty if there is nothing
}

// needs are those of each side.
var needs = map[keyspec.Side][]need{keyspec.Factory: factoryNeeds, keyspec.Operator: operatorNeeds}

var factoryNeeds = []need{
	{mech: pkcs11.CKM_RSA_X9_31_KEY_PAIR_GEN, name: "CKM_RSA_X9_31_KEY_PAIR_GEN", flags: pkcs11.CKF_GENERATE_KEY_PAIR,
		purpose:  "lot keys with primes by ANSI X9.31",
		fallback: "CKM_RSA_PKCS_KEY_PAIR_GEN makes lot keys, and the manifest says so; --primes x931 is refused"},
	{mech: pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, name: "CKM_RSA_PKCS_KEY_PAIR_GEN", flags: pkcs11.CKF_GENERATE_KEY_PAIR,
		purpose: "lot keys; device keys of suite tr33868-rsa2048"},
	{mech: pkcs11.CKM_RSA_X_509, name: "CKM_RSA_X_509", flags: pkcs11.CKF_DECRYPT,
		purpose: "known answers that prove a new lot key"},
	{mech: pkcs11.CKM_EC_KEY_PAIR_GEN, name: "CKM_EC_KEY_PAIR_GEN", flags: pkcs11.CKF_GENERATE_KEY_PAIR,
		purpose: "the signing key; device keys of suite tr33868-ecdsa-p256"},
	{mech: pkcs11.CKM_ECDSA, name: "CKM_ECDSA", flags: pkcs11.CKF_SIGN,
		purpose: "signing manifests and shards; challenging device keys"},
	{mech: pkcs11.CKM_SHA256_RSA_PKCS, name: "CKM_SHA256_RSA_PKCS", flags: pkcs11.CKF_SIGN,
		purpose: "challenging device keys of suite tr33868-rsa2048"},
	{mech: pkcs11.CKM_AES_KEY_GEN, name: "CKM_AES_KEY_GEN", flags: pkcs11.CKF_GENERATE,
		purpose: "the injection key and operators' KEKs"},
	{mech: p11.AESKWP, name: "CKM_AES_KEY_WRAP_KWP", flags: pkcs11.CKF_WRAP,
		purpose: "wrapping device keys for injection and lot keys for operators (RFC 5649)", fallback: olderKWP},
	{mech: pkcs11.CKM_AES_KEY_WRAP_PAD, name: "CKM_AES_KEY_WRAP_PAD", flags: pkcs11.CKF_WRAP,
		purpose: "wrapping device keys for injection and lot keys for operators (RFC 5649)"},
	{mech: pkcs11.CKM_RSA_PKCS_OAEP, name: "CKM_RSA_PKCS_OAEP", flags: pkcs11.CKF_WRAP,
		purpose: "wrapping the injection key for the fixture and KEKs for operators"},
}

// What is used instead.
const (
	olderKWP       = "CKM_AES_KEY_WRAP_PAD, the older name for it, does it; a lot's manifest says which"
	softwareVerify = "keysvc can do it, with verify: software in its configuration"
)

var operatorNeeds = []need{
	{mech: pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, name: "CKM_RSA_PKCS_KEY_PAIR_GEN", flags: pkcs11.CKF_GENERATE_KEY_PAIR,
		purpose: "the transport key"},
	{mech: pkcs11.CKM_RSA_PKCS_OAEP, name: "CKM_RSA_PKCS_OAEP", flags: pkcs11.CKF_UNWRAP,
		purpose: "taking a manufacturer's KEK"},
	{mech: p11.AESKWP, name: "CKM_AES_KEY_WRAP_KWP", flags: pkcs11.CKF_UNWRAP,
		purpose: "taking granted lot keys (RFC 5649)", fallback: olderKWP},
	{mech: pkcs11.CKM_AES_KEY_WRAP_PAD, name: "CKM_AES_KEY_WRAP_PAD", flags: pkcs11.CKF_UNWRAP,
		purpose: "taking granted lot keys (RFC 5649)"},
	{mech: pkcs11.CKM_RSA_X_509, name: "CKM_RSA_X_509", flags: pkcs11.CKF_DECRYPT, purpose: "decrypting payloads"},
	{mech: pkcs11.CKM_ECDSA, name: "CKM_ECDSA", flags: pkcs11.CKF_VERIFY,
		purpose: "validating KME_SIG of suites with P-256", fallback: softwareVerify},
	{mech: pkcs11.CKM_SHA256_RSA_PKCS, name: "CKM_SHA256_RSA_PKCS", flags: pkcs11.CKF_VERIFY,
		purpose: "validating KME_SIG of suite tr33868-rsa2048", fallback: softwareVerify},
	{mech: pkcs11.CKM_GENERIC_SECRET_KEY_GEN, name: "CKM_GENERIC_SECRET_KEY_GEN", flags: pkcs11.CKF_GENERATE,
		purpose: "the ledger key"},
	{mech: pkcs11.CKM_SHA256_HMAC, name: "CKM_SHA256_HMAC", flags: pkcs11.CKF_SIGN,
		purpose: "tagging KMEs for the one-use ledger"},
	{mech: pkcs11.CKM_AES_KEY_GEN, name: "CKM_AES_KEY_GEN", flags: pkcs11.CKF_GENERATE, purpose: "the storage key"},
	{mech: pkcs11.CKM_AES_KEY_WRAP, name: "CKM_AES_KEY_WRAP", flags: pkcs11.CKF_WRAP | pkcs11.CKF_UNWRAP,
		purpose: "sealing KMEs (RFC 3394)"},
	{mech: pkcs11.CKM_AES_ECB, name: "CKM_AES_ECB", flags: pkcs11.CKF_ENCRYPT | pkcs11.CKF_DECRYPT,
		purpose: "processing RAND under a KME"},
}
