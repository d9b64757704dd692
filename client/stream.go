package client

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/kme"
)

const (
	maxCall  = 16 << 10 // above any valid call
	maxBatch = 48 << 10 // more calls go into another message, so that none exceeds 64 KiB, the limit of a message
)

// A stream carries calls until it breaks. One goroutine writes, another reads.
type stream struct {
	end      context.CancelFunc
	ready    chan struct{} // has one when there are calls to write
	patience time.Duration // with a stream on which nothing comes

	mu      sync.Mutex
	asked   time.Time          // guarded by mu: when the first call after the last message was sent; zero if none was
	silent  bool               // guarded by mu: it takes no more calls, and ends after the last answer
	last    uint64             // guarded by mu: the last call's id
	queue   []queued           // guarded by mu: calls to write
	waiting map[uint64]waiting // guarded by mu: calls without an answer
	over    func() error       // guarded by mu: makes the error of a call if the stream has ended
}

// A queued is a call that is encoded.
type queued struct {
	id   uint64
	call []byte
}

// A waiting gets one answer, or is closed when the stream has ended.
type waiting chan *kmev1.Answer

// A batch is an encoded StreamRequest.
type batch []byte

// batches is the codec: a batch is encoded already, and answers are decoded.
type batches struct{}

func (batches) Name() string                  { return "proto" }
func (batches) Marshal(m any) ([]byte, error) { return slices.Clone(*m.(*batch)), nil }
func (batches) MarshalAppend(to []byte, m any) ([]byte, error) {
	return append(to, *m.(*batch)...), nil
}
func (batches) Unmarshal(b []byte, m any) error { return proto.Unmarshal(b, m.(proto.Message)) }

type opener = connect.Client[batch, kmev1.StreamResponse]

func newOpener(c *http.Client, base string) *opener {
	return connect.NewClient[batch, kmev1.StreamResponse](c, base+kmev1connect.KeyServiceStreamProcedure,
		connect.WithCodec(batches{}), connect.WithAcceptCompression("gzip", nil, nil))
}

// open begins a stream with its first call. It waits for nothing.
func open(o *opener, patience time.Duration, call []byte) (s *stream, id uint64, answer waiting) {
	ctx, cancel := context.WithCancel(context.Background())
	s = &stream{end: cancel, ready: make(chan struct{}, 1), patience: patience, waiting: map[uint64]waiting{}}
	id, answer = s.accept(call)
	b := o.CallBidiStream(ctx)
	go s.write(ctx, b)
	go s.read(b)
	return s, id, answer
}

// accept queues a call, which is encoded except for its id. answer is nil if the stream takes no more calls.
func (s *stream) accept(call []byte) (id uint64, answer waiting) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over != nil || s.silent {
		return 0, nil
	}
	s.last++
	id, answer = s.last, make(waiting, 1)
	call = protowire.AppendVarint(protowire.AppendTag(call, 1, protowire.VarintType), id)
	s.queue, s.waiting[id] = append(s.queue, queued{id: id, call: call}), answer
	select {
	case s.ready <- struct{}{}:
	default:
	}
	return id, answer
}

// wait gives the answer to a call that was accepted.
func (s *stream) wait(ctx context.Context, id uint64, answer waiting) (*kmev1.Answer, error) {
	var a *kmev1.Answer
	select {
	case a = <-answer:
	case <-ctx.Done():
		if s.giveUp(id) {
			return nil, connect.NewError(contextCode(ctx.Err()), ctx.Err())
		}
		a = <-answer // it has just come
	}
	if a == nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		return nil, s.over()
	}
	if e := a.GetError(); e != nil {
		return nil, refusal(e)
	}
	return a, nil
}

// giveUp stops waiting for an answer. The server of a stream may hang while the connection lives: if nothing has come
// since the last calls were sent, later calls use a new stream.
func (s *stream) giveUp(id uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.waiting[id]
	delete(s.waiting, id)
	s.silent = s.silent || !s.asked.IsZero() && time.Since(s.asked) > s.patience
	s.endIfSilent()
	return ok
}

// close ends the stream with what is under way.
func (s *stream) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over == nil {
		s.over = func() error { return connect.NewError(connect.CodeCanceled, errors.New("the client was closed")) }
	}
	s.end()
}

// endIfSilent ends a silent stream if no call waits in it. s.mu is locked.
func (s *stream) endIfSilent() {
	if s.silent && len(s.waiting) == 0 {
		s.end()
	}
}

func contextCode(err error) connect.Code {
	if errors.Is(err, context.Canceled) {
		return connect.CodeCanceled
	}
	return connect.CodeDeadlineExceeded
}

// write sends calls as they come. Calls that come while it writes go together in the next message.
func (s *stream) write(ctx context.Context, b *connect.BidiStreamForClient[batch, kmev1.StreamResponse]) {
	defer b.CloseRequest() // HTTP/2 notes that ctx has ended once it has read all of the request
	var m batch
	for {
		select {
		case <-s.ready:
			runtime.Gosched() // so that calls which are about to come share the message: see write in api/stream.go
		case <-ctx.Done():
			return
		}
		for {
			if m = s.take(m[:0]); len(m) == 0 {
				break
			}
			if b.Send(&m) != nil {
				return // read finds out why
			}
		}
	}
}

