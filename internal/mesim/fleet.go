// Package mesim simulates devices, and the MME and HSS that they speak through.
package mesim

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha1" // OAEP's parameter, not a signature's
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/tink-crypto/tink-go/v2/kwp/subtle"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/kme"
)

// A Fleet is the devices of all injection packages below a folder.
type Fleet struct {
	packages  []string // in the order of their names
	lots      map[string]*lot
	injection map[string]*subtle.KWP // by the key's name: a fixture holds two while the key is rotated
}

type lot struct {
	manifest *directory.Manifest
	public   *rsa.PublicKey
}

// A Device is what it would have in its secure memory after injection.
type Device struct {
	IMEI kme.IMEI
	key  crypto.Signer
	lot  *lot
}

// Lot is the name of the device's lot.
func (d *Device) Lot() string { return d.lot.manifest.Lot }

// OpenFleet finds the injection packages below a folder. What they have is wrapped for a fixture: fixtureKey is the file
// of its private RSA key, and enrolments are those of its injection keys.
func OpenFleet(folder, fixtureKey string, enrolments []string) (*Fleet, error) {
	fixture, err := readPrivateKey(fixtureKey)
	if err != nil {
		return nil, fmt.Errorf("the fixture's key %s: %w", fixtureKey, err)
	}
	f := &Fleet{lots: map[string]*lot{}, injection: map[string]*subtle.KWP{}}
	var verifier *directory.Verifier
	for _, path := range enrolments {
		if verifier, err = f.enrol(fixture, path); err != nil {
			return nil, fmt.Errorf("the fixture's enrolment %s: %w", path, err)
		}
	}
	err = filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.Name() == "manifest.jws":
			return f.addLot(verifier, path)
		case strings.HasPrefix(entry.Name(), "injection-") && strings.HasSuffix(entry.Name(), ".jsonl"):
			f.packages = append(f.packages, path)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if len(f.packages) == 0 {
		return nil, fmt.Errorf("there is no injection package below %s", folder)
	}
	return f, nil
}

// enrol takes an injection key, and says whose it is.
func (f *Fleet) enrol(fixture *rsa.PrivateKey, path string) (*directory.Verifier, error) {
	data, err := cmdline.ReadFile(path)
	if err != nil {
		return nil, err
	}
	enrolment, err := directory.ParseFixtureEnrolment(data)
	if err != nil {
		return nil, err
	}
	key, err := rsa.DecryptOAEP(sha1.New(), nil, fixture, enrolment.Wrapped, nil)
	if err != nil {
		return nil, errors.New("the fixture's key does not open it: they do not belong together, or the file is damaged")
	}
	defer clear(key)
	if f.injection[enrolment.KeyID], err = subtle.NewKWP(key); err != nil {
		return nil, err
	}
	return enrolment.Verifier()
}

func (f *Fleet) addLot(verifier *directory.Verifier, path string) error {
	data, err := cmdline.ReadFile(path)
	if err != nil {
		return err
	}
	name := filepath.Base(filepath.Dir(path))
	m, err := verifier.Manifest(name, data)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	f.lots[name] = &lot{manifest: m, public: m.PublicKey()}
	return nil
}

func readPrivateKey(path string) (*rsa.PrivateKey, error) {
	data, err := cmdline.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New("it is no PEM file")
	}
	if k, err := x509.ParsePKCS1PrivateKey(block.Bytes); err == nil {
		return k, nil
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, errors.New("it holds no private key of PKCS #1 or PKCS #8")
	}
	k, ok := key.(*rsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("it holds a key of another kind (%T), not RSA", key)
	}
	return k, nil
}

// each calls f with the lines of all packages in their order, until it says stop.
func (f *Fleet) each(use func(directory.InjectionLine) (more bool, err error)) error {
	for _, path := range f.packages {
		more, err := f.eachOf(path, use)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if !more {
			return nil
		}
	}
	return nil
}

func (f *Fleet) eachOf(path string, use func(directory.InjectionLine) (bool, error)) (more bool, err error) {
	file, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer file.Close()
	for line, err := range directory.ReadInjection(file) {
		if err != nil {
			return false, err
		}
		if line, err = f.newest(filepath.Dir(path), line); err != nil {
			return false, err
		}
		if more, err := use(line); !more || err != nil {
			return false, err
		}
	}
	return true, nil
}

// newest is what a device was issued last: the line of its shard's package, or of a package of its own.
func (f *Fleet) newest(dir string, line directory.InjectionLine) (directory.InjectionLine, error) {
	if f.lots[line.Lot] == nil {
		return line, fmt.Errorf("lot %s has no manifest.jws beside its packages", line.Lot)
	}
	for n := 1; ; n++ {
		reissued, _, err := factory.ReadReissue(filepath.Join(dir, factory.ReissueFile(line.IMEI, n)), line.Lot, line.IMEI)
		if errors.Is(err, fs.ErrNotExist) {
			return line, nil
		}
		if err != nil {
			return line, fmt.Errorf("%w: bring back the file as it was", err)
		}
		line = reissued
	}
}

// Devices injects count devices from the first on; all with count 0.
func (f *Fleet) Devices(first, count int) (all []*Device, err error) {
	at := 0
	err = f.each(func(line directory.InjectionLine) (bool, error) {
		if at++; at <= first {
			return true, nil
		}
		d, err := f.inject(line)
		all = append(all, d)
		return count == 0 || len(all) < count, err
	})
	if err == nil && len(all) < max(count, 1) {
		err = fmt.Errorf("there are only %d devices from number %d on, not %d", len(all), first, max(count, 1))
	}
	return all, err
}

// Find injects the device of an IMEI.
func (f *Fleet) Find(imei kme.IMEI) (found *Device, err error) {
	err = f.each(func(line directory.InjectionLine) (bool, error) {
		if line.IMEI != imei {
			return true, nil
		}
		found, err = f.inject(line)
		return false, err
	})
	if err == nil && found == nil {
		err = fmt.Errorf("no injection package has IMEI %s", imei)
	}
	return found, err
}

// inject unwraps a device's private key, which must be that of its public key.
func (f *Fleet) inject(line directory.InjectionLine) (*Device, error) {
	injection := f.injection[line.DeviceKey.KeyID]
	if injection == nil {
		return nil, fmt.Errorf("IMEI %s is wrapped under injection key %s, which the fixture was not enrolled with", line.IMEI, line.DeviceKey.KeyID)
	}
	pkcs8, err := injection.Unwrap(line.DeviceKey.Wrapped)
	if err != nil {
		return nil, fmt.Errorf("the private key of IMEI %s does not unwrap: the package is damaged", line.IMEI)
	}
	defer clear(pkcs8)
	key, err := x509.ParsePKCS8PrivateKey(pkcs8)
	if err != nil {
		return nil, fmt.Errorf("the private key of IMEI %s is no PKCS #8", line.IMEI)
	}
	signer, ok := key.(crypto.Signer)
	if !ok || !signer.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(line.PublicKey.Key) {
		return nil, fmt.Errorf("the private key of IMEI %s is not that of its public key", line.IMEI)
	}
	return &Device{line.IMEI, signer, f.lots[line.Lot]}, nil
}
