package binding

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"slices"

	"github.com/kmehsm/kmehsm/binding/sightings"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// An EstablishRequest is what EstablishKME is asked: the payload of a device, as an origin has carried it.
type EstablishRequest struct {
	IMSI      kme.IMSI
	IMEI      kme.IMEI
	AttemptID string
	Payload   []byte
	Origin    Origin
	Export    bool // answer the KME too, for an HSS that keeps it itself
}

// Established is the answer to EstablishKME.
type Established struct {
	NWSig []byte
	State State
	KME   kme.Secret // only if it was asked for; the caller wipes it
}

// An establishment is an EstablishRequest that is under way.
type establishment struct {
	EstablishRequest
	digest [sha256.Size]byte // of the payload
	leave  func()            // gives back its place among the calls that enter admits
}

// EstablishKME takes a device's payload and answers NW_SIG.
func (s *Service) EstablishKME(ctx context.Context, asked EstablishRequest) (*Established, error) {
	leave, err := s.enter(ctx)
	if err != nil {
		return nil, s.failed(ctx, "EstablishKME", asked.IMSI, err, "imei", asked.IMEI)
	}
	p := &establishment{EstablishRequest: asked, digest: sha256.Sum256(asked.Payload), leave: leave}
	defer func() { p.leave() }()
	var e *Established
	if p.Origin.Provisioning == Allowed {
		e, err = s.establish(ctx, p)
	} else {
		err = mayNotProvision()
	}
	if err == nil && p.Export {
		// The KME is answered only after the commit. It is decrypted again, because the answer may be one that was
		// given before.
		if err = s.store.Note(ctx, EventExported, p.IMSI.String(), "of "+p.IMEI.String()); err != nil {
			err = fromStore(ctx, err)
		} else if e.KME, err = s.export(ctx, p); err == nil {
			s.log.InfoContext(ctx, "KME exported", "imsi", p.IMSI, "imei", p.IMEI)
		}
	}
	if err != nil {
		if r, ok := errors.AsType[*Refusal](err); ok && slices.Contains(aboutDevice, r.Reason) {
			s.history.Saw(p.IMSI, p.IMEI, sightings.Asserted)
		}
		return nil, s.failed(ctx, "EstablishKME", p.IMSI, err, "imei", p.IMEI, "origin", p.Origin.Name)
	}
	return e, nil
}

// aboutDevice has the reasons that are about the device: the network has named it, and it has proven nothing. All other
// reasons are about the call.
var aboutDevice = []kme.Reason{kme.UnknownDevice, kme.RevokedDevice, kme.OtherDevice, kme.KMERejected}

// outside calls wait, which waits neither for the HSM nor for the store. Meanwhile another call has this one's place.
func (s *Service) outside(ctx context.Context, p *establishment, wait func()) error {
	p.leave()
	p.leave = func() {} // also if wait panics
	wait()
	leave, err := s.enter(ctx)
	if err == nil {
		p.leave = leave
	}
	return err
}

func (s *Service) establish(ctx context.Context, p *establishment) (*Established, error) {
	b, err := s.accept(ctx, p)
	if err == nil {
		s.metrics.accepted.Inc()
		s.log.InfoContext(ctx, "established", "imsi", p.IMSI, "imei", p.IMEI, "lot", b.Lot,
			"manufacturer", b.Manufacturer, "origin", p.Origin.Name)
		return &Established{NWSig: b.NWSig, State: b.State}, nil
	}
	var r *Refusal
	if errors.As(err, &r) && (r.Reason == kme.NoAttempt || r.Reason == kme.KMERejected) {
		// An accepted payload has used up its attempt, so this may be a retransmission. Two copies of a call may also
		// run at once. So the store is asked for every rejected payload, and all rejections take the same time.
		if e, rerr := s.retransmitted(ctx, p); e != nil || rerr != nil {
			return e, rerr
		}
	}
	return nil, err
}

func (s *Service) export(ctx context.Context, p *establishment) (secret kme.Secret, err error) {
	lot := s.lots.Find(p.IMEI)
	if lot == nil {
		return secret, unknownDevice()
	}
	if secret, err = s.token.ExportKME(ctx, lot.Payload(kme.IMSI{}, p.IMEI, nil, p.Payload)); err != nil {
		return secret, fromToken(ctx, err)
	}
	return secret, nil
}

