package hsmkeys

import (
	"bytes"
	"context"
	"errors"
	"slices"

	"github.com/miekg/pkcs11"
)

// markLabel is that of the objects which hold a mark.
const markLabel = "kme high-water mark"

// private has an object that only who is logged in as the user can make or see. Anybody can make others, in a session
// that is not logged in: an object of a mark's name that is not PRIVATE is none.
var private = attributes{attr(pkcs11.CKA_PRIVATE, true)}

// Marks gives the marks that SetMark has left: one; or several, of processes that set one at the same time or were
// killed meanwhile.
func (t *Token) Marks(ctx context.Context) ([][]byte, error) {
	return do(ctx, t, "read the high-water mark", func(s *session) (all [][]byte, err error) {
		found, err := s.notes(markLabel, private)
		for _, n := range found {
			all = append(all, n.text)
		}
		return all, explainIf("read the high-water mark", err)
	})
}

// SetMark sets a mark, a text, in the place of others, and leaves those that another process has set meanwhile. Only
// who has the user PIN can do that. It is a new object: one that is changed in its place could be lost with the process.
func (t *Token) SetMark(ctx context.Context, mark []byte, others [][]byte) error {
	_, err := doAs(ctx, t, Operator, "set the high-water mark", func(s *session) (struct{}, error) {
		before, err := s.notes(markLabel, private)
		if err == nil {
			err = s.putNote(markLabel, mark, private)
		}
		for _, n := range before {
			if err != nil {
				break
			}
			if !slices.ContainsFunc(others, func(o []byte) bool { return bytes.Equal(o, n.text) }) {
				continue
			}
			// Another process may have replaced it meanwhile.
			if err = s.DestroyObject(s.h, n.object); isCKR(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
				err = nil
			}
		}
		return struct{}{}, explainIf("set the high-water mark", err)
	})
	return err
}

// Marks gives those of all tokens that are there.
func (g *Group) Marks(ctx context.Context) (all [][]byte, err error) {
	var errs []error
	for _, t := range g.tokens {
		marks, err := t.Marks(ctx)
		all = append(all, marks...)
		errs = append(errs, err)
	}
	if len(all) > 0 {
		return all, nil
	}
	return nil, errors.Join(errs...)
}

// SetMark sets it in all tokens. It fails if none could be set.
func (g *Group) SetMark(ctx context.Context, mark []byte, others [][]byte) error {
	var errs []error
	for _, t := range g.tokens {
		if err := t.SetMark(ctx, mark, others); err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) < len(g.tokens) {
		return nil
	}
	return errors.Join(errs...)
}

// A note is a text that an object holds in the token.
type note struct {
	object pkcs11.ObjectHandle
	text   []byte
}

// putNote makes an object that holds a text, in the CKA_APPLICATION of a data object: nothing of ours ever fetches a
// CKA_VALUE.
func (s *session) putNote(label string, text []byte, how attributes) error {
	common := frozen(attributes{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_LABEL, label)}, how)
	_, err := s.create(join(attributes{attr(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), attr(pkcs11.CKA_APPLICATION, text)}, common))
	if err != nil && isCKR(err, refusedTemplate...) {
		// NSS softoken keeps no data objects (CKR_ATTRIBUTE_VALUE_INVALID). There a key of no use says it by its CKA_ID.
		_, err = s.generate(pkcs11.CKM_AES_KEY_GEN, join(attributes{attr(pkcs11.CKA_VALUE_LEN, 32), attr(pkcs11.CKA_SENSITIVE, true),
			attr(pkcs11.CKA_EXTRACTABLE, false), attr(pkcs11.CKA_ID, text)}, use(usages), common))
	}
	return err
}

// notes finds the texts of a label, in objects that are how putNote made them.
func (s *session) notes(label string, how attributes) (all []note, err error) {
	found, err := s.findObjects(join(attributes{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_LABEL, label)}, how))
	if err != nil {
		return nil, err
	}
	for _, object := range found {
		says := uint(pkcs11.CKA_APPLICATION)
		a, err := s.GetAttributeValue(s.h, object, attributes{attr(pkcs11.CKA_CLASS, nil)})
		if err == nil && string(a[0].Value) == string(attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY).Value) {
			says = pkcs11.CKA_ID
		}
		if err == nil {
			a, err = s.GetAttributeValue(s.h, object, attributes{attr(says, nil)})
		}
		if isCKR(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
			continue // gone meanwhile
		}
		if err != nil {
			return nil, err
		}
		all = append(all, note{object, a[0].Value})
	}
	return all, nil
}
