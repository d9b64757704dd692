package binding

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// A Token is what the service needs of the operator's HSM.
type Token interface {
	OpenPayload(ctx context.Context, suite kme.Suite, lot hsmkeys.Key, n *rsa.PublicKey, device crypto.PublicKey, payload []byte) (*hsmkeys.Opened, error)
	EncryptRAND(ctx context.Context, sealed []byte, rand [hsmkeys.RANDSize]byte) ([hsmkeys.RANDSize]byte, error)
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
}

// NewService serves the lots given until SetLots gives it others. Decisions are logged, one line each; no line holds a
// secret.
func NewService(token Token, store Store, lots *Lots, attemptTTL time.Duration, log *slog.Logger) *Service {
	s := &Service{token: token, store: store, log: log, attemptTTL: attemptTTL}
	s.lots.Store(lots)
	return s
}

// SetLots changes the lots that are served. Calls under way finish with those that they began with.
func (s *Service) SetLots(lots *Lots) { s.lots.Store(lots) }

// CheckDirectories says which manufacturers' directories cannot be read now. Devices whose keys are cached are served all the
// same.
func (s *Service) CheckDirectories(ctx context.Context) map[string]error {
	return s.lots.Load().CheckDirectories(ctx)
}

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
	now := time.Now()
	fresh := Attempt{ID: newAttemptID(), IMSI: imsi, Expires: now.Add(s.attemptTTL)}
	// An HSS asks for several vectors at once: they share an attempt as long as it leaves a device time enough.
	b, attempt, err := s.store.Prepare(ctx, fresh, now, now.Add(s.attemptTTL/2))
	if err != nil {
		return nil, s.failed(ctx, "prepare", imsi, fromStore(ctx, err))
	}
	if b == nil {
		if attempt.ID == fresh.ID {
			s.log.InfoContext(ctx, "attempt opened", "imsi", imsi, "expires", attempt.Expires)
		}
		return &Prepared{RAND: vector, AttemptID: attempt.ID}, nil
	}
	out, err := s.token.EncryptRAND(ctx, b.Sealed, vector)
	if err != nil {
		return nil, s.failed(ctx, "prepare", imsi, fromToken(ctx, err))
	}
	return &Prepared{RAND: out}, nil
}

// RestoreRAND undoes PrepareVector for a bound IMSI.
func (s *Service) RestoreRAND(ctx context.Context, imsiText string, randBytes []byte) (out [hsmkeys.RANDSize]byte, err error) {
	imsi, vector, err := parseVector(imsiText, randBytes)
	if err != nil {
		return out, err
	}
	b, err := s.store.Binding(ctx, imsi)
	if err != nil {
		return out, s.failed(ctx, "restore", imsi, fromStore(ctx, err))
	}
	if out, err = s.token.DecryptRAND(ctx, b.Sealed, vector); err != nil {
		return out, s.failed(ctx, "restore", imsi, fromToken(ctx, err))
	}
	return out, nil
}

// Established is the answer to EstablishKME.
type Established struct {
	NWSig []byte
	State State
}

// EstablishKME takes a device's payload and answers NW_SIG.
func (s *Service) EstablishKME(ctx context.Context, imsiText, imeiText, attemptID string, payload []byte) (*Established, error) {
	imsi, err := parseIMSI(imsiText)
	if err != nil {
		return nil, err
	}
	imei, err := kme.ParseIMEI(imeiText)
	if err != nil {
		return nil, refuse(Malformed, err.Error(), nil)
	}
	e, err := s.establish(ctx, imsi, imei, attemptID, payload)
	if err != nil {
		return nil, s.failed(ctx, "establish", imsi, err, "imei", imei)
	}
	return e, nil
}

func (s *Service) establish(ctx context.Context, imsi kme.IMSI, imei kme.IMEI, attemptID string, payload []byte) (*Established, error) {
	digest := sha256.Sum256(payload)
	if e, err := s.retransmitted(ctx, imsi, imei, attemptID, digest[:]); e != nil || err != nil {
		return e, err
	}
	b, err := s.accept(ctx, imsi, imei, attemptID, payload, digest[:])
	if err == nil {
		s.log.InfoContext(ctx, "established", "imsi", imsi, "imei", imei, "lot", b.Lot, "manufacturer", b.Manufacturer)
		return &Established{NWSig: b.NWSig, State: b.State}, nil
	}
	var r *Refusal
	if errors.As(err, &r) && (r.Reason == NoAttempt || r.Reason == KMERejected) {
		// The same call may have overtaken itself: then the other one's answer is this one's too. Asked for every
		// rejected payload, used before or not, so that they all take as long.
		if e, rerr := s.retransmitted(ctx, imsi, imei, attemptID, digest[:]); e != nil || rerr != nil {
			return e, rerr
		}
	}
	return nil, err
}

