package binding

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/maypok86/otter/v2"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/kme"
)

// A Token is what the service needs of the operator's HSM.
type Token interface {
	OpenPayload(ctx context.Context, p hsmkeys.Payload) (*hsmkeys.Opened, error)
	EncryptRAND(ctx context.Context, sealed []byte, rand [hsmkeys.RANDSize]byte) ([hsmkeys.RANDSize]byte, error)
	ExportKME(ctx context.Context, p hsmkeys.Payload) (kme.Secret, error)
	DecryptRAND(ctx context.Context, sealed []byte, rand [hsmkeys.RANDSize]byte) ([hsmkeys.RANDSize]byte, error)
}

// A Service does what an HSS asks for. All methods may be called concurrently; their errors are Refusals, or the
// context's.
type Service struct {
	token      Token
	store      Store
	log        *slog.Logger
	attemptTTL time.Duration
	lots       atomic.Pointer[Lots]
	limits     *limits
	metrics    *Metrics
	coming     atomic.Int64 // see Coming

	// open has the attempts that this process has seen open, the last of each IMSI: the store need not be asked before their EstablishKME.
	// Another process may have closed one since; then the store says so before it establishes anything.
	open *otter.Cache[kme.IMSI, Attempt]
}

// maxOpen bounds the memory for open.
const maxOpen = 100_000

// NewService serves the lots given until SetLots gives it others. Decisions are logged, one line each; no line holds a
// secret.
func NewService(token Token, store Store, lots *Lots, attemptTTL time.Duration, log *slog.Logger) *Service {
	s := &Service{
		token: token, store: store, log: log, attemptTTL: attemptTTL, limits: newLimits(Limits{}), metrics: NewMetrics(prometheus.NewRegistry()),
		open: otter.Must(&otter.Options[kme.IMSI, Attempt]{MaximumSize: maxOpen, ExpiryCalculator: otter.ExpiryWriting[kme.IMSI, Attempt](attemptTTL)}),
	}
	s.lots.Store(lots)
	return s
}

// Limit sets limits, and Observe where to count and measure, for the time before the first call. Without, there are none.
func (s *Service) Limit(l Limits) { s.limits = newLimits(l) }

// Observe is described at Limit.
func (s *Service) Observe(m *Metrics) { s.metrics = m }

// enter admits a call that may reach the HSM. Work that nobody waits for is not begun: see hsmkeys.
func (s *Service) enter() (leave func(), err error) {
	if n := s.limits.calls.Add(1); s.limits.Calls > 0 && n > int64(s.limits.Calls) {
		s.limits.calls.Add(-1)
		return nil, overloaded("the service has all the work that it can do: call again later")
	}
	s.metrics.inFlight.Inc()
	return func() { s.metrics.inFlight.Dec(); s.limits.calls.Add(-1) }, nil
}

// Coming is how many calls are on their way to a change of the store and will soon be there: what they wait for is the HSM, if anything, and no directory.
func (s *Service) Coming() int { return int(s.coming.Load()) }

// SetLots changes the lots that are served. Calls under way finish with those that they began with.
func (s *Service) SetLots(lots *Lots) { s.lots.Store(lots) }

// CheckDirectories says which manufacturers' directories cannot be read now. Devices whose keys are cached are served all the
// same.
func (s *Service) CheckDirectories(ctx context.Context) map[string]error {
	return s.lots.Load().CheckDirectories(ctx)
}

// Overdue gives the lists of revoked devices that could not be read again when it was time, by manufacturer.
func (s *Service) Overdue() map[string][]directory.Overdue { return s.lots.Load().Overdue() }

// Prepared is the answer to PrepareVector.
type Prepared struct {
	RAND      [hsmkeys.RANDSize]byte
	AttemptID string // empty: RAND is encrypted under the KME
}

