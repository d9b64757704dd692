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
	EncryptRANDs(ctx context.Context, sealed []byte, rands []hsmkeys.RAND) ([]hsmkeys.RAND, error)
	ExportKME(ctx context.Context, p hsmkeys.Payload) (kme.Secret, error)
	DecryptRAND(ctx context.Context, sealed []byte, rand hsmkeys.RAND) (hsmkeys.RAND, error)
}

// A Service does what an HSS asks for. All methods may be called concurrently; their errors are Refusals, or the
// context's.
type Service struct {
	token   Token
	store   Store
	log     *slog.Logger
	times   Times
	lots    *Lots
	limits  *limits
	metrics *Metrics
	unknown *strangers
	coming  *atomic.Int64 // see Coming

	// open has the attempts that this process has seen open, the last of each IMSI: the store need not be asked before their EstablishKME.
	// Another process may have closed one since; then the store says so before it establishes anything.
	open *otter.Cache[kme.IMSI, Attempt]
}

// maxOpen bounds the memory for open.
const maxOpen = 100_000

// Times are how long things last.
type Times struct {
	Attempt        time.Duration    // from PrepareVector to EstablishKME
	Pending        time.Duration    // from EstablishKME to the first success; then the binding ends
	PendingVectors int              // how many PrepareVectors a pending binding answers before it ends
	Now            func() time.Time // time.Now, but for tests
}

// DefaultTimes are those of a service whose configuration does not name others.
func DefaultTimes() Times {
	return Times{Attempt: 5 * time.Minute, Pending: time.Hour, PendingVectors: 3, Now: time.Now}
}

// NewService serves lots. Decisions are logged, one line each, with the Actor of the call's context; no line holds a
// secret.
func NewService(token Token, store Store, lots *Lots, times Times, log *slog.Logger) *Service {
	s := &Service{
		token: token, store: store, log: slog.New(actorLog{log.Handler()}), times: times, limits: newLimits(Limits{}),
		lots: lots, coming: new(atomic.Int64), metrics: NewMetrics(prometheus.NewRegistry()),
		unknown: newStrangers(),
		open: otter.Must(&otter.Options[kme.IMSI, Attempt]{
			MaximumSize: maxOpen, ExpiryCalculator: otter.ExpiryWriting[kme.IMSI, Attempt](times.Attempt),
		}),
	}
	lots.follow(new(Lots))
	return s
}

// WithLots is the same service with other lots. Both have the same limits and metrics, and calls under way finish with
// the lots that they began with. From now on the lists of revoked devices of these lots are read in the background, and
// no more those of the lots before.
func (s *Service) WithLots(lots *Lots) *Service {
	other := *s
	other.lots = lots
	lots.follow(s.lots)
	return &other
}

// Limit sets limits, and Observe where to count and measure, for the time before the first call. Without, there are none.
func (s *Service) Limit(l Limits) { s.limits = newLimits(l) }

// Observe is described at Limit.
func (s *Service) Observe(m *Metrics) { s.metrics = m }

// enter admits a call that may reach the HSM. Work that nobody waits for is not begun: see hsmkeys.
func (s *Service) enter(ctx context.Context) (leave func(), err error) {
	client := ActorOf(ctx).Client
	if !s.limits.take(client) {
		return nil, overloaded("the service has all the work that it can do: call again later")
	}
	s.metrics.inFlight.Inc()
	return func() { s.metrics.inFlight.Dec(); s.limits.leave(client) }, nil
}

// Coming is how many calls are on their way to a change of the store and will soon be there: what they wait for is the HSM, if anything, and no directory.
func (s *Service) Coming() int { return int(s.coming.Load()) }

// CheckDirectories says which manufacturers' directories cannot be read now. Devices whose keys are cached are served all the
// same.
func (s *Service) CheckDirectories(ctx context.Context) map[string]error {
	return s.lots.CheckDirectories(ctx)
}

// Overdue gives the lists of revoked devices that could not be read again when it was time, by manufacturer.
func (s *Service) Overdue() map[string][]directory.Overdue { return s.lots.Overdue() }

// MaxRANDs is how many RANDs one PrepareVector takes.
const MaxRANDs = 32

// Prepared is the answer to PrepareVector.
type Prepared struct {
	RANDs     []hsmkeys.RAND
	AttemptID string // empty: the RANDs are encrypted under the KME
}

