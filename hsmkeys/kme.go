package hsmkeys

import (
	"context"
	"errors"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/keyop"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/kme"
)

// RANDSize is the length of an authentication vector's RAND (3GPP TS 33.102 clause 6.3.2).
const RANDSize = 16

// A RAND is the random challenge of an authentication vector.
type RAND = [RANDSize]byte

// EncryptRANDs encrypts RANDs, each as one AES-256 block under a sealed KME, inside the token: 3 calls, however many.
// TR 33.868 says only that RAND is encrypted; to encrypt it as one block, which has its size, is our choice.
func (t *OperatorToken) EncryptRANDs(ctx context.Context, sealed []byte, rands []RAND) ([]RAND, error) {
	return t.randBlocks(ctx, "encrypt RANDs", sealed, rands, (*p11.Session).Encrypt)
}

// DecryptRAND decrypts a RAND of EncryptRANDs.
func (t *OperatorToken) DecryptRAND(ctx context.Context, sealed []byte, rand RAND) (out RAND, err error) {
	all, err := t.randBlocks(ctx, "decrypt RAND", sealed, []RAND{rand}, (*p11.Session).Decrypt)
	if err != nil {
		return out, err
	}
	return all[0], nil
}

func (t *OperatorToken) randBlocks(ctx context.Context, operation string, sealed []byte, rands []RAND,
	process func(s *p11.Session, mechanism uint, key pkcs11.ObjectHandle, in, out []byte) ([]byte, error)) ([]RAND,
	error) {
	if len(sealed) != keyop.SealedSize {
		return nil, errors.New("the sealed KME is damaged: it has the wrong length")
	}
	if len(rands) == 0 {
		return nil, errors.New("there is no RAND to process")
	}
	in := make([]byte, 0, RANDSize*len(rands))
	for _, r := range rands {
		in = append(in, r[:]...)
	}
	return p11.Do(ctx, t.hsm, operation, func(s *p11.Session) (out []RAND, err error) {
		generation := int(sealed[0])
		if known := t.sealing.Load(); known != nil && known.generation < generation {
			t.sealing.Store(nil) // somebody has made a newer storage key
		}
		storage, err := t.find(s, pkcs11.CKO_SECRET_KEY, keyspec.StorageGeneration(generation))
		if err != nil {
			return out, err
		}
		h, err := keyop.Unseal(s, storage, sealed, keyspec.UsableKME)
		if err != nil {
			return out, err
		}
		s.Leave(h)
		b, err := process(s, pkcs11.CKM_AES_ECB, h, in, make([]byte, len(in)))
		if err != nil {
			return out, p11.Explain("process RAND", err)
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
func (t *OperatorToken) Ping(ctx context.Context) error {
	return t.as(ctx, Operator, "ping", func(s *p11.Session) error {
		h, err := t.find(s, pkcs11.CKO_SECRET_KEY, keyspec.Ledger)
		if err == nil {
			_, err = keyop.HMAC(s, h, make([]byte, kme.SecretSize))
		}
		return err
	})
}
