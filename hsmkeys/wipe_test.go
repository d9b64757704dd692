package hsmkeys

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"math/big"
	"slices"
	"testing"

	"github.com/kmehsm/kmehsm/internal/memscan"
	"github.com/kmehsm/kmehsm/internal/testkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// When a payload has been opened, neither its KME nor its RME stands anywhere in this program's memory; nor when it was
// refused, or when its KME has been exported and wiped.
func TestSecretsAreWiped(t *testing.T) {
	token := newOperator(t)
	key := must[*rsa.PrivateKey](t)(testkeys.RSA(3072))
	lot := Key{Role: RoleLot, Manufacturer: manufacturer, Name: "L1"}
	importLot(t, token, lot, key)
	p256 := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	rsa2048 := must[*rsa.PrivateKey](t)(testkeys.RSA(2048))
	memory := memscan.Of(t)
	for _, suite := range kme.Suites {
		for name, c := range map[string]struct {
			good, inSoftware bool
		}{"good": {true, false}, "refused": {false, false}, "verified in software": {true, true}} {
			t.Run(string(suite)+", "+name, func(t *testing.T) {
				var device crypto.Signer = p256
				if suite == kme.SuiteRSA {
					device = rsa2048
				}
				token.verifyInSoftware = c.inSoftware
				defer func() { token.verifyInSoftware = false }()
				in := Payload{Suite: suite, Lot: lot, N: &key.PublicKey, Device: device.Public(),
					For: kme.Context{Lot: "L1"}}
				p := kme.Plaintext{KME: kme.RandomSecret(), RME: kme.RandomSecret()}
				signed := suite.Signed(in.For, &p)
				p.Sig = must[[]byte](t)(suite.Sign(device, signed))
				clear(signed)
				if !c.good {
					p.Sig[40] ^= 1
				}
				in.Bytes = must[[]byte](t)(suite.Encrypt(&key.PublicKey, &p))
				needles := []memscan.Needle{memory.Take(p.KME.Bytes()), memory.Take(p.RME.Bytes())}
				p.Wipe()
				left := func(when string) {
					t.Helper()
					if found := memory.Find(needles); !slices.Equal(found, make([]int, len(needles))) {
						t.Errorf("%s: they stand at %v places", when, found)
					}
				}
				left("made")
				if o := must[*Opened](t)(token.OpenPayload(t.Context(), in)); (o.Fault == FaultNone) != c.good {
					t.Fatalf("fault %q", o.Fault)
				}
				left("opened")
				secret := must[kme.Secret](t)(token.ExportKME(t.Context(), in))
				secret.Wipe()
				left("exported")
			})
		}
	}
}

// Whoever has a payload and a power of its plaintext whose exponent is a power of two finds the plaintext: 65537 is
// odd. None of them is left of making one.
func TestPowersAreWiped(t *testing.T) {
	lot := must[*rsa.PrivateKey](t)(testkeys.RSA(2048))
	memory := memscan.Of(t)
	p := kme.Plaintext{KME: kme.RandomSecret(), Sig: make([]byte, kme.SuiteECDSA.SignatureSize()),
		RME: kme.RandomSecret()}
	power := new(big.Int).SetBytes(slices.Concat(p.KME.Bytes(), p.Sig, p.RME.Bytes()))
	var needles []memscan.Needle
	for range 17 {
		low := power.FillBytes(make([]byte, lot.Size()))
		slices.Reverse(low) // as math/big has it in memory
		needles = append(needles, memory.Take(low[:64]))
		clear(low)
		power = new(big.Int).Exp(power, big.NewInt(2), lot.N)
	}
	before := memory.Find(needles) // what this test has left of them
	must[[]byte](t)(kme.SuiteECDSA.Encrypt(&lot.PublicKey, &p))
	for i, after := range memory.Find(needles) {
		if after > before[i] {
			t.Errorf("m^(2^%d) is left at %d places", i, after-before[i])
		}
	}
}
