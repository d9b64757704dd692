package kme

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"math/big"
	"slices"
)

// A Plaintext is what a payload carries.
type Plaintext struct {
	KME Secret
	Sig []byte // KME_SIG, as long as the suite says
	RME Secret
}

// Wipe overwrites both secrets and the signature: whoever learns a (KME, KME_SIG) can encrypt it again.
func (p *Plaintext) Wipe() {
	p.KME.Wipe()
	p.RME.Wipe()
	clear(p.Sig)
}

// NWSig is the network's proof that it has the KME: SHA-256(KME || RME).
func (p *Plaintext) NWSig() [sha256.Size]byte {
	both := slices.Concat(p.KME.Bytes(), p.RME.Bytes()) // a block of SHA-256, which is hashed where it stands
	defer clear(both)
	return sha256.Sum256(both)
}

// PayloadSize is the length of a payload to a lot, k, in bytes.
func PayloadSize(lot *rsa.PublicKey) int { return (lot.N.BitLen() + 7) / 8 }

// Encrypt makes a payload, on the ME's side: in the bound suite by RSA-OAEP, else M^e mod N for M the
// big-endian integer KME || KME_SIG || RME, as exactly k bytes. It is no RSA encryption scheme, which is why
// crypto/rsa has no function for it.
func (s Suite) Encrypt(lot *rsa.PublicKey, p *Plaintext) ([]byte, error) {
	m, err := s.plaintext(lot, p)
	defer clear(m)
	if err != nil {
		return nil, err
	}
	if s == SuiteBound {
		return rsa.EncryptOAEP(sha256.New(), rand.Reader, lot, m, nil)
	}
	return power(m, lot.N).FillBytes(make([]byte, PayloadSize(lot))), nil
}

// power is m^65537 mod n. math/big wipes nothing, and whoever has the result and any m^(2^i) mod n finds m: so each of
// these is made here, and wiped when the next is there.
func power(m []byte, n *big.Int) *big.Int {
	times := func(a, b *big.Int) *big.Int {
		product := new(big.Int).Mul(a, b)
		quotient, rest := new(big.Int).QuoRem(product, n, new(big.Int))
		wipe(a, product, quotient)
		return rest
	}
	x, y := new(big.Int).SetBytes(m), new(big.Int).SetBytes(m)
	defer wipe(x)
	for range 16 {
		y = times(y, y)
	}
	return times(y, x)
}

func wipe(all ...*big.Int) {
	for _, x := range all {
		clear(x.Bits()[:cap(x.Bits())])
	}
}

// plaintext is KME || KME_SIG || RME, for a lot of the suite.
func (s Suite) plaintext(lot *rsa.PublicKey, p *Plaintext) ([]byte, error) {
	if err := s.CheckLot(lot); err != nil {
		return nil, err
	}
	if len(p.Sig) != s.SignatureSize() {
		return nil, fmt.Errorf("a KME_SIG of suite %s has %d bytes, not %d", s, s.SignatureSize(), len(p.Sig))
	}
	m := make([]byte, 0, s.PlaintextSize())
	m = append(append(append(m, p.KME.Bytes()...), p.Sig...), p.RME.Bytes()...)
	if len(m) != s.PlaintextSize() {
		return m, errors.New("KME or RME is missing")
	}
	return m, nil
}

// ReducePayload prepares a payload of exactly k bytes for raw decryption. So a caller can decrypt every payload in the
// same way, and neither the answer nor its time says which fault one has.
//
// If a payload is not below N, ok is false, and the result is the payload minus N. 0, 1 and N-1 are replaced by 2.
// These three decrypt to themselves, and a token may refuse them (NIST SP 800-56B Rev. 2 section 7.1.2.1 decrypts only
// what is between 1 and N-1). The decryption of 2 has no valid KME_SIG, as theirs have none.
func ReducePayload(lot *rsa.PublicKey, payload []byte) (reduced []byte, ok bool, err error) {
	k := PayloadSize(lot)
	if len(payload) != k {
		return nil, false, fmt.Errorf("a payload to this lot has %d bytes, not %d", k, len(payload))
	}
	c := new(big.Int).SetBytes(payload)
	if ok = c.Cmp(lot.N) < 0; !ok {
		c.Sub(c, lot.N) // below N, since payload < 2^(8k) <= 2N
	}
	one := big.NewInt(1)
	if c.Cmp(one) <= 0 || new(big.Int).Add(c, one).Cmp(lot.N) == 0 {
		c.SetInt64(2)
	}
	return c.FillBytes(make([]byte, k)), ok, nil
}

// Split takes the result of raw decryption apart, on the network's side. raw has k bytes; a token may have left out
// leading zero bytes, which PKCS #11 forbids for CKM_RSA_X_509 but which costs nothing to accept. ok is false if the
// bytes before KME || KME_SIG || RME are not all zero; the fields are set all the same, for a caller that treats all
// faults in the same way. The fields are copies: wipe raw, and wipe them.
func (s Suite) Split(raw []byte) (p Plaintext, ok bool) {
	size := s.PlaintextSize()
	m := make([]byte, max(size, len(raw)))
	copy(m[len(m)-len(raw):], raw)
	defer clear(m)

	var text []byte
	if s == SuiteBound {
		text, ok = unpadOAEP(m, size)
	} else {
		lead := m[:len(m)-size]
		ok = subtle.ConstantTimeCompare(lead, make([]byte, len(lead))) == 1
		text = m[len(lead):]
	}
	p.KME, _ = NewSecret(text[:SecretSize])
	p.Sig = bytes.Clone(text[SecretSize : size-SecretSize])
	p.RME, _ = NewSecret(text[size-SecretSize:])
	return p, ok
}
