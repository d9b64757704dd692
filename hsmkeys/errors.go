package hsmkeys

import (
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

// ErrNoKey: the token has no such key.
var ErrNoKey = errors.New("the token has no such key")

// explain adds to the return codes that a user can do something about what that is. Others keep their name.
func explain(what string, err error) error {
	var code pkcs11.Error
	if !errors.As(err, &code) {
		return fmt.Errorf("%s: %w", what, err)
	}
	hint := ""
	switch code {
	case pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE:
		hint = ": the token refused the PIN; it was tried once and will not be tried again, since a token locks after a few wrong PINs: check the pin-source"
	case pkcs11.CKR_PIN_LOCKED:
		hint = ": the token's PIN is locked after too many wrong tries: the security officer has to set a new one"
	case pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_WRAPPING_KEY_HANDLE_INVALID, pkcs11.CKR_UNWRAPPING_KEY_HANDLE_INVALID:
		hint = ": a key that was there is gone: the token was removed, or somebody removed the key; bring it back, and run the same command again"
	case pkcs11.CKR_USER_PIN_NOT_INITIALIZED:
		hint = ": the token has no user PIN yet: initialise it"
	case pkcs11.CKR_USER_ANOTHER_ALREADY_LOGGED_IN, pkcs11.CKR_SESSION_READ_ONLY_EXISTS:
		hint = ": another user is logged in to the token in this process"
	case pkcs11.CKR_MECHANISM_INVALID:
		hint = ": the token cannot do this: see the doctor command"
	case pkcs11.CKR_KEY_NOT_WRAPPABLE:
		hint = ": the key may only be wrapped under a key that the security officer has made TRUSTED"
	case pkcs11.CKR_KEY_UNEXTRACTABLE:
		hint = ": the key is sealed in the token for good"
	case pkcs11.CKR_DEVICE_MEMORY:
		hint = ": the token is full, or its disk is"
	}
	return fmt.Errorf("%s: %w%s", what, err, hint)
}

func isCKR(err error, codes ...pkcs11.Error) bool {
	var code pkcs11.Error
	if !errors.As(err, &code) {
		return false
	}
	for _, c := range codes {
		if code == c {
			return true
		}
	}
	return false
}
