package explain

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/kme"
)

// What is missing and known, left out, and not known each has its words; so has what is lost with it for good.
func TestMissing(t *testing.T) {
	some := &binding.Missing{Lost: 3, Lines: make([]binding.Line, 2), Unknown: [binding.Chains]int64{1: 1}}
	all := &binding.Missing{Lost: 2, Lines: make([]binding.Line, 2)}
	for name, c := range map[string]struct{ got, want string }{
		"no log":     {Missing(some, false, 0), "lost at least 1 entries. They are not known: no audit log was named"},
		"a log":      {Missing(some, true, 0), "has lost 3 entries; 2 come back from the audit log, and at least 1 "},
		"left out":   {Missing(all, true, 1), "2 entries; 1 come back from the audit log, and at least 0 "},
		"says so":    {Missing(all, true, 1), "known. 1 of the audit log were left out"},
		"all known":  {MissingLoss(all, true), "The KMEs of devices that were bound since are lost"},
		"revoked":    {MissingLoss(some, true), "Every binding whose end may be among what is not known is revoked"},
		"used again": {MissingLoss(some, false), "KMEs that were used since can be used again"},
	} {
		if !strings.Contains(c.got, c.want) {
			t.Errorf("%s: %q, want %q", name, c.got, c.want)
		}
	}
}

func TestIdentities(t *testing.T) {
	for text, want := range map[string]string{
		"262011234567890":      "- 262011234567890", // no Luhn check digit
		"35209900000012":       "35209900000012 35209900000012",
		"imei-35209900000012":  "35209900000012 -",
		"imsi-35209900000012":  "- 35209900000012",
		"imei-262011234567890": "refused", "imsi-1": "refused", "x": "refused", "": "refused",
		"imei-imsi-35209900000012": "refused",
	} {
		imei, imsi, err := Identities(text)
		got := "refused"
		if err == nil {
			got = "- "
			if imei != (kme.IMEI{}) {
				got = imei.String() + " "
			}
			if imsi == (kme.IMSI{}) {
				got += "-"
			} else {
				got += imsi.String()
			}
		}
		if got != want {
			t.Errorf("%q: %s (%v), want %s", text, got, err, want)
		}
	}
}

func TestParseIMSI(t *testing.T) {
	for text, want := range map[string]string{"262011234567890": "", "3520990000001234": "keysvc device 35209900000012",
		"nobody": "IMSI"} {
		_, err := ParseIMSI(text)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// opened is a store for MayOpen.
type opened struct {
	s    *binding.Subscription
	err  error
	lots []*registry.Lot
}

func (o opened) Subscription(context.Context, kme.IMSI, time.Time) (*binding.Subscription, error) {
	return o.s, o.err
}

func (o opened) Lots(context.Context) ([]*registry.Lot, error) { return o.lots, nil }

// A device that somebody takes for an IMSI is not opened; what is bound or damaged is, whatever its number.
func TestMayOpen(t *testing.T) {
	tac := must.Get[kme.TAC](t)(kme.ParseTAC("35209900"))
	lots := []*registry.Lot{
		{Manifest: &directory.Manifest{Lot: "L1", Ranges: []directory.Range{{TAC: tac, Count: 10}}}}}
	device := must.Get[kme.IMSI](t)(kme.ParseIMSI("35209900000003"))
	other := must.Get[kme.IMSI](t)(kme.ParseIMSI("262011234567890"))
	bound := &binding.Subscription{Active: &binding.Binding{State: binding.Active}}
	for name, c := range map[string]struct {
		imsi    kme.IMSI
		store   opened
		refused bool
	}{
		"a device":        {device, opened{s: new(binding.Subscription), lots: lots}, true},
		"no lots":         {device, opened{s: new(binding.Subscription)}, false},
		"an IMSI":         {other, opened{s: new(binding.Subscription), lots: lots}, false},
		"bound":           {device, opened{s: bound, lots: lots}, false},
		"what is damaged": {device, opened{err: &binding.DamagedRow{}, lots: lots}, false},
	} {
		err := MayOpen(t.Context(), c.store, c.imsi, time.Now())
		if (err != nil) != c.refused || c.refused && (!errors.As(err, new(usage.Error)) ||
			!strings.Contains(err.Error(), "of lot L1, and no IMSI that is bound: keysvc device 35209900000003")) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
