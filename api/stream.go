package api

import (
	"context"
	"errors"
	"io"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/panics"
)

const (
	// maxUnderWay bounds how many calls of a stream were read and not answered: so it bounds the goroutines and memory
	// of a stream, even if the client reads no answers. At the bound nothing more is read, and calls wait at the
	// client, as with the streams of an HTTP/2 connection. Overload is refused call by call: see maxCalls, and the
	// places of binding.Service.
	maxUnderWay = 512
	// maxStreams of one connection.
	maxStreams = 4
	// maxMessage is above 64 calls of any kind.
	maxMessage = 64 << 10
	// maxWait is the longest deadline of a call, and that of one without.
	maxWait = time.Minute
)

// Streams has the open streams of clients. They outlast a Handler: each call is made by the present one.
type Streams struct {
	serving  atomic.Pointer[Handler]
	draining context.Context
	drain    context.CancelFunc
	// how long a client may not take answers before its stream is ended; in fact up to twice as long
	patience time.Duration
}

// NewStreams has none.
func NewStreams() *Streams {
	s := &Streams{patience: 10 * time.Second}
	s.draining, s.drain = context.WithCancel(context.Background())
	return s
}

// Serve sets the Handler of new calls. Calls under way keep theirs.
func (s *Streams) Serve(h *Handler) { s.serving.Store(h) }

// Drain ends all streams, each after its calls under way are answered. It does not wait.
func (s *Streams) Drain() { s.drain() }

type controlKey struct{}

// withControl gives a stream the deadlines of its connection.
func withControl(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == kmev1connect.KeyServiceStreamProcedure {
			r = r.WithContext(context.WithValue(r.Context(), controlKey{}, http.NewResponseController(w)))
		}
		next.ServeHTTP(w, r)
	})
}

// Stream is described in kme.proto.
func (s *server) Stream(
	ctx context.Context, b *connect.BidiStream[kmev1.StreamRequest, kmev1.StreamResponse],
) error {
	const procedure = kmev1connect.KeyServiceStreamProcedure
	err := s.guard.finish(ctx, procedure, func() (err error) {
		if ctx, err = s.guard.may(ctx, procedure, nil); err == nil {
			if c, ok := ctx.Value(connectionKey{}).(*connection); ok {
				defer c.streams.Add(-1)
				if c.streams.Add(1) > maxStreams {
					err = overloaded("this connection has as many streams as it may have")
				}
			}
		}
		if r := refusalOf(err); r != nil {
			s.service.Refused(ctx, r, callOf(procedure)...)
			return toConnect(r)
		}
		return s.streams.serve(ctx, b)
	})
	if refused, ok := errors.AsType[*connect.Error](err); ok {
		setReason(refused.Meta(), err)
	}
	return err
}

// A stream is a stream that is served.
type stream struct {
	*Streams
	*connect.BidiStream[kmev1.StreamRequest, kmev1.StreamResponse]
	places  chan struct{}      // has one for each call that was read and whose answer was not written
	answers chan *kmev1.Answer // never full: each has a place
	work    chan func()        // calls for idle goroutines
	calls   sync.WaitGroup
	began   time.Time
	writing atomic.Int64 // when the write that is under way began, in nanoseconds since began; 0: none is
}

// serve answers the calls of a stream until it ends, also those that are under way then.
func (s *Streams) serve(
	ctx context.Context, b *connect.BidiStream[kmev1.StreamRequest, kmev1.StreamResponse],
) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	t := &stream{Streams: s, BidiStream: b, places: make(chan struct{}, maxUnderWay),
		answers: make(chan *kmev1.Answer, maxUnderWay), work: make(chan func()), began: time.Now()}
	var helpers sync.WaitGroup // they use the response, which ends with serve
	defer helpers.Wait()
	over := make(chan struct{})
	defer close(over)
	if control, ok := ctx.Value(controlKey{}).(*http.ResponseController); ok {
		control.SetReadDeadline(time.Time{}) // the server's are for single calls
		control.SetWriteDeadline(time.Time{})
		helpers.Go(func() { t.watch(control, over) })
	}
	written := make(chan error, 1)
	go func() {
		defer cancel() // nobody gets an answer any more
		written <- recovered(t.write)
	}()
	err := recovered(func() error { return t.read(ctx) })
	close(t.work)
	t.calls.Wait()
	close(t.answers)
	if broken := <-written; err == nil || panics.Of(broken) != nil {
		err = broken // without an error, all calls that have begun are answered
	}
	return err
}

