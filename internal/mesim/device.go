package mesim

import (
	"crypto"
	"crypto/aes"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"errors"

	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/kme"
)

// A Message is what a device sends, with the secrets that it knows.
type Message struct {
	Payload []byte
	plain   kme.Plaintext
}

// NWSig is what the network has to answer.
func (m *Message) NWSig() [sha256.Size]byte { return m.plain.NWSig() }

// Message is what an untouched device makes for one attempt of a subscription.
func (d *Device) Message(imsi kme.IMSI) (*Message, error) {
	m, err := d.sign(d.key, imsi)
	if err != nil {
		return nil, err
	}
	return m, m.encrypt(d.lot.manifest.Suite, d.lot.public)
}

func (d *Device) sign(key crypto.Signer, imsi kme.IMSI) (*Message, error) {
	m := &Message{plain: kme.Plaintext{KME: kme.RandomSecret(), RME: kme.RandomSecret()}}
	suite, about := d.lot.manifest.Suite, kme.Context{Lot: d.lot.manifest.Lot, IMEI: d.IMEI, IMSI: imsi}
	signed := suite.Signed(about, &m.plain)
	defer clear(signed)
	var err error
	m.plain.Sig, err = suite.Sign(key, signed)
	return m, err
}

func (m *Message) encrypt(suite kme.Suite, lot *rsa.PublicKey) (err error) {
	m.Payload, err = suite.Encrypt(lot, &m.plain)
	return err
}

// check is how the device checks the network.
func (m *Message) check(nwSig [sha256.Size]byte) error {
	want := m.plain.NWSig()
	if subtle.ConstantTimeCompare(nwSig[:], want[:]) != 1 {
		return errors.New("NW_SIG is not SHA-256(KME || RME): the network does not have the KME")
	}
	return nil
}

// Decrypts is the device's use of a vector: its RAND must be the one that the HSS gave, encrypted under KME.
func (m *Message) Decrypts(v client.Vectors, random client.RAND) error {
	if v.AttemptID != "" {
		return errors.New("the vector after NW_SIG is not pre-processed")
	}
	got, err := m.decrypt(v.RANDs[0])
	if err == nil && got != random {
		err = errors.New("the pre-processed RAND does not decrypt under the device's KME")
	}
	return err
}

func (m *Message) decrypt(rand [aes.BlockSize]byte) (out [aes.BlockSize]byte, err error) {
	block, err := aes.NewCipher(m.plain.KME.Bytes())
	if err == nil {
		block.Decrypt(out[:], rand[:])
	}
	return out, err
}
