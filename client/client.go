// Package client calls kme.v1.KeyService, for an HSS written in Go.
package client

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/kme"
)

// An Error is a refusal of the service. errors.Is(err, client.Reason(kme.KMERejected)) tells whether it has that
// reason.
type Error struct {
	Reason  kme.Reason
	Message string
}

func (e *Error) Error() string { return fmt.Sprintf("%s: %s", e.Reason, e.Message) }

// Is says whether two errors have one reason.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Reason == e.Reason
}

// Reason is an error to compare with, by errors.Is.
func Reason(r kme.Reason) error { return &Error{Reason: r} }

// Temporary says whether the same call may succeed later.
func (e *Error) Temporary() bool {
	switch e.Reason {
	case kme.Overloaded, kme.HSMUnavailable, kme.DirectoryUnavailable, kme.StoreUnavailable:
		return true
	}
	return false
}

// Options are a Client's.
type Options struct {
	// URLs are https://HOST:PORT or unix:PATH: one, or those of several instances that serve from one store, up to 16.
	URLs    []string
	TLS     *tls.Config   // for https: the service's CA, and the client's certificate
	Timeout time.Duration // of a call with all its tries, 5 seconds if 0; a deadline of the call's context counts too
	Tries   int           // of a call that may be repeated, at each instance, 3 if 0
}

// A Client may be used concurrently. The context's deadline is sent with a call: the service does no work for a caller
// that does not wait any more.
//
// The calls of an attach, CheckEquipment and GetBinding are made in one stream to each instance: the first call opens
// it, also after it has broken. An administrator's calls are single requests.
//
// If the service cannot be reached, or says that it may answer later, a call is repeated after a pause if it is
// idempotent: all are but OpenProvisioning and a report of a failed authentication. These two are repeated only if the
// service has certainly not begun them, because it is about to end, or there is no connection.
//
// Several instances share the calls. A call that may be repeated goes to another instance at once. An instance that
// cannot be reached, is silent, or has lost its HSM or its store gets no calls until its /readyz says that it is ready,
// unless all instances are like that.
type Client struct {
	instances []*instance
	timeout   time.Duration
	tries     int
}

// New makes a client. It does not connect yet.
func New(o Options) (*Client, error) {
	c := &Client{timeout: cmp.Or(o.Timeout, 5*time.Second), tries: cmp.Or(o.Tries, 3)}
	if len(o.URLs) == 0 || len(o.URLs) > maxInstances {
		return nil, fmt.Errorf("a client has from 1 to %d addresses of the service, not %d", maxInstances, len(o.URLs))
	}
	for _, u := range o.URLs {
		i, err := newInstance(u, o.TLS, c.timeout)
		if err != nil {
			return nil, err
		}
		c.instances = append(c.instances, i)
	}
	return c, nil
}

// Close ends the streams, with what is under way in them (connect.CodeCanceled), and closes connections that are idle
// then. A call after it connects again.
func (c *Client) Close() {
	for _, i := range c.instances {
		i.close()
	}
}

// A RAND is the random challenge of an authentication vector.
type RAND = [16]byte

// An Origin is who at the other end of the network asked. Its zero value is for a caller that has one peer only.
type Origin struct {
	Name kme.Origin // an MME's Origin-Host, an AMF's id
	// it cannot provision, or must not: then an IMSI without a binding is refused (kme.NotBound)
	NoProvisioning bool
}

// Vectors are what PrepareVector answers.
type Vectors struct {
	RANDs     []RAND // to send, in the order of the request
	AttemptID string // not empty: let the device in for provisioning only, and give this with its payload
}

// PrepareVector is called with the RANDs of all vectors, 1 to 32, that an origin asked for at once.
func (c *Client) PrepareVector(ctx context.Context, imsi kme.IMSI, o Origin, rands ...RAND) (v Vectors, err error) {
	q := &kmev1.PrepareVectorRequest{Imsi: imsi.String(), Origin: o.Name.String(), NoProvisioning: o.NoProvisioning}
	for i := range rands {
		q.Rands = append(q.Rands, rands[i][:])
	}
	answer, err := ask(ctx, c, true, &kmev1.Call{Call: &kmev1.Call_PrepareVector{PrepareVector: q}},
		(*kmev1.Answer).GetPrepareVector)
	if err != nil {
		return v, err
	}
	if len(answer.GetRands()) != len(rands) {
		return v, fmt.Errorf("the service has answered %d RANDs, not %d", len(answer.GetRands()), len(rands))
	}
	switch answer.Control { // if a clear RAND were taken for an encrypted one, any device would get in
	case kmev1.Control_PREPROCESSED, kmev1.Control_PROVISIONING_ONLY:
	default:
		return v, fmt.Errorf("the service has answered control %v", answer.Control)
	}
	if provisioning := answer.Control == kmev1.Control_PROVISIONING_ONLY; provisioning != (answer.AttemptId != "") {
		return v, fmt.Errorf("the service has answered %v and the attempt %q", answer.Control, answer.AttemptId)
	}
	v.AttemptID, v.RANDs = answer.AttemptId, make([]RAND, len(rands))
	for i := range v.RANDs {
		err = errors.Join(err, fill(v.RANDs[i][:], answer.Rands[i]))
	}
	return v, err
}