// recovered gives f's error, or its panic as an error.
func recovered(f func() error) (err error) {
	defer panics.Recover(&err)
	return f()
}

// watch ends reads when the service drains, and writes that take too long.
func (t *stream) watch(control *http.ResponseController, over <-chan struct{}) {
	ticker := time.NewTicker(t.patience)
	defer ticker.Stop()
	drain := t.draining.Done()
	for {
		select {
		case <-drain:
			control.SetReadDeadline(time.Now())
			drain = nil
		case <-ticker.C:
			writing := t.writing.Load()
			if writing != 0 && time.Since(t.began)-time.Duration(writing) > t.patience {
				control.SetWriteDeadline(time.Now())
			}
		case <-over:
			return
		}
	}
}

// read starts calls as they come.
func (t *stream) read(ctx context.Context) error {
	var handler *Handler
	var known context.Context // with the client that handler knows
	for {
		m, err := t.Receive()
		switch read := time.Now(); {
		case t.draining.Err() != nil, errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		default:
			for _, call := range m.Calls {
				select {
				case t.places <- struct{}{}:
				case <-t.draining.Done():
					return nil
				case <-ctx.Done():
					return ctx.Err()
				}
				// Only now, since the configuration may have changed while the call waited for its place.
				if h := t.serving.Load(); h != handler {
					handler, known = h, h.clients.know(ctx, *callerOf(ctx), binding.ActorOf(ctx))
				}
				if clientOf(known) == nil {
					stranger(known, handler.server.service, callOf(kmev1connect.KeyServiceStreamProcedure)...)
					return toConnect(notAllowed())
				}
				h, ctx := handler, known
				t.begin(func() { t.answers <- h.answer(ctx, read, call) })
			}
		}
	}
}

// begin gives a call to an idle goroutine, or starts one. Goroutines stay as long as the stream; there are never more
// than places. The stack of a goroutine grows with its first call, and is copied each time that it doubles: with a
// goroutine for each call, a call costs the server half as much CPU again (BenchmarkCalls/stream/64: 10.8 us instead of
// 7.0).
func (t *stream) begin(call func()) {
	select {
	case t.work <- call:
	default:
		t.calls.Go(func() {
			call()
			for call := range t.work {
				call()
			}
		})
	}
}

// write sends answers. Those that are ready go together.
func (t *stream) write() (err error) {
	var m kmev1.StreamResponse
	for a := range t.answers {
		m.Answers = append(m.Answers[:0], a)
		// Gosched lets calls that are about to end be in this message, too. Without this, and its like in the client, a
		// call costs the server 1.4 times the CPU, and the client 1.8 times (BenchmarkCalls/stream/64: 10.0 us instead
		// of 7.0, 9.9 instead of 5.5).
		runtime.Gosched()
		for len(t.answers) > 0 {
			m.Answers = append(m.Answers, <-t.answers)
		}
		if err == nil {
			t.writing.Store(int64(time.Since(t.began)))
			err = t.Send(&m)
			t.writing.Store(0)
		}
		for i := range m.Answers {
			m.Answers[i] = nil
			<-t.places
		}
	}
	return err
}

