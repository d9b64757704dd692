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
	"time"

	"connectrpc.com/connect"
	"connectrpc.com/grpchealth"
	"connectrpc.com/grpcreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/kme"
)

// maxRequest is above any valid request: the largest payload has 512 bytes.
const maxRequest = 16 << 10

// minCompressed is above all answers but those of ListBindings: random bytes grow if they are compressed.
const minCompressed = 4 << 10

// Options are what NewHandler serves, and for whom.
type Options struct {
	Service *binding.Service
	Clients *Clients
	Metrics *binding.Metrics      // counts the calls
	Gather  http.Handler          // serves GET /metrics
	Outer   []connect.Interceptor // are around each call
	// Ready fails while the service cannot work. Its warnings are about what the service can do without for some time.
	// It is asked once a second at most.
	Ready func(context.Context) (warnings []string, err error)
	// Leaving, if there is one, is asked whenever a caller asks whether the service is ready. If it says true, the
	// service is not, and Ready is not asked.
	Leaving func() bool
	// PageKey is the key of ListBindings' tokens, which all instances share. Without it, tokens are valid for this
	// Handler only.
	PageKey kme.Secret
	// Streams outlast this Handler. Without them, its streams are its own.
	Streams *Streams
}

// A Handler serves the service.
type Handler struct {
	http.Handler
	server  *server
	clients *Clients
	call    connect.UnaryFunc // makes a call of a stream: what requestOf gives
}

// NewHandler serves the service, and health: /healthz, for everybody, says that the process runs; /readyz and gRPC's
// health service, for clients, what Ready says. gRPC's reflection is for administrators.
func NewHandler(o Options) *Handler {
	if o.PageKey == (kme.Secret{}) {
		o.PageKey = kme.RandomSecret()
	}
	if o.Streams == nil {
		o.Streams = NewStreams()
	}
	mux := http.NewServeMux()
	g := &guard{service: o.Service, metrics: o.Metrics, errors: connect.NewErrorWriter()}
	s := &server{service: o.Service, pages: newPages(o.PageKey), guard: g, streams: o.Streams}
	mux.Handle(kmev1connect.NewKeyServiceHandler(s, connect.WithConditionalHandlerOptions(
		func(spec connect.Spec) []connect.HandlerOption {
			if spec.StreamType == connect.StreamTypeBidi { // the interceptors are around each of its calls
				return []connect.HandlerOption{connect.WithReadMaxBytes(maxMessage),
					connect.WithCompression("gzip", nil, nil)}
			}
			unary := append(slices.Clone(o.Outer), connect.UnaryInterceptorFunc(tellReason),
				connect.UnaryInterceptorFunc(g.around))
			return append(codecs(), connect.WithReadMaxBytes(maxRequest),
				connect.WithCompressMinBytes(minCompressed), connect.WithInterceptors(unary...))
		})))
	for procedure := range allowed {
		if procedure != kmev1connect.KeyServiceStreamProcedure { // its calls are counted one by one
			o.Metrics.Methods(path.Base(procedure))
		}
	}
	ready := &readiness{leaving: o.Leaving, find: func(ctx context.Context) (warnings []string, err error) {
		err = g.finish(ctx, "/readyz", func() (err error) { warnings, err = o.Ready(ctx); return err })
		return warnings, err
	}}
	mux.Handle(grpchealth.NewHandler(&checker{ready: ready}, connect.WithReadMaxBytes(maxRequest)))
	reflected := grpcreflect.NewStaticReflector(kmev1connect.KeyServiceName)
	for _, version := range []func(*grpcreflect.Reflector, ...connect.HandlerOption) (string, http.Handler){
		grpcreflect.NewHandlerV1, grpcreflect.NewHandlerV1Alpha} {
		path, handler := version(reflected, connect.WithReadMaxBytes(maxRequest))
		mux.Handle(path, g.only(handler, RoleAdmin))
	}
	mux.Handle("GET /metrics", g.only(o.Gather, RoleMetrics))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("ok\n")) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		warnings, err := ready.ask(r.Context())
		if err != nil { // the cause is only for the log
			http.Error(w, "not ready", http.StatusServiceUnavailable)
			return
		}
		w.Write([]byte("ready\n"))
		for _, warning := range warnings {
			fmt.Fprintf(w, "but %s\n", warning)
		}
	})
	h := &Handler{server: s, clients: o.Clients,
		call: g.around(func(ctx context.Context, r connect.AnyRequest) (connect.AnyResponse, error) {
			return r.(streamed).call(ctx)
		})}
	for _, outer := range slices.Backward(o.Outer) {
		h.call = outer.WrapUnary(h.call)
	}
	o.Streams.serving.CompareAndSwap(nil, h)
	h.Handler = identify(o.Clients, withControl(g.known(mux, "/healthz")))
	return h
}