// PrepareVector is called with the RANDs of all vectors that an origin asked for at once.
func (s *Service) PrepareVector(ctx context.Context, imsiText string, rands [][]byte, o Origin) (*Prepared, error) {
	imsi, err := parseIMSI(imsiText)
	if err != nil {
		return nil, err
	}
	vectors, err := parseRANDs(rands)
	if err != nil {
		return nil, err
	}
	leave, err := s.enter(ctx)
	if err != nil {
		return nil, s.failed(ctx, "prepare", imsi, err)
	}
	defer leave()
	p, err := s.prepare(ctx, imsi, vectors, o)
	if err != nil {
		return nil, s.failed(ctx, "prepare", imsi, err, "origin", o.Name)
	}
	return p, nil
}

func (s *Service) prepare(ctx context.Context, imsi kme.IMSI, rands []hsmkeys.RAND, o Origin) (*Prepared, error) {
	q := VectorRequest{
		IMSI: imsi, Origin: o, RANDs: rands, Now: s.times.Now(), AttemptID: newAttemptID(), AttemptTTL: s.times.Attempt,
		PendingVectors: s.times.PendingVectors,
	}
	for out := rands; ; {
		d, err := s.decide(ctx, q)
		if b := d.Ended; b != nil {
			s.log.InfoContext(ctx, "pending binding ended", "imsi", imsi, "imei", b.IMEI, "vectors", len(b.Sent),
				"established", b.Established)
		}
		switch {
		case errors.Is(err, ErrNotBound) && o.Provisioning == Forbidden:
			return nil, mayNotProvision()
		case err != nil:
			return nil, fromStore(ctx, err)
		case d.Attempt != nil:
			if d.Fresh {
				s.log.InfoContext(ctx, "attempt opened", "imsi", imsi, "origin", o.Name, "expires", d.Attempt.Expires)
			}
			s.open.Set(imsi, *d.Attempt)
			return &Prepared{RANDs: rands, AttemptID: d.Attempt.ID}, nil
		case d.Binding.AttemptID == q.Ready: // it was pending, and it is noted who is sent vectors under it
			return &Prepared{RANDs: out}, nil
		}
		if err := s.notRevoked(d.Binding); err != nil {
			return nil, err
		}
		if out, err = s.token.EncryptRANDs(ctx, d.Binding.Sealed, rands); err != nil {
			return nil, fromToken(ctx, err)
		}
		if d.Binding.State == Active {
			return &Prepared{RANDs: out}, nil
		}
		q.Ready = d.Binding.AttemptID
	}
}

// notRevoked refuses a binding whose device the manufacturer has revoked, or may have.
func (s *Service) notRevoked(b *Binding) error {
	switch revoked, err := s.lots.revoked(b); {
	case err != nil:
		return refuse(kme.DirectoryUnavailable, "whether the device was revoked is not known", err)
	case revoked:
		return deviceRevoked()
	}
	return nil
}

func (s *Service) decide(ctx context.Context, q VectorRequest) (Decision, error) {
	s.coming.Add(1)
	defer s.coming.Add(-1)
	return s.store.Prepare(ctx, q)
}

// RestoreRAND gives the RAND as the HSS made it, of a vector that an origin was sent.
func (s *Service) RestoreRAND(ctx context.Context, imsiText string, randBytes []byte,
	o Origin) (out hsmkeys.RAND, err error) {
	imsi, err := parseIMSI(imsiText)
	if err != nil {
		return out, err
	}
	rands, err := parseRANDs([][]byte{randBytes})
	if err != nil {
		return out, err
	}
	leave, err := s.enter(ctx)
	if err != nil {
		return out, s.failed(ctx, "restore", imsi, err)
	}
	defer leave()
	if out, err = s.restore(ctx, imsi, rands[0], o.Name); err != nil {
		return out, s.failed(ctx, "restore", imsi, err, "origin", o.Name)
	}
	return out, nil
}