// answer makes a call of a stream. read is when it was read.
func (h *Handler) answer(ctx context.Context, read time.Time, c *kmev1.Call) *kmev1.Answer {
	a := &kmev1.Answer{Id: c.Id}
	wait := time.Duration(c.TimeoutMs) * time.Millisecond
	if wait == 0 || wait > maxWait {
		wait = maxWait
	}
	ctx, cancel := context.WithDeadline(ctx, read.Add(wait))
	defer cancel()
	var err error
	broken := recovered(func() error { // guard handles panics of the call itself
		var answer connect.AnyResponse
		if answer, err = h.call(ctx, h.server.requestOf(c)); err == nil {
			setAnswer(a, answer.Any())
		}
		return nil
	})
	if broken != nil {
		h.server.service.Broken(ctx, broken, callOf(kmev1connect.KeyServiceStreamProcedure)...)
		err = toConnect(broken)
	}
	if err != nil {
		e := &kmev1.CallError{Code: connect.CodeOf(err).String(), Message: err.Error()}
		if shown, ok := errors.AsType[*connect.Error](err); ok {
			e.Message = shown.Message()
		}
		if r := refusalOf(err); r != nil {
			e.Reason = string(r.Reason)
		}
		a.Answer = &kmev1.Answer_Error{Error: e}
	}
	return a
}

// A streamed is a call of a stream in the form of a request, for the interceptors, and makes it by the same method as a
// single request.
type streamed struct {
	connect.AnyRequest
	procedure string
	call      func(context.Context) (connect.AnyResponse, error)
}

// Spec is that of a unary call.
func (r streamed) Spec() connect.Spec { return connect.Spec{Procedure: r.procedure} }

func asRequest[Q, A any](
	message *Q, procedure string, method func(context.Context, *connect.Request[Q]) (*connect.Response[A], error),
) streamed {
	r := connect.NewRequest(message)
	return streamed{AnyRequest: r, procedure: procedure, call: func(ctx context.Context) (connect.AnyResponse, error) {
		return method(ctx, r)
	}}
}

func (s *server) requestOf(c *kmev1.Call) connect.AnyRequest {
	switch q := c.Call.(type) {
	case *kmev1.Call_PrepareVector:
		return asRequest(q.PrepareVector, kmev1connect.KeyServicePrepareVectorProcedure, s.PrepareVector)
	case *kmev1.Call_EstablishKme:
		return asRequest(q.EstablishKme, kmev1connect.KeyServiceEstablishKMEProcedure, s.EstablishKME)
	case *kmev1.Call_ReportAuthentication:
		return asRequest(q.ReportAuthentication, kmev1connect.KeyServiceReportAuthenticationProcedure,
			s.ReportAuthentication)
	case *kmev1.Call_RestoreRand:
		return asRequest(q.RestoreRand, kmev1connect.KeyServiceRestoreRANDProcedure, s.RestoreRAND)
	case *kmev1.Call_GetBinding:
		return asRequest(q.GetBinding, kmev1connect.KeyServiceGetBindingProcedure, s.GetBinding)
	case *kmev1.Call_CheckEquipment:
		return asRequest(q.CheckEquipment, kmev1connect.KeyServiceCheckEquipmentProcedure, s.CheckEquipment)
	}
	return asRequest(c, kmev1connect.KeyServiceStreamProcedure, noCall)
}

func noCall(context.Context, *connect.Request[kmev1.Call]) (*connect.Response[kmev1.Call], error) {
	return nil, malformed(errors.New("a call of a stream is one of prepare_vector, establish_kme, " +
		"report_authentication, restore_rand, get_binding and check_equipment"))
}

func setAnswer(a *kmev1.Answer, message any) {
	switch m := message.(type) {
	case *kmev1.PrepareVectorResponse:
		a.Answer = &kmev1.Answer_PrepareVector{PrepareVector: m}
	case *kmev1.EstablishKMEResponse:
		a.Answer = &kmev1.Answer_EstablishKme{EstablishKme: m}
	case *kmev1.ReportAuthenticationResponse:
		a.Answer = &kmev1.Answer_ReportAuthentication{ReportAuthentication: m}
	case *kmev1.RestoreRANDResponse:
		a.Answer = &kmev1.Answer_RestoreRand{RestoreRand: m}
	case *kmev1.GetBindingResponse:
		a.Answer = &kmev1.Answer_GetBinding{GetBinding: m}
	case *kmev1.CheckEquipmentResponse:
		a.Answer = &kmev1.Answer_CheckEquipment{CheckEquipment: m}
	}
}
