package handover

import (
	"bufio"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/kme"
)

// An InjectionLine is one device in an injection package, a file of JSON lines.
type InjectionLine struct {
	IMEI      kme.IMEI            `json:"imei"`
	Lot       string              `json:"lot"`
	Shard     int                 `json:"shard"`
	PublicKey directory.DeviceKey `json:"public_key"`
	DeviceKey WrappedKey          `json:"device_key"`
}

// A WrappedKey is a device's private key, PKCS #8, under the injection key.
type WrappedKey struct {
	Algorithm string           `json:"alg"`
	KeyID     string           `json:"kid"` // the injection key's CKA_ID, hex
	Wrapped   directory.Base64 `json:"wrapped"`
}

// NewInjectionLine makes a device's line.
func NewInjectionLine(imei kme.IMEI, lot string, shard int, pub crypto.PublicKey, keyID string, wrapped []byte) InjectionLine {
	return InjectionLine{
		IMEI: imei, Lot: lot, Shard: shard, PublicKey: directory.DeviceKey{IMEI: imei, Key: pub},
		DeviceKey: WrappedKey{Algorithm: A256KWP, KeyID: keyID, Wrapped: wrapped},
	}
}

// Write appends the line to a package.
func (l InjectionLine) Write(w io.Writer) error {
	b, err := json.Marshal(l)
	if err != nil {
		return err
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

// maxLine is above the longest line, that of an RSA device key.
const maxLine = 16 << 10

// ReadInjection reads a package, line by line, until the first error. Whether the devices are the right ones is the
// caller's to check.
func ReadInjection(r io.Reader) iter.Seq2[InjectionLine, error] {
	return func(yield func(InjectionLine, error) bool) {
		lines := bufio.NewScanner(r)
		lines.Buffer(nil, maxLine)
		n := 0
		for lines.Scan() {
			n++
			line, err := parseInjection(lines.Bytes())
			if err != nil {
				yield(InjectionLine{}, fmt.Errorf("line %d: %w", n, err))
				return
			}
			if !yield(line, nil) {
				return
			}
		}
		if err := lines.Err(); err != nil {
			yield(InjectionLine{}, fmt.Errorf("line %d: %w", n+1, err))
		}
	}
}

func parseInjection(data []byte) (line InjectionLine, err error) {
	if err := directory.ParseStrict(data, &line); err != nil {
		return line, err
	}
	switch {
	case line.IMEI == (kme.IMEI{}) || line.PublicKey.Key == nil || line.PublicKey.IMEI != line.IMEI:
		err = errors.New("its public key is not that of its IMEI")
	case directory.CheckName(line.Lot) != nil || line.Shard < 0 || line.DeviceKey.KeyID == "" || len(line.DeviceKey.Wrapped) == 0:
		err = errors.New("a part of it is missing")
	default:
		err = checkAlgorithm(line.DeviceKey.Algorithm, A256KWP)
	}
	return line, err
}
