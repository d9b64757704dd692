package binding_test

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// A recorder notes each call of the service to its token and its store, and can make one fail or something happen
// first.
type recorder struct {
	binding.Ledger // of the store
	token          binding.Token
	store          binding.Store

	tickets atomic.Int64 // that are out

	mu     sync.Mutex
	calls  []string                // guarded by mu
	before func(call string) error // guarded by mu
}

// tokenCalls are the methods of binding.Token.
var tokenCalls = []string{"OpenPayload", "EncryptRANDs", "DecryptRAND", "ExportKME"}

func (r *recorder) enter(call string) error {
	r.mu.Lock()
	r.calls = append(r.calls, call)
	before := r.before
	r.mu.Unlock()
	if before != nil {
		return before(call)
	}
	return nil
}

// take gives the calls since the last take.
func (r *recorder) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	calls := r.calls
	r.calls = nil
	return calls
}

func (r *recorder) takeToken() []string {
	return slices.DeleteFunc(r.take(), func(call string) bool { return !slices.Contains(tokenCalls, call) })
}

// onFirst lets f happen before a call's first time.
func (r *recorder) onFirst(call string, f func() error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.before = func(c string) error {
		if c != call {
			return nil
		}
		r.mu.Lock()
		r.before = nil
		r.mu.Unlock()
		return f()
	}
}

func (r *recorder) Soon() (done func()) {
	r.tickets.Add(1)
	return func() { r.tickets.Add(-1) }
}

func (r *recorder) OpenPayload(ctx context.Context, p hsmkeys.Payload) (*hsmkeys.Opened, error) {
	if err := r.enter("OpenPayload"); err != nil {
		return nil, err
	}
	return r.token.OpenPayload(ctx, p)
}

func (r *recorder) EncryptRANDs(ctx context.Context, sealed []byte, rands []hsmkeys.RAND) ([]hsmkeys.RAND, error) {
	if err := r.enter("EncryptRANDs"); err != nil {
		return nil, err
	}
	return r.token.EncryptRANDs(ctx, sealed, rands)
}

func (r *recorder) ExportKME(ctx context.Context, p hsmkeys.Payload) (kme.Secret, error) {
	if err := r.enter("ExportKME"); err != nil {
		return kme.Secret{}, err
	}
	return r.token.ExportKME(ctx, p)
}

func (r *recorder) DecryptRAND(ctx context.Context, sealed []byte, rand hsmkeys.RAND) (out hsmkeys.RAND, err error) {
	if err := r.enter("DecryptRAND"); err != nil {
		return out, err
	}
	return r.token.DecryptRAND(ctx, sealed, rand)
}

func (r *recorder) Prepare(ctx context.Context, q binding.VectorRequest) (binding.Decision, error) {
	if err := r.enter("Prepare"); err != nil {
		return binding.Decision{}, err
	}
	return r.store.Prepare(ctx, q)
}

func (r *recorder) Spent(ctx context.Context, imsi kme.IMSI, rand hsmkeys.RAND) (bool, error) {
	if err := r.enter("Spent"); err != nil {
		return false, err
	}
	return r.store.Spent(ctx, imsi, rand)
}

func (r *recorder) Establish(ctx context.Context, b *binding.Binding, tag []byte, good bool, now time.Time) error {
	if err := r.enter("Establish"); err != nil {
		return err
	}
	return r.store.Establish(ctx, b, tag, good, now)
}

func (r *recorder) Settle(ctx context.Context) error {
	if err := r.enter("Settle"); err != nil {
		return err
	}
	return r.store.Settle(ctx)
}

func (r *recorder) Report(ctx context.Context, imsi kme.IMSI, o kme.Origin, ok bool,
	now time.Time) (*binding.Subscription, error) {
	if err := r.enter("Report"); err != nil {
		return nil, err
	}
	return r.store.Report(ctx, imsi, o, ok, now)
}

func (r *recorder) Subscription(ctx context.Context, imsi kme.IMSI, now time.Time) (*binding.Subscription, error) {
	if err := r.enter("Subscription"); err != nil {
		return nil, err
	}
	return r.store.Subscription(ctx, imsi, now)
}

func (r *recorder) Equipment(ctx context.Context, imei kme.IMEI, imsi kme.IMSI,
	now time.Time) (*binding.Subscription, []*binding.Binding, error) {
	if err := r.enter("Equipment"); err != nil {
		return nil, nil, err
	}
	return r.store.Equipment(ctx, imei, imsi, now)
}

func (r *recorder) Attempt(
	ctx context.Context, imsi kme.IMSI, o kme.Origin, id string, now time.Time,
) (*binding.Attempt, error) {
	if err := r.enter("Attempt"); err != nil {
		return nil, err
	}
	return r.store.Attempt(ctx, imsi, o, id, now)
}

func (r *recorder) OpenAttempt(ctx context.Context, a binding.Attempt) error {
	if err := r.enter("OpenAttempt"); err != nil {
		return err
	}
	return r.store.OpenAttempt(ctx, a)
}

func (r *recorder) Revoke(ctx context.Context, imsi kme.IMSI, now time.Time) (*binding.Binding, error) {
	if err := r.enter("Revoke"); err != nil {
		return nil, err
	}
	return r.store.Revoke(ctx, imsi, now)
}

func (r *recorder) Bindings(ctx context.Context, q binding.BindingQuery) ([]*binding.Binding, error) {
	if err := r.enter("Bindings"); err != nil {
		return nil, err
	}
	return r.store.Bindings(ctx, q)
}

func (r *recorder) DropExpired(ctx context.Context, now time.Time) error {
	return r.store.DropExpired(ctx, now)
}
