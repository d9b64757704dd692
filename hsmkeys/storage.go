package hsmkeys

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/doctor"
	"github.com/kmehsm/kmehsm/hsmkeys/keyop"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/kme"
)

// EnsureStorageKey makes the AES-256 key that seals KMEs, in its first generation, unless the token has one. A KME that
// is unwrapped with it always has the attributes that OpenPayload and EncryptRANDs give it. The key can be backed up,
// under a TRUSTED key.
func (t *OperatorToken) EnsureStorageKey(ctx context.Context) (created bool, err error) {
	if has, err := t.hasStorage(ctx); err != nil || has {
		return false, err
	}
	return t.makeStorage(ctx, keyspec.Storage)
}

func (t *OperatorToken) makeStorage(ctx context.Context, k Key) (created bool, err error) {
	defer t.sealing.Store(nil)
	traits, err := t.learnt(ctx)
	if err != nil {
		return false, err
	}
	return t.ensureSecret(ctx, Operator, k, pkcs11.CKM_AES_KEY_GEN, keyspec.StorageTemplate(traits))
}

// hasStorage says whether there is a storage key in any generation.
func (t *OperatorToken) hasStorage(ctx context.Context) (bool, error) {
	return p11.Do(ctx, t.hsm, "look for a key", func(s *p11.Session) (bool, error) {
		_, _, err := t.newestStorage(s)
		if errors.Is(err, ErrNoKey) {
			return false, nil
		}
		return err == nil, err
	})
}

// A sealing caches which generation of the storage key seals: for some time, and until handles are forgotten.
type sealing struct {
	generation int
	until      time.Time
	epoch      int64
}

// LookAgain is how often a token is asked whether there is a newer storage key. So, once that time has passed since a
// key was made, only calls that were under way seal with an older one.
const LookAgain = 5 * time.Second

// newestStorage finds the storage key that seals. Generations that are not used any more are destroyed, so the first
// one need not be 1. From there on, none is missing.
func (t *OperatorToken) newestStorage(s *p11.Session) (generation int, h pkcs11.ObjectHandle, err error) {
	epoch := t.hsm.Epoch()
	if known := t.sealing.Load(); known != nil && known.epoch == epoch && time.Now().Before(known.until) {
		h, err = t.find(s, pkcs11.CKO_SECRET_KEY, keyspec.StorageGeneration(known.generation))
		return known.generation, h, err
	}
	for g := range keyspec.Storage.Generations() {
		next, err := t.find(s, pkcs11.CKO_SECRET_KEY, g)
		if errors.Is(err, ErrNoKey) {
			if generation > 0 {
				break
			}
			continue
		}
		if err != nil {
			return 0, 0, err
		}
		generation, h = g.Generation, next
	}
	if generation == 0 {
		return 0, 0, fmt.Errorf("%s: %w", keyspec.Storage.Label(), ErrNoKey)
	}
	t.sealing.Store(&sealing{generation: generation, until: time.Now().Add(LookAgain), epoch: epoch})
	return generation, h, nil
}

// EnsureLedgerKey makes the HMAC key that tags KMEs for the one-use ledger, unless the token has it. It can be backed
// up as the storage key can.
func (t *OperatorToken) EnsureLedgerKey(ctx context.Context) (created bool, err error) {
	traits, err := t.learnt(ctx)
	if err != nil {
		return false, err
	}
	return t.ensureSecret(ctx, Operator, keyspec.Ledger, pkcs11.CKM_GENERIC_SECRET_KEY_GEN,
		keyspec.LedgerTemplate(traits))
}

// Derive derives a key for a purpose from the ledger key: HMAC-SHA-256 of the purpose's name, computed in the token. No
// name has the length of a KME, so no derived key is the tag of a KME. The caller wipes it.
func (t *OperatorToken) Derive(ctx context.Context, purpose string) (kme.Secret, error) {
	name := []byte("kme derived key " + purpose)
	if len(name) == kme.SecretSize {
		return kme.Secret{}, errors.New("the name of a derived key has the length of a KME")
	}
	return p11.Do(ctx, t.hsm, "derive a key", func(s *p11.Session) (kme.Secret, error) {
		h, err := t.find(s, pkcs11.CKO_SECRET_KEY, keyspec.Ledger)
		if err != nil {
			return kme.Secret{}, err
		}
		tag, err := keyop.HMAC(s, h, name)
		if err != nil {
			return kme.Secret{}, err
		}
		defer clear(tag)
		return kme.NewSecret(tag)
	})
}

// learnt are the traits of an operator's token.
func (t *OperatorToken) learnt(ctx context.Context) (keyspec.Traits, error) {
	return doAs(ctx, t.base, Operator, "try the token", t.learn)
}

// learn finds the traits by trial, once. The caller holds a session, so that the module stays.
func (t *OperatorToken) learn(*p11.Session) (keyspec.Traits, error) {
	if known := t.traits.Load(); known != nil {
		return *known, nil
	}
	learnt, err := doctor.Learn(t.hsm)
	if err != nil {
		return keyspec.Traits{}, err
	}
	t.traits.Store(&learnt)
	return learnt, nil
}
