// Package explain says in words what the state of subscriptions and devices is, and what is to be done.
package explain

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/refusals"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/kme"
)

// A Subscription explains a subscription: its state, why its last call was refused, and what is to be done.
type Subscription struct {
	IMSI    kme.IMSI         `json:"imsi"`
	State   string           `json:"state"` // the latest binding's; UNBOUND without one, DAMAGED if nobody knows
	Says    []string         `json:"says"`
	Doubts  []registry.Doubt `json:"doubts"`
	Refused *refusals.Past   `json:"last_refusal,omitempty"`
	Why     string           `json:"why,omitempty"` // it was refused
	Next    []string         `json:"next"`
}

// OfSubscription explains one.
func OfSubscription(k binding.Known) *Subscription {
	e := &Subscription{IMSI: k.IMSI, State: "UNBOUND", Says: []string{}, Next: []string{},
		Doubts: append([]registry.Doubt{}, k.Doubts...), Refused: k.Refused}
	if k.Damaged != nil {
		e.State = "DAMAGED"
		e.say("What the database has of it is not what the service wrote: %v.", k.Damaged)
		e.do("find out who has changed the database (keysvc store verify); keysvc binding revoke %s ends the "+
			"subscription's bindings, and its next attach may bind it again", k.IMSI)
		e.refusal(k)
		return e
	}
	if b := k.Subscription.Latest(); b != nil {
		e.State = string(b.State)
	}
	e.stands(k)
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

func (e *Subscription) say(format string, args ...any) {
	e.Says = append(e.Says, fmt.Sprintf(format, args...))
}
func (e *Subscription) do(format string, args ...any) {
	e.Next = append(e.Next, fmt.Sprintf(format, args...))
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// firstAttach is what to do for a subscription that is not bound, unless its last refusal asks for something else.
const firstAttach = "have its device attach; if the HSS names the MME or AMF as origin, provision_from has to allow it"

func (e *Subscription) stands(k binding.Known) {
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
			"whatever device.", s.Revoked.IMEI, stamp(s.Revoked.Revoked), by(last(k.History, binding.EventRevoked)))
		e.do("%s", firstAttach)
	default:
		if was := last(k.History, binding.EventEstablished); was != nil {
			e.say("It is not bound. Device %s was answered NW_SIG at %s, and never showed that it has the KME: that "+
				"ended by itself.", was.IMEI, stamp(was.Time))
		} else {
			e.say("It was never bound.")
		}
		e.do("%s", firstAttach)
	}
}

func last(history []binding.Entry, event binding.Event) *binding.Entry {
	for _, e := range slices.Backward(history) {
		if e.Event == event {
			return &e
		}
	}
	return nil
}

// by names the actor of an entry.
func by(e *binding.Entry) string {
	if e == nil || e.Actor == (binding.Actor{}) {
		return "the service"
	}
	if e.Actor.User != "" {
		return e.Actor.User + " (" + e.Actor.Client + ")"
	}
	return e.Actor.Client
}

// refusal says why the last call was refused, and what is to be done unless it was done since.
func (e *Subscription) refusal(k binding.Known) {
	r := k.Refused
	if r == nil {
		return
	}
	why, todo := meaning(r)
	e.Why = why
	for _, h := range k.History {
		if h.Time.After(r.Time) && (h.Event == binding.EventEstablished || h.Event == binding.EventActivated) {
			e.Why += "; since then, at " + stamp(h.Time) + ", it was " + string(h.Event)
			return
		}
	}
	if r.Reason != kme.OtherDevice { // to which it is not bound any more, if firstAttach is there
		e.Next = slices.DeleteFunc(e.Next, func(s string) bool { return s == firstAttach })
	}
	e.do("%s", todo)
}

