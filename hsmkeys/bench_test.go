package hsmkeys

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/keyop"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// An operator's token with a lot of 2048 bits, and a payload to it.
func benchOperator(b testing.TB) (*OperatorToken, Payload) {
	token := newOperator(b)
	softhsmtest.AsServed(b, token.Sessions())
	key := must[*rsa.PrivateKey](b)(testkeys.RSA(2048))
	lot := Key{Role: RoleLot, Manufacturer: manufacturer, Name: "BENCH"}
	importLot(b, token, lot, key)
	device := must[*ecdsa.PrivateKey](b)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	p := kme.Plaintext{KME: kme.RandomSecret(), RME: kme.RandomSecret()}
	p.Sig = must[[]byte](b)(kme.SuiteECDSA.Sign(device, p.KME.Bytes()))
	payload := must[[]byte](b)(kme.SuiteECDSA.Encrypt(&key.PublicKey, &p))
	return token, Payload{Suite: kme.SuiteECDSA, Lot: lot, N: &key.PublicKey, Device: &device.PublicKey, Bytes: payload}
}

// parallel runs f on so many goroutines, and reports what an operation takes of all cores together: unlike the time,
// other work changes it little.
func parallel(b *testing.B, goroutines int, f func(*testing.PB)) {
	used := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	b.SetParallelism(max(1, goroutines/runtime.GOMAXPROCS(0)))
	b.ReportAllocs()
	b.ResetTimer()
	before := used()
	b.RunParallel(f)
	b.ReportMetric(float64((used()-before).Nanoseconds())/1e3/float64(b.N), "cpu-us/op")
}

// sessions runs f on all sessions of the token at once. It leaves no more in them than the pool would.
func sessions(b *testing.B, token *OperatorToken, f func(s *p11.Session) error) {
	parallel(b, token.Sessions(), func(pb *testing.PB) {
		for more := true; more; {
			err := token.hsm.With(b.Context(), "test", func(s *p11.Session) error {
				for range 32 {
					if more = pb.Next(); !more {
						return nil
					}
					if err := f(s); err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				b.Error(err)
				return
			}
		}
	})
}

func BenchmarkRawDecrypt(b *testing.B) {
	token, p := benchOperator(b)
	h := token.mustFind(b, pkcs11.CKO_PRIVATE_KEY, p.Lot)
	sessions(b, token, func(s *p11.Session) error { _, err := keyop.Decrypt(s, h, p.Bytes); return err })
}

func BenchmarkVerify(b *testing.B) {
	token, p := benchOperator(b)
	sig := keyop.StandIn(p.Suite)
	signed := make([]byte, 32)
	sessions(b, token, func(s *p11.Session) error {
		_, err := keyop.VerifyKME(s, p.Suite, p.Device, signed, sig)
		return err
	})
}

func BenchmarkTag(b *testing.B) {
	token, _ := benchOperator(b)
	h := token.mustFind(b, pkcs11.CKO_SECRET_KEY, keyspec.Ledger)
	data := make([]byte, 32)
	sessions(b, token, func(s *p11.Session) error { _, err := keyop.HMAC(s, h, data); return err })
}

func BenchmarkSeal(b *testing.B) {
	token, _ := benchOperator(b)
	h := token.mustFind(b, pkcs11.CKO_SECRET_KEY, keyspec.Storage)
	secret := kme.RandomSecret()
	sessions(b, token, func(s *p11.Session) error { _, err := keyop.Seal(s, 1, h, secret); return err })
}

func BenchmarkOpenPayload(b *testing.B) {
	token, p := benchOperator(b)
	parallel(b, token.Sessions(), func(pb *testing.PB) {
		for pb.Next() {
			if o, err := token.OpenPayload(b.Context(), p); err != nil || o.Fault != FaultNone {
				b.Error(err, o)
			}
		}
	})
}

func BenchmarkEncryptRAND(b *testing.B) {
	token, _ := benchOperator(b)
	_, sealed, err := token.sample(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	parallel(b, token.Sessions(), func(pb *testing.PB) {
		for pb.Next() {
			if _, err := token.EncryptRANDs(b.Context(), sealed, make([]RAND, 1)); err != nil {
				b.Error(err)
			}
		}
	})
}

func BenchmarkMakeDeviceKey(b *testing.B) {
	token, _ := newFactory(b, nil)
	softhsmtest.AsServed(b, token.Sessions())
	parallel(b, token.Sessions(), func(pb *testing.PB) {
		for pb.Next() {
			if _, _, err := token.MakeDeviceKey(b.Context(), kme.SuiteECDSA, testInjection); err != nil {
				b.Error(err)
			}
		}
	})
}

// The budgets of what operations leave to the garbage collector, beside what the token does.
func TestAllocations(t *testing.T) {
	token, p := benchOperator(t)
	sealed := must[*Opened](t)(token.OpenPayload(t.Context(), p)).Sealed
	for _, c := range []struct {
		what string
		most float64
		do   func() error
	}{
		{"payload", 90, func() error { _, err := token.OpenPayload(t.Context(), p); return err }},
		{"RAND", 30, func() error { _, err := token.EncryptRANDs(t.Context(), sealed, make([]RAND, 1)); return err }},
	} {
		n := testing.AllocsPerRun(50, func() {
			if err := c.do(); err != nil {
				t.Fatal(err)
			}
		})
		if t.Logf("%v allocations a %s", n, c.what); n > c.most {
			t.Errorf("%v allocations a %s, not at most %v", n, c.what, c.most)
		}
	}
}
