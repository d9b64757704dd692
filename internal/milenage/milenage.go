// Package milenage is the SIM's side of AKA with MILENAGE (3GPP TS 35.206), for simulated devices.
package milenage

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"
	"errors"
)

// A SIM holds a subscriber's keys.
type SIM struct {
	block cipher.Block
	opc   [16]byte
}

// New makes a SIM of K and OPc, 16 bytes each.
func New(k, opc []byte) (*SIM, error) {
	if len(k) != 16 || len(opc) != 16 {
		return nil, errors.New("the SIM needs K and OPc of 16 bytes each")
	}
	block, err := aes.NewCipher(k)
	if err != nil {
		return nil, err
	}
	return &SIM{block: block, opc: [16]byte(opc)}, nil
}

// out computes OUT1 to OUT5 of clause 4.1: E(rot(in xor OPc, rotation) xor c xor temp) xor OPc.
func (s *SIM) out(in, temp [16]byte, rotation int, c byte) (out [16]byte) {
	for i := range out {
		out[i] = in[(i+rotation)%16] ^ s.opc[(i+rotation)%16]
	}
	out[15] ^= c
	subtle.XORBytes(out[:], out[:], temp[:])
	s.block.Encrypt(out[:], out[:])
	subtle.XORBytes(out[:], out[:], s.opc[:])
	return out
}

func (s *SIM) temp(rand [16]byte) (temp [16]byte) {
	subtle.XORBytes(temp[:], rand[:], s.opc[:])
	s.block.Encrypt(temp[:], temp[:])
	return temp
}

// f1 gives MAC-A and MAC-S.
func (s *SIM) f1(rand [16]byte, sqn, amf []byte) (macA, macS [8]byte) {
	in := [16]byte(bytes.Repeat(append(append([]byte{}, sqn...), amf...), 2))
	out := s.out(in, s.temp(rand), 8, 0)
	return [8]byte(out[:8]), [8]byte(out[8:])
}

// f2345 gives RES, CK, IK and AK.
func (s *SIM) f2345(rand [16]byte) (res [8]byte, ck, ik [16]byte, ak [6]byte) {
	temp := s.temp(rand)
	two := s.out(temp, [16]byte{}, 0, 1)
	return [8]byte(two[8:]), s.out(temp, [16]byte{}, 4, 2), s.out(temp, [16]byte{}, 8, 4), [6]byte(two[:6])
}

// f5star gives the AK of resynchronisation.
func (s *SIM) f5star(rand [16]byte) [6]byte {
	out := s.out(s.temp(rand), [16]byte{}, 12, 8)
	return [6]byte(out[:6])
}

// Authenticate checks AUTN, as the SIM does, and gives RES and the sequence number of the vector.
func (s *SIM) Authenticate(rand [16]byte, autn []byte) (res [8]byte, sqn uint64, err error) {
	if len(autn) != 16 {
		return res, 0, errors.New("the vector has an AUTN that is not 16 bytes long")
	}
	res, _, _, ak := s.f2345(rand)
	var number [8]byte
	subtle.XORBytes(number[2:], autn[:6], ak[:])
	if macA, _ := s.f1(rand, number[2:], autn[6:8]); subtle.ConstantTimeCompare(macA[:], autn[8:]) != 1 {
		return res, 0, errors.New("the SIM refuses AUTN: it was not made for this RAND by whoever has K")
	}
	return res, binary.BigEndian.Uint64(number[:]), nil
}

// Resynchronise makes AUTS (TS 33.102 clause 6.3.3) for a SIM whose sequence number is sqn.
func (s *SIM) Resynchronise(rand [16]byte, sqn uint64) (auts [14]byte) {
	var number [8]byte
	binary.BigEndian.PutUint64(number[:], sqn)
	ak := s.f5star(rand)
	_, macS := s.f1(rand, number[2:], []byte{0, 0})
	subtle.XORBytes(auts[:6], number[2:], ak[:])
	copy(auts[6:], macS[:])
	return auts
}

// GSM is what a SIM answers in GERAN, SRES and Kc: TS 33.102 clause 6.8.1.2, c2 and c3.
func (s *SIM) GSM(rand [16]byte) (sres [4]byte, kc [8]byte) {
	res, ck, ik, _ := s.f2345(rand)
	subtle.XORBytes(sres[:], res[:4], res[4:])
	for _, half := range [][]byte{ck[:8], ck[8:], ik[:8], ik[8:]} {
		subtle.XORBytes(kc[:], kc[:], half)
	}
	return sres, kc
}

// Challenge is the network's side: AUTN, XRES, CK and IK of a vector with this sequence number and AMF.
func (s *SIM) Challenge(rand [16]byte, sqn uint64, amf [2]byte) (autn [16]byte, xres [8]byte, ck, ik [16]byte) {
	xres, ck, ik, ak := s.f2345(rand)
	var number [8]byte
	binary.BigEndian.PutUint64(number[:], sqn)
	subtle.XORBytes(autn[:6], number[2:], ak[:])
	copy(autn[6:], amf[:])
	macA, _ := s.f1(rand, number[2:], amf[:])
	copy(autn[8:], macA[:])
	return autn, xres, ck, ik
}

// Resynchronised opens AUTS, as the network does: the sequence number of the SIM.
func (s *SIM) Resynchronised(rand [16]byte, auts []byte) (sqn uint64, err error) {
	if len(auts) != 14 {
		return 0, errors.New("AUTS has not 14 bytes")
	}
	var number [8]byte
	ak := s.f5star(rand)
	subtle.XORBytes(number[2:], auts[:6], ak[:])
	if _, macS := s.f1(rand, number[2:], []byte{0, 0}); subtle.ConstantTimeCompare(macS[:], auts[6:]) != 1 {
		return 0, errors.New("AUTS was not made for this RAND by whoever has K")
	}
	return binary.BigEndian.Uint64(number[:]), nil
}
