package api

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/genproto/googleapis/rpc/errdetails"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/kme"
)

// A guard checks each call of the service.
type guard struct {
	service *binding.Service
	metrics *binding.Metrics
	errors  *connect.ErrorWriter
}

// finish gives a call an answer even if it panics: net/http would end the connection.
func (g *guard) finish(ctx context.Context, procedure string, work func() error) error {
	err := func() (err error) {
		defer panics.Recover(&err)
		return work()
	}()
	if p := panics.Of(err); p != nil {
		err = toConnect(p)
	}
	if t, ok := errors.AsType[told](err); ok && connect.CodeOf(err) == connect.CodeInternal {
		g.service.Broken(ctx, t.error, callOf(procedure)...)
	}
	return err
}

// admit refuses a call that a client may not make, or not so often. Both count for its rate. Use its context
// afterwards, also after a refusal.
func (g *guard) admit(ctx context.Context, procedure string, message any) (context.Context, error) {
	ctx, err := g.may(ctx, procedure, message)
	if clientOf(ctx).tooMany() {
		err = tooOften()
	}
	return ctx, err
}

// may refuses a call that a client may not make.
func (g *guard) may(ctx context.Context, procedure string, message any) (context.Context, error) {
	client := clientOf(ctx)
	named, names := message.(interface{ GetImsi() string })
	if _, device := message.(*kmev1.CheckEquipmentRequest); device && named.GetImsi() == "" {
		names = false // a device alone has no PLMN
	}
	role := client.as(allowed[procedure]...)
	if role == "" {
		return ctx, notAllowed()
	}
	if err := checkRead(message); err != nil {
		return ctx, err
	}
	if names && !client.view.Has(named.GetImsi()) {
		return ctx, notAllowed()
	}
	return as(ctx, role), nil
}

func overloaded(message string) *binding.Refusal {
	return &binding.Refusal{Reason: kme.Overloaded, Message: message}
}

func tooOften() *binding.Refusal { return overloaded("this client calls more often than it may") }

// imsiOf is the IMSI that a message names, for the log.
func imsiOf(message any) []any {
	if named, ok := message.(interface{ GetImsi() string }); ok {
		if imsi, err := kme.ParseIMSI(named.GetImsi()); err == nil {
			return []any{"imsi", imsi}
		}
	}
	return nil
}

// only serves clients with one of these roles, as often as they may call.
func (g *guard) only(next http.Handler, some ...Role) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		role := clientOf(r.Context()).as(some...)
		var refusal *binding.Refusal
		if clientOf(r.Context()).tooMany() {
			refusal = tooOften()
		} else if role == "" {
			refusal = notAllowed()
		}
		if refusal != nil {
			g.service.Refused(r.Context(), refusal, callOf(r.URL.Path)...)
			g.deny(w, r, refusal)
			return
		}
		next.ServeHTTP(w, r.WithContext(as(r.Context(), role)))
	})
}

// known serves clients, and everybody a path that is open to all.
func (g *guard) known(next http.Handler, open string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		err := func() (err error) {
			defer panics.Recover(&err)
			if clientOf(r.Context()) == nil && r.URL.Path != open { // its body is not read
				stranger(r.Context(), g.service, callOf(r.URL.Path)...)
				return g.deny(w, r, notAllowed())
			}
			if !fits(r) {
				refusal := &binding.Refusal{Reason: kme.Malformed,
					Message: fmt.Sprintf("a request has at most %d bytes, packed and unpacked", maxRequest)}
				g.service.Refused(r.Context(), refusal, callOf(r.URL.Path)...)
				// A client that sends all before it reads would be cut off before it gets the answer.
				io.CopyN(io.Discard, r.Body, 8<<20)
				return g.deny(w, r, refusal)
			}
			next.ServeHTTP(w, r)
			return nil
		}()
		if err != nil { // not of a call: finish handles those
			g.service.Broken(r.Context(), err, callOf(r.URL.Path)...)
			http.Error(w, "internal error", http.StatusInternalServerError)
		}
	})
}

// fits says whether a request has at most maxRequest bytes, on the wire and unpacked. One that does not say its length
// or is packed is read for that: Connect's own limit would refuse it before the call, and without a reason.
func fits(r *http.Request) bool {
	if r.URL.Path == kmev1connect.KeyServiceStreamProcedure || strings.HasPrefix(r.URL.Path, "/grpc.reflection.") {
		return true // a stream, of which each message has a limit
	}
	encoding, prefix := "Content-Encoding", 0
	if strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
		encoding, prefix = "Grpc-Encoding", 5 // a flag and the length
	}
	packed := r.Header.Get(encoding) == "gzip"
	most := int64(maxRequest + prefix)
	if r.ContentLength > most || r.ContentLength >= 0 && !packed {
		return r.ContentLength <= most
	}
	body, _ := io.ReadAll(io.LimitReader(r.Body, most+1)) // whoever reads on gets the error, too
	if packed && len(body) > prefix {
		if z, err := gzip.NewReader(bytes.NewReader(body[prefix:])); err == nil {
			if n, _ := io.CopyN(io.Discard, z, maxRequest+1); n > maxRequest {
				return false
			}
		}
	}
	r.Body = struct {
		io.Reader
		io.Closer
	}{Reader: io.MultiReader(bytes.NewReader(body), r.Body), Closer: r.Body}
	return int64(len(body)) <= most
}

