package client

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
)

// broken is a service whose calls panic.
type broken struct{ kmev1connect.KeyServiceClient }

// A panic in what sends calls together is their error: it must not end the HSS.
func TestPanic(t *testing.T) {
	b := &batcher{service: broken{}}
	var all []*waiting
	for range 2 {
		all = append(all, &waiting{call: new(kmev1.EstablishKMERequest), outcome: make(chan outcome, 1)})
	}
	b.send(slices.Clone(all))
	for i, w := range all {
		if o := <-w.outcome; o.err == nil || !strings.HasPrefix(o.err.Error(), "panic: ") {
			t.Errorf("call %d: %v", i, o.err)
		}
	}
}

// slow is a service that looks at what it is given after its caller may have gone.
type slow struct {
	kmev1connect.KeyServiceClient
	sum chan byte
}

type (
	request = *connect.Request[kmev1.EstablishKMERequest]
	answer  = *connect.Response[kmev1.EstablishKMEResponse]
	batch   = *connect.Request[kmev1.EstablishKMEsRequest]
	stream  = *connect.ServerStreamForClient[kmev1.EstablishKMEsResponse]
)

func (s slow) EstablishKMEs(_ context.Context, req batch) (stream, error) {
	time.Sleep(10 * time.Millisecond)
	var sum byte
	for _, call := range req.Msg.Calls {
		for _, b := range call.Payload {
			sum |= b
		}
	}
	s.sum <- sum
	return nil, connect.NewError(connect.CodeUnavailable, nil)
}

func (s slow) EstablishKME(context.Context, request) (answer, error) {
	return nil, connect.NewError(connect.CodeUnavailable, nil)
}

// A caller who has gone may use its payload's memory again.
func TestPayloadIsTheCallers(t *testing.T) {
	s := slow{sum: make(chan byte, 100)}
	b := &batcher{service: s}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	var sent bool
	for range 1000 {
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				payload := make([]byte, 256)
				b.establish(gone, connect.NewRequest(&kmev1.EstablishKMERequest{Payload: payload}))
				for i := range payload {
					payload[i] = 0xff
				}
			})
		}
		all.Wait()
		select {
		case sum := <-s.sum:
			sent = true
			if sum != 0 {
				t.Fatal("what the caller has put there since was sent")
			}
		case <-time.After(20 * time.Millisecond):
		}
		if sent {
			return
		}
	}
	t.Error("no calls came together")
}
