package doctor

import (
	"cmp"
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyop"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
)

// The baseline: how often a second the token does the one operation that cannot be avoided, and nothing else. It uses
// sessions of its own, and plain calls of miekg/pkcs11, as anybody would write such a loop.

// BareDecryptions is the baseline of OpenPayload: raw decryptions a second with a lot key, on so many sessions; 0 for
// as many as are the fastest with SoftHSM.
func BareDecryptions(
	ctx context.Context, t *p11.Token, lot keyspec.Key, n *rsa.PublicKey, sessions int, d time.Duration,
) (float64, error) {
	block := make([]byte, n.Size())
	block[len(block)-1] = 2
	return bare(ctx, t, sessions, d, pkcs11.CKO_PRIVATE_KEY, lot, func(s *p11.Session, h pkcs11.ObjectHandle) error {
		if err := s.Ctx.DecryptInit(s.ID, ck.Mechanism(pkcs11.CKM_RSA_X_509), h); err != nil {
			return p11.Explain("decrypt", err)
		}
		_, err := s.Ctx.Decrypt(s.ID, block)
		return p11.Explain("decrypt", err)
	})
}

// BareDeviceKeys is the baseline of MakeDeviceKey in the suites with P-256: key pairs a second that are made, wrapped
// and destroyed. Their private keys are PRIVATE, which is the default of tokens.
func BareDeviceKeys(
	ctx context.Context, t *p11.Token, injection keyspec.Key, d time.Duration,
) (float64, error) {
	return bare(ctx, t, 0, d, pkcs11.CKO_SECRET_KEY, injection, func(s *p11.Session, w pkcs11.ObjectHandle) error {
		hp, h, err := s.Ctx.GenerateKeyPair(s.ID, ck.Mechanism(pkcs11.CKM_EC_KEY_PAIR_GEN), keyspec.DevicePublic,
			ck.Join(ck.Guarded(true), ck.Attributes{ck.Attr(pkcs11.CKA_TOKEN, false)}))
		if err != nil {
			return p11.Explain("make a device key", err)
		}
		_, err = s.Ctx.WrapKey(s.ID, ck.Mechanism(t.KWP()), w, h)
		return errors.Join(err, s.Destroy(hp), s.Destroy(h))
	})
}

// bareSessions is the number of sessions for each core with which SoftHSM is the fastest.
const bareSessions = 4

// bare runs f on many sessions for as long as d, and gives how often a second.
func bare(
	ctx context.Context, t *p11.Token, sessions int, d time.Duration, class uint, k keyspec.Key,
	f func(*p11.Session, pkcs11.ObjectHandle) error,
) (float64, error) {
	var n atomic.Int64
	var all sync.WaitGroup
	errs := make([]error, cmp.Or(sessions, bareSessions*runtime.GOMAXPROCS(0)))
	start := time.Now()
	for i := range errs {
		all.Go(func() {
			errs[i] = t.Beside(func(s *p11.Session) error {
				h, err := keyop.Find(t, s, class, k)
				for err == nil && ctx.Err() == nil && time.Since(start) < d {
					err = f(s, h)
					n.Add(1)
				}
				return err
			})
		})
	}
	all.Wait()
	if err := errors.Join(append(errs, ctx.Err())...); err != nil {
		return 0, fmt.Errorf("the bare token cannot be measured: %w", err)
	}
	return float64(n.Load()) / time.Since(start).Seconds(), nil
}
