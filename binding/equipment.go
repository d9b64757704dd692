package binding

import (
	"context"

	"github.com/kmehsm/kmehsm/binding/sightings"
	"github.com/kmehsm/kmehsm/kme"
)

// An EquipmentStatus is the list that an equipment identity register has a device on (3GPP TS 22.016 clause 2), or
// Unknown: nothing is known of the device, and no default replaces that.
type EquipmentStatus string

const (
	Whitelisted EquipmentStatus = "WHITELISTED"
	Greylisted  EquipmentStatus = "GREYLISTED"
	Blacklisted EquipmentStatus = "BLACKLISTED"
	Unknown     EquipmentStatus = "UNKNOWN"
)

// An EquipmentReason is the rule of docs/equipment.md that gave a status.
type EquipmentReason string

const (
	Listed            EquipmentReason = "LISTED"             // by the operator
	RevokedDevice     EquipmentReason = "REVOKED_DEVICE"     // by its manufacturer
	ReissuedDevice    EquipmentReason = "REISSUED_DEVICE"    // the key that its KME rests on was replaced
	OtherDevice       EquipmentReason = "OTHER_DEVICE"       // the IMSI is bound to another one
	OtherSubscription EquipmentReason = "OTHER_SUBSCRIPTION" // it is proven, for other IMSIs only
	Proven            EquipmentReason = "PROVEN"             // for the IMSI, if there is one
	NotProven         EquipmentReason = "NOT_PROVEN"         // it could be
	NotInLot          EquipmentReason = "NOT_IN_LOT"         // it cannot be
)

// Equipment is the answer to CheckEquipment.
type Equipment struct {
	Status EquipmentStatus
	Reason EquipmentReason
}

// answers are all possible answers, by the rules of docs/equipment.md.
func answers() (all []Equipment) {
	some := []EquipmentStatus{Whitelisted, Greylisted, Blacklisted}
	for reason, statuses := range map[EquipmentReason][]EquipmentStatus{
		Listed: some, OtherDevice: some, OtherSubscription: some, NotInLot: append(some, Unknown),
		RevokedDevice: {Blacklisted}, ReissuedDevice: {Blacklisted}, Proven: {Whitelisted}, NotProven: {Greylisted},
	} {
		for _, s := range statuses {
			all = append(all, Equipment{Status: s, Reason: reason})
		}
	}
	return all
}

// An EquipmentPolicy is what the rules leave to the operator.
type EquipmentPolicy struct {
	ListsLast         bool            // the operator's list decides only about devices that no other rule is about
	OtherDevice       EquipmentStatus // of a device with an IMSI that is bound to another
	OtherSubscription EquipmentStatus // of one that is proven for other IMSIs only
	NotInLot          EquipmentStatus // of one that cannot prove itself
}

// DefaultEquipmentPolicy lets a SIM that is bound work in its own device only, and lets devices in that cannot prove
// themselves.
func DefaultEquipmentPolicy() EquipmentPolicy {
	return EquipmentPolicy{OtherDevice: Blacklisted, OtherSubscription: Greylisted, NotInLot: Whitelisted}
}

// CheckEquipment says whether a device may be served, by the rules of docs/equipment.md; with the zero IMSI, where the
// subscription is not known. It reads the store once, and asks no HSM.
func (s *Service) CheckEquipment(ctx context.Context, imei kme.IMEI, imsi kme.IMSI) (Equipment, error) {
	e, err := s.check(ctx, imei, imsi)
	if err != nil {
		return e, s.failed(ctx, "CheckEquipment", imsi, err, "imei", imei)
	}
	s.history.Saw(imsi, imei, sightings.Asserted)
	s.metrics.equipment.WithLabelValues(string(e.Status), string(e.Reason)).Inc()
	s.log.DebugContext(ctx, "equipment checked", "imsi", imsi, "imei", imei, "status", e.Status, "equipment", e.Reason)
	return e, nil
}

func (s *Service) check(ctx context.Context, imei kme.IMEI, imsi kme.IMSI) (Equipment, error) {
	listed, isListed, err := s.listed.of(imei)
	if err != nil {
		return Equipment{}, fromStore(ctx, err)
	}
	if isListed && !s.equipment.ListsLast {
		return Equipment{Status: listed, Reason: Listed}, nil
	}
	lot := s.lots.Find(imei)
	if lot != nil {
		if revoked, err := lot.Reader.Revoked(lot.Manifest, imei); revoked || err != nil {
			return revokedEquipment(err)
		}
	}
	own, of, err := s.store.Equipment(ctx, imei, imsi, s.times.Now())
	if err != nil {
		return Equipment{}, fromStore(ctx, err)
	}
	held := own.Active
	if held != nil && held.IMEI == imei { // no other counts
		of = []*Binding{held}
	}
	var proven, reissued, revoked bool // by a key that stands; by one that was replaced; by one of a lot of before
	for _, b := range of {
		if !s.lots.Trusts(b.Basis()) {
			continue
		}
		switch gone, err := s.lots.Revoked(b.Basis()); {
		case err != nil:
			return revokedEquipment(err)
		case gone:
			revoked = true
			continue
		}
		old, err := s.lots.Reissued(ctx, b.Basis())
		switch {
		case ctx.Err() != nil && err != nil:
			return Equipment{}, fromDirectory(ctx, err)
		case err != nil:
			return revokedEquipment(err)
		}
		proven, reissued = proven || !old, reissued || old
	}
	expected := lot != nil && own.expects(imei)
	switch {
	case revoked && !proven:
		return Equipment{Status: Blacklisted, Reason: RevokedDevice}, nil
	case reissued && !proven:
		return Equipment{Status: Blacklisted, Reason: ReissuedDevice}, nil
	case proven && (imsi == kme.IMSI{} || held != nil && held.IMEI == imei):
		return Equipment{Status: Whitelisted, Reason: Proven}, nil
	case held != nil && held.IMEI != imei && !expected:
		return Equipment{Status: s.equipment.OtherDevice, Reason: OtherDevice}, nil
	case proven && !expected:
		return Equipment{Status: s.equipment.OtherSubscription, Reason: OtherSubscription}, nil
	case lot != nil:
		return Equipment{Status: Greylisted, Reason: NotProven}, nil
	case isListed:
		return Equipment{Status: listed, Reason: Listed}, nil
	}
	return Equipment{Status: s.equipment.NotInLot, Reason: NotInLot}, nil
}

// revokedEquipment is the answer about a device that is revoked, or may be: err says which.
func revokedEquipment(err error) (Equipment, error) {
	if err != nil {
		return Equipment{}, revocationsUnknown(err)
	}
	return Equipment{Status: Blacklisted, Reason: RevokedDevice}, nil
}

// expects says whether a device is about to be bound, or may be beside a binding: an administrator has opened that.
func (s *Subscription) expects(imei kme.IMEI) bool {
	return s.Pending != nil && s.Pending.IMEI == imei || len(s.Attempts) > 0
}
