// Package api serves package binding as kme.v1.KeyService over Connect.
package api

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"path"
	"slices"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"connectrpc.com/grpchealth"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/protobuf/types/known/timestamppb"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/kme"
)

// maxRequest is above any valid request: the largest payload has 512 bytes.
const maxRequest = 16 << 10

// minCompressed keeps all answers but those of ListBindings as they are: of random bytes, compression makes more.
const minCompressed = 4 << 10

// NewHandler serves the service, and health: /healthz says that the process runs; /readyz that ready does not fail, and what
// ready warns of: something that is away, and that the service goes on without for now.
//
// clients says who may call what; it is read at each request. metrics counts the calls, and gather serves GET /metrics to monitors.
// outer are around each call. The gRPC health service says what /readyz says.
func NewHandler(service *binding.Service, clients *atomic.Pointer[Clients], metrics *binding.Metrics, gather http.Handler, outer []connect.Interceptor, ready func(context.Context) (warnings []string, err error)) http.Handler {
	mux := http.NewServeMux()
	mux.Handle(kmev1connect.NewKeyServiceHandler(&server{service}, connect.WithReadMaxBytes(maxRequest), connect.WithCompressMinBytes(minCompressed), connect.WithInterceptors(append(slices.Clone(outer), measure(metrics), authorize(service))...)))
	mux.Handle(grpchealth.NewHandler(checker(func(ctx context.Context) error { _, err := ready(ctx); return err })))
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) {
		if !clientOf(r.Context()).has(RoleMonitor) {
			http.Error(w, "this client may not do that", http.StatusForbidden)
			return
		}
		gather.ServeHTTP(w, r)
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("ok\n")) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
		defer cancel()
		warnings, err := ready(ctx)
		if err != nil { // why is for the log of whoever runs the service
			http.Error(w, "not ready", http.StatusServiceUnavailable)
			return
		}
		w.Write([]byte("ready\n"))
		for _, warning := range warnings {
			fmt.Fprintf(w, "but %s\n", warning)
		}
	})
	return identify(clients, mux)
}

type checker func(context.Context) error

func (c checker) Check(ctx context.Context, req *grpchealth.CheckRequest) (*grpchealth.CheckResponse, error) {
	if req.Service != "" && req.Service != kmev1connect.KeyServiceName {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("there is no such service"))
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if c(ctx) != nil {
		return &grpchealth.CheckResponse{Status: grpchealth.StatusNotServing}, nil
	}
	return &grpchealth.CheckResponse{Status: grpchealth.StatusServing}, nil
}

// measure counts each call by what the caller was answered.
func measure(metrics *binding.Metrics) connect.UnaryInterceptorFunc {
	return func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
			start := time.Now()
			answer, err := next(ctx, req)
			reason := "OK"
			var r *binding.Refusal
			switch {
			case errors.As(err, &r):
				reason = string(r.Reason)
			case err != nil:
				reason = connect.CodeOf(err).String()
			}
			metrics.Called(path.Base(req.Spec().Procedure), reason, time.Since(start))
			return answer, err
		}
	}
}

// authorize refuses a call that its client may not make, before anything is done for it.
func authorize(service *binding.Service) connect.UnaryInterceptorFunc {
	return func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
			client := clientOf(ctx)
			ok := client.has(allowed[req.Spec().Procedure]...)
			if named, has := req.Any().(interface{ GetImsi() string }); ok && has {
				ok = client.may(named.GetImsi())
			}
			if !ok {
				name := ""
				if client != nil {
					name = client.Name
				}
				service.Refused(ctx, notAllowed(), "client", name, "call", req.Spec().Procedure)
				return nil, toConnect(notAllowed())
			}
			if client.tooMany() {
				refusal := &binding.Refusal{Reason: kme.Overloaded, Message: "this client calls more often than it may"}
				service.Refused(ctx, refusal, "client", client.Name, "call", req.Spec().Procedure)
				return nil, toConnect(refusal)
			}
			return next(ctx, req)
		}
	}
}

type server struct{ service *binding.Service }

func (s *server) PrepareVector(ctx context.Context, req *connect.Request[kmev1.PrepareVectorRequest]) (*connect.Response[kmev1.PrepareVectorResponse], error) {
	p, err := s.service.PrepareVector(ctx, req.Msg.Imsi, req.Msg.Rand)
	if err != nil {
		return nil, toConnect(err)
	}
	control := kmev1.Control_PREPROCESSED
	if p.AttemptID != "" {
		control = kmev1.Control_PROVISIONING_ONLY
	}
	return connect.NewResponse(&kmev1.PrepareVectorResponse{Rand: p.RAND[:], Control: control, AttemptId: p.AttemptID}), nil
}

func (s *server) EstablishKME(ctx context.Context, req *connect.Request[kmev1.EstablishKMERequest]) (*connect.Response[kmev1.EstablishKMEResponse], error) {
	e, err := s.service.EstablishKME(ctx, req.Msg.Imsi, req.Msg.Imei, req.Msg.AttemptId, req.Msg.Payload, clientOf(ctx).has(RoleExport))
	if err != nil {
		return nil, toConnect(err)
	}
	// The answer's copy of the KME is the marshaller's, who does not wipe it: that is what a client with kme-export asks for.
	return connect.NewResponse(&kmev1.EstablishKMEResponse{NwSig: e.NWSig, State: toState(e.State), Kme: e.KME.Bytes()}), nil
}

