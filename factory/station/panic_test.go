package station

import (
	"context"
	"testing"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/panics"
)

// panicking is a directory that panics.
type panicking struct{ directory.Store }

func (panicking) List(context.Context, string) ([]string, error) { panic("in the store") }

// Stations are served on while what the wall screen shows cannot be counted, however that fails.
func TestCountingPanics(t *testing.T) {
	d := &Desk{o: Options{Store: panicking{}}}
	if n, err := d.published(t.Context(), &lot{Manifest: &directory.Manifest{Lot: "L1"}}); panics.Of(err) == nil {
		t.Errorf("%d devices, %v", n, err)
	}
}
