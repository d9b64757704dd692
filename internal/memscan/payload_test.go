package memscan_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"math/big"
	"slices"
	"testing"

	"github.com/kmehsm/kmehsm/internal/memscan"
	"github.com/kmehsm/kmehsm/internal/testkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// What a payload holds stands nowhere in memory any more when it has been made, or taken apart, and wiped: neither KME
// nor RME, in whichever order of bytes, nor the seed of the padding, which gives the rest of it.
func TestSecretsAreWiped(t *testing.T) {
	lot, err := testkeys.RSA(3072)
	if err != nil {
		t.Fatal(err)
	}
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := testkeys.RSA(2048)
	if err != nil {
		t.Fatal(err)
	}
	memory := memscan.Of(t)
	about := kme.Context{Lot: "L1"}
	for _, suite := range kme.Suites {
		device := map[bool]crypto.Signer{true: rsa2048, false: p256}[suite == kme.SuiteRSA]
		p := &kme.Plaintext{KME: kme.RandomSecret(), RME: kme.RandomSecret()}
		needles := []memscan.Needle{memory.Take(p.KME.Bytes()), memory.Take(p.RME.Bytes())}
		for _, n := range needles[:2] {
			n = memory.Take(n)
			slices.Reverse(n) // as math/big has it
			needles = append(needles, n)
		}
		left := func(when string, want ...int) {
			t.Helper()
			if found := memory.Find(needles); !slices.Equal(found, want) {
				t.Errorf("%s, %s: they stand at %v places, want %v", suite, when, found, want)
			}
		}
		signed := suite.Signed(about, p)
		if p.Sig, err = suite.Sign(device, signed); err != nil {
			t.Fatal(err)
		}
		clear(signed)
		left("signed", 1, 1, 0, 0)
		payload, err := suite.Encrypt(&lot.PublicKey, p)
		if err != nil {
			t.Fatal(err)
		}
		left("encrypted", 1, 1, 0, 0)
		var raw []byte // as the token gives it; math/big leaves copies of a plaintext that is not masked
		if suite == kme.SuiteBound {
			raw = new(big.Int).Exp(new(big.Int).SetBytes(payload), lot.D, lot.N).FillBytes(make([]byte, 384))
			// MGF1's first block (RFC 8017 appendix B.2.1)
			mask := sha256.Sum256(slices.Concat(raw[33:], make([]byte, 4)))
			subtle.XORBytes(mask[:], mask[:], raw[1:33])
			seed := memory.Take(mask[:])
			clear(mask[:])
			defer func() {
				if found := memory.Find([]memscan.Needle{seed}); found[0] != 0 {
					t.Errorf("%s: the seed stands at %v places", suite, found)
				}
			}()
		} else {
			raw = slices.Concat(make([]byte, 384-suite.PlaintextSize()), p.KME.Bytes(), p.Sig, p.RME.Bytes())
		}
		p.Wipe()
		got, ok := suite.Split(raw)
		clear(raw)
		left("split", 1, 1, 0, 0)
		signed = suite.Signed(about, &got)
		if !ok || !suite.Verify(device.Public(), signed, got.Sig) {
			t.Fatalf("%s: the payload is not taken", suite)
		}
		clear(signed)
		got.NWSig()
		got.Wipe()
		left("wiped", make([]int, len(needles))...)
	}
}