// PrepareVector is called for every authentication vector.
func (s *Service) PrepareVector(ctx context.Context, imsiText string, randBytes []byte) (*Prepared, error) {
	imsi, vector, err := parseVector(imsiText, randBytes)
	if err != nil {
		return nil, err
	}
	leave, err := s.enter()
	if err != nil {
		return nil, s.failed(ctx, "prepare", imsi, err)
	}
	defer leave()
	now := time.Now()
	fresh := Attempt{ID: newAttemptID(), IMSI: imsi, Expires: now.Add(s.attemptTTL)}
	// An HSS asks for several vectors at once: they share an attempt as long as it leaves a device time enough.
	b, attempt, err := s.prepared(ctx, fresh, now)
	if err != nil {
		return nil, s.failed(ctx, "prepare", imsi, fromStore(ctx, err))
	}
	if b == nil {
		if attempt.ID == fresh.ID {
			s.log.InfoContext(ctx, "attempt opened", "imsi", imsi, "expires", attempt.Expires)
		}
		s.open.Set(imsi, *attempt)
		return &Prepared{RAND: vector, AttemptID: attempt.ID}, nil
	}
	if s.lots.Load().revoked(ctx, b.IMEI) {
		return nil, s.failed(ctx, "prepare", imsi, deviceRevoked(), "imei", b.IMEI)
	}
	out, err := s.token.EncryptRAND(ctx, b.Sealed, vector)
	if err != nil {
		return nil, s.failed(ctx, "prepare", imsi, fromToken(ctx, err))
	}
	return &Prepared{RAND: out}, nil
}

func (s *Service) prepared(ctx context.Context, fresh Attempt, now time.Time) (*Binding, *Attempt, error) {
	s.coming.Add(1)
	defer s.coming.Add(-1)
	return s.store.Prepare(ctx, fresh, now, now.Add(s.attemptTTL/2))
}

// RestoreRAND undoes PrepareVector for a bound IMSI.
func (s *Service) RestoreRAND(ctx context.Context, imsiText string, randBytes []byte) (out [hsmkeys.RANDSize]byte, err error) {
	imsi, vector, err := parseVector(imsiText, randBytes)
	if err != nil {
		return out, err
	}
	leave, err := s.enter()
	if err != nil {
		return out, s.failed(ctx, "restore", imsi, err)
	}
	defer leave()
	b, err := s.standing(ctx, imsi)
	if err != nil {
		return out, s.failed(ctx, "restore", imsi, fromStore(ctx, err))
	}
	if out, err = s.token.DecryptRAND(ctx, b.Sealed, vector); err != nil {
		return out, s.failed(ctx, "restore", imsi, fromToken(ctx, err))
	}
	return out, nil
}

// standing is an IMSI's binding that is not revoked, or ErrNotBound.
func (s *Service) standing(ctx context.Context, imsi kme.IMSI) (*Binding, error) {
	b, err := s.store.Binding(ctx, imsi)
	if err == nil && b.State == Revoked {
		return nil, ErrNotBound
	}
	return b, err
}

// Established is the answer to EstablishKME.
type Established struct {
	NWSig []byte
	State State
	KME   kme.Secret // only if it was asked for; the caller wipes it
}

// EstablishKME takes a device's payload and answers NW_SIG; with export, the KME too, for an HSS that keeps it itself.
func (s *Service) EstablishKME(ctx context.Context, imsiText, imeiText, attemptID string, payload []byte, export bool) (*Established, error) {
	imsi, err := parseIMSI(imsiText)
	if err != nil {
		return nil, err
	}
	imei, err := kme.ParseIMEI(imeiText)
	if err != nil {
		return nil, refuse(kme.Malformed, err.Error(), nil)
	}
	leave, err := s.enter()
	if err != nil {
		return nil, s.failed(ctx, "establish", imsi, err, "imei", imei)
	}
	defer leave()
	e, err := s.establish(ctx, imsi, imei, attemptID, payload)
	if err == nil && export {
		// Only now: a KME that was not accepted, or not durably, is nobody's. It is decrypted once more, since the answer may be one
		// that was given before.
		if e.KME, err = s.export(ctx, imei, payload); err == nil {
			s.log.InfoContext(ctx, "KME exported", "imsi", imsi, "imei", imei)
		}
	}
	if err != nil {
		return nil, s.failed(ctx, "establish", imsi, err, "imei", imei)
	}
	return e, nil
}