// An Establishment is what EstablishKME answers.
type Establishment struct {
	NWSig [32]byte
	State kmev1.State
	KME   kme.Secret // zero but for a client with the role kme-export
}

// EstablishKME is called with the payload of a device. It came from the origin that was given the attempt.
func (c *Client) EstablishKME(ctx context.Context, imsi kme.IMSI, o Origin, imei kme.IMEI, attemptID string,
	payload []byte) (e Establishment, err error) {
	q := &kmev1.EstablishKMERequest{
		Imsi: imsi.String(), Imei: imei.String(), AttemptId: attemptID, Payload: payload, Origin: o.Name.String(),
	}
	answer, err := ask(ctx, c, true, &kmev1.Call{Call: &kmev1.Call_EstablishKme{EstablishKme: q}},
		(*kmev1.Answer).GetEstablishKme)
	if err != nil {
		return e, err
	}
	e.State = answer.GetState()
	if secret := answer.GetKme(); len(secret) > 0 {
		e.KME, err = kme.NewSecret(secret)
		clear(secret)
	}
	return e, errors.Join(err, fill(e.NWSig[:], answer.GetNwSig()))
}

// A Report is what ReportAuthentication answers.
type Report struct {
	State  kmev1.State // of the binding that stands now
	Served bool        // the device may be let in for more than provisioning
}

// ReportAuthentication is called when AKA with a pre-processed vector has ended. Only an origin that was sent a vector
// under a pending binding makes it active.
func (c *Client) ReportAuthentication(ctx context.Context, imsi kme.IMSI, o Origin, ok bool) (Report, error) {
	// A repeated report of a failure could hit the earlier binding.
	answer, err := ask(ctx, c, ok, &kmev1.Call{Call: &kmev1.Call_ReportAuthentication{
		ReportAuthentication: &kmev1.ReportAuthenticationRequest{
			Imsi: imsi.String(), Ok: ok, Origin: o.Name.String(), NoProvisioning: o.NoProvisioning,
		}}}, (*kmev1.Answer).GetReportAuthentication)
	return Report{State: answer.GetState(), Served: answer.GetControl() == kmev1.Control_PREPROCESSED}, err
}

// RestoreRAND gives the RAND before PrepareVector, when a SIM asks for resynchronisation.
func (c *Client) RestoreRAND(ctx context.Context, imsi kme.IMSI, o Origin, rand RAND) (out RAND, err error) {
	answer, err := ask(ctx, c, true, &kmev1.Call{Call: &kmev1.Call_RestoreRand{RestoreRand: &kmev1.RestoreRANDRequest{
		Imsi: imsi.String(), Rand: rand[:], Origin: o.Name.String(),
	}}}, (*kmev1.Answer).GetRestoreRand)
	if err != nil {
		return out, err
	}
	return out, fill(out[:], answer.GetRand())
}

// GetBinding tells what an IMSI is bound to.
func (c *Client) GetBinding(ctx context.Context, imsi kme.IMSI) (*kmev1.GetBindingResponse, error) {
	return ask(ctx, c, true, &kmev1.Call{Call: &kmev1.Call_GetBinding{
		GetBinding: &kmev1.GetBindingRequest{Imsi: imsi.String()},
	}}, (*kmev1.Answer).GetGetBinding)
}

// Equipment is what CheckEquipment answers.
type Equipment struct {
	Status kmev1.EquipmentStatus
	Reason kmev1.EquipmentReason
}

