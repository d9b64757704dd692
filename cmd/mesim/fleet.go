package main

import (
	"crypto"
	"crypto/rand"
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
	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/kme"
)

// A fleet is the devices of all injection packages below a folder.
type fleet struct {
	packages  []string // in the order of their names
	lots      map[string]*lot
	injection map[string]*subtle.KWP // by the key's name: a fixture holds two while the key is rotated
}

type lot struct {
	manifest *directory.Manifest
	public   *rsa.PublicKey
}

// A device is what it would have in its secure memory after injection.
type device struct {
	imei kme.IMEI
	key  crypto.Signer
	lot  *lot
}

func openFleet(c *cli.Context) (*fleet, error) {
	if err := cmdline.Require(c, "injection", "fixture-key", "fixture-enrolment"); err != nil {
		return nil, err
	}
	fixture, err := readPrivateKey(c.String("fixture-key"))
	if err != nil {
		return nil, fmt.Errorf("the fixture's key %s: %w", c.String("fixture-key"), err)
	}
	f := &fleet{lots: map[string]*lot{}, injection: map[string]*subtle.KWP{}}
	var verifier *directory.Verifier
	for _, path := range c.StringSlice("fixture-enrolment") {
		if verifier, err = f.enrol(fixture, path); err != nil {
			return nil, fmt.Errorf("the fixture's enrolment %s: %w", path, err)
		}
	}
	err = filepath.WalkDir(c.String("injection"), func(path string, entry fs.DirEntry, err error) error {
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
		return nil, fmt.Errorf("there is no injection package below %s", c.String("injection"))
	}
	return f, nil
}

// enrol takes an injection key, and says whose it is.
func (f *fleet) enrol(fixture *rsa.PrivateKey, path string) (*directory.Verifier, error) {
	data, err := cmdline.ReadFile(path)
	if err != nil {
		return nil, err
	}
	enrolment, err := handover.ParseFixtureEnrolment(data)
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

func (f *fleet) addLot(verifier *directory.Verifier, path string) error {
	data, err := cmdline.ReadFile(path)
	if err != nil {
		return err
	}
	name := filepath.Base(filepath.Dir(path))
	m, err := verifier.Manifest(name, data)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	f.lots[name] = &lot{m, m.PublicKey()}
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
func (f *fleet) each(use func(handover.InjectionLine) (more bool, err error)) error {
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

func (f *fleet) eachOf(path string, use func(handover.InjectionLine) (bool, error)) (more bool, err error) {
	file, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer file.Close()
	for line, err := range handover.ReadInjection(file) {
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
func (f *fleet) newest(dir string, line handover.InjectionLine) (handover.InjectionLine, error) {
	if f.lots[line.Lot] == nil {
		return line, fmt.Errorf("lot %s has no manifest.jws beside its packages", line.Lot)
	}
	for n := 1; ; n++ {
		reissued, _, err := handover.ReadReissue(filepath.Join(dir, handover.ReissueFile(line.IMEI, n)), line.Lot, line.IMEI)
		if errors.Is(err, fs.ErrNotExist) {
			return line, nil
		}
		if err != nil {
			return line, fmt.Errorf("%w: bring back the file as it was", err)
		}
		line = reissued
	}
}

// devices injects count devices from the first on; all with count 0.
func (f *fleet) devices(first, count int) (all []*device, err error) {
	at := 0
	err = f.each(func(line handover.InjectionLine) (bool, error) {
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

func (f *fleet) find(imei kme.IMEI) (found *device, err error) {
	err = f.each(func(line handover.InjectionLine) (bool, error) {
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
func (f *fleet) inject(line handover.InjectionLine) (*device, error) {
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
	return &device{line.IMEI, signer, f.lots[line.Lot]}, nil
}

// A message is what a device sends, and what it knows of it.
type message struct {
	plain   kme.Plaintext
	payload []byte
}

// message is what an untouched device makes for one attempt of a subscription.
func (d *device) message(imsi kme.IMSI) (*message, error) {
	m, err := d.sign(d.key, imsi)
	if err != nil {
		return nil, err
	}
	return m, m.encrypt(d.lot.manifest.Suite, d.lot.public)
}

func (d *device) sign(key crypto.Signer, imsi kme.IMSI) (*message, error) {
	m := &message{plain: kme.Plaintext{KME: kme.RandomSecret(), RME: kme.RandomSecret()}}
	suite, about := d.lot.manifest.Suite, kme.Context{Lot: d.lot.manifest.Lot, IMEI: d.imei, IMSI: imsi}
	signed := suite.Signed(about, &m.plain)
	defer clear(signed)
	var err error
	m.plain.Sig, err = suite.Sign(key, signed)
	return m, err
}

func (m *message) encrypt(suite kme.Suite, lot *rsa.PublicKey) (err error) {
	m.payload, err = suite.Encrypt(lot, &m.plain)
	return err
}

// otherModulus is a key of the same length as a lot's, and not its.
func otherModulus(l *lot) (*rsa.PublicKey, error) {
	k, err := rsa.GenerateKey(rand.Reader, l.public.N.BitLen())
	if err != nil {
		return nil, err
	}
	return &k.PublicKey, nil
}
