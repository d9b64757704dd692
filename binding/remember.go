package binding

import (
	"context"
	"fmt"

	"github.com/kmehsm/kmehsm/binding/refusals"
	"github.com/kmehsm/kmehsm/kme"
)

// remember notes a refusal that is logged with attributes, if they name a subscription.
func (s *Service) remember(client string, r *Refusal, attrs []any) {
	p := refusals.Past{Time: s.times.Now().UTC(), Reason: r.Reason, Message: r.Message, Client: client}
	if r.Cause != nil {
		p.Cause = r.Cause.Error()
	}
	for i := 0; i+1 < len(attrs); i += 2 {
		switch attrs[i] {
		case "imsi":
			p.IMSI, _ = attrs[i+1].(kme.IMSI)
		case "imei":
			p.IMEI = fmt.Sprint(attrs[i+1])
		case "origin":
			p.Origin = fmt.Sprint(attrs[i+1])
		case "call":
			p.Call = fmt.Sprint(attrs[i+1])
		}
	}
	switch p.Call { // an administrator's call says nothing about the network's
	case "GetBinding", "ListBindings", "OpenProvisioning", "RevokeBinding":
		return
	}
	if p.IMSI != (kme.IMSI{}) {
		s.refusals.Put(p)
	}
}

// Unauthenticated logs and counts a caller that was not let in, because nobody knows who it is. why is a word for the
// metric. If there are many, lines are left out, and another line says how many.
func (s *Service) Unauthenticated(ctx context.Context, why string, attrs ...any) {
	s.metrics.unauthenticated.WithLabelValues(why).Inc()
	if s.unknown.Tell(why, func(left int) {
		s.log.Warn("client authentication failed; lines were left out", "why", why, "left_out", left)
	}) {
		s.log.WarnContext(ctx, "client authentication failed", append([]any{"why", why}, attrs...)...)
	}
}
