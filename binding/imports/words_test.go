package imports

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/kme"
)

// imported is a store that has manufacturers and lots.
type imported struct {
	registry.Store
	manufacturers []*registry.Manufacturer
	lots          []*registry.Lot
}

func (i imported) Manufacturers(context.Context) ([]*registry.Manufacturer, error) {
	return i.manufacturers, nil
}
func (i imported) Lots(context.Context) ([]*registry.Lot, error)                 { return i.lots, nil }
func (i imported) Bound(context.Context, string, string, time.Time) (int, error) { return 7, nil }

// hsm is a token that has a lot's key, or not.
type hsm bool

func (hsm) String() string                                   { return "token X" }
func (h hsm) Has(context.Context, hsmkeys.Key) (bool, error) { return bool(h), nil }

func TestLosses(t *testing.T) {
	withdrawn := registry.Verdict{Withdrawn: true}
	lot := &registry.Lot{Manufacturer: "good", Manifest: &directory.Manifest{Lot: "L1",
		Ranges: []directory.Range{{Count: 40}}}}
	store := imported{
		manufacturers: []*registry.Manufacturer{{KeyID: "good", Operator: "op"}, {KeyID: "bad", Verdict: withdrawn}},
		lots: []*registry.Lot{lot, {Manufacturer: "good", Retired: withdrawn}, {Manufacturer: "other"},
			{Manufacturer: "good"}},
	}
	for name, want := range map[string]string{"bad": "", "nobody": "",
		"good": "Manufacturer good, enrolled as operator op: none of its lots is served any more, 2 by now,"} {
		if got := must.Get[string](t)(DistrustLoss(t.Context(), store, name)); !strings.HasPrefix(got, want) ||
			(got == "") != (want == "") {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	lost := "Lot L1 of manufacturer good: its key in token X will be destroyed, and none of its 40 devices is bound " +
		"any more. 7 bindings stand."
	for _, c := range []struct {
		retired registry.Verdict
		has     hsm
		want    string
	}{{registry.Verdict{}, true, lost}, {registry.Verdict{}, false, lost}, {withdrawn, true, lost},
		{withdrawn, false, ""}} {
		lot.Retired = c.retired
		if got := must.Get[string](t)(RetirementLoss(t.Context(), store, lot, c.has, time.Now())); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}

// An enrolment says what it has changed of the one before, and what it has left.
func TestReplaced(t *testing.T) {
	tacs := []kme.TAC{must.Get[kme.TAC](t)(kme.ParseTAC("35209900"))}
	before := []*registry.Manufacturer{{KeyID: "other", Operator: "x", Directory: "file:/x"},
		{KeyID: "m", Operator: "op", Directory: "file:/a"}, {KeyID: "n", Operator: "op"}}
	for name, c := range map[string]struct {
		m       registry.Manufacturer
		newTACs bool
		want    []string
	}{
		"the first": {m: registry.Manufacturer{KeyID: "new", Operator: "op", Directory: "file:/a"}},
		"the same": {registry.Manufacturer{KeyID: "m", Operator: "op", Directory: "file:/a"}, false,
			[]string{"its directory is file:/a, as before"}},
		"another operator": {registry.Manufacturer{KeyID: "m", Operator: "op2"}, false, []string{
			"before, it was enrolled as operator op, whose grants are refused from now on"}},
		"another directory": {registry.Manufacturer{KeyID: "m", Operator: "op", Directory: "vault:k"}, false,
			[]string{"its directory is vault:k; before, it was file:/a"}},
		"its first directory": {m: registry.Manufacturer{KeyID: "n", Operator: "op", Directory: "vault:k"}},
		"TACs": {registry.Manufacturer{KeyID: "new", TACs: tacs}, true,
			[]string{"its lots may have TAC [35209900] alone"}},
		"those of before": {registry.Manufacturer{KeyID: "n", Operator: "op", TACs: tacs}, false,
			[]string{"its lots may have TAC [35209900] alone, as before"}},
	} {
		if got := Replaced(&c.m, before, c.newTACs); !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}