// For serves pages to clients that have a role. Their requests are authenticated, refused, limited and logged as calls
// are.
func For(role Role, service *binding.Service, clients *Clients, pages http.Handler) http.Handler {
	g := &guard{service: service}
	return identify(clients, g.known(g.only(pages, role), ""))
}

// View is which bindings the client of a request may see.
func View(ctx context.Context) binding.BindingQuery { return clientOf(ctx).view }

// deny refuses a request in the caller's protocol.
func (g *guard) deny(w http.ResponseWriter, r *http.Request, refusal *binding.Refusal) error {
	told := toConnect(refusal)
	setReason(w.Header(), told)
	if r.Method == http.MethodPost && g.errors != nil && g.errors.IsSupported(r) {
		return g.errors.Write(w, r, told)
	}
	code := http.StatusForbidden
	switch refusal.Reason {
	case kme.Overloaded:
		code = http.StatusTooManyRequests
	case kme.Malformed:
		code = http.StatusBadRequest
	}
	http.Error(w, refusal.Message, code)
	return nil
}

// around makes a call if its client may make it; otherwise it refuses before anything else is done. The Actor in the
// call's context has the role that allows it. The call is counted by its answer.
func (g *guard) around(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (answer connect.AnyResponse, err error) {
		start, procedure := time.Now(), req.Spec().Procedure
		err = g.finish(ctx, procedure, func() (err error) {
			if ctx, err = g.admit(ctx, procedure, req.Any()); err == nil {
				answer, err = g.within(ctx, req, next)
			}
			return toConnect(err)
		})
		reason := "OK"
		if r := refusalOf(err); r != nil {
			reason = string(r.Reason)
			g.service.Refused(ctx, r, append(imsiOf(req.Any()), callOf(procedure)...)...)
		} else if err != nil {
			reason = connect.CodeOf(err).String()
		}
		g.metrics.Called(path.Base(procedure), reason, time.Since(start))
		return answer, err
	}
}

// within makes an admitted call, if its client may have one more under way.
func (g *guard) within(
	ctx context.Context, req connect.AnyRequest, next connect.UnaryFunc,
) (connect.AnyResponse, error) {
	client := clientOf(ctx)
	if err := client.begin(); err != nil {
		return nil, err
	}
	defer client.end()
	return next(ctx, req)
}

// tellReason puts the reason of a refusal into the response's header.
func tellReason(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		answer, err := next(ctx, req)
		if info, ok := connect.CallInfoForHandlerContext(ctx); ok {
			setReason(info.ResponseHeader(), err)
		}
		return answer, err
	}
}

// setReason puts the reason of a refusal where clients of all protocols find it.
func setReason(h http.Header, err error) {
	if r := refusalOf(err); r != nil {
		h.Set(kme.ReasonHeader, string(r.Reason))
	}
}

var codes = map[kme.Reason]connect.Code{
	kme.Malformed:            connect.CodeInvalidArgument,
	kme.NoAttempt:            connect.CodeFailedPrecondition,
	kme.UnknownDevice:        connect.CodeNotFound,
	kme.RevokedDevice:        connect.CodePermissionDenied,
	kme.OtherDevice:          connect.CodeFailedPrecondition,
	kme.KMERejected:          connect.CodePermissionDenied,
	kme.CallerNotAllowed:     connect.CodePermissionDenied,
	kme.Overloaded:           connect.CodeResourceExhausted,
	kme.NotBound:             connect.CodeFailedPrecondition,
	kme.HSMUnavailable:       connect.CodeUnavailable,
	kme.DirectoryUnavailable: connect.CodeUnavailable,
	kme.StoreUnavailable:     connect.CodeUnavailable,
	kme.RolledBack:           connect.CodeFailedPrecondition,
	kme.Damaged:              connect.CodeFailedPrecondition,
}

// refusalOf is the refusal that an error is; nil if it is none.
func refusalOf(err error) *binding.Refusal {
	r, _ := errors.AsType[*binding.Refusal](err)
	return r
}

// told is an error whose text the caller may see.
type told struct {
	text string
	error
}

func (t told) Error() string { return t.text }
func (t told) Unwrap() error { return t.error }

// toConnect makes the caller's error: a refusal's reason and message, never its cause.
func toConnect(err error) error {
	r := refusalOf(err)
	switch {
	case err == nil:
		return nil
	case r != nil:
		e := connect.NewError(codes[r.Reason], told{text: r.Message, error: r})
		if d, derr := connect.NewErrorDetail(&errdetails.ErrorInfo{Reason: string(r.Reason),
			Domain: kme.ErrorDomain}); derr == nil {
			e.AddDetail(d)
		}
		return e
	case errors.Is(err, context.Canceled):
		return connect.NewError(connect.CodeCanceled, errors.New("the caller has gone"))
	case errors.Is(err, context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, errors.New("the caller's deadline has passed"))
	}
	return connect.NewError(connect.CodeInternal, told{text: "internal error", error: err})
}