func (s *Service) establish(ctx context.Context, imsi kme.IMSI, imei kme.IMEI, attemptID string, payload []byte) (*Established, error) {
	digest := sha256.Sum256(payload)
	b, err := s.accept(ctx, imsi, imei, attemptID, payload, digest[:])
	if err == nil {
		s.log.InfoContext(ctx, "established", "imsi", imsi, "imei", imei, "lot", b.Lot, "manufacturer", b.Manufacturer)
		return &Established{NWSig: b.NWSig, State: b.State}, nil
	}
	var r *Refusal
	if errors.As(err, &r) && (r.Reason == kme.NoAttempt || r.Reason == kme.KMERejected) {
		// A payload that was accepted has used up its attempt: this may be the same call again. It may also have overtaken itself, so every
		// rejected payload is asked for, used before or not, and they all take as long.
		if e, rerr := s.retransmitted(ctx, imsi, imei, attemptID, digest[:]); e != nil || rerr != nil {
			return e, rerr
		}
	}
	return nil, err
}

func (s *Service) export(ctx context.Context, imei kme.IMEI, payload []byte) (secret kme.Secret, err error) {
	lot := s.lots.Load().find(imei)
	if lot == nil {
		return secret, unknownDevice()
	}
	if secret, err = s.token.ExportKME(ctx, lot.payload(kme.IMSI{}, imei, nil, payload)); err != nil {
		return secret, fromToken(ctx, err)
	}
	return secret, nil
}

func unknownDevice() *Refusal {
	return refuse(kme.UnknownDevice, "the IMEI is in no lot that this operator has", nil)
}

func deviceRevoked() *Refusal {
	return refuse(kme.RevokedDevice, "the manufacturer has revoked the device", nil)
}

// accept makes the binding, durably, or refuses.
func (s *Service) accept(ctx context.Context, imsi kme.IMSI, imei kme.IMEI, attemptID string, payload, digest []byte) (*Binding, error) {
	if err := s.attempt(ctx, imsi, attemptID); errors.Is(err, ErrNoAttempt) {
		return nil, s.noAttempt(ctx, imsi, imei)
	} else if err != nil {
		return nil, fromStore(ctx, err)
	}
	lot := s.lots.Load().find(imei)
	if lot == nil {
		return nil, unknownDevice()
	}
	if want := kme.PayloadSize(lot.public); len(payload) != want {
		return nil, refuse(kme.Malformed, fmt.Sprintf("a payload of this device has %d bytes, not %d", want, len(payload)), nil)
	}
	device, err := lot.reader.Device(ctx, lot.manifest, imei)
	if err != nil {
		return nil, fromDirectory(ctx, err)
	}
	if device.Revoked != nil {
		return nil, deviceRevoked()
	}
	if !s.limits.allow(imei) {
		return nil, overloaded("this device sends too many payloads")
	}

	s.coming.Add(1)
	defer s.coming.Add(-1)
	opened, err := s.token.OpenPayload(ctx, lot.payload(imsi, imei, device.Key, payload))
	if err != nil {
		return nil, fromToken(ctx, err)
	}
	now := time.Now()
	b := &Binding{
		IMSI: imsi, IMEI: imei, Manufacturer: lot.manifest.Manufacturer, Lot: lot.manifest.Lot, State: Pending, Sealed: opened.Sealed,
		Established: now, AttemptID: attemptID, PayloadSHA256: digest, NWSig: opened.NWSig[:],
	}
	err = s.store.Establish(ctx, b, opened.Tag, opened.Fault == hsmkeys.FaultNone, now)
	switch {
	case opened.Fault != hsmkeys.FaultNone && (errors.Is(err, ErrNotGood) || errors.Is(err, ErrUsed)):
		return nil, rejected(errors.New(string(opened.Fault)))
	case errors.Is(err, ErrNoAttempt):
		return nil, s.noAttempt(ctx, imsi, imei)
	case err != nil:
		return nil, fromStore(ctx, err)
	}
	s.open.Invalidate(imsi)
	return b, nil
}

// attempt fails unless the attempt is open.
func (s *Service) attempt(ctx context.Context, imsi kme.IMSI, id string) error {
	now := time.Now()
	if a, ok := s.open.GetIfPresent(imsi); ok && now.Before(a.Expires) && subtle.ConstantTimeCompare([]byte(a.ID), []byte(id)) == 1 {
		return nil
	}
	_, err := s.store.Attempt(ctx, imsi, id, now)
	return err
}

