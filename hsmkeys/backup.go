package hsmkeys

import (
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyop"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/internal/weakkey"
)

// Storage and ledger key leave a token for another one, wrapped by RSA-OAEP. The other token has made the RSA key
// (NewRestoreKey), and the security officer of this one has imported it as TRUSTED (ImportRecipient). It is TRUSTED
// only while a backup is made, and wraps no other key.

// ImportRecipient imports the RSA key that receives the storage and ledger key. It logs in as the security officer,
// once: no token of the URI may be open in the process.
func ImportRecipient(ctx context.Context, tokenURI string, officer PIN, to *rsa.PublicKey) error {
	if err := weakkey.CheckWrapping(to); err != nil {
		return err
	}
	// By class and WRAP_WITH_TRUSTED: SoftHSM compares no byte strings with those of PRIVATE objects, as CKA_ID is.
	wraps := ck.Attributes{ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		ck.Attr(pkcs11.CKA_WRAP_WITH_TRUSTED, true)}
	return asOfficer(tokenURI, officer, func(b *base) error {
		return b.importRecipient(ctx, Operator, keyspec.Backup, to, wraps)
	})
}

// A Carried key is a storage or ledger key on its way to another token.
type Carried struct {
	Key     Key
	Wrapped []byte // by RSA-OAEP
	Check   []byte // the key's result on a known or a random value, by which the other token recognises the key
}

// CarryOut is the ledger key and all storage keys that the token has, under the key that ImportRecipient has imported,
// which it destroys.
func (t *OperatorToken) CarryOut(ctx context.Context) ([]Carried, error) {
	return doAs(ctx, t.base, Operator, "back up keys", func(s *p11.Session) (all []Carried, err error) {
		to, err := t.find(s, pkcs11.CKO_PUBLIC_KEY, keyspec.Backup)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, t.destroy(s, pkcs11.CKO_PUBLIC_KEY, keyspec.Backup)) }()
		for k := range carriedKeys() {
			h, err := t.find(s, pkcs11.CKO_SECRET_KEY, k)
			if errors.Is(err, ErrNoKey) && k.Role == RoleStorage {
				continue
			}
			if err != nil {
				return nil, err
			}
			c := Carried{Key: k}
			if c.Wrapped, err = s.Wrap(keyspec.OAEP, to, h, make([]byte, keyspec.WrappedRoom)); err != nil {
				return nil, p11.Explain("wrap "+k.Label(), err)
			}
			if c.Check, err = keyop.CheckValue(s, k, h); err != nil {
				return nil, err
			}
			all = append(all, c)
		}
		if len(all) < 2 {
			return nil, fmt.Errorf("%s: %w", keyspec.Storage.Label(), ErrNoKey)
		}
		return all, nil
	})
}

// carriedKeys are the keys that a backup may hold: the ledger key, and the generations of the storage key.
func carriedKeys() func(func(Key) bool) {
	return func(yield func(Key) bool) {
		if yield(keyspec.Ledger) {
			keyspec.Storage.Generations()(yield)
		}
	}
}

// NewRestoreKey makes an RSA-3072 key that receives another token's storage and ledger key. It is what a transport key
// (see NewTransportKey) is for a KEK.
func (t *OperatorToken) NewRestoreKey(ctx context.Context) (*rsa.PublicKey, error) {
	traits, err := t.learnt(ctx)
	if err != nil {
		return nil, err
	}
	return t.newReceiver(ctx, keyspec.RestoreLabel, keyspec.Restored(traits))
}

// RestoreKeys are the public halves of those that the token has.
func (t *OperatorToken) RestoreKeys(ctx context.Context) ([]*rsa.PublicKey, error) {
	return t.receivers(ctx, keyspec.RestoreLabel)
}

// DestroyRestoreKey destroys one. If it is gone already, nothing changes.
func (t *OperatorToken) DestroyRestoreKey(ctx context.Context, pub *rsa.PublicKey) error {
	return t.destroyReceiver(ctx, keyspec.RestoreLabel, pub)
}

// CarryIn imports keys that CarryOut has wrapped under a key of NewRestoreKey, with our templates. It first compares
// every key with its check value, also those that the token has already, and imports none if one differs. It gives
// those that it has imported.
func (t *OperatorToken) CarryIn(ctx context.Context, to *rsa.PublicKey, all []Carried) (taken []Key, err error) {
	return doAs(ctx, t.base, Operator, "restore keys", func(s *p11.Session) (taken []Key, err error) {
		var missing []Carried
		for _, c := range all {
			if !slices.Contains(slices.Collect(carriedKeys()), c.Key) || len(c.Wrapped) == 0 {
				return nil, fmt.Errorf("the backup has a key %q that no backup has", c.Key.Label())
			}
			h, err := t.find(s, pkcs11.CKO_SECRET_KEY, c.Key)
			if errors.Is(err, ErrNoKey) {
				missing = append(missing, c)
				continue
			}
			if err != nil {
				return nil, err
			}
			if same, err := keyop.Does(s, h, c.Key, c.Check); err != nil {
				return nil, err
			} else if !same {
				return nil, fmt.Errorf("%s has another %s than the backup: restore to a token without keys", t,
					c.Key.Label())
			}
		}
		if len(missing) == 0 {
			return nil, nil
		}
		private, err := keyop.Receiver(s, keyspec.RestoreLabel, to)
		if err != nil {
			return nil, err
		}
		traits, err := t.learn(s)
		if err != nil {
			return nil, err
		}
		unwrap := func(c Carried) func(where ck.Attributes) (pkcs11.ObjectHandle, error) {
			return func(where ck.Attributes) (pkcs11.ObjectHandle, error) {
				h, err := s.Unwrap(keyspec.OAEP, private, c.Wrapped,
					ck.Frozen(keyspec.CarriedTemplate(traits, c.Key), where))
				return h, p11.Explain("unwrap "+c.Key.Label()+": it was wrapped for another key, or damaged", err)
			}
		}
		for _, c := range missing {
			if err := try(s, unwrap(c), func(h pkcs11.ObjectHandle) error {
				same, err := keyop.Does(s, h, c.Key, c.Check)
				if err == nil && !same {
					err = fmt.Errorf("the backup's %s does not do what it should: the backup is damaged, make another",
						c.Key.Label())
				}
				return err
			}); err != nil {
				return nil, err
			}
		}
		defer t.sealing.Store(nil)
		for _, c := range missing {
			if _, err := unwrap(c)(keyspec.Named(c.Key)); err != nil {
				return taken, err
			}
			taken = append(taken, c.Key)
		}
		return taken, nil
	})
}
