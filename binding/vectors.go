package binding

import (
	"context"
	"errors"
	"fmt"

	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// MaxRANDs is how many RANDs one PrepareVector takes.
const MaxRANDs = 32

// Prepared is the answer to PrepareVector.
type Prepared struct {
	RANDs     []hsmkeys.RAND
	AttemptID string // empty: the RANDs are encrypted under the KME
}

// PrepareVector is called with the RANDs of all vectors that an origin asked for at once.
func (s *Service) PrepareVector(ctx context.Context, imsi kme.IMSI, rands [][]byte, o Origin) (*Prepared, error) {
	vectors, err := parseRANDs(rands)
	if err != nil {
		return nil, err
	}
	leave, err := s.enter(ctx)
	if err != nil {
		return nil, s.failed(ctx, "PrepareVector", imsi, err)
	}
	defer leave()
	p, err := s.prepare(ctx, imsi, vectors, o)
	if err != nil {
		return nil, s.failed(ctx, "PrepareVector", imsi, err, "origin", o.Name)
	}
	return p, nil
}

func (s *Service) prepare(ctx context.Context, imsi kme.IMSI, rands []hsmkeys.RAND, o Origin) (*Prepared, error) {
	q := VectorRequest{
		IMSI: imsi, Origin: o, RANDs: rands, Now: s.times.Now(), AttemptTTL: s.times.Attempt,
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
			s.log.InfoContext(ctx, "attempt opened", "imsi", imsi, "origin", o.Name, "expires", d.Attempt.Expires)
			s.open.Set(imsi, *d.Attempt)
			return &Prepared{RANDs: rands, AttemptID: d.Attempt.ID}, nil
		case d.Binding.AttemptID == q.Ready: // it was pending, and the origin that is sent vectors under it is noted
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
	switch revoked, err := s.lots.Revoked(b.Basis()); {
	case err != nil:
		return revocationsUnknown(err)
	case revoked:
		return deviceRevoked()
	}
	return nil
}

func (s *Service) decide(ctx context.Context, q VectorRequest) (Decision, error) {
	done := s.store.Soon()
	defer done()
	return s.store.Prepare(ctx, q)
}

// RestoreRAND gives the RAND as the HSS made it, of a vector that an origin was sent.
func (s *Service) RestoreRAND(ctx context.Context, imsi kme.IMSI, randBytes []byte,
	o Origin) (out hsmkeys.RAND, err error) {
	rands, err := parseRANDs([][]byte{randBytes})
	if err != nil {
		return out, err
	}
	leave, err := s.enter(ctx)
	if err != nil {
		return out, s.failed(ctx, "RestoreRAND", imsi, err)
	}
	defer leave()
	if out, err = s.restore(ctx, imsi, rands[0], o.Name); err != nil {
		return out, s.failed(ctx, "RestoreRAND", imsi, err, "origin", o.Name)
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