func (s *Service) restore(ctx context.Context, imsi kme.IMSI, rand hsmkeys.RAND,
	o kme.Origin) (out hsmkeys.RAND, err error) {
	if clear, err := s.store.Spent(ctx, imsi, rand); clear || err != nil {
		return rand, fromStore(ctx, err)
	}
	sub, err := s.store.Subscription(ctx, imsi, s.times.Now())
	if err != nil {
		return out, fromStore(ctx, err)
	}
	b := sub.Sent(o)
	if b == nil {
		return out, fromStore(ctx, ErrNotBound)
	}
	if out, err = s.token.DecryptRAND(ctx, b.Sealed, rand); err != nil {
		return out, fromToken(ctx, err)
	}
	return out, nil
}

// standing is an IMSI's binding that is not revoked, or ErrNotBound.
func (s *Service) standing(ctx context.Context, imsi kme.IMSI) (*Binding, error) {
	sub, err := s.store.Subscription(ctx, imsi, s.times.Now())
	if err != nil {
		return nil, err
	}
	if b := sub.Standing(); b != nil {
		return b, nil
	}
	return nil, ErrNotBound
}

// Established is the answer to EstablishKME.
type Established struct {
	NWSig []byte
	State State
	KME   kme.Secret // only if it was asked for; the caller wipes it
}

// EstablishKME takes a device's payload and answers NW_SIG; with export, the KME too, for an HSS that keeps it itself.
func (s *Service) EstablishKME(ctx context.Context, imsiText, imeiText, attemptID string, payload []byte, o Origin,
	export bool) (*Established, error) {
	imsi, err := parseIMSI(imsiText)
	if err != nil {
		return nil, err
	}
	imei, err := kme.ParseIMEI(imeiText)
	if err != nil {
		return nil, refuse(kme.Malformed, err.Error(), nil)
	}
	leave, err := s.enter(ctx)
	if err != nil {
		return nil, s.failed(ctx, "establish", imsi, err, "imei", imei)
	}
	place := &place{leave}
	defer func() { place.leave() }()
	var e *Established
	if o.Provisioning == Allowed {
		e, err = s.establish(ctx, place, imsi, imei, attemptID, payload, o.Name)
	} else {
		err = mayNotProvision()
	}
	if err == nil && export {
		// Only now: a KME that was not accepted, or not durably, is nobody's. It is decrypted once more, since the answer may be one
		// that was given before.
		if err = s.store.Note(ctx, EventExported, imsi.String(), "of "+imei.String()); err != nil {
			err = fromStore(ctx, err)
		} else if e.KME, err = s.export(ctx, imei, payload); err == nil {
			s.log.InfoContext(ctx, "KME exported", "imsi", imsi, "imei", imei)
		}
	}
	if err != nil {
		return nil, s.failed(ctx, "establish", imsi, err, "imei", imei, "origin", o.Name)
	}
	return e, nil
}

// A place is that of one call among those that enter admits.
type place struct{ leave func() }

// outside does what waits for others than the HSM and the store: meanwhile the place is somebody else's.
func (s *Service) outside(ctx context.Context, p *place, wait func()) error {
	p.leave()
	wait()
	leave, err := s.enter(ctx)
	if p.leave = leave; err != nil {
		p.leave = func() {}
	}
	return err
}

func (s *Service) establish(ctx context.Context, p *place, imsi kme.IMSI, imei kme.IMEI, attemptID string,
	payload []byte, o kme.Origin) (*Established, error) {
	digest := sha256.Sum256(payload)
	b, err := s.accept(ctx, p, imsi, imei, attemptID, payload, digest[:], o)
	if err == nil {
		s.log.InfoContext(ctx, "established", "imsi", imsi, "imei", imei, "lot", b.Lot,
			"manufacturer", b.Manufacturer, "origin", o)
		return &Established{NWSig: b.NWSig, State: b.State}, nil
	}
	var r *Refusal
	if errors.As(err, &r) && (r.Reason == kme.NoAttempt || r.Reason == kme.KMERejected) {
		// A payload that was accepted has used up its attempt: this may be the same call again. It may also have overtaken itself, so every
		// rejected payload is asked for, used before or not, and they all take as long.
		if e, rerr := s.retransmitted(ctx, imsi, imei, attemptID, digest[:], o); e != nil || rerr != nil {
			return e, rerr
		}
	}
	return nil, err
}

