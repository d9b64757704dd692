package p11

import (
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
)

// ErrNoKey: the token has no such key.
var ErrNoKey = errors.New("the token has no such key")

// ErrUnavailable: the token is away. It is reinitialised as soon as it can be.
var ErrUnavailable = errors.New("the token is not available")

// ErrBusy: all sessions that the token allows are in use. The same call may work later.
var ErrBusy = errors.New("all sessions that the token allows are in use")

// errGone marks an error of any kind after which the token opens no session any more.
var errGone = errors.New("and no session can be opened")

// hints say what to do about return codes that a user can do something about.
var hints = map[pkcs11.Error]string{
	pkcs11.CKR_PIN_INCORRECT:                  hintPIN,
	pkcs11.CKR_PIN_INVALID:                    hintPIN,
	pkcs11.CKR_PIN_LEN_RANGE:                  hintPIN,
	pkcs11.CKR_PIN_LOCKED:                     hintLocked,
	pkcs11.CKR_KEY_HANDLE_INVALID:             hintKeyGone,
	pkcs11.CKR_OBJECT_HANDLE_INVALID:          hintKeyGone,
	pkcs11.CKR_WRAPPING_KEY_HANDLE_INVALID:    hintKeyGone,
	pkcs11.CKR_UNWRAPPING_KEY_HANDLE_INVALID:  hintKeyGone,
	pkcs11.CKR_USER_PIN_NOT_INITIALIZED:       "the token has no user PIN yet: initialise it",
	pkcs11.CKR_USER_ANOTHER_ALREADY_LOGGED_IN: hintOtherUser,
	pkcs11.CKR_SESSION_READ_ONLY_EXISTS:       hintOtherUser,
	pkcs11.CKR_MECHANISM_INVALID:              "the token cannot do this: see the doctor command",
	pkcs11.CKR_KEY_NOT_WRAPPABLE:              hintTrusted,
	pkcs11.CKR_KEY_UNEXTRACTABLE:              "the key is sealed in the token for good",
	pkcs11.CKR_DEVICE_MEMORY:                  "the token is full, or its disk is",
}

const (
	hintPIN = "the token refused the PIN; it was tried once and will not be tried again, " +
		"since a token locks after a few wrong PINs: check the pin-source"
	hintLocked  = "the token's PIN is locked after too many wrong tries: the security officer has to set a new one"
	hintTrusted = "the key may only be wrapped under a key that the security officer has made TRUSTED"
	hintKeyGone = "a key that was there is gone: the token was removed, or somebody removed the key; " +
		"bring it back, and run the same command again"
	hintOtherUser = "another user is logged in to the token in this process"
)

// Explain adds to an error which operation failed, and what to do about it. Without an error it is nil.
func Explain(what string, err error) error {
	if err == nil {
		return nil
	}
	if code, ok := errors.AsType[pkcs11.Error](err); ok && hints[code] != "" {
		return fmt.Errorf("%s: %w: %s", what, err, hints[code])
	}
	return fmt.Errorf("%s: %w", what, err)
}

// A severity says what an error of the token means for the next call.
type severity int

const (
	permanent   severity = iota // the call is wrong, or the token cannot do it: the next one may be right
	transient                   // the token is short of something: the same call may work later
	sessionLost                 // the session has ended: the same call on another one may work now
	suspect                     // something is wrong, maybe with the token
	deviceLost                  // the token has gone, or forgotten who we are: nothing works until it is reinitialised
)

func classify(err error) severity {
	switch {
	case err == nil, errors.Is(err, ErrUnavailable):
		return permanent
	case errors.Is(err, errGone):
		return deviceLost
	case ck.IsCKR(err, pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED):
		return sessionLost
	case ck.IsCKR(err, pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_DEVICE_ERROR,
		pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_TOKEN_NOT_RECOGNIZED,
		pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED, pkcs11.CKR_SLOT_ID_INVALID,
		// The codes of a token that was away and is back: login and handles are gone.
		pkcs11.CKR_USER_NOT_LOGGED_IN, pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_OBJECT_HANDLE_INVALID,
		pkcs11.CKR_WRAPPING_KEY_HANDLE_INVALID, pkcs11.CKR_UNWRAPPING_KEY_HANDLE_INVALID):
		return deviceLost
	case ck.IsCKR(err, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED):
		return suspect // SoftHSM returns the first for a damaged wrapped key; others, when they are gone
	case ck.IsCKR(err, pkcs11.CKR_HOST_MEMORY, pkcs11.CKR_DEVICE_MEMORY, pkcs11.CKR_SESSION_COUNT,
		pkcs11.CKR_FUNCTION_CANCELED):
		return transient
	}
	return permanent
}

// SaysNothing says whether an error is about the token or the session, and not about the request.
func SaysNothing(err error) bool {
	c := classify(err)
	return c == deviceLost || c == sessionLost || c == transient
}

// refusedPIN are the return codes after which the PIN is not tried again.
var refusedPIN = []pkcs11.Error{
	pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE, pkcs11.CKR_PIN_LOCKED,
	pkcs11.CKR_PIN_EXPIRED,
}
