package binding

import (
	"slices"
	"time"

	"github.com/kmehsm/kmehsm/kme"
)

// An Origin is who at the other end of the network asked, and whether a device may be provisioned from there. Its zero
// value may not.
type Origin struct {
	Name         kme.Origin
	Provisioning Provisioning
}

// Provisioning says whether an IMSI without a binding is let in, for provisioning only.
type Provisioning int

const (
	Forbidden Provisioning = iota // by configuration
	Declined                      // by the caller: the origin cannot provision, or may not
	Allowed
)

// A Subscription is all that the store has of an IMSI at a time: what has expired by then is not in it. Its methods are
// the rules of docs/protocol.md; no store has rules of its own.
type Subscription struct {
	Pending, Active, Revoked *Binding  // nil where there is none
	Attempts                 []Attempt // that an administrator has opened, and those of origins within them
}

// Latest is the binding that an administrator is shown: pending before active, and that before revoked. Nil if there is
// none.
func (s *Subscription) Latest() *Binding {
	if b := s.Standing(); b != nil {
		return b
	}
	return s.Revoked
}

// Standing is Latest without what was revoked.
func (s *Subscription) Standing() *Binding {
	if s.Pending != nil {
		return s.Pending
	}
	return s.Active
}

// Under is the binding under which vectors for an origin are processed. If there are an active and a pending one, the
// pending one counts only for the origin that established it: the old device, at another origin, still has the active
// one.
func (s *Subscription) Under(o kme.Origin) *Binding {
	if s.Pending != nil && (s.Active == nil || s.Pending.Origin == o) {
		return s.Pending
	}
	return s.Active
}

// Sent is the binding under which the last vector that an origin was sent was processed.
func (s *Subscription) Sent(o kme.Origin) *Binding {
	if s.Pending != nil && (s.Active == nil || s.Pending.SentTo(o)) {
		return s.Pending
	}
	return s.Active
}

// Opened says whether an administrator lets an origin provision, even if there is a binding; and until when.
func (s *Subscription) Opened(o Origin) (until time.Time, ok bool) {
	if o.Provisioning != Allowed {
		return until, false
	}
	for _, a := range s.Attempts {
		if a.Expires.After(until) {
			until = a.Expires
		}
	}
	return until, !until.IsZero()
}

// Served says whether a device may be let in for more than provisioning. It may not if there is an active binding and a
// vector was sent in clear all the same, even if the origin says by now that it cannot provision.
func (s *Subscription) Served(o Origin) bool {
	_, opened := s.Opened(o)
	inClear := s.attempt(func(a Attempt) bool { return a.Origin == o.Name })
	return s.Active != nil && !opened && inClear == nil
}

// Attempt is the opened attempt of an id that is an origin's; nil if there is none.
func (s *Subscription) Attempt(id string, o kme.Origin) *Attempt {
	return s.attempt(func(a Attempt) bool { return sameText(a.ID, id) && a.Origin == o })
}

// Until is an opened attempt of an origin that does not expire before then; nil if there is none.
func (s *Subscription) Until(o kme.Origin, then time.Time) *Attempt {
	return s.attempt(func(a Attempt) bool { return a.Origin == o && !a.Expires.Before(then) })
}

func (s *Subscription) attempt(match func(Attempt) bool) *Attempt {
	if i := slices.IndexFunc(s.Attempts, match); i >= 0 {
		return &s.Attempts[i]
	}
	return nil
}

// Ends says whether a report of an authentication ends the pending state. A success activates the binding if the origin
// was sent a vector under it. A failure drops it if the origin was sent one, or established it. Other reports change
// nothing.
func (s *Subscription) Ends(o kme.Origin, ok bool) bool {
	p := s.Pending
	return p != nil && (p.SentTo(o) || !ok && p.Origin == o)
}