// CheckEquipment makes that call for the sender of a request in another protocol, with the same checks. A refusal is a
// *binding.Refusal.
func (h *Handler) CheckEquipment(r *http.Request, q *kmev1.CheckEquipmentRequest) (
	answer *kmev1.CheckEquipmentResponse, err error) {
	identify(h.clients, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if clientOf(r.Context()) == nil {
			stranger(r.Context(), h.server.service, callOf(r.URL.Path)...)
			err = notAllowed()
			return
		}
		var a connect.AnyResponse
		call := &kmev1.Call{Call: &kmev1.Call_CheckEquipment{CheckEquipment: q}}
		a, err = h.call(r.Context(), h.server.requestOf(call))
		if err == nil {
			answer = a.Any().(*kmev1.CheckEquipmentResponse)
		} else if refusal := refusalOf(err); refusal != nil {
			err = refusal
		}
	})).ServeHTTP(nil, r)
	return answer, err
}

// A checker answers over gRPC as /readyz does.
type checker struct{ ready *readiness }

func (c *checker) Check(ctx context.Context, req *grpchealth.CheckRequest) (*grpchealth.CheckResponse, error) {
	if req.Service != "" && req.Service != kmev1connect.KeyServiceName {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("there is no such service"))
	}
	if _, err := c.ready.ask(ctx); err != nil {
		return &grpchealth.CheckResponse{Status: grpchealth.StatusNotServing}, nil
	}
	return &grpchealth.CheckResponse{Status: grpchealth.StatusServing}, nil
}

type server struct {
	service *binding.Service
	pages
	guard   *guard
	streams *Streams
}

// subject parses the IMSI of a call, and its origin.
func subject(ctx context.Context, imsiText, origin string, declined bool) (imsi kme.IMSI, o binding.Origin, err error) {
	if o, err = clientOf(ctx).origin(origin, imsiText, declined); err == nil {
		imsi, err = parsed(kme.ParseIMSI(imsiText))
	}
	return imsi, o, err
}

// parsed gives an argument of a call, or the refusal of one that cannot be parsed.
func parsed[T any](v T, err error) (T, error) { return v, malformed(err) }

// malformed is the refusal of an argument that cannot be parsed.
func malformed(err error) error {
	if err == nil {
		return nil
	}
	return &binding.Refusal{Reason: kme.Malformed, Message: err.Error()}
}

func (s *server) PrepareVector(
	ctx context.Context, req *connect.Request[kmev1.PrepareVectorRequest],
) (*connect.Response[kmev1.PrepareVectorResponse], error) {
	imsi, o, err := subject(ctx, req.Msg.Imsi, req.Msg.Origin, req.Msg.NoProvisioning)
	if err != nil {
		return nil, err
	}
	p, err := s.service.PrepareVector(ctx, imsi, req.Msg.Rands, o)
	if err != nil {
		return nil, err
	}
	answer := &kmev1.PrepareVectorResponse{Control: toControl(p.AttemptID == ""), AttemptId: p.AttemptID,
		Rands: make([][]byte, len(p.RANDs))}
	for i := range p.RANDs {
		answer.Rands[i] = p.RANDs[i][:]
	}
	return connect.NewResponse(answer), nil
}

// toControl says how a device is let in: as one that has its KME, or for provisioning only.
func toControl(preprocessed bool) kmev1.Control {
	if preprocessed {
		return kmev1.Control_PREPROCESSED
	}
	return kmev1.Control_PROVISIONING_ONLY
}

func (s *server) EstablishKME(
	ctx context.Context, req *connect.Request[kmev1.EstablishKMERequest],
) (*connect.Response[kmev1.EstablishKMEResponse], error) {
	imsi, o, err := subject(ctx, req.Msg.Imsi, req.Msg.Origin, false)
	if err != nil {
		return nil, err
	}
	imei, err := parsed(kme.ParseIMEI(req.Msg.Imei))
	if err != nil {
		return nil, err
	}
	export := clientOf(ctx).as(RoleExport) != ""
	if export { // it asks for more than an HSS does
		ctx = as(ctx, RoleExport)
	}
	e, err := s.service.EstablishKME(ctx, binding.EstablishRequest{
		IMSI: imsi, IMEI: imei, AttemptID: req.Msg.AttemptId, Payload: req.Msg.Payload, Origin: o, Export: export,
	})
	if err != nil {
		return nil, err
	}
	// The encoder has a copy of the KME, and does not wipe it. A client with kme-export accepts that.
	return connect.NewResponse(&kmev1.EstablishKMEResponse{NwSig: e.NWSig, State: toState(e.State),
		Kme: e.KME.Bytes()}), nil
}

