package client

import (
	"net/http"
	"testing"
	"time"
)

// Whoever gives calls more time gives it to an instance, too, that says whether it is ready.
func TestSlowlyReady(t *testing.T) {
	l, path := listen(t)
	server := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(
		func(_ http.ResponseWriter, r *http.Request) {
			select {
			case <-r.Context().Done():
			case <-time.After(5 * watchEvery):
			}
		})}
	server.Protocols.SetUnencryptedHTTP2(true)
	go server.Serve(l)
	defer server.Close()
	for timeout, want := range map[time.Duration]bool{time.Second: false, time.Minute: true} {
		i, err := newInstance("unix:"+path, nil, timeout)
		if err != nil {
			t.Fatal(err)
		}
		if ready := i.ready(t.Context()); ready != want {
			t.Errorf("with calls of %v, an instance that needs %v is ready: %v", timeout, 5*watchEvery, ready)
		}
		i.close()
	}
}

// Whatever calls come in step, each instance gets its share of each kind.
func TestInstancesInStep(t *testing.T) {
	c := &Client{instances: []*instance{{}, {}}}
	var got [2][2]int
	for range 200 {
		for kind := range got {
			got[kind][c.pick(0)]++
		}
	}
	for kind, by := range got {
		if by[0] < 50 || by[1] < 50 {
			t.Errorf("kind %d: %v", kind, by)
		}
	}
}