// take appends the next calls to m. It leaves out those that nobody waits for.
func (s *stream) take(m batch) batch {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, q := range s.queue {
		if len(m) > 0 && len(m)+len(q.call) > maxBatch {
			break
		}
		n++
		if s.waiting[q.id] != nil {
			m = protowire.AppendBytes(protowire.AppendTag(m, 1, protowire.BytesType), q.call)
		}
	}
	if len(m) > 0 && s.asked.IsZero() {
		s.asked = time.Now()
	}
	rest := copy(s.queue, s.queue[n:])
	clear(s.queue[rest:])
	s.queue = s.queue[:rest]
	return m
}

// read hands answers to the waiting calls, until the stream ends.
func (s *stream) read(b *connect.BidiStreamForClient[batch, kmev1.StreamResponse]) {
	for {
		m, err := b.Receive()
		s.mu.Lock()
		if err != nil {
			if s.over == nil {
				s.over = why(err)
			}
			for _, w := range s.waiting {
				close(w)
			}
			s.waiting, s.queue = nil, nil
			s.mu.Unlock()
			s.end()
			b.CloseResponse()
			return
		}
		s.asked = time.Time{}
		for _, a := range m.Answers {
			if w := s.waiting[a.Id]; w != nil {
				delete(s.waiting, a.Id)
				w <- a
			} else { // it was given up
				clear(a.GetEstablishKme().GetKme())
			}
		}
		if len(s.waiting) > 0 {
			s.asked = time.Now()
		}
		s.endIfSilent()
		s.mu.Unlock()
	}
}

// why is the error of the calls in a stream that has ended: the service's refusal, or that it cannot be reached.
func why(err error) func() error {
	code := connect.CodeOf(err)
	if code != connect.CodeUnimplemented { // without a reason, no other is keysvc's
		code = connect.CodeUnavailable
	}
	var e *connect.Error
	var connection *net.OpError
	if errors.Is(err, io.EOF) {
		err = errEnded
	} else if errors.As(err, &connection) {
		err = fmt.Errorf("%w: %w", ErrStreamEnded, connection)
	} else if unsent(err) {
		err = fmt.Errorf("%w before it began: %w", errEnded, err)
	} else if errors.As(err, &e) {
		if reason := e.Meta().Get(kme.ReasonHeader); reason != "" {
			refused := &Error{Reason: kme.Reason(reason), Message: e.Message()}
			return func() error { return refused }
		}
		err = fmt.Errorf("%w: %w", ErrStreamEnded, e.Unwrap())
	}
	return func() error { return connect.NewError(code, err) }
}

// ErrStreamEnded is in the error of calls whose stream has broken: they may have been made. A service that refuses this
// client's certificate can look so.
var ErrStreamEnded = errors.New("the stream to the service has ended")

// errEnded is the error of calls without an answer in a stream that has ended in order: they were not begun (see
// KeyService.Stream).
var errEnded = errors.New("the service has ended the stream")

// unsent says whether the server has begun nothing of a request whose connection takes no more streams: net/http sent
// nothing of it, or the server's GOAWAY leaves its stream out (RFC 9113, 6.8). If net/http cannot read the request's
// body a second time, it says so by an error without a type (rewindBody, and http2shouldRetryRequest).
func unsent(err error) bool {
	return strings.Contains(err.Error(), "net/http: cannot rewind body after connection loss") ||
		strings.Contains(err.Error(), "http2: Transport received Server's graceful shutdown GOAWAY")
}

// notBegun says whether a call that has failed was certainly not begun: then any call may be made again.
func notBegun(err error) bool {
	connection, ok := errors.AsType[*net.OpError](err)
	return errors.Is(err, errEnded) || ok && connection.Op == "dial"
}

// refusal makes the error of a call.
func refusal(e *kmev1.CallError) error {
	if e.Reason != "" {
		return &Error{Reason: kme.Reason(e.Reason), Message: e.Message}
	}
	code := connect.CodeUnknown
	if err := code.UnmarshalText([]byte(e.Code)); err != nil {
		return fmt.Errorf("%s: %s", e.Code, e.Message)
	}
	return connect.NewError(code, errors.New(e.Message))
}

// whole sends each message in one piece: Connect writes the five bytes of its length separately, and HTTP/2 would send
// them so.
type whole struct{ *http.Transport }

func (w whole) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.ContentLength < 0 {
		r = r.Clone(r.Context())
		r.Body = &messages{ReadCloser: r.Body}
	}
	return w.Transport.RoundTrip(r)
}

type messages struct {
	io.ReadCloser
	left int // of the message that is being read
}

func (m *messages) Read(p []byte) (n int, err error) {
	const prefix = 5
	if m.left == 0 {
		if len(p) < prefix {
			return 0, io.ErrShortBuffer
		}
		if n, err = io.ReadFull(m.ReadCloser, p[:prefix]); err != nil {
			return n, err
		}
		m.left = int(binary.BigEndian.Uint32(p[1:]))
	}
	more, err := io.ReadFull(m.ReadCloser, p[n:min(len(p), n+m.left)])
	m.left -= more
	return n + more, err
}
