package factory

import "testing"

// Minutes have a fact a line: whoever is present is named in one line of text.
func TestCheckPresent(t *testing.T) {
	for name, good := range map[string]bool{"Ada": true, "Müller, Grace": true, "": false, "  ": false,
		"Ada\nmanufacturer x": false, "\x1b[31mAda": false} {
		if err := CheckPresent([]string{"Ada", name}); (err == nil) != good {
			t.Errorf("%q: %v", name, err)
		}
	}
	if err := CheckPresent(nil); err != nil {
		t.Error(err)
	}
}
