package api

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
)

// A service that begins to end while it is checked does not say that it is ready, however the check comes out.
func TestReadyWhileLeaving(t *testing.T) {
	var leaving atomic.Bool
	r := readiness{leaving: leaving.Load, find: func(context.Context) ([]string, error) {
		leaving.Store(true)
		return nil, nil
	}}
	if _, err := r.ask(t.Context()); !errors.Is(err, errLeaving) {
		t.Errorf("the service ends soon, and it says %v", err)
	}
}
