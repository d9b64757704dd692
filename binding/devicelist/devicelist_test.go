package devicelist

import (
	"testing"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/kme"
)

// Of the entries that a device's IMEI begins with, the one with the longest prefix counts.
func TestOf(t *testing.T) {
	tac, range1, device := binding.Listing{Prefix: "35209900"}, binding.Listing{Prefix: "3520990000"},
		binding.Listing{Prefix: "35209900000001"}
	listed := []binding.Listing{tac, range1, device, {Prefix: "35209900000002"}, {Prefix: "4"}} // in order
	all := append([]binding.Listing{{Prefix: ""}}, listed...)
	for _, c := range []struct {
		list       []binding.Listing
		imei, want string
	}{
		{listed, "35209900000001", device.Prefix},
		{listed, "35209900000003", range1.Prefix},
		{listed, "35209900990001", tac.Prefix},
		{listed, "35209901000001", "none"},
		{all, "35209901000001", ""},
		{all, "35209900000001", device.Prefix},
		{nil, "35209900000001", "none"},
	} {
		got := "none"
		if l := Of(c.list, must.Get[kme.IMEI](t)(kme.ParseIMEI(c.imei))); l != nil {
			got = l.Prefix
		}
		if got != c.want {
			t.Errorf("of %d entries, %q counts for %s, not %q", len(c.list), got, c.imei, c.want)
		}
	}
}
