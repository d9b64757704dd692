package binding

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/kmehsm/kmehsm/kme"
)

// An Explanation says in words how a subscription stands, why its last call was refused, and what is to be done.
type Explanation struct {
	IMSI    kme.IMSI     `json:"imsi"`
	State   string       `json:"state"` // of Subscription.Latest; UNBOUND where there is none, DAMAGED if nobody knows
	Says    []string     `json:"says"`
	Doubts  []Doubt      `json:"doubts"`
	Refused *PastRefusal `json:"last_refusal,omitempty"`
	Why     string       `json:"why,omitempty"` // it was refused
	Next    []string     `json:"next"`
}

// Known is what an Explanation is made of.
type Known struct {
	IMSI         kme.IMSI
	Subscription *Subscription
	Damaged      error   // why there is no Subscription
	History      []Entry // about the IMSI
	Refused      *PastRefusal
	Doubts       []Doubt // about its latest binding
	Unknown      error   // why nobody knows whether there are any
}

// Explain makes one.
func Explain(k Known) *Explanation {
	e := &Explanation{IMSI: k.IMSI, State: "UNBOUND", Says: []string{}, Doubts: append([]Doubt{}, k.Doubts...),
		Refused: k.Refused, Next: []string{}}
	if k.Damaged != nil {
		e.State = "DAMAGED"
		e.say("What the database has of it is not what the service wrote: %v.", k.Damaged)
		e.do("find out who has changed the database (keysvc store verify); keysvc binding revoke %s ends the "+
			"subscription's bindings, and its next attach may bind it again", k.IMSI)
		e.refusal(k)
		return e
	}
	b := k.Subscription.Latest()
	if b != nil {
		e.State = string(b.State)
	}
	e.stands(k, b)
	for _, a := range k.Subscription.Attempts {
		if a.Origin == (kme.Origin{}) {
			e.say("An administrator lets it be bound to another device, once, until %s.", stamp(a.Expires))
			e.do("have that device attach before %s", stamp(a.Expires))
		}
	}
	for _, d := range k.Doubts {
		e.say("Its binding rests on a key that is not to be trusted any more (%s, %s: %s).", d.Why, stamp(d.Time),
			d.Reason)
	}
	if len(k.Doubts) > 0 {
		e.do("keysvc binding revoke %s ends the binding; give the subscriber another device before, if this one is "+
			"revoked", k.IMSI)
	}
	if k.Unknown != nil {
		e.say("Whether its device's key is still to be trusted is not known: %v.", k.Unknown)
	}
	e.refusal(k)
	if len(e.Next) == 0 {
		e.do("nothing")
	}
	return e
}

