package devicelist

import (
	"io"
	"strings"
	"testing"
	"time"

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

// What is no list may have no end of a line for gigabytes.
func TestReadNoList(t *testing.T) {
	zeros := &endless{}
	if _, err := Read(zeros, time.Now()); err == nil || zeros.read > 1<<20 {
		t.Errorf("%d bytes were read: %v", zeros.read, err)
	}
	all, err := Read(strings.NewReader("equipment,status,reason\n35209900,blacklisted,x\n"), time.Now())
	if err != nil || len(all) != 1 {
		t.Errorf("%v, %v", all, err)
	}
}

// An endless file has zeros: 1 GB, for a reader that does not give up.
type endless struct{ read int }

func (e *endless) Read(p []byte) (int, error) {
	if e.read > 1<<30 {
		return 0, io.EOF
	}
	e.read += len(p)
	return len(p), nil
}
