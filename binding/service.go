package binding

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/maypok86/otter/v2"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kmehsm/kmehsm/binding/limits"
	"github.com/kmehsm/kmehsm/binding/refusals"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/sightings"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cache"
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
	lots    *registry.Lots
	limits  *limits.Gate
	metrics *Metrics
	// refusals has the last one of each subscription
	refusals *refusals.Memory
	unknown  *limits.Strangers

	equipment EquipmentPolicy
	listed    *listed
	history   *sightings.History

	// open caches the last open attempt of each IMSI, so that EstablishKME need not read it from the store. Another
	// process may have closed it since: then the store refuses to establish.
	open cache.Cache[kme.IMSI, Attempt]
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

// Options are a Service's. Those that are not said to be optional are needed.
type Options struct {
	Token  Token
	Store  Store
	Lots   *registry.Lots // optional: none are served until WithLots
	Times  Times
	Limits limits.Limits // optional: none
	// Equipment is optional: DefaultEquipmentPolicy
	Equipment *EquipmentPolicy
	Listings  Listings           // optional: the operator has no list of devices. See LoadListings
	History   *sightings.History // optional: nobody asks with which devices subscriptions were seen
	Metrics   *Metrics           // optional: where calls are counted and measured
	Refusals  *refusals.Memory   // optional: where the last refusal of each subscription is remembered
	// Log gets each decision, in one line, with the Actor of the call's context. No line holds a secret.
	Log *slog.Logger
}

// NewService makes a Service.
func NewService(o Options) *Service {
	if o.Metrics == nil {
		o.Metrics = NewMetrics(prometheus.NewRegistry())
	}
	s := &Service{
		token: o.Token, store: o.Store, log: slog.New(actorLog{Handler: o.Log.Handler()}), times: o.Times,
		lots: cmp.Or(o.Lots, new(registry.Lots)), limits: limits.NewGate(o.Limits), metrics: o.Metrics,
		unknown: limits.NewStrangers(),
		open: cache.New(&otter.Options[kme.IMSI, Attempt]{
			MaximumSize: maxOpen, ExpiryCalculator: otter.ExpiryWriting[kme.IMSI, Attempt](o.Times.Attempt),
		}),
	}
	s.equipment, s.listed, s.history = DefaultEquipmentPolicy(), newListed(o.Listings), o.History
	if o.Equipment != nil {
		s.equipment = *o.Equipment
	}
	s.refusals = cmp.Or(o.Refusals, new(refusals.Memory))
	s.lots.Follow(new(registry.Lots))
	return s
}

// WithLots is the same service with other lots. Both have the same limits and metrics, and calls under way finish with
// the lots that they began with. From now on their lists of revoked devices are read in the background, instead of
// those of the lots before.
func (s *Service) WithLots(lots *registry.Lots) *Service {
	other := *s
	other.lots = lots
	lots.Follow(s.lots)
	return &other
}

// enter admits a call that may reach the HSM. A call that nobody waits for any more is not admitted: see hsmkeys.
func (s *Service) enter(ctx context.Context) (leave func(), err error) {
	client := ActorOf(ctx).Client
	if !s.limits.Take(client) {
		return nil, overloaded("the service has all the work that it can do: call again later")
	}
	s.metrics.inFlight.Inc()
	return func() { s.metrics.inFlight.Dec(); s.limits.Leave(client) }, nil
}

// CheckDirectories says which manufacturers' directories cannot be read now. Devices whose keys are cached are served
// all the same.
func (s *Service) CheckDirectories(ctx context.Context) map[string]error {
	return s.lots.CheckDirectories(ctx)
}

// Overdue gives the lists of revoked devices that could not be read again when it was time, by manufacturer.
func (s *Service) Overdue() map[string][]directory.Overdue { return s.lots.Overdue() }

// Refused logs and counts a refusal, unless that was done.
func (s *Service) Refused(ctx context.Context, r *Refusal, attrs ...any) {
	if r.logged {
		return
	}
	r.logged = true
	s.metrics.refused(r)
	s.remember(ActorOf(ctx).Client, r, attrs)
	s.log.WarnContext(ctx, "refused", append([]any{"reason", r.Reason, "message", r.Message}, attrs...)...)
}

// Broken logs an error that is no refusal: a fault of the service itself.
func (s *Service) Broken(ctx context.Context, err error, attrs ...any) {
	s.log.ErrorContext(ctx, "internal error", append(attrs, "cause", err.Error())...)
}

// failed logs a refusal, with the cause that the caller does not get. The call is a method of kme.v1.KeyService.
func (s *Service) failed(ctx context.Context, call string, imsi kme.IMSI, err error, more ...any) error {
	if r, ok := errors.AsType[*Refusal](err); ok {
		r.logged = true
		s.metrics.refused(r)
		attrs := append([]any{"call", call, "imsi", imsi, "reason", r.Reason, "message", r.Message}, more...)
		if r.Cause != nil {
			attrs = append(attrs, "cause", r.Cause.Error())
		}
		s.remember(ActorOf(ctx).Client, r, attrs)
		level := slog.LevelWarn
		if r.Reason == kme.Damaged || r.Reason == kme.RolledBack {
			level = slog.LevelError
		}
		s.log.Log(ctx, level, "refused", attrs...)
	}
	return err
}