func (e *Explanation) say(format string, args ...any) {
	e.Says = append(e.Says, fmt.Sprintf(format, args...))
}
func (e *Explanation) do(format string, args ...any) {
	e.Next = append(e.Next, fmt.Sprintf(format, args...))
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func (e *Explanation) stands(k Known, b *Binding) {
	s := k.Subscription
	if a := s.Active; a != nil {
		e.say("It is bound to device %s of lot %s since %s: its vectors are pre-processed, and only that device can "+
			"use them.", a.IMEI, a.Lot, stamp(a.Activated))
	}
	switch {
	case s.Pending != nil:
		p := s.Pending
		e.say("Device %s of lot %s was answered NW_SIG at %s, and has not shown yet that it has the KME: %d of its "+
			"vectors were sent. Without a successful authentication this ends by itself, at %s at the latest.", p.IMEI,
			p.Lot, stamp(p.Established), len(p.Sent), stamp(p.Expires))
		e.do("have device %s attach again before %s", p.IMEI, stamp(p.Expires))
	case s.Active != nil:
	case s.Revoked != nil:
		e.say("It is not bound: its binding to device %s was ended at %s by %s. Its next attach may bind it, to "+
			"whatever device.", s.Revoked.IMEI, stamp(s.Revoked.Revoked), by(last(k.History, EventRevoked)))
		e.attach()
	default:
		if was := last(k.History, EventEstablished); was != nil {
			e.say("It is not bound. Device %s was answered NW_SIG at %s, and never showed that it has the KME: that "+
				"ended by itself.", was.IMEI, stamp(was.Time))
		} else {
			e.say("It was never bound.")
		}
		e.attach()
	}
}

func (e *Explanation) attach() {
	e.do("have its device attach from an origin that may provision (provision_from)")
}

func last(history []Entry, event Event) (found *Entry) {
	for i := range history {
		if history[i].Event == event {
			found = &history[i]
		}
	}
	return found
}

// by names who did what an entry says.
func by(e *Entry) string {
	if e == nil || e.Actor == (Actor{}) {
		return "the service"
	}
	if e.Actor.User != "" {
		return e.Actor.User + " (" + e.Actor.Client + ")"
	}
	return e.Actor.Client
}

// refusal says why the last call was refused. What has been mended since is not to be done any more.
func (e *Explanation) refusal(k Known) {
	r := k.Refused
	if r == nil {
		return
	}
	why, todo := meaning(r)
	e.Why = why
	for _, h := range k.History {
		if h.Time.After(r.Time) && (h.Event == EventEstablished || h.Event == EventActivated) {
			e.Why += "; since then, at " + stamp(h.Time) + ", it was " + string(h.Event)
			return
		}
	}
	e.do("%s", todo)
}

// meaning says in words why a call was refused, and what is to be done.
func meaning(r *PastRefusal) (why, todo string) {
	device, cause := "keysvc device "+r.IMEI, ""
	switch r.Reason {
	case kme.NoAttempt:
		return "no attempt was open for this IMSI" + at(r.Origin) + ": none was opened by a vector, or it has " +
				"expired, or was used",
			"have the device attach again; if that does not help, see that the HSS names the same origin for the " +
				"vector and for the payload, and that the payload comes within attempt_ttl"
	case kme.UnknownDevice:
		return "device " + r.IMEI + " is in no lot that was imported here, or its lot's directory does not have it",
			"see keysvc lot list and " + device + "; if the lot is missing, have its manufacturer grant it, and " +
				"keysvc lot import it"
	case kme.RevokedDevice:
		return "the manufacturer has revoked the device, or its whole lot",
			"the subscriber needs another device; then keysvc binding open " + r.IMSI.String()
	case kme.OtherDevice:
		return "the IMSI is bound to another device than " + r.IMEI,
			"if the subscriber has that device now: keysvc binding open " + r.IMSI.String() + "; else its SIM is in " +
				"a device that it does not belong to"
	case kme.KMERejected:
		if r.Cause != "" {
			cause = " (" + r.Cause + ")"
		}
		return "the payload of device " + r.IMEI + " was not accepted" + cause,
			"have the device attach again; if that does not help, its key is another than the published one: see " +
				device + ", and return it to its manufacturer (factory lot reissue)"
	case kme.NotBound:
		return "the IMSI has no binding, and the call needs one or asked for none to be made",
			"have its device attach from an origin that may provision"
	case kme.CallerNotAllowed:
		return fmt.Sprintf("%s (client %q, origin %q)", r.Message, r.Client, r.Origin),
			"see roles, plmns and provision_from of the client in the configuration of keysvc serve"
	case kme.Malformed:
		return r.Message, "have the HSS, or whoever is between it and the service, looked at: nothing can be " +
			"answered to that"
	case kme.Overloaded:
		return r.Message, "have the device attach again; if that happens often, see imei_rate, calls and the " +
			"client's rate"
	case kme.RolledBack, kme.Damaged:
		return r.Message, "keysvc store verify"
	case kme.HSMUnavailable, kme.DirectoryUnavailable, kme.StoreUnavailable:
		return r.Message, "see /readyz and the log of the service; have the device attach again when it is ready"
	}
	return r.Message, "have the device attach again; see the log of the service"
}

func at(origin string) string {
	if origin == "" { // a caller's only peer
		return ""
	}
	return " at origin " + origin
}

// Doubts gives those about a binding. It needs the directory of its manufacturer, if that is trusted.
func (l *Lots) Doubts(ctx context.Context, b *Binding) ([]Doubt, error) {
	name := lotName{b.Manufacturer, b.Lot}
	if lot := l.imported[name]; lot != nil && lot.servedLot != nil {
		// A directory that is gone would have nothing revoked.
		if _, err := lot.reader.Manifest(ctx, b.Lot); err != nil {
			return nil, unknownRevocations(name, err)
		}
	}
	return l.doubts(ctx, b)
}

// Damage is err if it says that rows of a subscription are damaged; else nil.
func Damage(err error) error {
	if errors.As(err, new(*DamagedRow)) {
		return err
	}
	return nil
}