// accept makes the binding, durably, or refuses.
func (s *Service) accept(ctx context.Context, imsi kme.IMSI, imei kme.IMEI, attemptID string, payload, digest []byte) (*Binding, error) {
	if _, err := s.store.Attempt(ctx, imsi, attemptID, time.Now()); err != nil {
		return nil, fromStore(ctx, err)
	}
	lot := s.lots.Load().find(imei)
	if lot == nil {
		return nil, refuse(UnknownDevice, "the IMEI is in no lot that this operator has", nil)
	}
	if want := kme.PayloadSize(lot.public); len(payload) != want {
		return nil, refuse(Malformed, fmt.Sprintf("a payload of this device has %d bytes, not %d", want, len(payload)), nil)
	}
	device, err := lot.reader.Device(ctx, lot.manifest, imei)
	if err != nil {
		return nil, fromDirectory(ctx, err)
	}
	if device.Revoked != nil {
		return nil, refuse(RevokedDevice, "the manufacturer has revoked the device", nil)
	}

	opened, err := s.token.OpenPayload(ctx, lot.manifest.Suite, lot.key, lot.public, device.Key, payload)
	if err != nil {
		return nil, fromToken(ctx, err)
	}
	// The ledger is asked whatever the token found: a refusal by one must not be faster than by the other.
	used, err := s.store.Used(ctx, imei, opened.Tag)
	switch {
	case err != nil:
		return nil, fromStore(ctx, err)
	case opened.Fault != hsmkeys.FaultNone:
		return nil, rejected(errors.New(string(opened.Fault)))
	case used:
		return nil, rejected(ErrUsed)
	}
	now := time.Now()
	b := &Binding{
		IMSI: imsi, IMEI: imei, Manufacturer: lot.manifest.Manufacturer, Lot: lot.manifest.Lot, State: Pending, Sealed: opened.Sealed,
		Established: now, AttemptID: attemptID, PayloadSHA256: digest, NWSig: opened.NWSig[:],
	}
	return b, fromStore(ctx, s.store.Establish(ctx, b, opened.Tag, now))
}

// retransmitted answers a call that was answered before.
func (s *Service) retransmitted(ctx context.Context, imsi kme.IMSI, imei kme.IMEI, attemptID string, digest []byte) (*Established, error) {
	b, err := s.store.Binding(ctx, imsi)
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
		return nil, fromStore(ctx, err)
	}
	return b, nil
}

// failed logs a refusal, with the cause that the caller does not get.
func (s *Service) failed(ctx context.Context, what string, imsi kme.IMSI, err error, more ...any) error {
	var r *Refusal
	if errors.As(err, &r) {
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
		return imsi, refuse(Malformed, err.Error(), nil)
	}
	return imsi, nil
}

func parseVector(imsiText string, randBytes []byte) (imsi kme.IMSI, vector [hsmkeys.RANDSize]byte, err error) {
	if imsi, err = parseIMSI(imsiText); err != nil {
		return imsi, vector, err
	}
	if len(randBytes) != len(vector) {
		return imsi, vector, refuse(Malformed, fmt.Sprintf("a RAND has %d bytes, not %d", len(vector), len(randBytes)), nil)
	}
	return imsi, [hsmkeys.RANDSize]byte(randBytes), nil
}

// fromToken and fromDirectory do as fromStore does.
func fromToken(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return refuse(HSMUnavailable, "the HSM is not available", err)
}

func fromDirectory(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, directory.ErrUnknownDevice):
		return refuse(UnknownDevice, "the IMEI is not in its lot's directory", err)
	}
	return refuse(DirectoryUnavailable, "the device's public key cannot be had", err)
}

func newAttemptID() string {
	var b [16]byte
	rand.Read(b[:])
	return base64.RawURLEncoding.EncodeToString(b[:])
}
