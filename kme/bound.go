package kme

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"slices"
)

// A Context is what KME_SIG of the bound suite is about, besides KME and RME.
type Context struct {
	Lot  string
	IMEI IMEI
	IMSI IMSI
}

// Signed gives the bytes that KME_SIG signs: the KME alone, by the text; in the bound suite everything that the device
// knows about the attempt, so that a KME_SIG is useless for any other attempt:
//
//	"kme-binding-v2\x00" || len8(lot) || lot || IMEI14 || len8(IMSI) || IMSI || KME || RME
//
// It is a copy, which the caller wipes.
func (s Suite) Signed(c Context, p *Plaintext) []byte {
	if s != SuiteBound {
		return bytes.Clone(p.KME.Bytes())
	}
	imsi := c.IMSI.String()
	about := fmt.Sprintf("kme-binding-v2\x00%s%s%s%s%s", []byte{byte(len(c.Lot))}, c.Lot, c.IMEI,
		[]byte{byte(len(imsi))}, imsi)
	return slices.Concat([]byte(about), p.KME.Bytes(), p.RME.Bytes()) // at once: append leaves copies behind
}

// OAEPHash is the hash of the bound suite's RSA-OAEP and of its MGF1, as manifests name it.
const OAEPHash = "SHA-256"

// CheckOAEP refuses a hash that does not fit the suite: the text's suites have none.
func (s Suite) CheckOAEP(hash string) error {
	if s == SuiteBound && hash != OAEPHash || s != SuiteBound && hash != "" {
		return fmt.Errorf("the OAEP hash %q does not go with suite %s", hash, s)
	}
	return nil
}

// unpadOAEP takes all k bytes of a raw decryption apart (RFC 8017 section 7.1.2 step 3, with an empty label). The
// message's length is known, so every part has its fixed place, and is checked even if an earlier one was wrong: the
// time does not say which (J. Manger, CRYPTO 2001). A token's own OAEP was measured to take longer to refuse than to
// accept: docs/decisions/0009.
func unpadOAEP(raw []byte, size int) (m []byte, ok bool) {
	const h = sha256.Size
	if len(raw) < 2*h+2+size { // no modulus of ours
		return make([]byte, size), false
	}
	seed, db := raw[1:1+h], raw[1+h:]
	mgf1(seed, db)
	mgf1(db, seed)
	label := sha256.Sum256(nil)
	zeros := db[h : len(db)-size-1]
	good := subtle.ConstantTimeByteEq(raw[0], 0) & subtle.ConstantTimeCompare(db[:h], label[:]) &
		subtle.ConstantTimeCompare(zeros, make([]byte, len(zeros))) & subtle.ConstantTimeByteEq(db[len(db)-size-1], 1)
	return db[len(db)-size:], good == 1
}

// mgf1 masks out with MGF1 of seed (RFC 8017 appendix B.2.1).
func mgf1(out, seed []byte) {
	text := slices.Concat(seed, make([]byte, 4))
	defer clear(text)
	for i, done := uint32(0), 0; done < len(out); i++ {
		binary.BigEndian.PutUint32(text[len(seed):], i)
		mask := sha256.Sum256(text)
		done += subtle.XORBytes(out[done:], out[done:], mask[:])
		clear(mask[:])
	}
}
