// Package ck is Cryptoki, the C interface of PKCS #11, as this project calls it: templates, and the calls of one
// session. Most go by miekg/pkcs11; some go to the module directly, see docs/decisions/0012-direct-calls.md.
package ck

import (
	"errors"
	"sync/atomic"

	"github.com/miekg/pkcs11"
)

// A Session is used by one goroutine at a time.
type Session struct {
	Ctx *pkcs11.Ctx // the module, for calls that have no method here
	ID  pkcs11.SessionHandle

	functions Functions
	lacks     *atomic.Uint32
}

// NewSession wraps an open session. lacks has a bit for each attribute of Optional that the token does not support; all
// sessions of a token share it.
func NewSession(module *pkcs11.Ctx, id pkcs11.SessionHandle, f Functions, lacks *atomic.Uint32) Session {
	return Session{Ctx: module, ID: id, functions: f, lacks: lacks}
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

// PutNote stores a text in the token, as the CKA_APPLICATION of a data object: this project never fetches a CKA_VALUE.
func (s *Session) PutNote(label string, text []byte, how Attributes) error {
	common := Frozen(Attributes{Attr(pkcs11.CKA_TOKEN, true), Attr(pkcs11.CKA_LABEL, label)}, how)
	_, err := s.Create(Join(
		Attributes{Attr(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), Attr(pkcs11.CKA_APPLICATION, text)}, common))
	if err != nil && IsCKR(err, Refused...) {
		// NSS softoken keeps no data objects (CKR_ATTRIBUTE_VALUE_INVALID). There, the CKA_ID of a key without a use
		// has the text.
		_, err = s.Generate(pkcs11.CKM_AES_KEY_GEN, Join(
			Attributes{Attr(pkcs11.CKA_VALUE_LEN, 32), Attr(pkcs11.CKA_ID, text)}, Unextractable, Use(Usages), common))
	}
	return err
}

// Notes gives the texts that PutNote has stored under a label.
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
		if err != nil {
			return nil, err
		}
		all = append(all, Note{Object: object, Text: a[0]})
	}
	return all, nil
}
