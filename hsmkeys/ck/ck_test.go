package ck

import (
	"testing"

	"github.com/miekg/pkcs11"
)

// Whatever length a token says that a result has, it is taken, or refused.
func TestWritten(t *testing.T) {
	room := make([]byte, 32)
	for _, size := range []uint{0, 1, 32} {
		if b, err := written(room, size); err != nil || len(b) != int(size) {
			t.Errorf("%d: %d bytes, %v", size, len(b), err)
		}
	}
	for _, size := range []uint{33, 1 << 31, 1 << 63, pkcs11.CK_UNAVAILABLE_INFORMATION} {
		if b, err := written(room, size); err == nil {
			t.Errorf("%d: %d bytes", size, len(b))
		}
	}
}
