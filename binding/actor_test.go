package binding_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/limits"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/kme"
)

// Every line that a call makes says who made it.
func TestActorInEveryLine(t *testing.T) {
	r, _, l := newServed(t)
	actor := binding.Actor{Client: "hss-1", Role: "hss", Certificate: "c0ffee", Address: "192.0.2.1:1"}
	ctx := binding.WithActor(t.Context(), actor)
	imsi, d := newIMSI(), l.devices[0]
	prepare := func() *binding.Prepared {
		return must[*binding.Prepared](t)(r.service.PrepareVector(ctx, imsi, newRANDs(1), here))
	}
	establish := func(attempt string, payload []byte) (*binding.Established, error) {
		return r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: attempt,
			Payload: payload, Origin: here, Export: true})
	}
	attempt := prepare().AttemptID
	payload, _ := d.payload(t)
	bad := append([]byte(nil), payload...)
	bad[len(bad)-1] ^= 1
	_, err := establish(attempt, bad)
	checkRefused(t, "a bad payload", err, kme.KMERejected, "")
	for range 2 {
		must[*binding.Established](t)(establish(attempt, payload))
	}
	for range times().PendingVectors + 1 {
		prepare()
	}
	must[*binding.Attempt](t)(r.service.OpenProvisioning(ctx, imsi, time.Hour))
	attempt = prepare().AttemptID
	payload, _ = d.payload(t)
	must[*binding.Established](t)(establish(attempt, payload))
	prepare()
	must[*binding.Reported](t)(r.service.ReportAuthentication(ctx, imsi, true, here))
	must[*binding.Binding](t)(r.service.GetBinding(ctx, imsi))
	must[[]*binding.Binding](t)(r.service.ListBindings(ctx, binding.BindingQuery{Limit: 10}))
	must[*binding.Binding](t)(r.service.RevokeBinding(ctx, imsi))
	r.service.Broken(ctx, errors.New("a fault"))
	r.service.Refused(ctx, &binding.Refusal{Reason: kme.CallerNotAllowed})
	seen := map[string]bool{}
	for line := range strings.Lines(r.log.String()) {
		var m struct {
			Msg   string        `json:"msg"`
			Actor binding.Actor `json:"actor"`
		}
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatal(err)
		}
		if seen[m.Msg] = true; m.Actor != actor {
			t.Errorf("not whose it is: %s", line)
		}
	}
	for _, msg := range []string{"attempt opened", "refused", "established", "established again", "KME exported",
		"pending binding ended", "provisioning opened", "authentication reported", "binding read", "bindings listed",
		"binding revoked", "internal error"} {
		if !seen[msg] {
			t.Errorf("no line %q", msg)
		}
	}
}

// A stuckStore keeps every call that prepares vectors, and says whose it is.
type stuckStore struct {
	binding.Store
	came chan string
	goOn chan struct{}
}

func (s *stuckStore) Soon() (done func()) { return func() {} }

func (s *stuckStore) Prepare(ctx context.Context, q binding.VectorRequest) (binding.Decision, error) {
	s.came <- binding.ActorOf(ctx).Client
	<-s.goOn
	return binding.Decision{}, binding.ErrNotBound
}

// A client that takes all places in the queue keeps nobody else out, and has all of them again when it is alone.
func TestFairPlaces(t *testing.T) {
	const places = 8
	store := &stuckStore{came: make(chan string), goOn: make(chan struct{})}
	service := binding.NewService(binding.Options{Store: store, Times: times(), Limits: limits.Limits{Calls: places},
		Log: slog.New(slog.DiscardHandler)})
	var inside []chan error
	// enter makes calls until one is refused, and gives how many were not. All others share the limits.
	enter := func(client string) (n int) {
		t.Helper()
		ctx := binding.WithActor(t.Context(), binding.Actor{Client: client})
		for ; ; n++ {
			done := make(chan error, 1)
			go func() {
				_, err := service.WithLots(new(registry.Lots)).PrepareVector(ctx, parseIMSI("001010000000001"),
					newRANDs(1), here)
				done <- err
			}()
			select {
			case who := <-store.came:
				if inside = append(inside, done); who != client {
					t.Fatalf("%s came as %s", client, who)
				}
			case err := <-done:
				checkRefused(t, fmt.Sprintf("%s's call number %d", client, n+1), err, kme.Overloaded, "")
				return n
			}
		}
	}
	leave := func() {
		for range inside {
			store.goOn <- struct{}{}
		}
		for _, done := range inside {
			<-done
		}
		inside = nil
	}
	for _, c := range []struct {
		client string
		want   int
	}{{"greedy", places}, {"second", places / 2}, {"greedy", 0}, {"third", places / 3}, {"second", 0}, {"greedy", 0}} {
		if n := enter(c.client); n != c.want {
			t.Errorf("%s has %d more places, want %d", c.client, n, c.want)
		}
	}
	leave()
	if n := enter("second"); n != places {
		t.Errorf("alone, a client has %d places, not %d", n, places)
	}
	leave()
	for i := range 2 * places { // more clients than places: each has its share, or one
		if n, want := enter(fmt.Sprint("client ", i)), max(places/(i+1), 1); n != want {
			t.Errorf("client %d of many has %d places, want %d", i+1, n, want)
		}
	}
	leave()
}
