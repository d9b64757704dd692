package hsmkeys

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/kme"
)

// A Finding is one line of the doctor's report.
type Finding struct {
	Check string `json:"check"` // the mechanism or key looked at
	For   string `json:"for"`   // what it is needed for
	OK    bool   `json:"ok"`
	// Required is false where something else does instead.
	Required    bool   `json:"required"`
	Consequence string `json:"consequence,omitempty"` // what follows, where it is not there
	Measured    string `json:"measured,omitempty"`    // how long it takes

	Attributes map[string]bool `json:"attributes,omitempty"` // of a key
}

// Sentences say of a token what it does not do, by findings that are not OK.
func Sentences(findings []Finding) (all []string) {
	for _, f := range findings {
		if what, ok := strings.CutPrefix(f.Check, "refuses "); ok {
			all = append(all, "it does not refuse "+what)
		} else {
			all = append(all, f.Check+": "+f.Consequence)
		}
	}
	return all
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
	{ckmAESKeyWrapKWP, "CKM_AES_KEY_WRAP_KWP", pkcs11.CKF_WRAP, "wrapping device keys for injection and lot keys for operators (RFC 5649)", olderKWP},
	{pkcs11.CKM_AES_KEY_WRAP_PAD, "CKM_AES_KEY_WRAP_PAD", pkcs11.CKF_WRAP, "wrapping device keys for injection and lot keys for operators (RFC 5649)", ""},
	{pkcs11.CKM_RSA_PKCS_OAEP, "CKM_RSA_PKCS_OAEP", pkcs11.CKF_WRAP, "wrapping the injection key for the fixture and KEKs for operators", ""},
}

// What does instead.
const (
	olderKWP       = "CKM_AES_KEY_WRAP_PAD, the older name for it, does it; a lot's manifest says which"
	softwareVerify = "keysvc can do it, with verify: software in its configuration"
)

var operatorNeeds = []need{
	{pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, "CKM_RSA_PKCS_KEY_PAIR_GEN", pkcs11.CKF_GENERATE_KEY_PAIR, "the transport key", ""},
	{pkcs11.CKM_RSA_PKCS_OAEP, "CKM_RSA_PKCS_OAEP", pkcs11.CKF_UNWRAP, "taking a manufacturer's KEK", ""},
	{ckmAESKeyWrapKWP, "CKM_AES_KEY_WRAP_KWP", pkcs11.CKF_UNWRAP, "taking granted lot keys (RFC 5649)", olderKWP},
	{pkcs11.CKM_AES_KEY_WRAP_PAD, "CKM_AES_KEY_WRAP_PAD", pkcs11.CKF_UNWRAP, "taking granted lot keys (RFC 5649)", ""},
	{pkcs11.CKM_RSA_X_509, "CKM_RSA_X_509", pkcs11.CKF_DECRYPT, "decrypting payloads", ""},
	{pkcs11.CKM_ECDSA, "CKM_ECDSA", pkcs11.CKF_VERIFY, "validating KME_SIG of suites with P-256", softwareVerify},
	{pkcs11.CKM_SHA256_RSA_PKCS, "CKM_SHA256_RSA_PKCS", pkcs11.CKF_VERIFY, "validating KME_SIG of suite tr33868-rsa2048", softwareVerify},
	{pkcs11.CKM_GENERIC_SECRET_KEY_GEN, "CKM_GENERIC_SECRET_KEY_GEN", pkcs11.CKF_GENERATE, "the ledger key", ""},
	{pkcs11.CKM_SHA256_HMAC, "CKM_SHA256_HMAC", pkcs11.CKF_SIGN, "tagging KMEs for the one-use ledger", ""},
	{pkcs11.CKM_AES_KEY_GEN, "CKM_AES_KEY_GEN", pkcs11.CKF_GENERATE, "the storage key", ""},
	{pkcs11.CKM_AES_KEY_WRAP, "CKM_AES_KEY_WRAP", pkcs11.CKF_WRAP | pkcs11.CKF_UNWRAP, "sealing KMEs (RFC 3394)", ""},
	{pkcs11.CKM_AES_ECB, "CKM_AES_ECB", pkcs11.CKF_ENCRYPT | pkcs11.CKF_DECRYPT, "processing RAND under a KME", ""},
}

// DoctorFactory says what the token can and cannot do as a manufacturer's.
func (t *Token) DoctorFactory(ctx context.Context, keys ...Key) ([]Finding, error) {
	report, err := t.doctor(ctx, factoryNeeds, keys)
	if err != nil {
		return nil, err
	}
	for _, k := range keys {
		if k.Role != RoleInjection {
			continue
		}
		f := Finding{Check: "device key made, wrapped, destroyed", For: "lot provision, on one session", Required: true}
		f.measure(20, func() error { _, _, err := t.MakeDeviceKey(ctx, kme.SuiteECDSA, k); return err })
		report = append(report, f)
	}
	return t.examine(ctx, Factory, report)
}

// DoctorOperator says what the token can and cannot do as an operator's.
func (t *Token) DoctorOperator(ctx context.Context) ([]Finding, error) {
	keys := []Key{ledgerKey}
	if has, err := t.hasStorage(ctx); err != nil {
		return nil, err
	} else if !has {
		keys = append(keys, storageKey)
	}
	report, err := t.doctor(ctx, operatorNeeds, keys)
	if err != nil {
		return nil, err
	}
	return t.examine(ctx, Operator, report)
}

// examine adds to a report what is tried, and what is seen of keys and token.
func (t *Token) examine(ctx context.Context, side Side, report []Finding) ([]Finding, error) {
	tried, err := t.try(ctx, side)
	if err != nil {
		return nil, err
	}
	seen, err := t.trials(ctx, side, (*trial).decryption, (*trial).keys)
	if err != nil {
		return nil, err
	}
	id, err := t.Identity(ctx)
	return append(slices.Concat(report, tried, seen), id.pins()), err
}

// measure runs do n times, and says how long one takes, or what goes wrong.
func (f *Finding) measure(n int, do func() error) {
	start := time.Now()
	for range n {
		if err := do(); err != nil {
			f.Consequence = err.Error()
			return
		}
	}
	each := time.Since(start) / time.Duration(n)
	f.OK, f.Measured = true, fmt.Sprintf("%s each, %.0f a second", each.Round(time.Microsecond), float64(time.Second)/float64(each))
}

func (t *Token) doctor(ctx context.Context, needs []need, keys []Key) ([]Finding, error) {
	can, err := do(ctx, t, "ask for mechanisms", func(*session) (can []bool, err error) {
		for _, n := range needs {
			has, err := t.can(n.mech, n.flags)
			if err != nil {
				return nil, err
			}
			can = append(can, has)
		}
		return can, nil
	})
	if err != nil {
		return nil, err
	}
	var report []Finding
	for i, n := range needs {
		f := Finding{Check: n.name, For: n.purpose, OK: can[i], Required: n.fallback == ""}
		if n.mech == pkcs11.CKM_AES_KEY_WRAP_PAD && t.kwp == ckmAESKeyWrapKWP {
			n.fallback, f.Required = "not needed: CKM_AES_KEY_WRAP_KWP does it", false
		}
		if !can[i] {
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
		if !has { // those that are there, examine reports
			report = append(report, Finding{Check: fmt.Sprintf("key %q", k.Label()), For: "made by init", Required: true, Consequence: "run init"})
		}
	}
	return report, nil
}

// can says whether the token has a mechanism, and for all of the uses in flags. The caller holds a session, so that the
// module stays, or is connect.
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
