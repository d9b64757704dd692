package keyspec

import "testing"

// A label is read back as the key that has it.
func TestParseLabel(t *testing.T) {
	for _, k := range []Key{Storage, {Role: RoleKEK, Manufacturer: "m", Name: "op"},
		{Role: RoleLot, Manufacturer: "m", Name: "L1"}, {Role: RoleStorage, Generation: 7},
		{Role: RoleOperatorOutgoing, Manufacturer: "m", Name: "a of b", Generation: 12},
		{Role: RoleLot, Name: "L (2)"}, {Role: RoleSigning, Generation: 2}} {
		if got, ok := ParseLabel(k.Label()); !ok || got != k && got.Label() != k.Label() {
			t.Errorf("%q: %+v, %v", k.Label(), got, ok)
		}
	}
	for _, label := range []string{"", "kme", "km storage", "storage", "kme storage (1)x"} {
		if k, ok := ParseLabel(label); ok && k.Role == RoleStorage && k.Name == "" {
			t.Errorf("%q is %+v", label, k)
		}
	}
}
