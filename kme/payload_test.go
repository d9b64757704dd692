package kme

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"os"
	"strings"
	"testing"
)

type vector struct {
	Name, Suite, Expect, Why string
	Lot                      string `json:"lot_key"`
	Device                   []byte `json:"device_public_key_spki_b64"`
	KME                      string `json:"kme_hex"`
	Sig                      string `json:"kme_sig_hex"`
	RME                      string `json:"rme_hex"`
	Payload                  string `json:"payload_hex"`
	NWSig                    string `json:"nw_sig_hex"`
}

func vectors(t testing.TB) (lots map[string]*rsa.PrivateKey, all []vector) {
	t.Helper()
	data, err := os.ReadFile("testdata/kme-payload.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Lots []struct {
			Name string
			Key  string `json:"private_key_pkcs8_pem"`
		}
		Vectors []vector
	}
	if err := json.Unmarshal(data, &file); err != nil {
		t.Fatal(err)
	}
	lots = map[string]*rsa.PrivateKey{}
	for _, l := range file.Lots {
		block, _ := pem.Decode([]byte(l.Key))
		key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		lots[l.Name] = key.(*rsa.PrivateKey)
	}
	if len(lots) == 0 || len(file.Vectors) < 50 {
		t.Fatal("the known answers are not all there")
	}
	return lots, file.Vectors
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// open is the network's side in software: what OpenPayload of a token does.
func open(suite Suite, lot *rsa.PrivateKey, device crypto.PublicKey, payload []byte) (p Plaintext, fault string) {
	reduced, inRange, err := ReducePayload(&lot.PublicKey, payload)
	if err != nil {
		return p, "length"
	}
	raw := new(big.Int).Exp(new(big.Int).SetBytes(reduced), lot.D, lot.N)
	p, lead := suite.Split(raw.Bytes()) // as a token that strips zeros
	switch {
	case !inRange:
		return p, "range"
	case !lead:
		return p, "layout"
	case !suite.Verify(device, p.KME.Bytes(), p.Sig):
		return p, "signature"
	}
	return p, ""
}

func TestVectors(t *testing.T) {
	lots, all := vectors(t)
	for _, v := range all {
		t.Run(v.Name, func(t *testing.T) {
			suite, err := ParseSuite(v.Suite)
			if err != nil {
				t.Fatal(err)
			}
			device, err := x509.ParsePKIXPublicKey(v.Device)
			if err != nil {
				t.Fatal(err)
			}
			payload := unhex(t, v.Payload)
			p, fault := open(suite, lots[v.Lot], device, payload)
			if v.Expect == "reject" {
				// A short plaintext may look like one whose KME begins with zeros: then the signature finds it.
				if fault != v.Why && !(v.Why == "layout" && fault == "signature") {
					t.Errorf("fault %q, want %q", fault, v.Why)
				}
				return
			}
			if fault != "" {
				t.Fatalf("fault %q", fault)
			}
			nwSig := p.NWSig()
			for name, pair := range map[string][2][]byte{
				"KME": {p.KME.Bytes(), unhex(t, v.KME)}, "KME_SIG": {p.Sig, unhex(t, v.Sig)},
				"RME": {p.RME.Bytes(), unhex(t, v.RME)}, "NW_SIG": {nwSig[:], unhex(t, v.NWSig)},
			} {
				if !bytes.Equal(pair[0], pair[1]) {
					t.Errorf("%s is %x, want %x", name, pair[0], pair[1])
				}
			}
			// And the ME's side.
			kme, _ := NewSecret(unhex(t, v.KME))
			rme, _ := NewSecret(unhex(t, v.RME))
			made, err := suite.Encrypt(&lots[v.Lot].PublicKey, &Plaintext{kme, unhex(t, v.Sig), rme})
			if err != nil || !bytes.Equal(made, payload) {
				t.Errorf("the ME makes %x, %v", made, err)
			}
		})
	}
}

