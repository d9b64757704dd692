package tables

import (
	"errors"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sightings"
	"github.com/kmehsm/kmehsm/kme"
)

// OfBinding is a binding as its row has it.
func OfBinding(b *binding.Binding, seq int64) []any {
	return []any{
		b.IMSI.String(), string(b.State), b.IMEI.String(), b.Manufacturer, b.Lot, int64(b.DeviceKey), orEmpty(b.Sealed),
		orEmpty(b.NWSig), b.AttemptID, orEmpty(b.PayloadSHA256), Millis(b.Established), Millis(b.Activated),
		Millis(b.Revoked), b.Origin.String(), Millis(b.Expires), SentText(b.Sent), seq,
	}
}

// orEmpty has no NULL in a row.
func orEmpty(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}

// Binding is the binding of a row, and the number of its last entry in the ledger.
func Binding(r Row) (b *binding.Binding, seq int64, err error) {
	b = &binding.Binding{
		State: binding.State(r.Text(1)), Manufacturer: r.Text(3), Lot: r.Text(4), DeviceKey: int(r.Int(5)),
		Sealed: r.Bytes(6), NWSig: r.Bytes(7), AttemptID: r.Text(8), PayloadSHA256: r.Bytes(9),
		Established: Time(r.Int(10)), Activated: Time(r.Int(11)), Revoked: Time(r.Int(12)),
		Expires: Time(r.Int(14)),
	}
	err = errors.Join(b.IMSI.UnmarshalText([]byte(r.Text(0))), b.IMEI.UnmarshalText([]byte(r.Text(2))),
		b.Origin.UnmarshalText([]byte(r.Text(13))))
	for line := range strings.Lines(r.Text(15)) {
		var o kme.Origin
		err = errors.Join(err, o.UnmarshalText([]byte(strings.TrimSuffix(line, "\n"))))
		b.Sent = append(b.Sent, o)
	}
	return b, r.Int(16), err
}

// SentText is a Binding's Sent as its column has it: each with its end of line, since an origin may be empty.
func SentText(sent []kme.Origin) string {
	var b strings.Builder
	for _, o := range sent {
		b.WriteString(o.String() + "\n")
	}
	return b.String()
}

// Listing is the entry of a row of Equipment.
func Listing(r Row) binding.Listing {
	return binding.Listing{Prefix: r.Text(0), Status: binding.EquipmentStatus(r.Text(1)), Reason: r.Text(2),
		Listed: Time(r.Int(3)), Change: r.Int(4)}
}

// Sighting is that of a row of Sightings.
func Sighting(r Row) (seen sightings.Sighting, err error) {
	seen = sightings.Sighting{Evidence: sightings.Evidence(r.Text(2)), First: Time(r.Int(3)),
		Last: Time(r.Int(4))}
	return seen, errors.Join(seen.IMSI.UnmarshalText([]byte(r.Text(0))), seen.IMEI.UnmarshalText([]byte(r.Text(1))))
}

// Millis is a time as a row has it: milliseconds since 1970; 0 for none.
func Millis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

// Time is that of Millis.
func Time(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}

// Int is a bool as a row has it.
func Int(b bool) int64 {
	if b {
		return 1
	}
	return 0
}
