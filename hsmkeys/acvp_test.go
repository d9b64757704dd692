package hsmkeys

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"maps"
	"math/big"
	"os"
	"strconv"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyop"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/kme"
)

// An acvpCase has a key of its own. The parts of it for the Chinese remainder theorem are missing in some groups, and
// so computed: OpenSSL, below SoftHSM, decrypts by d alone where they are wrong.
type acvpCase struct {
	ID                                      int `json:"tcId"`
	TestPassed                              bool
	CT, PT, N, E, D, P, Q, DMP1, DMQ1, IQMP hexBytes
}

func (c *acvpCase) key(t *testing.T) *rsa.PrivateKey {
	n, e, d, p, q := number(c.N), number(c.E), number(c.D), number(c.P), number(c.Q)
	part := func(given hexBytes, computed *big.Int) *big.Int {
		if len(given) > 0 && number(given).Cmp(computed) != 0 {
			t.Errorf("d, p and q give %x, and the case has %x", computed, given)
		}
		return computed
	}
	one := big.NewInt(1)
	key := &rsa.PrivateKey{PublicKey: rsa.PublicKey{N: n, E: int(e.Int64())}, D: d, Primes: []*big.Int{p, q}}
	key.Precomputed.Dp = part(c.DMP1, new(big.Int).Mod(d, new(big.Int).Sub(p, one)))
	key.Precomputed.Dq = part(c.DMQ1, new(big.Int).Mod(d, new(big.Int).Sub(q, one)))
	key.Precomputed.Qinv = part(c.IQMP, new(big.Int).ModInverse(q, p))
	return key
}

// What the token decrypts for a case.
const (
	decrypted = "the ciphertext"
	two       = "2 in the place of 0, 1 or N-1"
	notBelow  = "what is left of the ciphertext modulo N"
)

func number(b []byte) *big.Int { return new(big.Int).SetBytes(b) }

// NIST ACVP's vectors of raw decryption (SP 800-56B Rev. 2 section 7.1.2.1) on a token, through the calls that open
// payloads.
//
// A ciphertext c with 1 < c < N-1 must become the plaintext that the case names. Any other has to be refused: the token
// must get what ReducePayload puts in its place. None of the plaintexts is a payload's, so OpenPayload refuses them
// all; NW_SIG shows what it has decrypted. The counts are exact.
func TestACVP(t *testing.T) {
	v := newVectorToken(t)
	device := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)).Public()
	var vectors struct {
		TestGroups []struct {
			Modulo  int
			KeyMode string
			Tests   []acvpCase
		}
	}
	data := must[[]byte](t)(os.ReadFile("testdata/acvp/RSA-DecryptionPrimitive-Sp800-56Br2.json"))
	if err := json.Unmarshal(data, &vectors); err != nil {
		t.Fatal(err)
	}
	want := map[string]int{decrypted: 11, two: 3, notBelow: 1}
	groups := map[string]bool{}
	for _, g := range vectors.TestGroups {
		name := fmt.Sprintf("%d %s", g.Modulo, g.KeyMode)
		groups[name] = true
		t.Run(name, func(t *testing.T) {
			counts := map[string]int{}
			for _, c := range g.Tests {
				t.Run(strconv.Itoa(c.ID), func(t *testing.T) { counts[v.rawDecryption(t, device, &c)]++ })
			}
			if !maps.Equal(counts, want) {
				t.Errorf("%v, want %v", counts, want)
			}
		})
	}
	if len(groups) != 6 {
		t.Errorf("%v, want 2048, 3072 and 4096 bits, standard and crt", groups)
	}
}

// rawDecryption decrypts a case's ciphertext, or what is put in its place, and says which.
func (v *vectorToken) rawDecryption(t *testing.T, device crypto.PublicKey, c *acvpCase) string {
	key := c.key(t)
	lot := v.stand(t, testLot, pkcs11.CKO_PRIVATE_KEY, rsaPrivate(key), ck.Guarded(false),
		ck.Use(ck.PrivateUsages, pkcs11.CKA_DECRYPT))
	what, fault, input, plain := decrypted, FaultLayout, []byte(c.CT), []byte(c.PT)
	if !c.TestPassed {
		x := big.NewInt(2)
		what = two
		if rest := new(big.Int).Sub(number(c.CT), key.N); rest.Sign() >= 0 {
			what, fault, x = notBelow, FaultRange, rest
		}
		input = x.FillBytes(make([]byte, len(c.CT)))
		plain = new(big.Int).Exp(x, key.D, key.N).FillBytes(make([]byte, len(c.CT)))
	}

	reduced, _, err := kme.ReducePayload(&key.PublicKey, c.CT)
	if err != nil || !bytes.Equal(reduced, input) {
		t.Fatalf("the token would get %x, %v; want %x: %s", reduced, err, input, what)
	}
	if err := v.hsm.With(t.Context(), "test", func(s *p11.Session) error {
		got, err := keyop.Decrypt(s, lot, reduced)
		if err == nil && !bytes.Equal(got, plain) {
			t.Errorf("decrypts to %x, want %x", got, plain)
		}
		return err
	}); err != nil {
		t.Error(err)
	}

	p, _ := kme.SuiteECDSA.Split(plain)
	opened, err := v.OpenPayload(t.Context(), Payload{Suite: kme.SuiteECDSA, Lot: testLot, N: &key.PublicKey,
		Device: device, Bytes: c.CT})
	switch {
	case err != nil:
		t.Error(err)
	case opened.Fault != fault || opened.NWSig != p.NWSig():
		t.Errorf("as a payload: fault %q, NW_SIG %x, want %q and %x", opened.Fault, opened.NWSig, fault, p.NWSig())
	}
	return what
}