func (s *server) ReportAuthentication(ctx context.Context, req *connect.Request[kmev1.ReportAuthenticationRequest]) (*connect.Response[kmev1.ReportAuthenticationResponse], error) {
	b, err := s.service.ReportAuthentication(ctx, req.Msg.Imsi, req.Msg.Ok)
	if err != nil {
		return nil, toConnect(err)
	}
	out := new(kmev1.ReportAuthenticationResponse)
	if b != nil {
		out.State = toState(b.State)
	}
	return connect.NewResponse(out), nil
}

func (s *server) RestoreRAND(ctx context.Context, req *connect.Request[kmev1.RestoreRANDRequest]) (*connect.Response[kmev1.RestoreRANDResponse], error) {
	rand, err := s.service.RestoreRAND(ctx, req.Msg.Imsi, req.Msg.Rand)
	if err != nil {
		return nil, toConnect(err)
	}
	return connect.NewResponse(&kmev1.RestoreRANDResponse{Rand: rand[:]}), nil
}

func (s *server) GetBinding(ctx context.Context, req *connect.Request[kmev1.GetBindingRequest]) (*connect.Response[kmev1.GetBindingResponse], error) {
	b, err := s.service.GetBinding(ctx, req.Msg.Imsi)
	if err != nil {
		return nil, toConnect(err)
	}
	return connect.NewResponse(toBinding(b)), nil
}

func (s *server) OpenProvisioning(ctx context.Context, req *connect.Request[kmev1.OpenProvisioningRequest]) (*connect.Response[kmev1.OpenProvisioningResponse], error) {
	a, err := s.service.OpenProvisioning(ctx, req.Msg.Imsi, req.Msg.Ttl.AsDuration())
	if err != nil {
		return nil, toConnect(err)
	}
	return connect.NewResponse(&kmev1.OpenProvisioningResponse{AttemptId: a.ID, ExpiresAt: timestamppb.New(a.Expires)}), nil
}

func (s *server) RevokeBinding(ctx context.Context, req *connect.Request[kmev1.RevokeBindingRequest]) (*connect.Response[kmev1.GetBindingResponse], error) {
	b, err := s.service.RevokeBinding(ctx, req.Msg.Imsi)
	if err != nil {
		return nil, toConnect(err)
	}
	return connect.NewResponse(toBinding(b)), nil
}

func (s *server) ListBindings(ctx context.Context, req *connect.Request[kmev1.ListBindingsRequest]) (*connect.Response[kmev1.ListBindingsResponse], error) {
	size := min(cmp.Or(int(req.Msg.PageSize), 100), 1000)
	if size < 1 {
		return nil, toConnect(&binding.Refusal{Reason: kme.Malformed, Message: "the page_size is from 1 to 1000"})
	}
	page, err := s.service.ListBindings(ctx, req.Msg.PageToken, req.Msg.Imei, size)
	if err != nil {
		return nil, toConnect(err)
	}
	out := new(kmev1.ListBindingsResponse)
	if len(page) == size {
		out.NextPageToken = page[size-1].IMSI.String()
	}
	client := clientOf(ctx)
	for _, b := range page {
		if client.may(b.IMSI.String()) { // a page may have fewer than asked for, or none
			out.Bindings = append(out.Bindings, toBinding(b))
		}
	}
	return connect.NewResponse(out), nil
}

func toBinding(b *binding.Binding) *kmev1.GetBindingResponse {
	at := func(t time.Time) *timestamppb.Timestamp {
		if t.IsZero() {
			return nil
		}
		return timestamppb.New(t)
	}
	return &kmev1.GetBindingResponse{
		Imsi: b.IMSI.String(), Imei: b.IMEI.String(), Lot: b.Lot, Manufacturer: b.Manufacturer, State: toState(b.State),
		EstablishedAt: at(b.Established), ActivatedAt: at(b.Activated), RevokedAt: at(b.Revoked),
	}
}

// toState relies on the names being the same in both.
func toState(s binding.State) kmev1.State { return kmev1.State(kmev1.State_value[string(s)]) }

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
}

// told is a refusal whose text is what the caller may know.
type told struct{ r *binding.Refusal }

func (t told) Error() string { return t.r.Message }
func (t told) Unwrap() error { return t.r }

// toConnect tells a caller what it may know: a refusal's reason and message, never its cause.
func toConnect(err error) error {
	var r *binding.Refusal
	switch {
	case errors.As(err, &r):
		e := connect.NewError(codes[r.Reason], told{r})
		if d, derr := connect.NewErrorDetail(&errdetails.ErrorInfo{Reason: string(r.Reason), Domain: kme.ErrorDomain}); derr == nil {
			e.AddDetail(d)
		}
		return e
	case errors.Is(err, context.Canceled):
		return connect.NewError(connect.CodeCanceled, errors.New("the caller has gone"))
	case errors.Is(err, context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, errors.New("the caller's deadline has passed"))
	}
	return connect.NewError(connect.CodeInternal, errors.New("internal error"))
}
