package hsmkeys

import (
	"context"
	"crypto"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/big"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/kme"
)

// A Fault is why a payload was not accepted. It is for the audit log: a caller of the service must not learn it.
type Fault string

const (
	FaultNone      Fault = ""
	FaultRange     Fault = "range"     // the payload is not below N
	FaultLayout    Fault = "layout"    // the bytes before KME || KME_SIG || RME are not all zero; in the bound suite: it is no OAEP
	FaultSignature Fault = "signature" // KME_SIG does not verify
)

// Opened is what a payload became in the token. With a Fault, the other fields hold nothing of use.
type Opened struct {
	Fault  Fault
	NWSig  [32]byte // SHA-256(KME || RME)
	Tag    []byte   // HMAC-SHA-256(KME) under the ledger key
	Sealed []byte   // the KME under the storage key: that one's generation, and AES key wrap (RFC 3394), 41 bytes
}

// A Payload is one to open.
type Payload struct {
	Suite  kme.Suite
	Lot    Key
	N      *rsa.PublicKey   // the lot's
	Device crypto.PublicKey // whose KME_SIG it must have
	For    kme.Context      // what the bound suite's KME_SIG is about
	Bytes  []byte
}

// OpenPayload decrypts a payload, validates KME_SIG, tags the KME for the ledger and seals it, on one session. The
// payload must have exactly k bytes; an error otherwise, and when the token fails. The KME is in this process only
// between decryption and sealing, and is wiped.
//
// Whatever is wrong with the payload's content, all steps run, with a stand-in where the content is of no use, so
// that neither the answer nor its time says which step found it: with textbook RSA that would be an oracle.
func (t *Token) OpenPayload(ctx context.Context, in Payload) (*Opened, error) {
	suite, device := in.Suite, in.Device
	reduced, inRange, err := kme.ReducePayload(in.N, in.Bytes)
	if err != nil {
		return nil, err
	}
	if err := suite.CheckDevice(device); err != nil {
		return nil, err
	}
	return do(ctx, t, "open payload", func(s *session) (*Opened, error) {
		hLot, err := t.find(s, pkcs11.CKO_PRIVATE_KEY, in.Lot)
		if err != nil {
			return nil, err
		}
		generation, hStorage, err := t.newestStorage(s)
		if err != nil {
			return nil, err
		}
		hLedger, err := t.find(s, pkcs11.CKO_SECRET_KEY, ledgerKey)
		if err != nil {
			return nil, err
		}

		raw, err := rawDecrypt(s, hLot, reduced)
		if err != nil {
			return nil, err
		}
		defer clear(raw) // also when Split panics
		p, leadOK := suite.Split(raw)
		defer p.Wipe()

		formed := wellFormed(device, p.Sig)
		sig := p.Sig
		if !formed {
			sig = standIn(suite) // a token answers malformed values without computing anything
		}
		var verified bool
		signed := suite.Signed(in.For, &p)
		defer clear(signed)
		if t.verifyInSoftware {
			verified = suite.Verify(device, signed, sig)
		} else if verified, err = verifyKME(s, suite, device, signed, sig); err != nil {
			return nil, err
		}
		opened := &Opened{NWSig: p.NWSig()}
		if opened.Tag, err = hmac(s, hLedger, p.KME.Bytes()); err != nil {
			return nil, err
		}
		if opened.Sealed, err = seal(s, generation, hStorage, p.KME); err != nil {
			return nil, err
		}

		switch {
		case !inRange:
			opened.Fault = FaultRange
		case !leadOK:
			opened.Fault = FaultLayout
		case !formed || !verified:
			opened.Fault = FaultSignature
		}
		return opened, nil
	})
}

// VerifyInSoftware has KME_SIG validated in this process, for tokens without the mechanism: it needs no secret, and no
// answer is another by it. It is for the time before the first call.
func (t *Token) VerifyInSoftware() { t.verifyInSoftware = true }

