// Package mesim simulates devices, and the MME and HSS that they speak through.
package mesim

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha1" // OAEP's parameter, not a signature's
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strings"

	"github.com/tink-crypto/tink-go/v2/kwp/subtle"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/handover"
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

// A Device has what a device has in its secure memory after injection.
type Device struct {
	IMEI kme.IMEI
	key  crypto.Signer
	lot  *lot
}

// Lot is the name of the device's lot.
func (d *Device) Lot() string { return d.lot.manifest.Lot }

// OpenFleet finds the injection packages below a folder. What they have is wrapped for a fixture: fixtureKey is the
// file of its private RSA key, and enrolments are those of its injection keys.
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
	data, err := durable.ReadFile(path)
	if err != nil {
		return nil, err
	}
	enrolment, err := handover.ParseFixtureEnrolment(data)
	if err != nil {
		return nil, fmt.Errorf("it is no enrolment of a fixture, as factory fixture enroll writes it: %w", err)
	}
	key, err := rsa.DecryptOAEP(sha1.New(), nil, fixture, enrolment.Wrapped, nil)
	if err != nil {
		return nil, errors.New("the fixture's key does not open it: they do not belong together, or the file is " +
			"damaged")
	}
	defer clear(key)
	if f.injection[enrolment.KeyID], err = subtle.NewKWP(key); err != nil {
		return nil, err
	}
	return enrolment.Verifier()
}

func (f *Fleet) addLot(verifier *directory.Verifier, path string) error {
	data, err := durable.ReadFile(path)
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
	data, err := durable.ReadFile(path)
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

// A packaged device has the device's line of the package at path.
type packaged struct {
	path string
	handover.InjectionLine
}

// lines gives the lines of all packages, in order.
func (f *Fleet) lines() iter.Seq2[packaged, error] {
	return func(yield func(packaged, error) bool) {
		for _, path := range f.packages {
			data, err := os.ReadFile(path)
			if err != nil {
				yield(packaged{}, err)
				return
			}
			for line, err := range handover.ReadInjection(bytes.NewReader(data)) {
				if err == nil {
					line, err = f.newest(filepath.Dir(path), line)
				}
				if err != nil {
					yield(packaged{}, fmt.Errorf("%s: %w", path, err))
					return
				}
				if !yield(packaged{path: path, InjectionLine: line}, nil) {
					return
				}
			}
		}
	}
}

// newest gives the line of the key that a device was issued last, from its shard's package or from one of its own.
func (f *Fleet) newest(dir string, line handover.InjectionLine) (handover.InjectionLine, error) {
	if f.lots[line.Lot] == nil {
		return line, fmt.Errorf("lot %s has no manifest.jws beside its packages", line.Lot)
	}
	for n := 1; ; n++ {
		reissued, _, err := handover.ReadReissue(filepath.Join(dir, handover.ReissueFile(line.IMEI, n)),
			line.Lot, line.IMEI)
		if errors.Is(err, fs.ErrNotExist) {
			return line, nil
		}
		if err != nil {
			return line, fmt.Errorf("%w: bring back the file as it was", err)
		}
		line = reissued
	}
}

// Devices injects count devices from the first on, until ctx ends; all with count 0.
func (f *Fleet) Devices(ctx context.Context, first, count int) (all []*Device, err error) {
	at := 0
	for line, err := range f.lines() {
		if err != nil {
			return nil, err
		}
		if at++; at <= first {
			continue
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		d, err := f.inject(line)
		if err != nil {
			return nil, err
		}
		if all = append(all, d); len(all) == count {
			break
		}
	}
	if least := max(count, 1); len(all) < least {
		return nil, fmt.Errorf("there are only %d devices from number %d on, not %d: the folder has %d, and the first "+
			"is number 0", len(all), first, least, at)
	}
	return all, nil
}

// Find injects the device of an IMEI.
func (f *Fleet) Find(imei kme.IMEI) (*Device, error) {
	for line, err := range f.lines() {
		if err != nil {
			return nil, err
		}
		if line.IMEI == imei {
			return f.inject(line)
		}
	}
	return nil, fmt.Errorf("no injection package has IMEI %s", imei)
}

// inject unwraps a device's private key, which must be that of its public key.
func (f *Fleet) inject(line packaged) (*Device, error) {
	injection := f.injection[line.DeviceKey.KeyID]
	if injection == nil {
		return nil, fmt.Errorf("%s: IMEI %s is wrapped under injection key %s, which the fixture was not enrolled with",
			line.path, line.IMEI, line.DeviceKey.KeyID)
	}
	pkcs8, err := injection.Unwrap(line.DeviceKey.Wrapped)
	if err != nil {
		return nil, fmt.Errorf("%s: the private key of IMEI %s does not unwrap: the package is damaged",
			line.path, line.IMEI)
	}
	defer clear(pkcs8)
	key, err := x509.ParsePKCS8PrivateKey(pkcs8)
	if err != nil {
		return nil, fmt.Errorf("%s: the private key of IMEI %s is no PKCS #8", line.path, line.IMEI)
	}
	signer, ok := key.(crypto.Signer)
	if !ok || !signer.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(line.PublicKey.Key) {
		return nil, fmt.Errorf("%s: the private key of IMEI %s is not that of its public key", line.path, line.IMEI)
	}
	return &Device{IMEI: line.IMEI, key: signer, lot: f.lots[line.Lot]}, nil
}
