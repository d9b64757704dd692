package client

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/kme"
)

// A batcher makes one request of calls that come at the same time, as they do when a commit of the service has answered many at once. None waits for
// another: who is first lets those go on that are ready to run, and sends what there is then.
type batcher struct {
	service kmev1connect.KeyServiceClient
	mu      sync.Mutex
	waiting []*waiting // the first of them sends them
}

type waiting struct {
	call     *kmev1.EstablishKMERequest
	deadline time.Time
	outcome  chan outcome // with room for it
}

type outcome struct {
	answer *kmev1.EstablishKMEResponse
	err    error
}

func (b *batcher) establish(ctx context.Context, req *connect.Request[kmev1.EstablishKMERequest]) (*connect.Response[kmev1.EstablishKMEResponse], error) {
	// The caller may go before the call is sent, and its payload is its own again then.
	call := proto.CloneOf(req.Msg)
	w := &waiting{call: call, outcome: make(chan outcome, 1)}
	w.deadline, _ = ctx.Deadline()
	b.mu.Lock()
	b.waiting = append(b.waiting, w)
	first := len(b.waiting) == 1
	b.mu.Unlock()
	if first {
		runtime.Gosched()
		b.mu.Lock()
		all := b.waiting
		b.waiting = nil
		b.mu.Unlock()
		if len(all) == 1 {
			return b.service.EstablishKME(ctx, req)
		}
		for len(all) > 0 {
			n := min(len(all), kmev1.MaxCalls)
			go b.send(all[:n])
			all = all[n:]
		}
	}
	select {
	case o := <-w.outcome:
		if o.err != nil {
			return nil, o.err
		}
		return connect.NewResponse(o.answer), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// send makes calls in one, which has until the last of their deadlines.
func (b *batcher) send(all []*waiting) {
	err := b.exchange(all)
	if err == nil {
		err = connect.NewError(connect.CodeUnavailable, errors.New("the service has answered without a result"))
	}
	err, _ = explain(err) // once, since it is the error of several callers, and a connect.Error is not for concurrent use
	for _, w := range all {
		if w != nil {
			w.outcome <- outcome{err: err}
		}
	}
}

// exchange answers calls that the service has answered, and puts nil in their place.
func (b *batcher) exchange(all []*waiting) (err error) {
	defer func() { // in the process of an HSS
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	var deadline time.Time
	request := &kmev1.EstablishKMEsRequest{Calls: make([]*kmev1.EstablishKMERequest, len(all))}
	for i, w := range all {
		request.Calls[i] = w.call
		if w.deadline.After(deadline) {
			deadline = w.deadline
		}
	}
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	stream, err := b.service.EstablishKMEs(ctx, connect.NewRequest(request))
	if err != nil {
		return err
	}
	for stream.Receive() {
		for _, r := range stream.Msg().Results {
			if i := int(r.Call); r.Outcome != nil && i >= 0 && i < len(all) && all[i] != nil {
				all[i].outcome <- outcomeOf(r)
				all[i] = nil
			}
		}
	}
	return errors.Join(stream.Err(), stream.Close())
}

func outcomeOf(r *kmev1.EstablishKMEsResponse_Result) outcome {
	switch refused := r.GetRefused(); {
	case refused == nil:
		return outcome{answer: r.GetEstablished()}
	case refused.Reason != "":
		return outcome{err: &Error{kme.Reason(refused.Reason), refused.Message}}
	default:
		return outcome{err: connect.NewError(connect.Code(refused.Code), errors.New(refused.Message))}
	}
}
