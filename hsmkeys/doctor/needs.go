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
	fallback string // what is used instead; empty where nothing is
}

// needs are those of each side.
var needs = map[keyspec.Side][]need{keyspec.Factory: factoryNeeds, keyspec.Operator: operatorNeeds}

var factoryNeeds = []need{
	{pkcs11.CKM_RSA_X9_31_KEY_PAIR_GEN, "CKM_RSA_X9_31_KEY_PAIR_GEN", pkcs11.CKF_GENERATE_KEY_PAIR,
		"lot keys with primes by ANSI X9.31",
		"CKM_RSA_PKCS_KEY_PAIR_GEN makes lot keys, and the manifest says so; --primes x931 is refused"},
	{pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, "CKM_RSA_PKCS_KEY_PAIR_GEN", pkcs11.CKF_GENERATE_KEY_PAIR,
		"lot keys; device keys of suite tr33868-rsa2048", ""},
	{pkcs11.CKM_RSA_X_509, "CKM_RSA_X_509", pkcs11.CKF_DECRYPT, "known answers that prove a new lot key", ""},
	{pkcs11.CKM_EC_KEY_PAIR_GEN, "CKM_EC_KEY_PAIR_GEN", pkcs11.CKF_GENERATE_KEY_PAIR,
		"the signing key; device keys of suite tr33868-ecdsa-p256", ""},
	{pkcs11.CKM_ECDSA, "CKM_ECDSA", pkcs11.CKF_SIGN, "signing manifests and shards; challenging device keys", ""},
	{pkcs11.CKM_SHA256_RSA_PKCS, "CKM_SHA256_RSA_PKCS", pkcs11.CKF_SIGN,
		"challenging device keys of suite tr33868-rsa2048", ""},
	{pkcs11.CKM_AES_KEY_GEN, "CKM_AES_KEY_GEN", pkcs11.CKF_GENERATE, "the injection key and operators' KEKs", ""},
	{p11.AESKWP, "CKM_AES_KEY_WRAP_KWP", pkcs11.CKF_WRAP,
		"wrapping device keys for injection and lot keys for operators (RFC 5649)", olderKWP},
	{pkcs11.CKM_AES_KEY_WRAP_PAD, "CKM_AES_KEY_WRAP_PAD", pkcs11.CKF_WRAP,
		"wrapping device keys for injection and lot keys for operators (RFC 5649)", ""},
	{pkcs11.CKM_RSA_PKCS_OAEP, "CKM_RSA_PKCS_OAEP", pkcs11.CKF_WRAP,
		"wrapping the injection key for the fixture and KEKs for operators", ""},
}

// What does instead.
const (
	olderKWP       = "CKM_AES_KEY_WRAP_PAD, the older name for it, does it; a lot's manifest says which"
	softwareVerify = "keysvc can do it, with verify: software in its configuration"
)

var operatorNeeds = []need{
	{pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, "CKM_RSA_PKCS_KEY_PAIR_GEN", pkcs11.CKF_GENERATE_KEY_PAIR,
		"the transport key", ""},
	{pkcs11.CKM_RSA_PKCS_OAEP, "CKM_RSA_PKCS_OAEP", pkcs11.CKF_UNWRAP, "taking a manufacturer's KEK", ""},
	{p11.AESKWP, "CKM_AES_KEY_WRAP_KWP", pkcs11.CKF_UNWRAP, "taking granted lot keys (RFC 5649)", olderKWP},
	{pkcs11.CKM_AES_KEY_WRAP_PAD, "CKM_AES_KEY_WRAP_PAD", pkcs11.CKF_UNWRAP, "taking granted lot keys (RFC 5649)", ""},
	{pkcs11.CKM_RSA_X_509, "CKM_RSA_X_509", pkcs11.CKF_DECRYPT, "decrypting payloads", ""},
	{pkcs11.CKM_ECDSA, "CKM_ECDSA", pkcs11.CKF_VERIFY, "validating KME_SIG of suites with P-256", softwareVerify},
	{pkcs11.CKM_SHA256_RSA_PKCS, "CKM_SHA256_RSA_PKCS", pkcs11.CKF_VERIFY,
		"validating KME_SIG of suite tr33868-rsa2048", softwareVerify},
	{pkcs11.CKM_GENERIC_SECRET_KEY_GEN, "CKM_GENERIC_SECRET_KEY_GEN", pkcs11.CKF_GENERATE, "the ledger key", ""},
	{pkcs11.CKM_SHA256_HMAC, "CKM_SHA256_HMAC", pkcs11.CKF_SIGN, "tagging KMEs for the one-use ledger", ""},
	{pkcs11.CKM_AES_KEY_GEN, "CKM_AES_KEY_GEN", pkcs11.CKF_GENERATE, "the storage key", ""},
	{pkcs11.CKM_AES_KEY_WRAP, "CKM_AES_KEY_WRAP", pkcs11.CKF_WRAP | pkcs11.CKF_UNWRAP, "sealing KMEs (RFC 3394)", ""},
	{pkcs11.CKM_AES_ECB, "CKM_AES_ECB", pkcs11.CKF_ENCRYPT | pkcs11.CKF_DECRYPT, "processing RAND under a KME", ""},
}