// noAttempt is the refusal of a call whose attempt is not open.
func (s *Service) noAttempt(ctx context.Context, imsi kme.IMSI, imei kme.IMEI) error {
	s.open.Invalidate(imsi)
	switch b, err := s.standing(ctx, imsi); {
	case err != nil && !errors.Is(err, ErrNotBound):
		return fromStore(ctx, err)
	case err == nil && b.State == Active && b.IMEI != imei:
		return otherDevice()
	}
	return fromStore(ctx, ErrNoAttempt)
}

// retransmitted answers a call that was answered before.
func (s *Service) retransmitted(ctx context.Context, imsi kme.IMSI, imei kme.IMEI, attemptID string, digest []byte) (*Established, error) {
	b, err := s.standing(ctx, imsi)
	if errors.Is(err, ErrNotBound) {
		return nil, nil
	}
	if err != nil {
		return nil, fromStore(ctx, err)
	}
	same := subtle.ConstantTimeCompare([]byte(b.AttemptID), []byte(attemptID)) & subtle.ConstantTimeCompare(b.PayloadSHA256, digest)
	if b.IMEI != imei || same != 1 {
		return nil, nil
	}
	s.log.InfoContext(ctx, "established again", "imsi", imsi, "imei", imei)
	return &Established{NWSig: b.NWSig, State: b.State}, nil
}

// ReportAuthentication ends the wait of a pending binding. It gives the binding that stands then; nil if none.
func (s *Service) ReportAuthentication(ctx context.Context, imsiText string, ok bool) (*Binding, error) {
	imsi, err := parseIMSI(imsiText)
	if err != nil {
		return nil, err
	}
	b, err := s.store.Report(ctx, imsi, ok, time.Now())
	if err != nil {
		return nil, s.failed(ctx, "report", imsi, fromStore(ctx, err))
	}
	state := State("")
	if b != nil {
		state = b.State
	}
	s.log.InfoContext(ctx, "authentication reported", "imsi", imsi, "ok", ok, "state", state)
	return b, nil
}

// GetBinding tells what an IMSI is bound to.
func (s *Service) GetBinding(ctx context.Context, imsiText string) (*Binding, error) {
	imsi, err := parseIMSI(imsiText)
	if err != nil {
		return nil, err
	}
	b, err := s.store.Binding(ctx, imsi)
	if err != nil {
		return nil, s.failed(ctx, "get", imsi, fromStore(ctx, err))
	}
	return b, nil
}

// maxTTL bounds for how long an administrator may open provisioning: whoever has the SIM can bind a device meanwhile.
const maxTTL = 30 * 24 * time.Hour

// NewOpened is an administrator's attempt for an IMSI.
func NewOpened(imsi kme.IMSI, ttl time.Duration) (*Attempt, error) {
	if ttl < time.Second || ttl > maxTTL {
		return nil, errors.New("the ttl is from a second to 30 days")
	}
	return &Attempt{ID: newAttemptID(), IMSI: imsi, Expires: time.Now().Add(ttl).UTC().Truncate(time.Millisecond), Opened: true}, nil
}

// OpenProvisioning lets an IMSI be bound to another device, once, for ttl; an hour with 0.
func (s *Service) OpenProvisioning(ctx context.Context, imsiText string, ttl time.Duration) (*Attempt, error) {
	imsi, err := parseIMSI(imsiText)
	if err != nil {
		return nil, err
	}
	a, err := NewOpened(imsi, cmp.Or(ttl, time.Hour))
	if err != nil {
		return nil, refuse(kme.Malformed, err.Error(), nil)
	}
	s.open.Invalidate(imsi)
	if err := s.store.OpenAttempt(ctx, *a); err != nil {
		return nil, s.failed(ctx, "open", imsi, fromStore(ctx, err))
	}
	s.log.InfoContext(ctx, "provisioning opened", "imsi", imsi, "expires", a.Expires)
	return a, nil
}

