package explain

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/devicelist"
	"github.com/kmehsm/kmehsm/binding/sightings"
	"github.com/kmehsm/kmehsm/kme"
)

// Identities are what a text can be: an IMEI, an IMSI, or both. imei-DIGITS and imsi-DIGITS are one.
func Identities(text string) (imei kme.IMEI, imsi kme.IMSI, err error) {
	digits, isIMEI := strings.CutPrefix(text, "imei-")
	isIMSI := false
	if !isIMEI {
		digits, isIMSI = strings.CutPrefix(digits, "imsi-")
	}
	var notIMEI, notIMSI error
	if !isIMSI {
		imei, notIMEI = kme.ParseIMEI(digits)
	}
	if !isIMEI {
		imsi, notIMSI = kme.ParseIMSI(digits)
	}
	switch {
	case isIMEI && notIMEI != nil:
		return imei, imsi, notIMEI
	case notIMSI != nil && (isIMSI || notIMEI != nil):
		return imei, imsi, notIMSI
	}
	return imei, imsi, nil
}

// Equipment is what a store has of a device, of a subscription, or of both.
type Equipment struct {
	Listing   *binding.Listing // the entry of the operator's list that counts for the device; nil if there is none
	Listed    []binding.Entry  // what the ledger has about Listing
	Bindings  []*binding.Binding
	Sightings []sightings.Sighting
}

// ReadEquipment reads it. imei or imsi may be the zero value.
func ReadEquipment(ctx context.Context, store interface {
	binding.Listings
	Equipment(ctx context.Context, imei kme.IMEI, imsi kme.IMSI, now time.Time) (
		own *binding.Subscription, of []*binding.Binding, err error)
	Sightings(ctx context.Context, imsi kme.IMSI, imei kme.IMEI) ([]sightings.Sighting, error)
	History(ctx context.Context, subject string) ([]binding.Entry, error)
}, imei kme.IMEI, imsi kme.IMSI, now time.Time) (e Equipment, err error) {
	own, of, err := store.Equipment(ctx, imei, imsi, now)
	if err != nil {
		return e, err
	}
	if b := own.Latest(); b != nil && !slices.Contains(of, b) {
		of = append(of, b)
	}
	e.Bindings = of
	if e.Sightings, err = store.Sightings(ctx, imsi, imei); err != nil || imei == (kme.IMEI{}) {
		return e, err
	}
	all, err := devicelist.Standing(ctx, store)
	if err != nil {
		return e, err
	}
	if e.Listing = devicelist.Of(all, imei); e.Listing != nil {
		e.Listed, err = store.History(ctx, binding.ListingSubject(e.Listing.Prefix))
	}
	return e, err
}