func (s *server) ReportAuthentication(
	ctx context.Context, req *connect.Request[kmev1.ReportAuthenticationRequest],
) (*connect.Response[kmev1.ReportAuthenticationResponse], error) {
	imsi, o, err := subject(ctx, req.Msg.Imsi, req.Msg.Origin, req.Msg.NoProvisioning)
	if err != nil {
		return nil, err
	}
	r, err := s.service.ReportAuthentication(ctx, imsi, req.Msg.Ok, o)
	if err != nil {
		return nil, err
	}
	answer := &kmev1.ReportAuthenticationResponse{Control: toControl(r.Served)}
	if r.Binding != nil {
		answer.State = toState(r.Binding.State)
	}
	return connect.NewResponse(answer), nil
}

func (s *server) RestoreRAND(
	ctx context.Context, req *connect.Request[kmev1.RestoreRANDRequest],
) (*connect.Response[kmev1.RestoreRANDResponse], error) {
	imsi, o, err := subject(ctx, req.Msg.Imsi, req.Msg.Origin, false)
	if err != nil {
		return nil, err
	}
	rand, err := s.service.RestoreRAND(ctx, imsi, req.Msg.Rand, o)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&kmev1.RestoreRANDResponse{Rand: rand[:]}), nil
}

func (s *server) CheckEquipment(
	ctx context.Context, req *connect.Request[kmev1.CheckEquipmentRequest],
) (*connect.Response[kmev1.CheckEquipmentResponse], error) {
	imei, err := parsed(kme.ParseIMEI(req.Msg.Imei))
	if err != nil {
		return nil, err
	}
	var imsi kme.IMSI
	if req.Msg.Imsi != "" {
		if imsi, err = parsed(kme.ParseIMSI(req.Msg.Imsi)); err != nil {
			return nil, err
		}
	}
	e, err := s.service.CheckEquipment(ctx, imei, imsi)
	if err == nil && e.Status == binding.Unknown {
		err = &binding.Refusal{Reason: kme.UnknownDevice, Message: "nothing is known of this device"}
	}
	if err != nil {
		return nil, err
	}
	// The names are the same in both.
	return connect.NewResponse(&kmev1.CheckEquipmentResponse{
		Status: kmev1.EquipmentStatus(kmev1.EquipmentStatus_value[string(e.Status)]),
		Reason: kmev1.EquipmentReason(kmev1.EquipmentReason_value[string(e.Reason)]),
	}), nil
}

func (s *server) GetBinding(
	ctx context.Context, req *connect.Request[kmev1.GetBindingRequest],
) (*connect.Response[kmev1.GetBindingResponse], error) {
	return answerBinding(ctx, req.Msg.Imsi, s.service.GetBinding)
}

func (s *server) RevokeBinding(
	ctx context.Context, req *connect.Request[kmev1.RevokeBindingRequest],
) (*connect.Response[kmev1.GetBindingResponse], error) {
	return answerBinding(ctx, req.Msg.Imsi, s.service.RevokeBinding)
}

func answerBinding(
	ctx context.Context, imsiText string, call func(context.Context, kme.IMSI) (*binding.Binding, error),
) (*connect.Response[kmev1.GetBindingResponse], error) {
	imsi, err := parsed(kme.ParseIMSI(imsiText))
	if err != nil {
		return nil, err
	}
	b, err := call(ctx, imsi)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(toBinding(b)), nil
}

func (s *server) OpenProvisioning(
	ctx context.Context, req *connect.Request[kmev1.OpenProvisioningRequest],
) (*connect.Response[kmev1.OpenProvisioningResponse], error) {
	imsi, err := parsed(kme.ParseIMSI(req.Msg.Imsi))
	if err != nil {
		return nil, err
	}
	a, err := s.service.OpenProvisioning(ctx, imsi, req.Msg.Ttl.AsDuration())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&kmev1.OpenProvisioningResponse{AttemptId: a.ID,
		ExpiresAt: timestamppb.New(a.Expires)}), nil
}

func (s *server) ListBindings(
	ctx context.Context, req *connect.Request[kmev1.ListBindingsRequest],
) (*connect.Response[kmev1.ListBindingsResponse], error) {
	size := min(cmp.Or(int(req.Msg.PageSize), 100), 1000)
	if size < 1 {
		return nil, malformed(errors.New("the page_size is from 1 to 1000"))
	}
	client := clientOf(ctx)
	q := client.view
	q.Limit = size + 1 // one more says whether there is a next page
	var err error
	if req.Msg.Imei != "" {
		if q.IMEI, err = parsed(kme.ParseIMEI(req.Msg.Imei)); err != nil {
			return nil, err
		}
	}
	if req.Msg.PageToken != "" {
		if q.After, err = s.after(client, q.IMEI, req.Msg.PageToken); err != nil {
			return nil, err
		}
	}
	page, err := s.service.ListBindings(ctx, q)
	if err != nil {
		return nil, err
	}
	out := new(kmev1.ListBindingsResponse)
	if len(page) > size {
		page = page[:size]
		out.NextPageToken = s.token(client, q.IMEI, page[size-1].IMSI)
	}
	for _, b := range page {
		out.Bindings = append(out.Bindings, toBinding(b))
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
