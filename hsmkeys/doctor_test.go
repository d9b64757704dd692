package hsmkeys

import (
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/softhsmtest"
)

// SoftHSM does all that it must, on both sides.
func TestWeaknesses(t *testing.T) {
	token := open(t, softhsmtest.Token(t))
	for _, side := range []Side{Factory, Operator} {
		start := time.Now()
		all := must[[]Finding](t)(token.try(t.Context(), side))
		t.Log(side, time.Since(start))
		for _, f := range all {
			t.Logf("%v %-80s %s %s", f.OK, f.Check, f.For, f.Consequence)
		}
	}
}
