package hsmkeys

import (
	"context"
	"crypto"
	"crypto/rsa"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/keyop"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/kme"
)

// A Fault is why a payload was not accepted. It is for the audit log: a caller of the service must not learn it.
type Fault string

const (
	FaultNone  Fault = ""
	FaultRange Fault = "range" // the payload is not below N
	// the bytes before KME || KME_SIG || RME are not all zero; in the bound suite: it is no OAEP
	FaultLayout    Fault = "layout"
	FaultSignature Fault = "signature" // KME_SIG does not verify
)

// Opened is the result of OpenPayload. With a Fault, the other fields are meaningless.
type Opened struct {
	Fault  Fault
	NWSig  [32]byte // SHA-256(KME || RME)
	Tag    []byte   // HMAC-SHA-256(KME) under the ledger key
	Sealed []byte   // the KME under the storage key: its generation, 1 byte, and AES key wrap (RFC 3394), 40 bytes
}

// A Payload is one to open.
type Payload struct {
	Suite  kme.Suite
	Lot    Key
	N      *rsa.PublicKey   // the lot's
	Device crypto.PublicKey // whose KME_SIG it must have
	For    kme.Context      // what KME_SIG covers in the bound suite
	Bytes  []byte
}

// OpenPayload decrypts a payload, validates KME_SIG, tags the KME for the ledger and seals it: 9 calls, the last 7 of
// them in three steps, which run in parallel if the token is far. A payload that does not have exactly k bytes is an
// error, and so is a failure of the token. The KME is in this process only between decryption and sealing, and is
// wiped; in the token it is an object for p11.LeftFor at most.
//
// If the payload's content is wrong, all steps run all the same, on substitute values. So neither the answer nor its
// time says which step has failed: with textbook RSA that would be an oracle.
func (t *OperatorToken) OpenPayload(ctx context.Context, in Payload) (*Opened, error) {
	suite, device := in.Suite, in.Device
	reduced, inRange, err := kme.ReducePayload(in.N, in.Bytes)
	if err != nil {
		return nil, err
	}
	if err := suite.CheckDevice(device); err != nil {
		return nil, err
	}
	return p11.DoApart(ctx, t.hsm, "open payload", 3, func(s *p11.Session) (*Opened, error) {
		hLot, err := t.find(s, pkcs11.CKO_PRIVATE_KEY, in.Lot)
		if err != nil {
			return nil, err
		}
		generation, hStorage, err := t.newestStorage(s)
		if err != nil {
			return nil, err
		}
		hLedger, err := t.find(s, pkcs11.CKO_SECRET_KEY, keyspec.Ledger)
		if err != nil {
			return nil, err
		}

		raw, err := keyop.Decrypt(s, hLot, reduced)
		if err != nil {
			return nil, err
		}
		defer clear(raw) // also when Split panics
		p, leadOK := suite.Split(raw)
		defer p.Wipe()

		formed := keyop.WellFormed(device, p.Sig)
		sig := p.Sig
		if !formed {
			sig = keyop.StandIn(suite) // a token answers malformed values without computing anything
		}
		signed := suite.Signed(in.For, &p)
		defer clear(signed)
		opened, verified := &Opened{NWSig: p.NWSig()}, false
		err = t.hsm.Apart(s, func(s *p11.Session) (err error) {
			if t.verifyInSoftware {
				verified = suite.Verify(device, signed, sig)
				return nil
			}
			verified, err = keyop.VerifyKME(s, suite, device, signed, sig)
			return err
		}, func(s *p11.Session) (err error) {
			opened.Tag, err = keyop.HMAC(s, hLedger, p.KME.Bytes())
			return err
		}, func(s *p11.Session) (err error) {
			opened.Sealed, err = keyop.Seal(s, generation, hStorage, p.KME)
			return err
		})
		if err != nil {
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

// ExportKME decrypts a payload that OpenPayload has found good, and gives its KME. It is for an HSS that keeps the KME
// itself; the caller wipes it.
func (t *OperatorToken) ExportKME(ctx context.Context, in Payload) (kme.Secret, error) {
	reduced, _, err := kme.ReducePayload(in.N, in.Bytes)
	if err != nil {
		return kme.Secret{}, err
	}
	return p11.Do(ctx, t.hsm, "export KME", func(s *p11.Session) (kme.Secret, error) {
		h, err := t.find(s, pkcs11.CKO_PRIVATE_KEY, in.Lot)
		if err != nil {
			return kme.Secret{}, err
		}
		raw, err := keyop.Decrypt(s, h, reduced)
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
