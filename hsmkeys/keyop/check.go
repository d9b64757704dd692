package keyop

import (
	"bytes"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/kme"
)

// CheckValue is a value by which Does recognises a ledger or storage key: the ledger key's tag of zeros, or a random
// KME wrapped under the storage key, whose integrity AES key wrap protects (RFC 3394 section 2.2.3).
func CheckValue(s *p11.Session, k keyspec.Key, h pkcs11.ObjectHandle) ([]byte, error) {
	if k.Role == keyspec.RoleLedger {
		return HMAC(s, h, make([]byte, kme.SecretSize))
	}
	return Seal(s, k.Generation, h, kme.RandomSecret())
}

// Does says whether a key fits its check value.
func Does(s *p11.Session, h pkcs11.ObjectHandle, k keyspec.Key, check []byte) (bool, error) {
	if k.Role == keyspec.RoleLedger {
		tag, err := HMAC(s, h, make([]byte, kme.SecretSize))
		return bytes.Equal(tag, check), err
	}
	if len(check) != SealedSize || int(check[0]) != k.Generation {
		return false, nil
	}
	opened, err := s.Unwrap(pkcs11.CKM_AES_KEY_WRAP, h, check[1:], keyspec.UsableKME)
	if err != nil {
		return false, nil // tokens have several codes for it
	}
	return true, p11.Explain("drop an unsealed KME", s.Destroy(opened))
}
