package kme

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"math/big"
	"slices"
	"testing"

	"github.com/kmehsm/kmehsm/internal/memscan"
)

// What a payload holds stands nowhere in memory any more when it has been made, or taken apart, and wiped: no half of KME or RME, in whichever order
// of bytes, and no seed of the padding, which gives the rest of it.
func TestNothingIsLeft(t *testing.T) {
	lot, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	about := Context{Lot: "L1"}
	for _, suite := range Suites {
		device := map[bool]crypto.Signer{true: rsa2048, false: p256}[suite == SuiteRSA]
		p := &Plaintext{KME: RandomSecret(), RME: RandomSecret()}
		var needles []memscan.Needle
		for _, s := range []Secret{p.KME, p.RME} {
			for _, half := range [][]byte{s.Bytes()[:16], s.Bytes()[16:]} {
				reversed := bytes.Clone(half)
				slices.Reverse(reversed) // as math/big has it
				needles = append(needles, memscan.Take(t, bytes.Clone(half)), memscan.Take(t, reversed))
			}
		}
		left := func(when string, known int) {
			t.Helper()
			for i, n := range needles {
				known := known
				if i%2 == 1 {
					known = 0
				}
				if found := memscan.Find(t, n); found != known {
					t.Errorf("%s, %s: needle %d stands at %d places, and %d are known", suite, when, i, found, known)
				}
			}
		}
		signed := suite.Signed(about, p)
		if p.Sig, err = suite.Sign(device, signed); err != nil {
			t.Fatal(err)
		}
		clear(signed)
		left("signed", 1)
		payload, err := suite.Encrypt(&lot.PublicKey, p)
		if err != nil {
			t.Fatal(err)
		}
		left("encrypted", 1)
		var raw []byte // as the token gives it; math/big leaves copies of a plaintext that is not masked
		if suite == SuiteBound {
			raw = new(big.Int).Exp(new(big.Int).SetBytes(payload), lot.D, lot.N).FillBytes(make([]byte, 384))
			padded := bytes.Clone(raw)
			unpadOAEP(padded, suite.PlaintextSize())
			seed := memscan.Take(t, padded[1:33])
			clear(padded)
			defer func() {
				if found := memscan.Find(t, seed); found != 0 {
					t.Errorf("%s: the seed stands at %d places", suite, found)
				}
			}()
		} else {
			raw = slices.Concat(make([]byte, 384-suite.PlaintextSize()), p.KME.Bytes(), p.Sig, p.RME.Bytes())
		}
		p.Wipe()
		got, ok := suite.Split(raw)
		clear(raw)
		left("split", 1)
		signed = suite.Signed(about, &got)
		if !ok || !suite.Verify(device.Public(), signed, got.Sig) {
			t.Fatalf("%s: the payload is not taken", suite)
		}
		clear(signed)
		got.NWSig()
		got.Wipe()
		left("wiped", 0)
	}
}
