package keyop

import (
	"bytes"
	"slices"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
)

// private marks an object that only a logged-in user can make or see. Without a login, anybody can make other objects:
// so an object with a mark's name that is not PRIVATE does not count.
var private = ck.Attributes{ck.Attr(pkcs11.CKA_PRIVATE, true)}

// Marks gives the objects that hold the high-water mark, and their texts. Once there was one, there is one at any
// moment.
func Marks(s *p11.Session) (found []ck.Note, err error) {
	err = patiently(func() (bool, error) {
		found, err = s.Notes(keyspec.MarkLabel, private)
		return len(found) > 0, err
	})
	return found, err
}

// SetMark makes an object with a mark, and then destroys those of the given others.
func SetMark(s *p11.Session, mark []byte, others [][]byte) error {
	before, err := Marks(s)
	if err == nil {
		err = patiently(func() (bool, error) { return true, s.PutNote(keyspec.MarkLabel, mark, private) })
	}
	for _, n := range before {
		if err != nil {
			break
		}
		if !slices.ContainsFunc(others, func(o []byte) bool { return bytes.Equal(o, n.Text) }) {
			continue
		}
		err = patiently(func() (bool, error) {
			err := s.Destroy(n.Object)
			if ck.IsCKR(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) { // another process has
				err = nil
			}
			return true, err
		})
	}
	return err
}

// patiently tries again what fails since another process replaces a mark at that moment. Then SoftHSM finds neither the
// old one nor the new one, or says CKR_OBJECT_HANDLE_INVALID, CKR_GENERAL_ERROR, CKR_FUNCTION_FAILED or
// CKR_ATTRIBUTE_VALUE_INVALID.
func patiently(try func() (done bool, err error)) (err error) {
	for range 15 {
		var done bool
		if done, err = try(); done && err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	return err
}
