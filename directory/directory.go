// Package directory is the public-key directory: signed objects, the interface of their stores, and a reader that
// verifies all.
//
// Every object is a compact JWS (RFC 7515, ES256) by the manufacturer's key, which readers pin. So whoever runs a store
// can lose or withhold objects, but not change them.
package directory

import (
	"crypto/rsa"
	"errors"
	"fmt"
	"math/big"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/kme"
)

// A Manifest describes a lot. Its devices have positions: 0 is the first device of the first range, and so on.
type Manifest struct {
	Lot          string        `json:"lot"`
	Manufacturer string        `json:"manufacturer"` // RFC 7638 thumbprint of the signing key
	Suite        kme.Suite     `json:"suite"`
	N            strict.Base64 `json:"n"` // big-endian, as in a JWK
	E            int           `json:"e"`
	Mechanism    string        `json:"key_generation"`         // the CKM_* that made the key
	Wrapping     string        `json:"key_wrapping,omitempty"` // the CKM_* by which device keys are wrapped (AES-KWP)
	OAEP         string        `json:"oaep_hash,omitempty"`    // of the bound suite
	Ranges       []Range       `json:"ranges"`
	ShardSize    int           `json:"shard_size"` // devices a shard; the last shard may have fewer
	Created      time.Time     `json:"created"`
}

// A Range is Count serial numbers of a TAC, from First on.
type Range struct {
	TAC   kme.TAC `json:"tac"`
	First int     `json:"first"`
	Count int     `json:"count"`
}

// maxShard bounds a shard, and with it what a reader holds in memory for one device.
const maxShard = 1024

var nameRule = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// CheckName refuses a name of a lot or an operator that is not safe in a path, a label or a log.
func CheckName(name string) error {
	if !nameRule.MatchString(name) || strings.Contains(name, "..") {
		return fmt.Errorf("the name %q is not valid: 1 to 64 of the characters A-Z a-z 0-9 . _ -, the first a letter "+
			"or digit, no two dots together", name)
	}
	return nil
}

// ManifestPath, ShardPath and ShardsPath are the paths of a lot's objects in a store.
func ManifestPath(lot string) string     { return "lots/" + lot + "/manifest" }
func ShardPath(lot string, n int) string { return fmt.Sprintf("lots/%s/shards/%06d", lot, n) }
func ShardsPath(lot string) string       { return "lots/" + lot + "/shards" }

// Validate refuses a manifest whose parts do not fit one another.
func (m *Manifest) Validate() error {
	n := new(big.Int).SetBytes(m.N)
	if len(m.N) == 0 || m.N[0] == 0 || n.Bit(0) == 0 {
		return errors.New("the modulus is not an odd number without leading zero bytes")
	}
	if m.Mechanism == "" || m.Created.IsZero() {
		return errors.New("how or when the key was made is missing")
	}
	if m.E != kme.PublicExponent {
		return fmt.Errorf("the public exponent is %d; only %d is accepted", m.E, kme.PublicExponent)
	}
	if err := m.Suite.CheckOAEP(m.OAEP); err != nil {
		return err
	}
	return m.ValidateSpec(n.BitLen())
}

// ValidateSpec is Validate before there is a modulus, which will have so many bits.
func (m *Manifest) ValidateSpec(bits int) error {
	if err := CheckName(m.Lot); err != nil {
		return fmt.Errorf("the lot: %w", err)
	}
	if m.Manufacturer == "" {
		return errors.New("the manufacturer is missing")
	}
	if _, err := kme.ParseSuite(string(m.Suite)); err != nil {
		return err
	}
	if err := m.Suite.CheckLot(&rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), uint(max(bits, 1)-1)),
		E: kme.PublicExponent}); err != nil {
		return err
	}
	if m.ShardSize < 1 || m.ShardSize > maxShard {
		return fmt.Errorf("a shard has 1 to %d devices, not %d", maxShard, m.ShardSize)
	}
	if len(m.Ranges) == 0 {
		return errors.New("the lot has no IMEIs")
	}
	for i, r := range m.Ranges {
		if r.TAC == (kme.TAC{}) || r.First < 0 || r.Count < 1 || r.First >= kme.SNRs || r.Count > kme.SNRs-r.First {
			return fmt.Errorf("a lot cannot have %d devices from serial number %d on: it has one device at least, and "+
				"a TAC has the serial numbers 0 to %d", r.Count, r.First, kme.SNRs-1)
		}
		if slices.ContainsFunc(m.Ranges[:i], r.overlaps) {
			return errors.New("two ranges of the lot overlap")
		}
	}
	return nil
}

func (r Range) overlaps(o Range) bool {
	return r.TAC == o.TAC && r.First < o.First+o.Count && o.First < r.First+r.Count
}

// Overlap is the first range of other that shares IMEIs with m; nil if there is none.
func (m *Manifest) Overlap(other *Manifest) *Range {
	for _, r := range m.Ranges {
		for i, o := range other.Ranges {
			if r.overlaps(o) {
				return &other.Ranges[i]
			}
		}
	}
	return nil
}

// PublicKey is the lot's public key.
func (m *Manifest) PublicKey() *rsa.PublicKey {
	return &rsa.PublicKey{N: new(big.Int).SetBytes(m.N), E: m.E}
}

// Devices is how many devices the lot has.
func (m *Manifest) Devices() (n int) {
	for _, r := range m.Ranges {
		n += r.Count
	}
	return n
}

// Shards is how many shards the lot has.
func (m *Manifest) Shards() int { return (m.Devices() + m.ShardSize - 1) / m.ShardSize }

// ShardRange is the position of a shard's first device, and how many devices the shard has; none if there is no such
// shard.
func (m *Manifest) ShardRange(n int) (first, count int) {
	first = n * m.ShardSize
	return first, max(0, min(m.ShardSize, m.Devices()-first))
}

// Position is a device's number in the lot; ok is false if the lot does not have it.
func (m *Manifest) Position(imei kme.IMEI) (position int, ok bool) {
	for _, r := range m.Ranges {
		if at := imei.SNR() - r.First; imei.TAC() == r.TAC && at >= 0 && at < r.Count {
			return position + at, true
		}
		position += r.Count
	}
	return 0, false
}

// IMEI is the device at a position; the zero IMEI if there is none.
func (m *Manifest) IMEI(position int) kme.IMEI {
	for _, r := range m.Ranges {
		if position < r.Count {
			imei, _ := kme.NewIMEI(r.TAC, r.First+position)
			return imei
		}
		position -= r.Count
	}
	return kme.IMEI{}
}
