package directory

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/go-jose/go-jose/v4"

	"github.com/kmehsm/kmehsm/directory/internal/packed"
	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/kme"
)

// A Shard is the public keys of a lot's devices at successive positions: those of Manifest.ShardRange.
type Shard struct {
	Lot     string        `json:"lot"`
	Number  int           `json:"shard"`
	Package strict.Base64 `json:"package"` // SHA-256 of the injection package that has the private keys
	Keys    []DeviceKey   `json:"keys"`    // makes the payload a JWK Set (RFC 7517 section 5)
}

// A DeviceKey is a device's public key, *ecdsa.PublicKey on P-256 or *rsa.PublicKey; in JSON a JWK whose kid is the
// IMEI.
type DeviceKey struct {
	IMEI kme.IMEI
	Key  crypto.PublicKey
}

func (k DeviceKey) MarshalJSON() ([]byte, error) {
	return (&jose.JSONWebKey{Key: k.Key, KeyID: k.IMEI.String()}).MarshalJSON()
}

func (k *DeviceKey) UnmarshalJSON(data []byte) error {
	var jwk jose.JSONWebKey
	if err := jwk.UnmarshalJSON(data); err != nil {
		return err
	}
	if !jwk.IsPublic() || !jwk.Valid() {
		return errors.New("a JWK is not a valid public key")
	}
	k.Key = jwk.Key
	return k.IMEI.UnmarshalText([]byte(jwk.KeyID))
}

// NewShard makes shard n of a lot. It refuses keys unless they are those of all the shard's devices, in order, of the
// lot's suite and all different. pkg is the SHA-256 of their injection package.
func NewShard(m *Manifest, n int, keys []DeviceKey, pkg []byte) (*Shard, error) {
	s := &Shard{Lot: m.Lot, Number: n, Package: pkg, Keys: keys}
	return s, s.check(m, n)
}

func (s *Shard) check(m *Manifest, n int) error {
	if s.Lot != m.Lot || s.Number != n {
		return fmt.Errorf("it is shard %d of lot %q", s.Number, s.Lot)
	}
	first, count := m.ShardRange(n)
	if count == 0 {
		return fmt.Errorf("lot %s has no shard %d", m.Lot, n)
	}
	if len(s.Keys) != count {
		return fmt.Errorf("it has %d keys, not %d", len(s.Keys), count)
	}
	if err := checkPackage(s.Package); err != nil {
		return err
	}
	seen := make(map[string]kme.IMEI, count)
	for i, k := range s.Keys {
		if want := m.IMEI(first + i); k.IMEI != want {
			return fmt.Errorf("key %d is that of IMEI %s, not %s", i, k.IMEI, want)
		}
		if err := m.Suite.CheckDevice(k.Key); err != nil {
			return fmt.Errorf("IMEI %s: %w", k.IMEI, err)
		}
		key := string(packed.Key(k.Key))
		if other, twice := seen[key]; twice {
			return fmt.Errorf("IMEIs %s and %s have one key", other, k.IMEI)
		}
		seen[key] = k.IMEI
	}
	return nil
}

func checkPackage(hash strict.Base64) error {
	if len(hash) != sha256.Size {
		return fmt.Errorf("the SHA-256 of its injection package has %d bytes, not %d", len(hash), sha256.Size)
	}
	return nil
}

// Equal says whether two shards hold the same keys, out of the same injection package.
func (s *Shard) Equal(o *Shard) bool {
	return s.Lot == o.Lot && s.Number == o.Number && bytes.Equal(s.Package, o.Package) &&
		slices.EqualFunc(s.Keys, o.Keys, DeviceKey.equal)
}

func (k DeviceKey) equal(o DeviceKey) bool {
	return k.IMEI == o.IMEI && bytes.Equal(packed.Key(k.Key), packed.Key(o.Key))
}

// Fingerprint is the first eight bytes of the SHA-256 of the key. Different keys can have the same one, but rarely:
// compare the keys then.
func (k DeviceKey) Fingerprint() uint64 {
	sum := sha256.Sum256(packed.Key(k.Key))
	return binary.BigEndian.Uint64(sum[:])
}
