// Package api serves package binding as kme.v1.KeyService over Connect.
package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/protobuf/types/known/timestamppb"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/binding"
)

// ErrorDomain is the domain of the google.rpc.ErrorInfo in every error of the service.
const ErrorDomain = "kme"

// maxRequest is above any valid request: the largest payload has 512 bytes.
const maxRequest = 16 << 10

// NewHandler serves the service, and health: /healthz says that the process runs; /readyz that ready does not fail, and what
// ready warns of: something that is away, and that the service goes on without for now.
func NewHandler(service *binding.Service, ready func(context.Context) (warnings []string, err error)) http.Handler {
	mux := http.NewServeMux()
	mux.Handle(kmev1connect.NewKeyServiceHandler(&server{service}, connect.WithReadMaxBytes(maxRequest)))
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
	return mux
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
	e, err := s.service.EstablishKME(ctx, req.Msg.Imsi, req.Msg.Imei, req.Msg.AttemptId, req.Msg.Payload)
	if err != nil {
		return nil, toConnect(err)
	}
	return connect.NewResponse(&kmev1.EstablishKMEResponse{NwSig: e.NWSig, State: toState(e.State)}), nil
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
	out := &kmev1.GetBindingResponse{
		Imsi: b.IMSI.String(), Imei: b.IMEI.String(), Lot: b.Lot, Manufacturer: b.Manufacturer, State: toState(b.State),
		EstablishedAt: timestamppb.New(b.Established),
	}
	if !b.Activated.IsZero() {
		out.ActivatedAt = timestamppb.New(b.Activated)
	}
	return connect.NewResponse(out), nil
}

// toState relies on the names being the same in both.
func toState(s binding.State) kmev1.State { return kmev1.State(kmev1.State_value[string(s)]) }

var codes = map[binding.Reason]connect.Code{
	binding.Malformed:            connect.CodeInvalidArgument,
	binding.NoAttempt:            connect.CodeFailedPrecondition,
	binding.UnknownDevice:        connect.CodeNotFound,
	binding.RevokedDevice:        connect.CodePermissionDenied,
	binding.KMERejected:          connect.CodePermissionDenied,
	binding.NotBound:             connect.CodeFailedPrecondition,
	binding.HSMUnavailable:       connect.CodeUnavailable,
	binding.DirectoryUnavailable: connect.CodeUnavailable,
	binding.StoreUnavailable:     connect.CodeUnavailable,
}

// toConnect tells a caller what it may know: a refusal's reason and message, never its cause.
func toConnect(err error) error {
	var r *binding.Refusal
	switch {
	case errors.As(err, &r):
		e := connect.NewError(codes[r.Reason], errors.New(r.Message))
		if d, derr := connect.NewErrorDetail(&errdetails.ErrorInfo{Reason: string(r.Reason), Domain: ErrorDomain}); derr == nil {
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
