package hsmkeys

import (
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"sync"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// After 10,000 operations, good and bad, there are no more sessions, and no more objects, than before.
func TestNothingIsLeft(t *testing.T) {
	token := newOperator(t)
	v := vectors(t)
	block, _ := pem.Decode([]byte(v.Lots[0].Key))
	key := must[any](t)(x509.ParsePKCS8PrivateKey(block.Bytes)).(*rsa.PrivateKey)
	lot := Key{Role: RoleLot, Manufacturer: manufacturer, Name: v.Lots[0].Name}
	importLot(t, token, lot, key)
	var payloads []Payload
	for _, c := range v.Vectors {
		if c.Lot == v.Lots[0].Name && c.Why != "length" {
			suite := must[kme.Suite](t)(kme.ParseSuite(c.Suite))
			payloads = append(payloads, Payload{Suite: suite, Lot: lot, N: &key.PublicKey,
				Device: must[any](t)(x509.ParsePKIXPublicKey(c.Device)), Bytes: c.Payload})
		}
	}
	var sealed []byte // made below, when all objects have been counted
	run := func(n int) {
		t.Helper()
		var all sync.WaitGroup
		for w := range 8 {
			all.Go(func() {
				for i := range n / 8 {
					var err error
					switch i % 5 {
					case 0:
						_, err = token.OpenPayload(t.Context(), payloads[(w+i)%len(payloads)])
					case 1:
						_, err = token.DecryptRAND(t.Context(), sealed, [RANDSize]byte{})
					case 2: // fails in the token
						damaged := append([]byte{}, sealed...)
						damaged[3] ^= 1
						if _, derr := token.EncryptRANDs(t.Context(), damaged, make([]RAND, 1)); derr == nil {
							t.Error("a damaged KME was used")
						}
					default:
						_, err = token.EncryptRANDs(t.Context(), sealed, make([]RAND, 1))
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		all.Wait()
	}
	count := func() (sessions, objects int) {
		t.Helper()
		err := token.hsm.With(t.Context(), "test", func(s *p11.Session) error {
			info, _, err := token.hsm.Ask(s)
			if err != nil {
				return err
			}
			if info.SessionCount != pkcs11.CK_UNAVAILABLE_INFORMATION {
				sessions = int(info.SessionCount)
			} else {
				for h := range 100_000 { // SoftHSM counts its handles up
					if _, err := s.Ctx.GetSessionInfo(pkcs11.SessionHandle(h)); err == nil {
						sessions++
					}
				}
			}
			found, err := s.Find(nil)
			objects = len(found)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return sessions, objects
	}
	var sessions, objects int
	dropped := func() bool { _, n := count(); return n == objects }
	_, objects = count()
	_, sealed, err := token.sample(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	run(400)
	testproc.Await(t, "what the operations left is dropped", dropped)
	sessions, _ = count()
	run(10_000)
	testproc.Await(t, "what the operations left is dropped", dropped)
	if s, o := count(); s == 0 || s > sessions+token.Sessions() || o != objects {
		t.Errorf("%d sessions and %d objects, before %d and %d", s, o, sessions, objects)
	} else {
		t.Logf("%d sessions and %d objects, before %d and %d", s, o, sessions, objects)
	}
	if h := token.Health(); h.Hung != 0 || h.Reinitialised != 0 || h.Cause != nil {
		t.Errorf("%+v", h)
	}
}

// In software KME_SIG is validated as in the token, payload by payload.
func TestVerifyInSoftware(t *testing.T) {
	token := newOperator(t)
	v := vectors(t)
	for _, l := range v.Lots {
		block, _ := pem.Decode([]byte(l.Key))
		importLot(t, token, Key{Role: RoleLot, Manufacturer: manufacturer, Name: l.Name},
			must[any](t)(x509.ParsePKCS8PrivateKey(block.Bytes)).(*rsa.PrivateKey))
	}
	for _, c := range v.Vectors {
		if c.Why == "length" {
			continue
		}
		lot := Key{Role: RoleLot, Manufacturer: manufacturer, Name: c.Lot}
		in := Payload{Suite: must[kme.Suite](t)(kme.ParseSuite(c.Suite)), Lot: lot,
			N:      must[*rsa.PublicKey](t)(token.rsaPublicKey(t.Context(), lot)),
			Device: must[any](t)(x509.ParsePKIXPublicKey(c.Device)), Bytes: c.Payload}
		token.verifyInSoftware = false
		want := must[*Opened](t)(token.OpenPayload(t.Context(), in))
		token.verifyInSoftware = true
		if got := must[*Opened](t)(token.OpenPayload(t.Context(), in)); got.Fault != want.Fault ||
			got.NWSig != want.NWSig {
			t.Errorf("%s: fault %q in software, %q in the token", c.Name, got.Fault, want.Fault)
		}
	}
}
