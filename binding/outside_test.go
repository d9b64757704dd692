package binding

import (
	"log/slog"
	"testing"

	"github.com/kmehsm/kmehsm/binding/limits"
)

// A call gives back its place once, also if what it waits for outside panics.
func TestOutsidePanics(t *testing.T) {
	s := NewService(Options{Times: DefaultTimes(), Limits: limits.Limits{Calls: 1},
		Log: slog.New(slog.DiscardHandler)})
	leave, err := s.enter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p := &establishment{leave: leave}
	func() {
		defer func() { recover() }()
		defer func() { p.leave() }() // as EstablishKME does
		s.outside(t.Context(), p, func() { panic("outside") })
	}()
	if _, err := s.enter(t.Context()); err != nil {
		t.Errorf("the place was not given back: %v", err)
	}
	if _, err := s.enter(t.Context()); err == nil {
		t.Error("the place was given back twice")
	}
}