// ExportKME decrypts a payload that OpenPayload has found good, and gives its KME. It is for an HSS that keeps the KME
// itself; the caller wipes it.
func (t *Token) ExportKME(ctx context.Context, in Payload) (kme.Secret, error) {
	reduced, _, err := kme.ReducePayload(in.N, in.Bytes)
	if err != nil {
		return kme.Secret{}, err
	}
	return do(ctx, t, "export KME", func(s *session) (kme.Secret, error) {
		h, err := t.find(s, pkcs11.CKO_PRIVATE_KEY, in.Lot)
		if err != nil {
			return kme.Secret{}, err
		}
		raw, err := rawDecrypt(s, h, reduced)
		if err != nil {
			return kme.Secret{}, err
		}
		defer clear(raw)
		p, _ := in.Suite.Split(raw)
		p.RME.Wipe()
		clear(p.Sig)
		return p.KME, nil
	})
}

// wellFormed says whether the values in a signature are in their ranges: 0 < r, s < n of P-256 (FIPS 186-4 section
// 6.4.2), or below the modulus (RFC 8017 section 5.2.2).
func wellFormed(device crypto.PublicKey, sig []byte) bool {
	if k, ok := device.(*rsa.PublicKey); ok {
		return new(big.Int).SetBytes(sig).Cmp(k.N) < 0
	}
	order := elliptic.P256().Params().N
	for _, half := range [][]byte{sig[:len(sig)/2], sig[len(sig)/2:]} {
		if v := new(big.Int).SetBytes(half); v.Sign() == 0 || v.Cmp(order) >= 0 {
			return false
		}
	}
	return true
}

// standIn is a signature of the right form that verifies for no key that anybody has.
func standIn(suite kme.Suite) []byte {
	sig := make([]byte, suite.SignatureSize())
	sig[0], sig[len(sig)/2] = 1, 1
	return sig
}

func hmac(s *session, key pkcs11.ObjectHandle, data []byte) ([]byte, error) {
	tag, err := s.sign(pkcs11.CKM_SHA256_HMAC, key, data, make([]byte, sha256.Size))
	if err == nil && len(tag) != sha256.Size {
		err = fmt.Errorf("the token's HMAC-SHA-256 has %d bytes: do not use this token", len(tag))
	}
	return tag, explainIf("make an HMAC", err)
}

// kmeObject is a KME as a session object, for one use. It is not PRIVATE, which no other process gains by: to those a
// session object does not exist; and SoftHSM encrypts each attribute of a PRIVATE object in its memory, which takes it
// as long as the use.
func kmeObject(template attributes) attributes {
	return join(template, attributes{attr(pkcs11.CKA_TOKEN, false), attr(pkcs11.CKA_PRIVATE, false)})
}

var (
	sealable = kmeObject(join(use(usages), attributes{
		attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, true),
	}))
	usable = kmeObject(unsealed)
)

// seal wraps a KME under a generation of the storage key. C_WrapKey takes a key object, so the KME is one for that
// long.
func seal(s *session, generation int, storage pkcs11.ObjectHandle, secret kme.Secret) (sealed []byte, err error) {
	h, err := s.create(append(sealable[:len(sealable):len(sealable)], &pkcs11.Attribute{Type: pkcs11.CKA_VALUE, Value: secret.Bytes()}))
	if err != nil {
		return nil, explain("seal a KME", err)
	}
	defer func() {
		if derr := s.DestroyObject(s.h, h); err == nil {
			err = explainIf("seal a KME", derr)
		}
	}()
	return sealObject(s, generation, storage, h)
}

// sealObject wraps a KME that is an object.
func sealObject(s *session, generation int, storage, h pkcs11.ObjectHandle) ([]byte, error) {
	sealed := make([]byte, sealedSize)
	sealed[0] = byte(generation)
	wrapped, err := s.wrap(pkcs11.CKM_AES_KEY_WRAP, storage, h, sealed[1:])
	if err == nil && len(wrapped) != sealedSize-1 {
		err = fmt.Errorf("the token's AES key wrap of a KME has %d bytes: do not use this token", len(wrapped))
	}
	return sealed, explainIf("seal a KME", err)
}

