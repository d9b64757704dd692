package p11

import (
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
)

// A Session is used by one goroutine at a time.
type Session struct {
	ck.Session

	open      *atomic.Int64         // the sessions of the token, with this one
	others    []*Session            // of the same operation, see Apart
	left      []pkcs11.ObjectHandle // objects that are not needed any more
	leftSince time.Time             // when the first of them was left
	own       map[string]pkcs11.ObjectHandle
}

// Close ends the session, and with it the objects that it made.
func (s *Session) Close() error {
	defer s.open.Add(-1)
	return s.Ctx.CloseSession(s.ID)
}

// Leave says that an object of the session is not needed any more. The pool destroys it together with others: LeftFor
// after the first of them was left, or when there are many.
func (s *Session) Leave(h pkcs11.ObjectHandle) {
	if len(s.left) == 0 {
		s.leftSince = time.Now()
	}
	s.left = append(s.left, h)
}

// Own gives the handle of a session object that the session has under a name. make is called once for each name; the
// object stays as long as the session.
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
