package ck

import (
	"errors"
	"slices"

	"github.com/miekg/pkcs11"
)

// IsCKR says whether an error comes from one of these return codes.
func IsCKR(err error, codes ...pkcs11.Error) bool {
	var code pkcs11.Error
	return errors.As(err, &code) && slices.Contains(codes, code)
}
