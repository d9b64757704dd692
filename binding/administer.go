package binding

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"time"

	"github.com/kmehsm/kmehsm/binding/sightings"
	"github.com/kmehsm/kmehsm/kme"
)

// Reported is the answer to ReportAuthentication.
type Reported struct {
	Binding *Binding // that stands now: the pending one before the active; nil if none does
	Served  bool     // the device may be let in for more than provisioning
}

// ReportAuthentication activates the pending binding or drops it, if the report is about it: see Subscription.Ends.
func (s *Service) ReportAuthentication(ctx context.Context, imsi kme.IMSI, ok bool, o Origin) (*Reported, error) {
	now := s.times.Now()
	sub, err := s.store.Report(ctx, imsi, o.Name, ok, now)
	if err != nil {
		return nil, s.failed(ctx, "ReportAuthentication", imsi, fromStore(ctx, err), "origin", o.Name)
	}
	r := &Reported{Binding: sub.Standing(), Served: sub.Served(o)}
	if a := sub.Active; a != nil && a.Activated.UnixMilli() == now.UnixMilli() { // by this report
		s.history.Saw(imsi, a.IMEI, sightings.Shown)
	}
	if ok && r.Served {
		s.metrics.attaches.Inc()
	}
	state := State("")
	if r.Binding != nil {
		state = r.Binding.State
	}
	s.log.InfoContext(ctx, "authentication reported", "imsi", imsi, "origin", o.Name, "ok", ok,
		"state", state, "served", r.Served)
	return r, nil
}

// GetBinding tells what an IMSI is bound to.
func (s *Service) GetBinding(ctx context.Context, imsi kme.IMSI) (*Binding, error) {
	sub, err := s.store.Subscription(ctx, imsi, s.times.Now())
	if err == nil && sub.Latest() == nil {
		err = ErrNotBound
	}
	if err != nil {
		return nil, s.failed(ctx, "GetBinding", imsi, fromStore(ctx, err))
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
	return &Attempt{ID: rand.Text(), IMSI: imsi,
		Expires: now.Add(ttl).UTC().Truncate(time.Millisecond), Opened: true}, nil
}

// OpenProvisioning lets an IMSI be bound to another device, once, for ttl; an hour with 0.
func (s *Service) OpenProvisioning(ctx context.Context, imsi kme.IMSI, ttl time.Duration) (*Attempt, error) {
	a, err := NewOpened(imsi, s.times.Now(), cmp.Or(ttl, time.Hour))
	if err != nil {
		return nil, refuse(kme.Malformed, err.Error(), nil)
	}
	s.open.Invalidate(imsi)
	if err := s.store.OpenAttempt(ctx, *a); err != nil {
		return nil, s.failed(ctx, "OpenProvisioning", imsi, fromStore(ctx, err))
	}
	s.log.InfoContext(ctx, "provisioning opened", "imsi", imsi, "expires", a.Expires)
	return a, nil
}

// RevokeBinding ends an IMSI's bindings and forgets the KME.
func (s *Service) RevokeBinding(ctx context.Context, imsi kme.IMSI) (*Binding, error) {
	s.open.Invalidate(imsi)
	b, err := s.store.Revoke(ctx, imsi, s.times.Now())
	if err != nil {
		return nil, s.failed(ctx, "RevokeBinding", imsi, fromStore(ctx, err))
	}
	s.log.InfoContext(ctx, "binding revoked", "imsi", imsi, "imei", b.IMEI)
	return b, nil
}

// ListBindings gives a page of bindings.
func (s *Service) ListBindings(ctx context.Context, q BindingQuery) ([]*Binding, error) {
	q.Now = s.times.Now()
	all, err := s.store.Bindings(ctx, q)
	if err != nil {
		return nil, s.failed(ctx, "ListBindings", kme.IMSI{}, fromStore(ctx, err))
	}
	s.log.InfoContext(ctx, "bindings listed", "bindings", len(all))
	return all, nil
}
