package tokenkeys

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// A Sealed is a KME as a binding has it.
type Sealed struct {
	IMSI  kme.IMSI
	State binding.State
	KME   []byte
}

// A Resealed is one that is sealed again.
type Resealed struct {
	Sealed
	Again []byte
}

// A SealedStore gives the KMEs of bindings that must be sealed again. Their bytes say which: see hsmkeys.SealedFrom.
type SealedStore interface {
	// CountSealed counts the KMEs below these bytes.
	CountSealed(ctx context.Context, below []byte) (int, error)
	// Sealed gives KMEs below these bytes, in the order of IMSIs and states, behind after, limit at most.
	Sealed(ctx context.Context, after Sealed, below []byte, limit int) ([]Sealed, error)
	// Reseal replaces KMEs, in the order of their IMSIs, where they are still what they were, in one step. It gives how
	// many were.
	Reseal(ctx context.Context, all []Resealed) (int, error)
	// Settle fails unless what was read is durable.
	Settle(ctx context.Context) error
}

// A Resealer is what sealing again needs of the operator's HSM.
type Resealer interface {
	Reseal(ctx context.Context, sealed []byte) ([]byte, error)
	Sessions() int
	Health() hsmkeys.Health
}

// settled is after how long nobody seals with an earlier storage key any more.
const settled = 2 * hsmkeys.LookAgain

// ErrStillSealing: somebody goes on sealing KMEs under an earlier storage key, after everybody could know the newest
// one.
var ErrStillSealing = errors.New("KMEs are still being sealed under an earlier storage key: a token that serves has " +
	"not got the newest one; bring it there with keysvc backup, and run this again")

// latePasses is after how many passes with KMEs Reseal fails: the first one finds those of calls that were under way.
const latePasses = 3

// resealBatch is how many KMEs go into one commit, beside which the service makes its own.
const resealBatch = 100

// A DamagedError names the bindings whose KMEs could not be sealed again: the HSM does not open them.
type DamagedError struct {
	IMSIs []string
	Cause error // of the first
}

func (e *DamagedError) Error() string {
	return fmt.Sprintf("the KMEs of %d bindings cannot be opened, and are sealed as they were: end them with keysvc "+
		"binding revoke, and run this again; IMSIs %s; of the first: %v",
		len(e.IMSIs), strings.Join(e.IMSIs, ", "), e.Cause)
}

// maxDamaged bounds a DamagedError: where there are more, something else is wrong.
const maxDamaged = 100

// Reseal seals every KME below these bytes again, while services serve and seal; since they may seal under an earlier
// key for some time, it goes on until that has passed and none is left. It gives how many it has sealed, also when it
// fails; then the same again goes on. report is called with that now and then.
func Reseal(
	ctx context.Context, token Resealer, store SealedStore, below []byte, report func(done int),
) (done int, err error) {
	began, late := time.Now(), 0
	for {
		last := time.Since(began) >= settled
		left, damaged, err := resealPass(ctx, token, store, below, func(n int) { done += n; report(done) })
		if err != nil {
			return done, err
		}
		switch more := left > len(damaged.IMSIs); {
		case last && more:
			if late++; late == latePasses {
				return done, ErrStillSealing
			}
		case last && len(damaged.IMSIs) > 0:
			return done, damaged
		case last:
			return done, nil
		}
		select {
		case <-ctx.Done():
			return done, ctx.Err()
		case <-time.After(hsmkeys.LookAgain / 5):
		}
	}
}

// resealPass gives how many it has found to seal again.
func resealPass(
	ctx context.Context, token Resealer, store SealedStore, below []byte, report func(n int),
) (found int, damaged *DamagedError, err error) {
	damaged = new(DamagedError)
	for after := (Sealed{}); ; {
		batch, err := store.Sealed(ctx, after, below, resealBatch)
		if err != nil || len(batch) == 0 {
			return found, damaged, err
		}
		found += len(batch)
		after = batch[len(batch)-1]
		again := make([][]byte, len(batch))
		failed := make([]error, len(batch))
		g, gctx := errgroup.WithContext(ctx)
		g.SetLimit(token.Sessions())
		for i, s := range batch {
			g.Go(func() (err error) {
				if again[i], err = token.Reseal(gctx, s.KME); err == nil {
					return nil
				}
				if failed[i] = err; gctx.Err() != nil || token.Health().Cause != nil {
					return err // and nothing about this KME
				}
				return nil
			})
		}
		if err := g.Wait(); err != nil {
			return found, damaged, err
		}
		var good []Resealed
		for i, s := range batch {
			if failed[i] == nil {
				good = append(good, Resealed{Sealed: s, Again: again[i]})
				continue
			}
			if damaged.IMSIs = append(damaged.IMSIs, s.IMSI.String()); damaged.Cause == nil {
				damaged.Cause = failed[i]
			}
			if len(damaged.IMSIs) == maxDamaged {
				return found, damaged, damaged
			}
		}
		n, err := store.Reseal(ctx, good)
		if err != nil {
			return found, damaged, err
		}
		report(n)
	}
}

// RetirementLoss says what is lost when RetireStorage destroys the earlier generations; nothing if there are none.
func RetirementLoss(ctx context.Context, token interface {
	fmt.Stringer
	StorageToken
}) (string, error) {
	all, err := token.StorageGenerations(ctx)
	if err != nil || len(all) < 2 {
		return "", err
	}
	earlier := len(all) - 1
	return fmt.Sprintf("%d earlier storage keys in %s will be destroyed: a backup of the store from before the "+
		"rotation to generation %d cannot be used any more.", earlier, token, all[earlier]), nil
}

// RetireStorage destroys the earlier generations of the storage key, if no KME is sealed under them, and none is for as
// long as one could. It gives those.
func RetireStorage(ctx context.Context, token StorageToken, store SealedStore) (destroyed []int, err error) {
	all, err := token.StorageGenerations(ctx)
	if err != nil || len(all) < 2 {
		return nil, err
	}
	newest := all[len(all)-1]
	// The last count is after a commit: a failover could bring KMEs back that are sealed under the others.
	for _, wait := range []time.Duration{0, settled, 0} {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(wait):
		}
		left, err := store.CountSealed(ctx, hsmkeys.SealedFrom(newest))
		if err != nil {
			return nil, err
		}
		if left > 0 {
			return nil, fmt.Errorf("%d KMEs are still sealed under an earlier storage key: run keysvc storage "+
				"rotate again", left)
		}
		if err := store.Settle(ctx); err != nil {
			return nil, err
		}
	}
	for _, g := range all[:len(all)-1] {
		if err := token.DestroyStorageKey(ctx, g); err != nil {
			return destroyed, err
		}
		destroyed = append(destroyed, g)
	}
	return destroyed, nil
}

// A StorageToken is what RetireStorage needs of the operator's HSM.
type StorageToken interface {
	StorageGenerations(ctx context.Context) ([]int, error)
	DestroyStorageKey(ctx context.Context, generation int) error
}
