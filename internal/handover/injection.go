package handover

import (
	"bufio"
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/strict"
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
	Algorithm string        `json:"alg"`
	KeyID     string        `json:"kid"` // the injection key's CKA_ID, hex
	Wrapped   strict.Base64 `json:"wrapped"`
}

// NewInjectionLine makes a device's line.
func NewInjectionLine(
	imei kme.IMEI, lot string, shard int, pub crypto.PublicKey, keyID string, wrapped []byte,
) InjectionLine {
	return InjectionLine{
		IMEI: imei, Lot: lot, Shard: shard, PublicKey: directory.DeviceKey{IMEI: imei, Key: pub},
		DeviceKey: WrappedKey{Algorithm: A256KWP, KeyID: keyID, Wrapped: wrapped},
	}
}

// maxLine is above the longest line, that of an RSA device key.
const maxLine = 16 << 10

// ReadInjection reads a package, line by line, until the first error. The caller checks whether the devices are the
// right ones.
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
	if err := strict.Parse(data, &line); err != nil {
		return line, err
	}
	switch {
	case line.IMEI == (kme.IMEI{}) || line.PublicKey.Key == nil || line.PublicKey.IMEI != line.IMEI:
		err = errors.New("its public key is not that of its IMEI")
	case directory.CheckName(line.Lot) != nil || line.Shard < 0 || line.DeviceKey.KeyID == "" ||
		len(line.DeviceKey.Wrapped) == 0:
		err = errors.New("a part of it is missing")
	default:
		err = checkAlgorithm(line.DeviceKey.Algorithm, A256KWP)
	}
	return line, err
}

// ManifestFile is the lot's signed manifest in the folder of its injection packages: a device gets the modulus of its
// lot beside its own key.
const ManifestFile = "manifest.jws"

// InjectionFile is the name of a shard's injection package.
func InjectionFile(shard int) string { return fmt.Sprintf("injection-%06d.jsonl", shard) }

// ReissueFile is the name of the injection package of a device's n-th new key, counted from 1.
func ReissueFile(imei kme.IMEI, n int) string { return fmt.Sprintf("reissue-%s-%d.jsonl", imei, n) }

// MarshalPackage is an injection package, and its SHA-256.
func MarshalPackage(lines ...InjectionLine) (file, hash []byte, err error) {
	var b bytes.Buffer
	out := json.NewEncoder(&b)
	for _, line := range lines {
		if err := out.Encode(line); err != nil {
			return nil, nil, err
		}
	}
	sum := sha256.Sum256(b.Bytes())
	return b.Bytes(), sum[:], nil
}

// ReadPackage reads a shard's injection package, which must be that of this lot and shard, and gives its
// lines and what is published of it. The SHA-256 in there is that of the file as it was read: the caller
// compares it with the known one.
func ReadPackage(m *directory.Manifest, n int, path string) ([]InjectionLine, *directory.Shard, error) {
	lines, hash, err := readPackage(path, func(at int, line InjectionLine) error {
		if line.Lot != m.Lot || line.Shard != n {
			return fmt.Errorf("line %d is not of this lot and shard", at+1)
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	shard, err := NewShard(m, n, lines, hash)
	if err != nil {
		return nil, nil, fmt.Errorf("%s is damaged: %w", path, err)
	}
	return lines, shard, nil
}

// NewShard is what is published of a shard's injection package, whose SHA-256 is hash.
func NewShard(m *directory.Manifest, n int, lines []InjectionLine, hash []byte) (*directory.Shard, error) {
	keys := make([]directory.DeviceKey, len(lines))
	for i, line := range lines {
		keys[i] = line.PublicKey
	}
	return directory.NewShard(m, n, keys, hash)
}

// ReadReissue reads the injection package of one device of a lot, and gives the SHA-256 of the file too.
func ReadReissue(path, lot string, imei kme.IMEI) (line InjectionLine, hash []byte, err error) {
	lines, hash, err := readPackage(path, func(at int, line InjectionLine) error {
		if at > 0 || line.IMEI != imei || line.Lot != lot {
			return fmt.Errorf("line %d is not of IMEI %s in lot %s, or not the only one", at+1, imei, lot)
		}
		return nil
	})
	if err == nil && len(lines) == 0 {
		err = fmt.Errorf("%s is empty", path)
	}
	if err != nil {
		return line, nil, err
	}
	return lines[0], hash, nil
}

// readPackage gives a package's lines, all of which check has passed, and the SHA-256 of the file.
func readPackage(
	path string, check func(at int, line InjectionLine) error,
) (all []InjectionLine, hash []byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	sum := sha256.New()
	for line, err := range ReadInjection(io.TeeReader(f, sum)) {
		if err == nil {
			err = check(len(all), line)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("%s is damaged: %w", path, err)
		}
		all = append(all, line)
	}
	return all, sum.Sum(nil), nil
}

// Reissues gives the keys that replaced others, each with the path of its package below dir.
func Reissues(entries []directory.Revocation, dir string) iter.Seq2[string, directory.Revocation] {
	return func(yield func(string, directory.Revocation) bool) {
		issued := map[kme.IMEI]int{}
		for _, e := range entries {
			if e.Key == nil {
				continue
			}
			issued[e.IMEI]++
			if !yield(filepath.Join(dir, ReissueFile(e.IMEI, issued[e.IMEI])), e) {
				return
			}
		}
	}
}

// CheckReissue refuses a package that is not the one of an entry of the revocations.
func CheckReissue(lot, path string, e directory.Revocation) error {
	line, hash, err := ReadReissue(path, lot, e.IMEI)
	if err == nil && (!bytes.Equal(hash, e.Package) || line.PublicKey.Fingerprint() != e.Key.Fingerprint()) {
		err = fmt.Errorf("%s is not the package of the published key", path)
	}
	return err
}

// BringBack is what to do when a package is not the one whose SHA-256 is known.
func BringBack(hash []byte) string {
	return fmt.Sprintf("bring back the file whose SHA-256 is %x, and inject from no other", hash)
}
