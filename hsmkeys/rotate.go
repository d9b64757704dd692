package hsmkeys

import (
	"context"
	"crypto/rsa"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyop"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
)

// A Rotation seals KMEs again, under the newest generation of the storage key. By the CKA_UNWRAP_TEMPLATE of the
// earlier storage keys, no KME that they unwrap can be wrapped again. So a Rotation needs copies of them without that
// template. As in a backup, the keys are wrapped under an RSA key that the security officer has imported. Its private
// half is in the same token, and unwraps the copies as session objects, which end with the process. No KME is ever in
// its memory.
type Rotation struct {
	*OperatorToken
	Newest int  // the generation that KMEs are sealed under
	Made   bool // it was made by this rotation; if not, this one continues an earlier rotation

	to      *rsa.PublicKey
	wrapped map[int][]byte // storage keys of earlier generations, under to
}

// OpenRotation makes a storage key of the next generation, unless one of a rotation that was interrupted is there, and
// opens the token for sealing again. It logs in as the security officer, once: no token of the URI may be open in
// the process. Close ends it.
func OpenRotation(ctx context.Context, tokenURI string, officer PIN, o Options) (r *Rotation, err error) {
	t, err := OpenOperator(ctx, tokenURI, o)
	if err != nil {
		return nil, err
	}
	r = &Rotation{OperatorToken: t}
	if err = r.dropLeft(ctx); err == nil {
		// during the rotation, earlier storage keys only unwrap, as KEKs do
		r.to, err = t.newReceiver(ctx, keyspec.RotationLabel, keyspec.ImportedKEK)
	}
	if err = errors.Join(err, t.Close()); err != nil {
		return nil, err
	}
	taken := ImportRecipient(ctx, tokenURI, officer, r.to)
	if r.OperatorToken, err = OpenOperator(ctx, tokenURI, o); err != nil {
		return nil, errors.Join(taken, err)
	}
	if err = taken; err == nil {
		err = r.begin(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// dropLeft destroys what an interrupted rotation or backup has left.
func (r *Rotation) dropLeft(ctx context.Context) error {
	left, err := r.receivers(ctx, keyspec.RotationLabel)
	for _, pub := range left {
		err = errors.Join(err, r.destroyReceiver(ctx, keyspec.RotationLabel, pub))
	}
	return err
}

func (r *Rotation) begin(ctx context.Context) error {
	all, err := r.CarryOut(ctx)
	if err != nil {
		return err
	}
	r.wrapped = map[int][]byte{}
	for _, c := range all {
		if c.Key.Role == RoleStorage {
			r.wrapped[c.Key.Generation], r.Newest = c.Wrapped, c.Key.Generation
		}
	}
	if len(r.wrapped) > 1 { // an earlier rotation has made it
		return nil
	}
	if r.Newest == MaxGenerations {
		return fmt.Errorf("the storage key has been rotated %d times, and cannot be once more", MaxGenerations-1)
	}
	r.Newest++
	r.Made, err = r.makeStorage(ctx, keyspec.StorageGeneration(r.Newest))
	return err
}

// Close ends the rotation, finished or not: what it needed is destroyed.
func (r *Rotation) Close() error {
	return errors.Join(r.dropLeft(context.Background()), r.OperatorToken.Close())
}

// Reseal seals a KME under the newest generation.
func (r *Rotation) Reseal(ctx context.Context, sealed []byte) ([]byte, error) {
	if len(sealed) != keyop.SealedSize {
		return nil, errors.New("the sealed KME is damaged: it has the wrong length")
	}
	return p11.Do(ctx, r.hsm, "reseal a KME", func(s *p11.Session) (out []byte, err error) {
		earlier, err := r.earlier(s, int(sealed[0]))
		if err != nil {
			return nil, err
		}
		newest, err := r.find(s, pkcs11.CKO_SECRET_KEY, keyspec.StorageGeneration(r.Newest))
		if err != nil {
			return nil, err
		}
		h, err := keyop.Unseal(s, earlier, sealed, keyspec.SealableKME)
		if err != nil {
			return nil, err
		}
		out, err = keyop.SealObject(s, r.Newest, newest, h)
		if derr := s.Destroy(h); err == nil { // not left there: earlier would have to be unwrapped again
			err = p11.Explain("drop an unsealed KME", derr)
		}
		return out, err
	})
}

// earlier gives a storage key of an earlier generation as an object of this session.
func (r *Rotation) earlier(s *p11.Session, generation int) (pkcs11.ObjectHandle, error) {
	wrapped := r.wrapped[generation]
	if wrapped == nil {
		return 0, fmt.Errorf("%s: %w", keyspec.StorageGeneration(generation).Label(), ErrNoKey)
	}
	return s.Own(keyspec.StorageGeneration(generation).Label(), func() (pkcs11.ObjectHandle, error) {
		private, err := keyop.Receiver(s, keyspec.RotationLabel, r.to)
		if err != nil {
			return 0, err
		}
		here := ck.Attributes{ck.Attr(pkcs11.CKA_PRIVATE, true), ck.Attr(pkcs11.CKA_TOKEN, false)}
		h, err := s.Unwrap(keyspec.OAEP, private, wrapped, ck.Frozen(keyspec.ImportedKEK, keyspec.BySealing, here))
		return h, p11.Explain("unwrap "+keyspec.StorageGeneration(generation).Label(), err)
	})
}

// SealedFrom is the smallest value, byte by byte, of a KME that is sealed under this generation of the storage key or a
// later one.
func SealedFrom(generation int) []byte { return []byte{byte(generation)} }

// StorageGenerations gives those that the token has, in ascending order.
func (t *OperatorToken) StorageGenerations(ctx context.Context) (all []int, err error) {
	return doAs(ctx, t.base, Operator, "look for storage keys", func(s *p11.Session) (all []int, err error) {
		for k := range keyspec.Storage.Generations() {
			_, err := t.find(s, pkcs11.CKO_SECRET_KEY, k)
			if err == nil {
				all = append(all, k.Generation)
			} else if !errors.Is(err, ErrNoKey) {
				return nil, err
			}
		}
		return all, nil
	})
}

// DestroyStorageKey ends an earlier generation of the storage key for good, and with it whatever is sealed under it. It
// refuses the newest.
func (t *OperatorToken) DestroyStorageKey(ctx context.Context, generation int) error {
	return t.as(ctx, Operator, "destroy a storage key", func(s *p11.Session) error {
		t.sealing.Store(nil)
		newest, _, err := t.newestStorage(s)
		if err == nil && generation >= newest {
			err = fmt.Errorf("generation %d of the storage key is in use", generation)
		}
		if err != nil {
			return err
		}
		return t.destroy(s, pkcs11.CKO_SECRET_KEY, keyspec.StorageGeneration(generation))
	})
}
