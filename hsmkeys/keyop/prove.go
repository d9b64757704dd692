package keyop

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"math/big"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/kme"
)

// Prove shows that the private key h is the one of pub: it decrypts, raw, what was encrypted here. One of the messages
// has leading zero bytes, which some tokens strip.
func Prove(s *p11.Session, h pkcs11.ObjectHandle, pub *rsa.PublicKey) error {
	notIts := errors.New("the private key in the token does not decrypt what was encrypted to the modulus: it is not " +
		"this modulus's key")
	if have, err := keyspec.ReadRSA(s, h); err != nil {
		return err
	} else if !have.Equal(pub) { // a ciphertext may be above its modulus, which is an error that misleads
		return notIts
	}
	size := kme.PayloadSize(pub)
	full, short := make([]byte, size), make([]byte, size)
	rand.Read(full)
	full[0] = 0 // below N
	rand.Read(short[size-16:])
	for _, m := range [][]byte{full, short} {
		c := new(big.Int).Exp(new(big.Int).SetBytes(m), big.NewInt(int64(pub.E)), pub.N)
		got, err := Decrypt(s, h, c.FillBytes(make([]byte, size)))
		if err != nil {
			return err
		}
		if !bytes.Equal(got, m) {
			return notIts
		}
	}
	return nil
}

// Decrypt gives c^d mod N. c has as many bytes as N, and is below N.
func Decrypt(s *p11.Session, h pkcs11.ObjectHandle, c []byte) ([]byte, error) {
	out := make([]byte, len(c))
	m, err := s.Decrypt(pkcs11.CKM_RSA_X_509, h, c, out)
	if err != nil {
		return nil, p11.Explain("decrypt", err)
	}
	// a token may leave out leading zero bytes, which PKCS #11 forbids for CKM_RSA_X_509
	if lead := len(c) - len(m); lead > 0 {
		copy(out[lead:], m)
		clear(out[:lead])
	}
	return out, nil
}