func (s *Service) export(ctx context.Context, imei kme.IMEI, payload []byte) (secret kme.Secret, err error) {
	lot := s.lots.find(imei)
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
func (s *Service) accept(ctx context.Context, p *place, imsi kme.IMSI, imei kme.IMEI, attemptID string,
	payload, digest []byte, o kme.Origin) (*Binding, error) {
	if err := s.attempt(ctx, imsi, attemptID, o); errors.Is(err, ErrNoAttempt) {
		return nil, s.noAttempt(ctx, imsi, imei)
	} else if err != nil {
		return nil, fromStore(ctx, err)
	}
	lot := s.lots.find(imei)
	if lot == nil {
		return nil, unknownDevice()
	}
	if want := kme.PayloadSize(lot.public); len(payload) != want {
		return nil, refuse(kme.Malformed, fmt.Sprintf("a payload of this device has %d bytes, not %d", want, len(payload)), nil)
	}
	device, cached, err := lot.reader.Cached(lot.manifest, imei)
	if !cached {
		full := s.outside(ctx, p, func() { device, err = lot.reader.Fetch(ctx, lot.manifest, imei) })
		if err == nil && full != nil {
			return nil, full
		}
	}
	if err != nil {
		return nil, fromDirectory(ctx, err)
	}
	if device.Revoked != nil {
		return nil, deviceRevoked()
	}
	if !s.limits.allow(imsi, imei) {
		return nil, overloaded("this subscription or this device sends too many payloads")
	}

	s.coming.Add(1)
	defer s.coming.Add(-1)
	opened, err := s.token.OpenPayload(ctx, lot.payload(imsi, imei, device.Key, payload))
	if err != nil {
		return nil, fromToken(ctx, err)
	}
	now := s.times.Now()
	b := &Binding{
		IMSI: imsi, IMEI: imei, Manufacturer: lot.manifest.Manufacturer, Lot: lot.manifest.Lot, State: Pending,
		DeviceKey: device.Issued(), Sealed: opened.Sealed, Established: now, Origin: o, Expires: now.Add(s.times.Pending), AttemptID: attemptID, PayloadSHA256: digest,
		NWSig: opened.NWSig[:],
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
	s.limits.established(imei)
	s.open.Invalidate(imsi)
	return b, nil
}

// attempt fails unless the attempt is open, and the origin's.
func (s *Service) attempt(ctx context.Context, imsi kme.IMSI, id string, o kme.Origin) error {
	now := s.times.Now()
	if a, ok := s.open.GetIfPresent(imsi); ok && now.Before(a.Expires) && a.Origin == o && sameText(a.ID, id) {
		return nil
	}
	sub, err := s.store.Subscription(ctx, imsi, now)
	if err == nil && sub.Attempt(id, o) == nil {
		err = ErrNoAttempt
	}
	return err
}

// sameText compares what nobody may find out by trying.
func sameText(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

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
func (s *Service) retransmitted(ctx context.Context, imsi kme.IMSI, imei kme.IMEI, attemptID string, digest []byte,
	o kme.Origin) (*Established, error) {
	b, err := s.standing(ctx, imsi)
	if errors.Is(err, ErrNotBound) {
		return nil, nil
	}
	if err != nil {
		return nil, fromStore(ctx, err)
	}
	if b.IMEI != imei || b.Origin != o || !sameText(b.AttemptID, attemptID) ||
		subtle.ConstantTimeCompare(b.PayloadSHA256, digest) != 1 {
		return nil, nil
	}
	s.log.InfoContext(ctx, "established again", "imsi", imsi, "imei", imei)
	return &Established{NWSig: b.NWSig, State: b.State}, nil
}

// Reported is the answer to ReportAuthentication.
type Reported struct {
	Binding *Binding // that stands now: the pending one before the active; nil if none does
	Served  bool     // the device may be let in for more than provisioning
}

// ReportAuthentication activates the pending binding or drops it, if the report is about it: see Subscription.Ends.
func (s *Service) ReportAuthentication(ctx context.Context, imsiText string, ok bool, o Origin) (*Reported, error) {
	imsi, err := parseIMSI(imsiText)
	if err != nil {
		return nil, err
	}
	sub, err := s.store.Report(ctx, imsi, o.Name, ok, s.times.Now())
	if err != nil {
		return nil, s.failed(ctx, "report", imsi, fromStore(ctx, err), "origin", o.Name)
	}
	r := &Reported{sub.Standing(), sub.Served(o)}
	state := State("")
	if r.Binding != nil {
		state = r.Binding.State
	}
	s.log.InfoContext(ctx, "authentication reported", "imsi", imsi, "origin", o.Name, "ok", ok,
		"state", state, "served", r.Served)
	return r, nil
}

// GetBinding tells what an IMSI is bound to.
func (s *Service) GetBinding(ctx context.Context, imsiText string) (*Binding, error) {
	imsi, err := parseIMSI(imsiText)
	if err != nil {
		return nil, err
	}
	sub, err := s.store.Subscription(ctx, imsi, s.times.Now())
	if err == nil && sub.Latest() == nil {
		err = ErrNotBound
	}
	if err != nil {
		return nil, s.failed(ctx, "get", imsi, fromStore(ctx, err))
	}
	s.log.InfoContext(ctx, "binding read", "imsi", imsi, "imei", sub.Latest().IMEI)
	return sub.Latest(), nil
}

// maxTTL bounds for how long an administrator may open provisioning: whoever has the SIM can bind a device meanwhile.
const maxTTL = 30 * 24 * time.Hour

// NewOpened is an administrator's attempt for an IMSI.
func NewOpened(imsi kme.IMSI, now time.Time, ttl time.Duration) (*Attempt, error) {
	if ttl < time.Second || ttl > maxTTL {
		return nil, errors.New("the ttl is from a second to 30 days")
	}
	return &Attempt{ID: newAttemptID(), IMSI: imsi,
		Expires: now.Add(ttl).UTC().Truncate(time.Millisecond), Opened: true}, nil
}

// OpenProvisioning lets an IMSI be bound to another device, once, for ttl; an hour with 0.
func (s *Service) OpenProvisioning(ctx context.Context, imsiText string, ttl time.Duration) (*Attempt, error) {
	imsi, err := parseIMSI(imsiText)
	if err != nil {
		return nil, err
	}
	a, err := NewOpened(imsi, s.times.Now(), cmp.Or(ttl, time.Hour))
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
	b, err := s.store.Revoke(ctx, imsi, s.times.Now())
	if err != nil {
		return nil, s.failed(ctx, "revoke", imsi, fromStore(ctx, err))
	}
	s.log.InfoContext(ctx, "binding revoked", "imsi", imsi, "imei", b.IMEI)
	return b, nil
}

// ListBindings gives a page of bindings.
func (s *Service) ListBindings(ctx context.Context, q BindingQuery) ([]*Binding, error) {
	q.Now = s.times.Now()
	all, err := s.store.Bindings(ctx, q)
	if err != nil {
		return nil, s.failed(ctx, "list", kme.IMSI{}, fromStore(ctx, err))
	}
	s.log.InfoContext(ctx, "bindings listed", "bindings", len(all))
	return all, nil
}

// Refused logs and counts a refusal, unless that was done.
func (s *Service) Refused(ctx context.Context, r *Refusal, attrs ...any) {
	if r.logged {
		return
	}
	r.logged = true
	s.metrics.refused(r)
	s.log.WarnContext(ctx, "refused", append([]any{"reason", r.Reason, "message", r.Message}, attrs...)...)
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
		r.logged = true
		s.metrics.refused(r)
		attrs := append([]any{"call", what, "imsi", imsi, "reason", r.Reason, "message", r.Message}, more...)
		if r.Cause != nil {
			attrs = append(attrs, "cause", r.Cause.Error())
		}
		level := slog.LevelWarn
		if r.Reason == kme.Damaged || r.Reason == kme.RolledBack {
			level = slog.LevelError
		}
		s.log.Log(ctx, level, "refused", attrs...)
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

func parseRANDs(all [][]byte) ([]hsmkeys.RAND, error) {
	if len(all) == 0 || len(all) > MaxRANDs {
		return nil, refuse(kme.Malformed, fmt.Sprintf("a call has 1 to %d RANDs, not %d", MaxRANDs, len(all)), nil)
	}
	rands := make([]hsmkeys.RAND, len(all))
	for i, b := range all {
		if len(b) != hsmkeys.RANDSize {
			return nil, refuse(kme.Malformed, fmt.Sprintf("a RAND has %d bytes, not %d", hsmkeys.RANDSize, len(b)), nil)
		}
		rands[i] = hsmkeys.RAND(b)
	}
	return rands, nil
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