// CheckEquipment asks whether a device may be served; with the zero IMSI if the subscription is not known. A device of
// which nothing is known may be refused (kme.UnknownDevice).
func (c *Client) CheckEquipment(ctx context.Context, imei kme.IMEI, imsi kme.IMSI) (Equipment, error) {
	answer, err := ask(ctx, c, true, &kmev1.Call{Call: &kmev1.Call_CheckEquipment{
		CheckEquipment: &kmev1.CheckEquipmentRequest{Imei: imei.String(), Imsi: imsi.String()},
	}}, (*kmev1.Answer).GetCheckEquipment)
	if err != nil {
		return Equipment{}, err
	}
	switch answer.Status { // a caller that compares with BLACKLISTED only would serve a device without a status
	case kmev1.EquipmentStatus_WHITELISTED, kmev1.EquipmentStatus_GREYLISTED, kmev1.EquipmentStatus_BLACKLISTED:
		return Equipment{Status: answer.Status, Reason: answer.Reason}, nil
	}
	return Equipment{}, fmt.Errorf("the service has answered status %v", answer.Status)
}

// OpenProvisioning lets an IMSI be bound to another device.
func (c *Client) OpenProvisioning(
	ctx context.Context, imsi kme.IMSI, ttl time.Duration,
) (*kmev1.OpenProvisioningResponse, error) {
	return alone(ctx, c, false, kmev1connect.KeyServiceClient.OpenProvisioning,
		&kmev1.OpenProvisioningRequest{Imsi: imsi.String(), Ttl: durationpb.New(ttl)})
}

// RevokeBinding ends an IMSI's bindings.
func (c *Client) RevokeBinding(ctx context.Context, imsi kme.IMSI) (*kmev1.GetBindingResponse, error) {
	return alone(ctx, c, true, kmev1connect.KeyServiceClient.RevokeBinding,
		&kmev1.RevokeBindingRequest{Imsi: imsi.String()})
}

func fill(to, from []byte) error {
	if copy(to, from) != len(to) || len(from) != len(to) {
		return fmt.Errorf("the service has answered %d bytes, not %d", len(from), len(to))
	}
	return nil
}

// alone makes a call as a single request.
func alone[Q, A any](
	ctx context.Context, c *Client, again bool,
	method func(kmev1connect.KeyServiceClient, context.Context, *connect.Request[Q]) (*connect.Response[A], error),
	q *Q,
) (*A, error) {
	return try(ctx, c, again, func(ctx context.Context, i *instance) (*A, error) {
		answer, err := method(i.service, ctx, connect.NewRequest(q))
		if err != nil {
			return nil, err
		}
		return answer.Msg, nil
	})
}

// ask makes a call in the stream, and opens one if there is none. An answer that does not fit the call is an error.
func ask[A any](ctx context.Context, c *Client, again bool, call *kmev1.Call, of func(*kmev1.Answer) *A) (*A, error) {
	encoded, err := proto.Marshal(call)
	if err != nil { // a text that is not UTF-8
		return nil, &Error{Reason: kme.Malformed, Message: err.Error()}
	}
	if len(encoded) > maxCall {
		return nil, &Error{Reason: kme.Malformed, Message: fmt.Sprintf("the call has %d bytes, of %d that it may have",
			len(encoded), maxCall)}
	}
	return try(ctx, c, again, func(ctx context.Context, i *instance) (*A, error) {
		a, err := i.call(ctx, slices.Clip(encoded))
		if err != nil {
			return nil, err
		}
		if answer := of(a); answer != nil {
			return answer, nil
		}
		return nil, connect.NewError(connect.CodeUnavailable, errors.New("the service has answered another call"))
	})
}

// try makes a call. If it may be repeated, it tries each instance, and after a pause all of them again.
func try[A any](
	ctx context.Context, c *Client, again bool, call func(context.Context, *instance) (*A, error),
) (*A, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var tried instances
	at := c.pick(tried)
	for round, pause := 1, 20*time.Millisecond; ; {
		answer, err := once(ctx, c, c.instances[at], again, call)
		if err == nil {
			return answer, nil
		}
		err, temporary := explain(err)
		tried |= 1 << at
		at = c.pick(tried)
		if !again && !notBegun(err) || !temporary || at < 0 && round >= c.tries || ctx.Err() != nil {
			return nil, err
		}
		if at >= 0 {
			continue
		}
		tried, round = 0, round+1
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(pause/2 + rand.N(pause)):
			pause *= 4
		}
		at = c.pick(tried)
	}
}

// explain gives the error that a caller sees, and whether the call may be made again.
func explain(err error) (error, bool) {
	if refused, ok := errors.AsType[*Error](err); ok {
		return err, refused.Temporary()
	}
	e, ok := errors.AsType[*connect.Error](err)
	if !ok {
		return err, false
	}
	if reason := e.Meta().Get(kme.ReasonHeader); reason != "" {
		refusal := &Error{Reason: kme.Reason(reason), Message: e.Message()}
		return refusal, refusal.Temporary()
	}
	return err, e.Code() == connect.CodeUnavailable // it could not be reached
}
