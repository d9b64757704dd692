package api

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// newInstances makes two services, and a client of both.
func newInstances(t *testing.T, timeout time.Duration) (a, b *streaming, c *client.Client) {
	t.Helper()
	a, b = newStreaming(t, new(http.Transport)), newStreaming(t, new(http.Transport))
	c, err := client.New(client.Options{URLs: []string{"unix:" + a.path, "unix:" + b.path}, Timeout: timeout, Tries: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return a, b, c
}

func TestInstancesShare(t *testing.T) {
	a, b, c := newInstances(t, testproc.Patience)
	for range 20 {
		if _, err := c.GetBinding(t.Context(), parseIMSITest(t, bound)); err != nil {
			t.Fatal(err)
		}
	}
	if a, b := a.store.asked.Load(), b.store.asked.Load(); a != 10 || b != 10 {
		t.Errorf("%d and %d calls", a, b)
	}
}

// Calls go on while an instance is killed, and while it is back but not ready. It gets its share again when it is.
func TestInstanceKilled(t *testing.T) {
	a, b, c := newInstances(t, testproc.Patience)
	one := parseIMSITest(t, bound)
	get := func(n int) {
		t.Helper()
		var all sync.WaitGroup
		for range n {
			all.Go(func() {
				if _, err := c.GetBinding(t.Context(), one); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
	}
	get(20)
	a.server.Close()
	get(20)
	for range 10 { // may not be repeated, and need not be
		if _, err := c.ReportAuthentication(t.Context(), one, client.Origin{}, false); err != nil {
			t.Error(err)
		}
	}
	a.unready.Store(true)
	a.listen(t)
	before := a.opened.Load()
	testproc.Await(t, "it is asked whether it is ready", func() bool { return a.opened.Load() > before+2 })
	asked := a.store.asked.Load()
	get(20)
	if n := a.store.asked.Load() - asked; n != 0 {
		t.Errorf("an instance that is not ready got %d calls", n)
	}
	a.unready.Store(false)
	testproc.Await(t, "it gets calls again", func() bool { get(2); return a.store.asked.Load() > asked })
	b.server.Close()
	get(20)
}

// An instance that is silent keeps a call for half of its time. What may not be repeated is made once.
func TestInstanceSilent(t *testing.T) {
	a, b, c := newInstances(t, 2*time.Second)
	close(b.store.goOn)
	slow := parseIMSITest(t, kept)
	for range 4 {
		if got, err := c.GetBinding(t.Context(), slow); err != nil || got.GetImsi() != kept {
			t.Errorf("%v, %v", got, err)
		}
	}
	if a.store.asked.Load() == 0 {
		t.Error("the silent one was not asked")
	}
	testproc.Await(t, "each has its turn", func() bool {
		before := a.store.asked.Load() + b.store.asked.Load()
		_, err := c.ReportAuthentication(t.Context(), slow, client.Origin{}, false)
		if n := a.store.asked.Load() + b.store.asked.Load() - before; n != 1 {
			t.Fatalf("a report of a failure was made %d times: %v", n, err)
		}
		return connect.CodeOf(err) == connect.CodeDeadlineExceeded
	})
}

// All are away: a call goes to any of them, and says why it is refused.
func TestInstancesAway(t *testing.T) {
	a, b, c := newInstances(t, testproc.Patience)
	a.server.Close()
	b.server.Close()
	for range 3 {
		_, err := c.GetBinding(t.Context(), parseIMSITest(t, bound))
		if connect.CodeOf(err) != connect.CodeUnavailable {
			t.Error(err)
		}
	}
	b.listen(t)
	for range 3 {
		if _, err := c.GetBinding(t.Context(), parseIMSITest(t, bound)); err != nil {
			t.Error(err)
		}
	}
}

// A refusal of one that is overloaded is the answer where the other is known to be away: that is not waited for.
func TestInstanceOverloaded(t *testing.T) {
	a, b, c := newInstances(t, 4*time.Second)
	one := parseIMSITest(t, bound)
	get := func() {
		t.Helper()
		for range 2 {
			if _, err := c.GetBinding(t.Context(), one); err != nil {
				t.Error(err)
			}
		}
	}
	get()
	b.server.Close()
	l, err := net.Listen("unix", b.path) // it takes connections, and is silent
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	get()
	a.handler.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		e := connect.NewError(connect.CodeResourceExhausted, errors.New("too much"))
		e.Meta().Set(kme.ReasonHeader, string(kme.Overloaded))
		if err := connect.NewErrorWriter().Write(w, r, e); err != nil {
			t.Error(err)
		}
	})
	a.end(t) // the stream to it
	a.listen(t)
	for range 2 {
		if _, err := c.GetBinding(t.Context(), one); !errors.Is(err, client.Reason(kme.Overloaded)) {
			t.Error(err)
		}
	}
}

// No call fails while an instance ends in order and another serves, also none that may be made only once.
func TestInstanceEnds(t *testing.T) {
	a, b, c := newInstances(t, testproc.Patience)
	one := parseIMSITest(t, bound)
	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for ctx.Err() == nil {
				if _, err := c.ReportAuthentication(t.Context(), one, client.Origin{}, false); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for _, s := range []*streaming{a, b, a, b} {
		ofA, ofB := a.store.asked.Load(), b.store.asked.Load()
		testproc.Await(t, "both get calls", func() bool {
			return a.store.asked.Load() > ofA+20 && b.store.asked.Load() > ofB+20
		})
		s.end(t)
		s.listen(t)
	}
	stop()
	all.Wait()
}

// A call that may be made only once goes to the next instance if there is no connection to the first.
func TestInstanceNotThere(t *testing.T) {
	a, _, c := newInstances(t, testproc.Patience)
	a.server.Close()
	for range 4 {
		if _, err := c.OpenProvisioning(t.Context(), parseIMSITest(t, bound), time.Hour); connect.CodeOf(err) ==
			connect.CodeUnavailable {
			t.Error(err)
		}
		if _, err := c.ReportAuthentication(t.Context(), parseIMSITest(t, bound), client.Origin{}, false); err != nil {
			t.Error(err)
		}
	}
}