// meaning says in words why a call was refused, and what is to be done.
func meaning(r *refusals.Past) (why, todo string) {
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
		if r.Cause == binding.ErrUsed.Error() {
			return "the payload of device " + r.IMEI + " was not accepted" + cause,
				"have the device attach again: it makes another KME; if this happens again, somebody repeats its " +
					"payload: see who and from where in the log of the service"
		}
		return "the payload of device " + r.IMEI + " was not accepted" + cause,
			"have the device attach again; if that does not help, its key is another than the published one: see " +
				device + ", and return it to its manufacturer (factory lot reissue)"
	case kme.NotBound:
		return "the IMSI has no binding, and the call needs one or asked for none to be made",
			firstAttach
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

// OrDevice adds, if it is so, that an unknown IMSI's number is the IMEI of a device of a lot. It may be an IMSI all the
// same.
func (e *Subscription) OrDevice(lots []*registry.Lot) {
	if imei, lot := DeviceOf(e.IMSI, lots); lot != "" {
		e.say("It is the IMEI of a device of lot %s, too.", lot)
		e.do("if the device is meant: %s", DeviceCommands(imei))
	}
}

// DeviceOf is the device of a lot whose IMEI has an IMSI's digits; lot is empty if there is none.
func DeviceOf(imsi kme.IMSI, lots []*registry.Lot) (imei kme.IMEI, lot string) {
	imei, err := kme.ParseIMEI(imsi.String())
	if err != nil {
		return imei, ""
	}
	if l := registry.LotOf(lots, imei); l != nil {
		lot = l.Manifest.Lot
	}
	return imei, lot
}

// ParseIMSI is [kme.ParseIMSI]. If the text is an IMEI, the error says what to do with that.
func ParseIMSI(text string) (kme.IMSI, error) {
	imsi, err := kme.ParseIMSI(text)
	if imei, e := kme.ParseIMEI(text); err != nil && e == nil {
		err = fmt.Errorf("%w, and this is an IMEI: %s", err, DeviceCommands(imei))
	}
	return imsi, err
}

// MayOpen refuses to open provisioning for what is the IMEI of a device, and no IMSI that was bound. An IMSI that is
// not bound needs no opening: its next vector opens an attempt.
func MayOpen(ctx context.Context, store interface {
	Subscription(ctx context.Context, imsi kme.IMSI, now time.Time) (*binding.Subscription, error)
	Lots(ctx context.Context) ([]*registry.Lot, error)
}, imsi kme.IMSI, now time.Time) error {
	if s, err := store.Subscription(ctx, imsi, now); err != nil || s.Latest() != nil {
		return nil // what is damaged may be opened, too
	}
	lots, err := store.Lots(ctx)
	if err != nil {
		return err
	}
	if imei, lot := DeviceOf(imsi, lots); lot != "" {
		return usage.Errorf("%s is the IMEI of a device of lot %s, and no IMSI that is bound: %s", imsi, lot,
			DeviceCommands(imei))
	}
	return nil
}

// DeviceCommands says which commands show a device.
func DeviceCommands(imei kme.IMEI) string {
	return fmt.Sprintf("keysvc device %s shows it, and keysvc binding list --imei %[1]s the IMSIs that are bound to it",
		imei)
}

// RevocationLoss says what is lost when an IMSI's bindings are revoked; nothing if it has none. s and err are what
// Store.Subscription gave. Damaged bindings can be revoked, too; it returns any other err.
func RevocationLoss(imsi kme.IMSI, s *binding.Subscription, err error) (string, error) {
	lost := "what it is bound to is damaged"
	if err == nil {
		b := s.Latest()
		if b == nil || b.State == binding.Revoked {
			return "", nil
		}
		lost = fmt.Sprintf("it is bound to IMEI %s, of lot %s, since %s", b.IMEI, b.Lot,
			b.Established.Format(time.RFC3339))
	} else if !binding.IsDamaged(err) {
		return "", err
	}
	return fmt.Sprintf("IMSI %s: %s. Its KME will be forgotten, and its next attach may bind it to whatever device.",
		imsi, lost), nil
}

// A Device explains a device: its state, and what is to be done.
type Device struct {
	Says, Next []string
	Bindings   []*binding.Binding
}

// OfDevice explains one.
func OfDevice(k binding.KnownDevice) *Device {
	d := &Device{Bindings: k.Bindings}
	in := "It is in lot " + k.Lot + " of manufacturer " + k.Manufacturer + ", which "
	switch {
	case k.Lot == "":
		d.Says = []string{"It is in no lot that was imported and whose manufacturer is trusted."}
		d.Next = []string{"if it is to be bound: have its manufacturer grant its lot, keysvc lot import it, and send " +
			"the service SIGHUP"}
		return d
	case k.Retired.Withdrawn:
		d.Says = []string{in + "was retired " + k.Retired.String() + ": no device of it is newly bound."}
		d.Next = []string{"keysvc lot import FILE --reinstate REASON takes that back"}
	default:
		d.Says = []string{in + "is served."}
	}
	switch {
	case k.Unknown != nil:
		d.Says = append(d.Says, "Whether the manufacturer has revoked it is not known, and so it is refused.")
		d.Next = append(d.Next, "see the directory's state, and max_revocation_age in the configuration")
	case k.Revoked:
		d.Says = append(d.Says, "The manufacturer has revoked it: it is neither newly bound nor sent vectors.")
		d.Next = append(d.Next, "the subscriber needs another device")
	}
	return d
}
