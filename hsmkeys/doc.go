// Package hsmkeys makes every PKCS #11 call of this project, and does nothing else: it opens tokens, makes and finds
// keys, wraps, unwraps, decrypts, verifies, signs and seals. It knows the protocol of package kme, but not the lots,
// the directory or the database.
//
// It has two layers. Package p11 below is a token that stays usable, and knows no key of ours; it makes its calls by
// package ck. This package has the keys of a [FactoryToken], of an [OperatorToken], and of an [OperatorPool]: several
// operator's tokens with the same keys. Package keyspec defines each key, package keyop uses keys on one session,
// package doctor tests what a token does, and package officer changes its security officer's PIN.
//
// Private and secret keys leave a token through this package only wrapped. It never fetches an attribute that could
// hold one; the doctor asks only for the length of such an attribute.
//
// Handles are never kept longer than a login: keys are looked up by CKA_ID, which is derived from what the key is
// for (see Key), so that a second run finds its own key and an outage cannot swap two keys.
package hsmkeys

import (
	"context"
	"strings"

	"github.com/kmehsm/kmehsm/hsmkeys/doctor"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/officer"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/hsmkeys/pinsource"
)

// What packages below define, and those above use.
type (
	Key      = keyspec.Key
	Role     = keyspec.Role
	Side     = keyspec.Side
	Finding  = doctor.Finding
	Identity = doctor.Identity
	PIN      = pinsource.PIN
	Health   = p11.Health
	Observer = p11.Observer
	Slot     = p11.Slot

	Split      = officer.Split
	OfficerPIN = officer.PIN
)

const (
	Factory  = keyspec.Factory
	Operator = keyspec.Operator

	RoleSigning   = keyspec.RoleSigning
	RoleInjection = keyspec.RoleInjection
	RoleLot       = keyspec.RoleLot
	RoleKEK       = keyspec.RoleKEK
	RoleStorage   = keyspec.RoleStorage
	RoleLedger    = keyspec.RoleLedger
	RoleFixture   = keyspec.RoleFixture

	MaxGenerations = keyspec.MaxGenerations
)

var (
	ErrNoKey       = p11.ErrNoKey
	ErrUnavailable = p11.ErrUnavailable
	ErrPINMaybeSet = officer.ErrPINMaybeSet
)

// ReadPIN takes a PIN from a pin-source.
func ReadPIN(source string) (PIN, error) { return pinsource.Read(source) }

// CheckURI refuses what is no token's URI. Its error has no PIN.
func CheckURI(uri string) error { return p11.CheckURI(uri) }

// CheckPIN says whether the user PIN that a token's URI names can be read. The token is not asked.
func CheckPIN(uri string) error { return p11.CheckPIN(uri) }

// Slots asks a PKCS #11 module, or the one that a token's URI names, for its slots and tokens, without a login.
func Slots(moduleOrURI string) (all []Slot, module string, err error) {
	module, reserved := moduleOrURI, ""
	if strings.HasPrefix(moduleOrURI, "pkcs11:") {
		if module, reserved, err = p11.ModuleOf(moduleOrURI); err != nil {
			return nil, "", err
		}
	}
	all, err = p11.Slots(module, reserved)
	return all, module, err
}

// Sentences describe, one by one, the findings that are not OK.
func Sentences(findings []Finding) []string { return doctor.Sentences(findings) }

// OfficerSplit says which split the security officer's PIN is in: see officer.SplitOf.
func (b *base) OfficerSplit(ctx context.Context) (inForce, begun *Split, err error) {
	return officer.SplitOf(ctx, b.hsm)
}