func TestSuites(t *testing.T) {
	for _, c := range []struct {
		suite    Suite
		sig, all int
		bits     string
	}{{SuiteECDSA, 64, 128, "[2048 3072 4096]"}, {SuiteRSA, 256, 320, "[3072 4096]"}} {
		if c.suite.SignatureSize() != c.sig || c.suite.PlaintextSize() != c.all {
			t.Errorf("%s: %d, %d", c.suite, c.suite.SignatureSize(), c.suite.PlaintextSize())
		}
		for _, bits := range []int{1024, 2047, 2048, 2049, 3072, 4096, 8192} {
			n := new(big.Int).SetBit(big.NewInt(1), bits-1, 1)
			want := strings.Contains(c.bits, big.NewInt(int64(bits)).String())
			for _, e := range []int{3, 65536, 65537, 65539} {
				if err := c.suite.CheckLot(&rsa.PublicKey{N: n, E: e}); (err == nil) != (want && e == 65537) {
					t.Errorf("%s, %d bits, e = %d: %v", c.suite, bits, e, err)
				}
			}
		}
	}
	for _, s := range []string{"", "tr33868", "TR33868-ECDSA-P256", "bound-ecdsa-p256"} {
		if _, err := ParseSuite(s); err == nil {
			t.Errorf("there is a suite %q", s)
		}
	}
}

func TestSignAndVerify(t *testing.T) {
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	rsa3072, _ := rsa.GenerateKey(rand.Reader, 3072)
	for _, c := range []struct {
		suite Suite
		key   crypto.Signer
		ok    bool
	}{
		{SuiteECDSA, p256, true}, {SuiteECDSA, p384, false}, {SuiteECDSA, rsa2048, false},
		{SuiteRSA, rsa2048, true}, {SuiteRSA, rsa3072, false}, {SuiteRSA, p256, false},
	} {
		kme := RandomSecret().Bytes()
		sig, err := c.suite.Sign(c.key, kme)
		if (err == nil) != c.ok {
			t.Errorf("%s with %T: %v", c.suite, c.key, err)
			continue
		}
		if !c.ok {
			if c.suite.Verify(c.key.Public(), kme, make([]byte, c.suite.SignatureSize())) {
				t.Error("a key that does not go with the suite verifies")
			}
			continue
		}
		if len(sig) != c.suite.SignatureSize() || !c.suite.Verify(c.key.Public(), kme, sig) {
			t.Errorf("%s does not verify its own", c.suite)
		}
		for name, bad := range map[string][]byte{"a bit changed": flip(sig), "short": sig[1:],
			"long": append(sig[:len(sig):len(sig)], 0), "none": nil} {
			if c.suite.Verify(c.key.Public(), kme, bad) {
				t.Errorf("%s: %s verifies", c.suite, name)
			}
		}
		if c.suite.Verify(c.key.Public(), RandomSecret().Bytes(), sig) {
			t.Errorf("%s verifies for another KME", c.suite)
		}
	}
	// DER is refused: its length varies.
	digest := sha256.Sum256(RandomSecret().Bytes())
	der, err := ecdsa.SignASN1(rand.Reader, p256, digest[:])
	if err != nil || SuiteECDSA.Verify(p256.Public(), RandomSecret().Bytes(), der) {
		t.Error("DER verifies", err)
	}
	//lint:ignore SA1019 no other way makes a point that is not on the curve
	off := &ecdsa.PublicKey{Curve: elliptic.P256(), X: big.NewInt(1), Y: big.NewInt(1)}
	if SuiteECDSA.CheckDevice(off) == nil {
		t.Error("a point that is not on the curve passes")
	}
}

func flip(b []byte) []byte {
	c := bytes.Clone(b)
	c[len(c)/2] ^= 1
	return c
}

func TestEncryptRefuses(t *testing.T) {
	lots, _ := vectors(t)
	lot := &lots["lot-2048"].PublicKey
	good := Plaintext{RandomSecret(), make([]byte, 64), RandomSecret()}
	for name, c := range map[string]struct {
		suite Suite
		lot   *rsa.PublicKey
		p     Plaintext
	}{
		"no KME":       {SuiteECDSA, lot, Plaintext{Secret{}, good.Sig, good.RME}},
		"no RME":       {SuiteECDSA, lot, Plaintext{good.KME, good.Sig, Secret{}}},
		"DER":          {SuiteECDSA, lot, Plaintext{good.KME, make([]byte, 70), good.RME}},
		"RSA and 2048": {SuiteRSA, lot, Plaintext{good.KME, make([]byte, 256), good.RME}},
		"even e":       {SuiteECDSA, &rsa.PublicKey{N: lot.N, E: 65536}, good},
	} {
		if c, err := c.suite.Encrypt(c.lot, &c.p); err == nil {
			t.Errorf("%s: %d bytes", name, len(c))
		}
	}
}

