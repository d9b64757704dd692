package binding

import (
	"math/big"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/kme"
)

func TestFind(t *testing.T) {
	type rng struct {
		tac          string
		first, count int
	}
	lot := func(name string, ranges ...rng) *registry.Lot {
		m := &directory.Manifest{
			Lot: name, Manufacturer: "maker", Suite: kme.SuiteECDSA,
			N: new(big.Int).SetBit(big.NewInt(1), 2047, 1).Bytes(), E: kme.PublicExponent, Mechanism: "none",
			ShardSize: 1, Created: time.Now(),
		}
		for _, r := range ranges {
			tac, err := kme.ParseTAC(r.tac)
			if err != nil {
				t.Fatal(err)
			}
			m.Ranges = append(m.Ranges, directory.Range{TAC: tac, First: r.first, Count: r.count})
		}
		if err := m.Validate(); err != nil {
			t.Fatal(err)
		}
		return &registry.Lot{Manufacturer: "maker", Manifest: m}
	}
	readers := map[string]*directory.Reader{"maker": directory.NewReader(nil, nil, directory.ReaderOptions{})}
	// Out of order, neighbours without a gap, one of several ranges, one of one device, and a TAC's first and last.
	index, err := registry.NewLots([]*registry.Lot{
		lot("high", rng{"35209900", 500_000, 500_000}),
		lot("low", rng{"35209900", 10, 10}, rng{"35209901", 0, 1}),
		lot("next", rng{"35209900", 20, 1}),
		lot("first", rng{"00000000", 0, 1}),
		lot("last", rng{"99999999", 999_999, 1}),
	}, readers)
	if err != nil {
		t.Fatal(err)
	}
	if index.Len() != 6 {
		t.Errorf("%d ranges, want 6", index.Len())
	}
	for imei, want := range map[string]string{
		"00000000000000": "first",
		"00000000000001": "",
		"35209899999999": "",
		"35209900000009": "",
		"35209900000010": "low",
		"35209900000015": "low",
		"35209900000019": "low",
		"35209900000020": "next",
		"35209900000021": "",
		"35209900499999": "",
		"35209900500000": "high",
		"35209900999999": "high",
		"35209901000000": "low",
		"35209901000001": "",
		"99999999999998": "",
		"99999999999999": "last",
	} {
		parsed, err := kme.ParseIMEI(imei)
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		if l := index.Find(parsed); l != nil {
			got = l.Manifest.Lot
		}
		if got != want {
			t.Errorf("IMEI %s is in lot %q, want %q", imei, got, want)
		}
		if l := new(registry.Lots).Find(parsed); l != nil {
			t.Errorf("without lots, IMEI %s is in %q", imei, l.Manifest.Lot)
		}
	}
	unknown, _ := kme.ParseIMEI("35209900000009")
	if _, _, err := index.Device(t.Context(), unknown); err == nil {
		t.Error("a device in no lot was found")
	}
}