// RevokeBinding ends an IMSI's bindings and forgets the KME.
func (s *Service) RevokeBinding(ctx context.Context, imsiText string) (*Binding, error) {
	imsi, err := parseIMSI(imsiText)
	if err != nil {
		return nil, err
	}
	s.open.Invalidate(imsi)
	b, err := s.store.Revoke(ctx, imsi, time.Now())
	if err != nil {
		return nil, s.failed(ctx, "revoke", imsi, fromStore(ctx, err))
	}
	s.log.InfoContext(ctx, "binding revoked", "imsi", imsi, "imei", b.IMEI)
	return b, nil
}

// ListBindings gives a page of all bindings, those behind the IMSI after, and only those of a device unless imei is empty.
func (s *Service) ListBindings(ctx context.Context, after, imeiText string, limit int) ([]*Binding, error) {
	var imei kme.IMEI
	if imeiText != "" {
		var err error
		if imei, err = kme.ParseIMEI(imeiText); err != nil {
			return nil, refuse(kme.Malformed, err.Error(), nil)
		}
	}
	if after != "" {
		if _, err := parseIMSI(after); err != nil {
			return nil, refuse(kme.Malformed, "the page token is none of ours", nil)
		}
	}
	all, err := s.store.Bindings(ctx, after, imei, limit)
	if err != nil {
		return nil, s.failed(ctx, "list", kme.IMSI{}, fromStore(ctx, err))
	}
	return all, nil
}

// Refused logs a refusal that was made before the service was asked.
func (s *Service) Refused(ctx context.Context, r *Refusal, attrs ...any) {
	s.metrics.refused(r)
	s.log.WarnContext(ctx, "refused", append([]any{"reason", r.Reason}, attrs...)...)
}

// Broken logs an error that is no refusal: a fault of the service itself. A panic is counted.
func (s *Service) Broken(ctx context.Context, err error, attrs ...any) {
	attrs = append(attrs, "cause", err.Error())
	if p := panics.Of(err); p != nil {
		s.metrics.panics.Inc()
		attrs = append(attrs, "stack", string(p.Stack))
	}
	s.log.ErrorContext(ctx, "internal error", attrs...)
}

// failed logs a refusal, with the cause that the caller does not get.
func (s *Service) failed(ctx context.Context, what string, imsi kme.IMSI, err error, more ...any) error {
	var r *Refusal
	if errors.As(err, &r) {
		s.metrics.refused(r)
		attrs := append([]any{"call", what, "imsi", imsi, "reason", r.Reason}, more...)
		if r.Cause != nil {
			attrs = append(attrs, "cause", r.Cause.Error())
		}
		s.log.WarnContext(ctx, "refused", attrs...)
	}
	return err
}

func parseIMSI(text string) (kme.IMSI, error) {
	imsi, err := kme.ParseIMSI(text)
	if err != nil {
		return imsi, refuse(kme.Malformed, err.Error(), nil)
	}
	return imsi, nil
}

func parseVector(imsiText string, randBytes []byte) (imsi kme.IMSI, vector [hsmkeys.RANDSize]byte, err error) {
	if imsi, err = parseIMSI(imsiText); err != nil {
		return imsi, vector, err
	}
	if len(randBytes) != len(vector) {
		return imsi, vector, refuse(kme.Malformed, fmt.Sprintf("a RAND has %d bytes, not %d", len(vector), len(randBytes)), nil)
	}
	return imsi, [hsmkeys.RANDSize]byte(randBytes), nil
}

// fromToken and fromDirectory do as fromStore does.
func fromToken(ctx context.Context, err error) error {
	switch {
	case panics.Of(err) != nil:
		return err
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return refuse(kme.HSMUnavailable, "the HSM is not available", err)
}

func fromDirectory(ctx context.Context, err error) error {
	switch {
	case panics.Of(err) != nil:
		return err
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, directory.ErrUnknownDevice):
		return refuse(kme.UnknownDevice, "the IMEI is not in its lot's directory", err)
	}
	return refuse(kme.DirectoryUnavailable, "the device's public key cannot be had", err)
}

func newAttemptID() string {
	var b [16]byte
	rand.Read(b[:])
	return base64.RawURLEncoding.EncodeToString(b[:])
}