func FuzzSplit(f *testing.F) {
	f.Add([]byte{}, true)
	f.Add(make([]byte, 384), false)
	f.Fuzz(func(t *testing.T, raw []byte, ecdsa bool) {
		suite := SuiteRSA
		if ecdsa {
			suite = SuiteECDSA
		}
		p, ok := suite.Split(raw)
		joined := append(append(bytes.Clone(p.KME.Bytes()), p.Sig...), p.RME.Bytes()...)
		if len(joined) != suite.PlaintextSize() {
			t.Fatalf("%d bytes", len(joined))
		}
		a, b := new(big.Int).SetBytes(raw), new(big.Int).SetBytes(joined)
		if ok != (a.Cmp(b) == 0) {
			t.Errorf("ok is %v, and the number is %x, not %x", ok, b, a)
		}
	})
}

func FuzzRoundTrip(f *testing.F) {
	lots, all := vectors(f)
	f.Add(bytes.Repeat([]byte{0, 1}, 64))
	f.Fuzz(func(t *testing.T, m []byte) {
		// 0 and 1 are no plaintexts: see ReducePayload
		if len(m) < 128 || new(big.Int).SetBytes(m[:128]).BitLen() <= 1 {
			return
		}
		kme, _ := NewSecret(m[:32])
		rme, _ := NewSecret(m[96:128])
		lot := lots["lot-2048"]
		payload, err := SuiteECDSA.Encrypt(&lot.PublicKey, &Plaintext{kme, m[32:96], rme})
		if err != nil || len(payload) != 256 {
			t.Fatal(len(payload), err)
		}
		device, err := x509.ParsePKIXPublicKey(all[0].Device)
		if err != nil {
			t.Fatal(err)
		}
		p, fault := open(SuiteECDSA, lot, device, payload)
		if fault != "signature" || !p.KME.Equal(kme) || !p.RME.Equal(rme) || !bytes.Equal(p.Sig, m[32:96]) {
			t.Errorf("fault %q", fault)
		}
	})
}

func FuzzReducePayload(f *testing.F) {
	lots, all := vectors(f)
	for _, v := range all {
		f.Add(unhex(f, v.Payload))
	}
	lot := &lots["lot-2048"].PublicKey
	f.Fuzz(func(t *testing.T, payload []byte) {
		reduced, ok, err := ReducePayload(lot, payload)
		if (err == nil) != (len(payload) == 256) {
			t.Fatal(len(payload), err)
		}
		if err != nil {
			return
		}
		c, r := new(big.Int).SetBytes(payload), new(big.Int).SetBytes(reduced)
		want, last := new(big.Int).Mod(c, lot.N), new(big.Int).Sub(lot.N, big.NewInt(1))
		if want.Cmp(big.NewInt(1)) <= 0 || want.Cmp(last) == 0 {
			want.SetInt64(2)
		}
		if len(reduced) != 256 || ok != (c.Cmp(lot.N) < 0) || want.Cmp(r) != 0 {
			t.Errorf("%x became %x, %v", payload, reduced, ok)
		}
	})
}

// Reduce, and take apart: what is done in software for each payload besides NW_SIG.
func BenchmarkPayload(b *testing.B) {
	key, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		b.Fatal(err)
	}
	payload := make([]byte, PayloadSize(&key.PublicKey))
	payload[len(payload)-1] = 2
	b.ReportAllocs()
	for b.Loop() {
		raw, _, err := ReducePayload(&key.PublicKey, payload)
		if err != nil {
			b.Fatal(err)
		}
		p, _ := SuiteECDSA.Split(raw)
		p.NWSig()
		p.Wipe()
	}
}
