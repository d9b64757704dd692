package hsmkeys

import (
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"
)

// The yardstick: what the token does in a second when nothing is asked of it but the operation that the rest has to be made for. It
// has sessions of its own, and the calls are those of miekg/pkcs11, as a loop that anybody writes makes them.

// BareDecryptions is the yardstick of OpenPayload: raw decryptions a second with a lot key.
func (t *Token) BareDecryptions(ctx context.Context, lot Key, n *rsa.PublicKey, d time.Duration) (float64, error) {
	block := make([]byte, n.Size())
	block[len(block)-1] = 2
	return t.bare(ctx, d, pkcs11.CKO_PRIVATE_KEY, lot, func(s *session, h pkcs11.ObjectHandle) error {
		if err := s.DecryptInit(s.h, mechanism(pkcs11.CKM_RSA_X_509), h); err != nil {
			return explain("decrypt", err)
		}
		_, err := s.Decrypt(s.h, block)
		return explainIf("decrypt", err)
	})
}

// BareDeviceKeys is the yardstick of MakeDeviceKey in the suites with P-256: key pairs a second that are made, wrapped and destroyed. Their private keys
// are PRIVATE, as tokens make them unless told otherwise.
func (t *Token) BareDeviceKeys(ctx context.Context, injection Key, d time.Duration) (float64, error) {
	return t.bare(ctx, d, pkcs11.CKO_SECRET_KEY, injection, func(s *session, w pkcs11.ObjectHandle) error {
		hp, h, err := s.GenerateKeyPair(s.h, mechanism(pkcs11.CKM_EC_KEY_PAIR_GEN), devicePublic, join(guarded(true), attributes{attr(pkcs11.CKA_TOKEN, false)}))
		if err != nil {
			return explain("make a device key", err)
		}
		_, err = s.WrapKey(s.h, mechanism(t.kwp), w, h)
		return errors.Join(err, s.DestroyObject(s.h, hp), s.DestroyObject(s.h, h))
	})
}

// bareSessions are those for each core with which SoftHSM is the fastest at it: a loop has nothing else to do while it waits.
const bareSessions = 4

// bare runs f on many sessions for as long as d, and gives how often a second.
func (t *Token) bare(ctx context.Context, d time.Duration, class uint, k Key, f func(*session, pkcs11.ObjectHandle) error) (float64, error) {
	var n atomic.Int64
	var all sync.WaitGroup
	errs := make([]error, bareSessions*runtime.GOMAXPROCS(0))
	start := time.Now()
	for i := range errs {
		all.Go(func() {
			_, errs[i] = noPanic(t, func() (none struct{}, err error) {
				s, err := t.openSession()
				if err != nil {
					return none, err
				}
				defer s.CloseSession(s.h)
				h, err := t.find(s, class, k)
				for err == nil && ctx.Err() == nil && time.Since(start) < d {
					err = f(s, h)
					n.Add(1)
				}
				return none, err
			})
		})
	}
	all.Wait()
	if err := errors.Join(append(errs, ctx.Err())...); err != nil {
		return 0, fmt.Errorf("the bare token cannot be measured: %w", err)
	}
	return float64(n.Load()) / time.Since(start).Seconds(), nil
}
