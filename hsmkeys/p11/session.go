package p11

import (
	"errors"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"
)

// A Session is used by one goroutine at a time.
type Session struct {
	Ctx *pkcs11.Ctx // the module, for calls that have no method here
	ID  pkcs11.SessionHandle

	list  functionList
	lacks *atomic.Uint32 // which of the attributes in optional the token has no place for, by bits
	open  *atomic.Int64  // the sessions of the token, with this one

	others    []*Session            // of the same operation, see Apart
	left      []pkcs11.ObjectHandle // objects of no more use, which are to go
	leftSince time.Time             // when the first of them was left
	own       map[string]pkcs11.ObjectHandle
}

// Close ends the session, and with it the objects that it made.
func (s *Session) Close() error {
	defer s.open.Add(-1)
	return s.Ctx.CloseSession(s.ID)
}

// Leave says that an object that the session made is of no more use. The pool has it destroyed, with others, LeftFor
// after the first of them was left, or when there are many.
func (s *Session) Leave(h pkcs11.ObjectHandle) {
	if len(s.left) == 0 {
		s.leftSince = time.Now()
	}
	s.left = append(s.left, h)
}

// Own gives the handle of a session object that the session has by a name, for as long as it is open; what makes it is
// called once.
func (s *Session) Own(name string, make func() (pkcs11.ObjectHandle, error)) (h pkcs11.ObjectHandle, err error) {
	if h, ok := s.own[name]; ok {
		return h, nil
	}
	if h, err = make(); err != nil {
		return 0, err
	}
	if s.own == nil {
		s.own = map[string]pkcs11.ObjectHandle{}
	}
	s.own[name] = h
	return h, nil
}

// Destroy removes an object.
func (s *Session) Destroy(h pkcs11.ObjectHandle) error { return s.Ctx.DestroyObject(s.ID, h) }

// Copy makes a copy of an object with other values of some attributes.
func (s *Session) Copy(h pkcs11.ObjectHandle, changes Attributes) (pkcs11.ObjectHandle, error) {
	return s.Ctx.CopyObject(s.ID, h, changes)
}

// Set changes attributes of an object.
func (s *Session) Set(h pkcs11.ObjectHandle, changes ...*pkcs11.Attribute) error {
	return s.Ctx.SetAttributeValue(s.ID, h, changes)
}

// Get gives the values of attributes of an object, in their order. None may be one that holds a key.
func (s *Session) Get(h pkcs11.ObjectHandle, types ...uint) ([][]byte, error) {
	template := make(Attributes, len(types))
	for i, t := range types {
		template[i] = &pkcs11.Attribute{Type: t}
	}
	a, err := s.Ctx.GetAttributeValue(s.ID, h, template)
	if err != nil {
		return nil, err
	}
	values := make([][]byte, len(a))
	for i := range a {
		values[i] = a[i].Value
	}
	return values, nil
}

// Find gives all objects that fit a template.
func (s *Session) Find(template Attributes) (all []pkcs11.ObjectHandle, err error) {
	if err := s.Ctx.FindObjectsInit(s.ID, template); err != nil {
		return nil, err
	}
	for {
		found, _, err := s.Ctx.FindObjects(s.ID, 100)
		if all = append(all, found...); err != nil || len(found) == 0 {
			return all, errors.Join(err, s.Ctx.FindObjectsFinal(s.ID))
		}
	}
}

// A Note is a text that an object holds in the token.
type Note struct {
	Object pkcs11.ObjectHandle
	Text   []byte
}

// PutNote makes a token object that holds a text, in the CKA_APPLICATION of a data object: nothing of ours ever fetches
// a CKA_VALUE.
func (s *Session) PutNote(label string, text []byte, how Attributes) error {
	common := Frozen(Attributes{Attr(pkcs11.CKA_TOKEN, true), Attr(pkcs11.CKA_LABEL, label)}, how)
	_, err := s.Create(Join(
		Attributes{Attr(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), Attr(pkcs11.CKA_APPLICATION, text)}, common))
	if err != nil && IsCKR(err, refusedTemplate...) {
		// NSS softoken keeps no data objects (CKR_ATTRIBUTE_VALUE_INVALID). There a key of no use says it by its
		// CKA_ID.
		_, err = s.Generate(pkcs11.CKM_AES_KEY_GEN, Join(
			Attributes{Attr(pkcs11.CKA_VALUE_LEN, 32), Attr(pkcs11.CKA_ID, text)}, Unextractable, Use(Usages), common))
	}
	return err
}

// Notes finds the texts of a label, in objects that are how PutNote made them.
func (s *Session) Notes(label string, how Attributes) (all []Note, err error) {
	found, err := s.Find(Join(Attributes{Attr(pkcs11.CKA_TOKEN, true), Attr(pkcs11.CKA_LABEL, label)}, how))
	if err != nil {
		return nil, err
	}
	for _, object := range found {
		says := uint(pkcs11.CKA_APPLICATION)
		a, err := s.Get(object, pkcs11.CKA_CLASS)
		if err == nil && string(a[0]) == string(Attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY).Value) {
			says = pkcs11.CKA_ID
		}
		if err == nil {
			a, err = s.Get(object, says)
		}
		if IsCKR(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
			continue // gone meanwhile
		}
		if err != nil {
			return nil, err
		}
		all = append(all, Note{object, a[0]})
	}
	return all, nil
}
