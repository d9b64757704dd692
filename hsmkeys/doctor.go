package hsmkeys

import (
	"context"
	"fmt"

	"github.com/miekg/pkcs11"
)

// A Finding is one line of the doctor's report.
type Finding struct {
	Check string `json:"check"` // the mechanism or key looked at
	For   string `json:"for"`   // what it is needed for
	OK    bool   `json:"ok"`
	// Required is false where something else does instead.
	Required    bool   `json:"required"`
	Consequence string `json:"consequence,omitempty"` // what follows, where it is not there
}

// A need is a mechanism that a role cannot do without, or that it prefers.
type need struct {
	mech     uint
	name     string
	flags    uint // what it must be able to do
	purpose  string
	fallback string // what is used instead; empty where nothing is
}

var factoryNeeds = []need{
	{pkcs11.CKM_RSA_X9_31_KEY_PAIR_GEN, "CKM_RSA_X9_31_KEY_PAIR_GEN", pkcs11.CKF_GENERATE_KEY_PAIR, "lot keys with primes by ANSI X9.31",
		"CKM_RSA_PKCS_KEY_PAIR_GEN makes lot keys, and the manifest says so; --primes x931 is refused"},
	{pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, "CKM_RSA_PKCS_KEY_PAIR_GEN", pkcs11.CKF_GENERATE_KEY_PAIR, "lot keys; device keys of suite tr33868-rsa2048", ""},
	{pkcs11.CKM_RSA_X_509, "CKM_RSA_X_509", pkcs11.CKF_DECRYPT, "known answers that prove a new lot key", ""},
	{pkcs11.CKM_EC_KEY_PAIR_GEN, "CKM_EC_KEY_PAIR_GEN", pkcs11.CKF_GENERATE_KEY_PAIR, "the signing key; device keys of suite tr33868-ecdsa-p256", ""},
	{pkcs11.CKM_ECDSA, "CKM_ECDSA", pkcs11.CKF_SIGN, "signing manifests and shards; challenging device keys", ""},
	{pkcs11.CKM_SHA256_RSA_PKCS, "CKM_SHA256_RSA_PKCS", pkcs11.CKF_SIGN, "challenging device keys of suite tr33868-rsa2048", ""},
	{pkcs11.CKM_AES_KEY_GEN, "CKM_AES_KEY_GEN", pkcs11.CKF_GENERATE, "the injection key and operators' KEKs", ""},
	{pkcs11.CKM_AES_KEY_WRAP_PAD, "CKM_AES_KEY_WRAP_PAD", pkcs11.CKF_WRAP, "wrapping device keys for injection and lot keys for operators (RFC 5649)", ""},
	{pkcs11.CKM_RSA_PKCS_OAEP, "CKM_RSA_PKCS_OAEP", pkcs11.CKF_WRAP, "wrapping the injection key for the fixture and KEKs for operators", ""},
}

var operatorNeeds = []need{
	{pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, "CKM_RSA_PKCS_KEY_PAIR_GEN", pkcs11.CKF_GENERATE_KEY_PAIR, "the transport key", ""},
	{pkcs11.CKM_RSA_PKCS_OAEP, "CKM_RSA_PKCS_OAEP", pkcs11.CKF_UNWRAP, "taking a manufacturer's KEK", ""},
	{pkcs11.CKM_AES_KEY_WRAP_PAD, "CKM_AES_KEY_WRAP_PAD", pkcs11.CKF_UNWRAP, "taking granted lot keys (RFC 5649)", ""},
	{pkcs11.CKM_RSA_X_509, "CKM_RSA_X_509", pkcs11.CKF_DECRYPT, "decrypting payloads", ""},
	{pkcs11.CKM_ECDSA, "CKM_ECDSA", pkcs11.CKF_VERIFY, "validating KME_SIG of suite tr33868-ecdsa-p256", ""},
	{pkcs11.CKM_SHA256_RSA_PKCS, "CKM_SHA256_RSA_PKCS", pkcs11.CKF_VERIFY, "validating KME_SIG of suite tr33868-rsa2048", ""},
	{pkcs11.CKM_GENERIC_SECRET_KEY_GEN, "CKM_GENERIC_SECRET_KEY_GEN", pkcs11.CKF_GENERATE, "the ledger key", ""},
	{pkcs11.CKM_SHA256_HMAC, "CKM_SHA256_HMAC", pkcs11.CKF_SIGN, "tagging KMEs for the one-use ledger", ""},
	{pkcs11.CKM_AES_KEY_GEN, "CKM_AES_KEY_GEN", pkcs11.CKF_GENERATE, "the storage key", ""},
	{pkcs11.CKM_AES_KEY_WRAP, "CKM_AES_KEY_WRAP", pkcs11.CKF_WRAP | pkcs11.CKF_UNWRAP, "sealing KMEs (RFC 3394)", ""},
	{pkcs11.CKM_AES_ECB, "CKM_AES_ECB", pkcs11.CKF_ENCRYPT | pkcs11.CKF_DECRYPT, "processing RAND under a KME", ""},
}

// DoctorFactory says what the token can and cannot do as a manufacturer's.
func (t *Token) DoctorFactory(ctx context.Context, keys ...Key) ([]Finding, error) {
	return t.doctor(ctx, factoryNeeds, keys)
}

// DoctorOperator says what the token can and cannot do as an operator's.
func (t *Token) DoctorOperator(ctx context.Context) ([]Finding, error) {
	return t.doctor(ctx, operatorNeeds, []Key{transportKey, storageKey, ledgerKey})
}

func (t *Token) doctor(ctx context.Context, needs []need, keys []Key) ([]Finding, error) {
	var report []Finding
	for _, n := range needs {
		can, err := t.can(n.mech, n.flags)
		if err != nil {
			return nil, err
		}
		f := Finding{Check: n.name, For: n.purpose, OK: can, Required: n.fallback == ""}
		if !can {
			if f.Consequence = n.fallback; f.Required {
				f.Consequence = "not possible with this token"
			}
		}
		report = append(report, f)
	}
	for _, k := range keys {
		has, err := t.Has(ctx, k)
		if err != nil {
			return nil, err
		}
		f := Finding{Check: fmt.Sprintf("key %q", k.Label()), For: "made by init", OK: has, Required: true}
		if !has {
			f.Consequence = "run init"
		}
		report = append(report, f)
	}
	return report, nil
}

func (t *Token) hasMechanism(m uint) (bool, error) { return t.can(m, 0) }

// can says whether the token has a mechanism, and for all of the uses in flags.
func (t *Token) can(m, flags uint) (bool, error) {
	info, err := t.module.GetMechanismInfo(t.slot, mechanism(m))
	if isCKR(err, pkcs11.CKR_MECHANISM_INVALID) {
		return false, nil
	}
	if err != nil {
		return false, explain("ask the token for its mechanisms", err)
	}
	return info.Flags&flags == flags, nil
}