// unseal runs f on a sealed KME, which is an object of the session for that long.
func (s *session) unseal(storage pkcs11.ObjectHandle, sealed []byte, template attributes,
	f func(pkcs11.ObjectHandle) error) (err error) {
	h, err := s.unwrap(pkcs11.CKM_AES_KEY_WRAP, storage, sealed[1:], template)
	if err != nil {
		return explain("unseal a KME", err)
	}
	defer func() {
		if derr := s.DestroyObject(s.h, h); err == nil {
			err = explainIf("drop an unsealed KME", derr)
		}
	}()
	return f(h)
}

// RANDSize is the length of an authentication vector's RAND (3GPP TS 33.102 clause 6.3.2).
const RANDSize = 16

// sealedSize is the length of a sealed KME: the generation of the storage key, a byte, and AES key wrap.
const sealedSize = 1 + kme.SecretSize + 8

// A RAND is the random challenge of an authentication vector.
type RAND = [RANDSize]byte

// EncryptRANDs encrypts RANDs, each as one AES-256 block under a sealed KME, inside the token: 4 calls, however many.
// The text says only that RAND is encrypted; one block, of exactly its size, is our choice.
func (t *Token) EncryptRANDs(ctx context.Context, sealed []byte, rands []RAND) ([]RAND, error) {
	return t.randBlocks(ctx, "encrypt RANDs", sealed, rands, (*session).encrypt)
}

// DecryptRAND undoes EncryptRANDs of one.
func (t *Token) DecryptRAND(ctx context.Context, sealed []byte, rand RAND) (out RAND, err error) {
	all, err := t.randBlocks(ctx, "decrypt RAND", sealed, []RAND{rand}, (*session).decrypt)
	if err != nil {
		return out, err
	}
	return all[0], nil
}

func (t *Token) randBlocks(ctx context.Context, operation string, sealed []byte, rands []RAND,
	process func(s *session, mechanism uint, key pkcs11.ObjectHandle, in, out []byte) ([]byte, error)) ([]RAND, error) {
	if len(sealed) != sealedSize {
		return nil, errors.New("the sealed KME is damaged: it has the wrong length")
	}
	if len(rands) == 0 {
		return nil, errors.New("there is no RAND to process")
	}
	in := make([]byte, 0, RANDSize*len(rands))
	for _, r := range rands {
		in = append(in, r[:]...)
	}
	return do(ctx, t, operation, func(s *session) (out []RAND, err error) {
		generation := int(sealed[0])
		if known := t.sealing.Load(); known != nil && known.generation < generation {
			t.sealing.Store(nil) // somebody has made a newer storage key
		}
		storage, err := t.find(s, pkcs11.CKO_SECRET_KEY, storageGeneration(generation))
		if err != nil {
			return out, err
		}
		var b []byte
		err = s.unseal(storage, sealed, usable, func(h pkcs11.ObjectHandle) (err error) {
			b, err = process(s, pkcs11.CKM_AES_ECB, h, in, make([]byte, len(in)))
			return explainIf("process RAND", err)
		})
		if err != nil {
			return out, err
		}
		if len(b) != len(in) {
			return out, errors.New("the token's AES-ECB gives another number of blocks than it was given")
		}
		out = make([]RAND, len(rands))
		for i := range out {
			out[i] = RAND(b[RANDSize*i:])
		}
		return out, nil
	})
}

// Ping shows that the token can work: it tags a value under the ledger key.
func (t *Token) Ping(ctx context.Context) error {
	_, err := doAs(ctx, t, Operator, "ping", func(s *session) ([]byte, error) {
		h, err := t.find(s, pkcs11.CKO_SECRET_KEY, ledgerKey)
		if err != nil {
			return nil, err
		}
		return hmac(s, h, make([]byte, kme.SecretSize))
	})
	return err
}