// accept makes the binding, durably, or refuses.
func (s *Service) accept(ctx context.Context, p *establishment) (*Binding, error) {
	if err := s.attempt(ctx, p); errors.Is(err, ErrNoAttempt) {
		return nil, s.noAttempt(ctx, p)
	} else if err != nil {
		return nil, fromStore(ctx, err)
	}
	lot := s.lots.Find(p.IMEI)
	if lot == nil {
		return nil, unknownDevice()
	}
	if want := kme.PayloadSize(lot.Public); len(p.Payload) != want {
		return nil, refuse(kme.Malformed, fmt.Sprintf("a payload of this device has %d bytes, not %d", want,
			len(p.Payload)), nil)
	}
	device, cached, err := lot.Reader.Cached(lot.Manifest, p.IMEI)
	if !cached {
		full := s.outside(ctx, p, func() { device, err = lot.Reader.Fetch(ctx, lot.Manifest, p.IMEI) })
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
	if !s.limits.Allow(p.IMSI, p.IMEI) {
		return nil, overloaded("this subscription or this device sends too many payloads")
	}

	done := s.store.Soon()
	defer done()
	opened, err := s.token.OpenPayload(ctx, lot.Payload(p.IMSI, p.IMEI, device.Key, p.Payload))
	if err != nil {
		return nil, fromToken(ctx, err)
	}
	now := s.times.Now()
	b := &Binding{
		IMSI: p.IMSI, IMEI: p.IMEI, Manufacturer: lot.Manifest.Manufacturer, Lot: lot.Manifest.Lot, State: Pending,
		DeviceKey: device.Issued(), Sealed: opened.Sealed, Established: now, Origin: p.Origin.Name,
		Expires: now.Add(s.times.Pending), AttemptID: p.AttemptID, PayloadSHA256: p.digest[:], NWSig: opened.NWSig[:],
	}
	err = s.store.Establish(ctx, b, opened.Tag, opened.Fault == hsmkeys.FaultNone, now)
	switch {
	case opened.Fault != hsmkeys.FaultNone && (errors.Is(err, ErrNotGood) || errors.Is(err, ErrUsed)):
		return nil, rejected(errors.New(string(opened.Fault)))
	case errors.Is(err, ErrNoAttempt):
		return nil, s.noAttempt(ctx, p)
	case err != nil:
		return nil, fromStore(ctx, err)
	}
	s.limits.Established(p.IMEI)
	s.open.Invalidate(p.IMSI)
	return b, nil
}

// attempt fails unless the attempt is open, and the origin's.
func (s *Service) attempt(ctx context.Context, p *establishment) error {
	now := s.times.Now()
	if a, ok := s.open.GetIfPresent(p.IMSI); ok && now.Before(a.Expires) && a.Origin == p.Origin.Name &&
		sameText(a.ID, p.AttemptID) {
		return nil
	}
	_, err := s.store.Attempt(ctx, p.IMSI, p.Origin.Name, p.AttemptID, now)
	return err
}

// sameText compares secrets in constant time.
func sameText(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

// noAttempt is the refusal of a call whose attempt is not open.
func (s *Service) noAttempt(ctx context.Context, p *establishment) error {
	s.open.Invalidate(p.IMSI)
	switch b, err := s.standing(ctx, p.IMSI); {
	case err != nil && !errors.Is(err, ErrNotBound):
		return fromStore(ctx, err)
	case err == nil && b.State == Active && b.IMEI != p.IMEI:
		return otherDevice()
	}
	return fromStore(ctx, ErrNoAttempt)
}

// retransmitted answers a call that was answered before. It reads the binding again after a commit: a failover may have
// been between the two.
func (s *Service) retransmitted(ctx context.Context, p *establishment) (*Established, error) {
	b, err := s.madeBy(ctx, p)
	if b == nil || err != nil {
		return nil, err
	}
	if err := s.store.Settle(ctx); err != nil {
		return nil, fromStore(ctx, err)
	}
	if b, err = s.madeBy(ctx, p); b == nil || err != nil {
		return nil, err
	}
	s.log.InfoContext(ctx, "established again", "imsi", p.IMSI, "imei", p.IMEI)
	return &Established{NWSig: b.NWSig, State: b.State}, nil
}

// madeBy is the IMSI's binding if it was made by the same payload for the same attempt; else nil.
func (s *Service) madeBy(ctx context.Context, p *establishment) (*Binding, error) {
	b, err := s.standing(ctx, p.IMSI)
	if errors.Is(err, ErrNotBound) {
		return nil, nil
	}
	if err != nil {
		return nil, fromStore(ctx, err)
	}
	if b.IMEI != p.IMEI || b.Origin != p.Origin.Name || !sameText(b.AttemptID, p.AttemptID) ||
		subtle.ConstantTimeCompare(b.PayloadSHA256, p.digest[:]) != 1 {
		return nil, nil
	}
	return b, nil
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
