package kme

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"math/big"
	"slices"
	"strings"
	"testing"
)

// What the bound suite signs is written down byte by byte, and every part of it counts.
func TestSigned(t *testing.T) {
	must := func(imei, imsi string) (IMEI, IMSI) {
		i, err := ParseIMEI(imei)
		if err != nil {
			t.Fatal(err)
		}
		m, err := ParseIMSI(imsi)
		if err != nil {
			t.Fatal(err)
		}
		return i, m
	}
	imei, imsi := must("35209900000001", "001010123456789")
	one, _ := NewSecret(bytes.Repeat([]byte{1}, 32))
	two, _ := NewSecret(bytes.Repeat([]byte{2}, 32))
	p := &Plaintext{KME: one, RME: two}
	want := "kme-binding-v2\x00\x02L135209900000001\x0f001010123456789" + strings.Repeat("\x01", 32) +
		strings.Repeat("\x02", 32)
	if got := SuiteBound.Signed(Context{"L1", imei, imsi}, p); string(got) != want {
		t.Errorf("%q, want %q", got, want)
	}
	for _, s := range []Suite{SuiteECDSA, SuiteRSA} {
		if !bytes.Equal(s.Signed(Context{"L1", imei, imsi}, p), one.Bytes()) {
			t.Errorf("%s signs more than KME", s)
		}
	}
	otherIMEI, otherIMSI := must("35209900000002", "00101012345678")
	for _, c := range []Context{{"L2", imei, imsi}, {"L13", imei, imsi}, {"L1", otherIMEI, imsi},
		{"L1", imei, otherIMSI}} {
		if string(SuiteBound.Signed(c, p)) == want {
			t.Errorf("%+v signs the same", c)
		}
	}
	if string(SuiteBound.Signed(Context{"L1", imei, imsi}, &Plaintext{KME: one, RME: one})) == want {
		t.Error("another RME signs the same")
	}
}

func TestOAEP(t *testing.T) {
	lot, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p := &Plaintext{KME: RandomSecret(), RME: RandomSecret()}
	if p.Sig, err = SuiteBound.Sign(key, SuiteBound.Signed(Context{}, p)); err != nil {
		t.Fatal(err)
	}
	for _, bits := range SuiteBound.ModulusBits() {
		if bits != 2048 {
			if lot, err = rsa.GenerateKey(rand.Reader, bits); err != nil {
				t.Fatal(err)
			}
		}
		c, err := SuiteBound.Encrypt(&lot.PublicKey, p)
		if err != nil || len(c) != bits/8 {
			t.Fatal(len(c), err)
		}
		// Both ways, by another implementation.
		if m, err := rsa.DecryptOAEP(sha256.New(), nil, lot, c, nil); err != nil ||
			!bytes.Equal(m, slices.Concat(p.KME.Bytes(), p.Sig, p.RME.Bytes())) {
			t.Errorf("crypto/rsa decrypts it to %x, %v", m, err)
		}
		raw := new(big.Int).Exp(new(big.Int).SetBytes(c), lot.D, lot.N).FillBytes(make([]byte, bits/8))
		check := func(name string, raw []byte, want bool) {
			t.Helper()
			got, ok := SuiteBound.Split(raw)
			if ok != want || want && !(got.KME.Equal(p.KME) && got.RME.Equal(p.RME) && bytes.Equal(got.Sig, p.Sig)) {
				t.Errorf("%d bits, %s: %v", bits, name, ok)
			}
		}
		check("as it is", bytes.Clone(raw), true)
		for i := range raw {
			bad := bytes.Clone(raw)
			bad[i] ^= 1 << (i % 8)
			_, ok := SuiteBound.Split(bad)
			// A change of the message itself, at the end, is for the signature to find; any in the
			// seed or in the mask changes all.
			if i < len(raw)-SuiteBound.PlaintextSize() && ok {
				t.Fatalf("%d bits: byte %d changed, and it is taken", bits, i)
			}
		}
		for _, other := range []int{127, 129, 0} { // of another length
			c, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, &lot.PublicKey, make([]byte, other), nil)
			if err != nil {
				t.Fatal(err)
			}
			raw := new(big.Int).Exp(new(big.Int).SetBytes(c), lot.D, lot.N).FillBytes(make([]byte, bits/8))
			check("another length", raw, false)
		}
		check("a byte short", bytes.Clone(raw[1:]), false)
		check("nothing", nil, false)
	}
	if SuiteECDSA.CheckOAEP("") != nil || SuiteECDSA.CheckOAEP(OAEPHash) == nil || SuiteBound.CheckOAEP("") == nil ||
		SuiteBound.CheckOAEP("SHA-1") == nil || SuiteBound.CheckOAEP(OAEPHash) != nil {
		t.Error("a hash goes with another suite")
	}
}
