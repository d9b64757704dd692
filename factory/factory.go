// Package factory is the manufacturer's line: it makes lots and device keys in a token, writes injection packages,
// publishes public keys, and hands lot keys to operators.
//
// Every step can run twice. What a run has not finished, the next one finishes; what is published is never
// published a second time with other content.
package factory

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rsa"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory/memory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/weakkey"
	"github.com/kmehsm/kmehsm/kme"
)

// A Token is what the line needs of the manufacturer's HSM.
type Token interface {
	Weaknesses(ctx context.Context, side hsmkeys.Side) ([]hsmkeys.Finding, error)
	Dedicate(ctx context.Context, d hsmkeys.Dedication) (created bool, err error)
	EnsureSigningKey(ctx context.Context, k hsmkeys.Key) (created bool, err error)
	Signer(k hsmkeys.Key) (crypto.Signer, error)
	Fixtures(ctx context.Context, manufacturer string) ([]string, error)
	EnsureLotKey(ctx context.Context, k hsmkeys.Key, bits int, primes hsmkeys.Primes) (*rsa.PublicKey, string, error)
	RemoveLotKey(ctx context.Context, k hsmkeys.Key) error
	ProveLotKey(ctx context.Context, k hsmkeys.Key, pub *rsa.PublicKey) error
	WrapLotKey(ctx context.Context, lot, kek hsmkeys.Key) ([]byte, error)
	SealLotKey(ctx context.Context, k hsmkeys.Key) error
	Has(ctx context.Context, k hsmkeys.Key) (bool, error)
	LotKeySealed(ctx context.Context, k hsmkeys.Key) (bool, error)
	MakeDeviceKey(ctx context.Context, suite kme.Suite, injection hsmkeys.Key) (crypto.PublicKey, []byte, error)
	KeyWrapMechanism() string
	Sessions() int
}

// refuseWeak refuses a token that does not do what the secrecy of lot keys rests on.
func refuseWeak(ctx context.Context, token Token) error {
	weak, err := token.Weaknesses(ctx, hsmkeys.Factory)
	if err == nil && len(weak) > 0 {
		err = fmt.Errorf("the token was tried, and P and Q would not be safe in it: %s: use another token, or have "+
			"its maker put this right; factory doctor says what follows", strings.Join(hsmkeys.Sentences(weak), "; "))
	}
	return err
}

// A Line is one manufacturer's, on one token and one directory. All methods may be called concurrently, but two
// CreateLots at once may take the same IMEIs: one process at a time makes lots.
type Line struct {
	token    Token
	store    directory.Store // guarded
	guard    *memory.Guard
	signer   *directory.Signer
	verifier *directory.Verifier
	reader   *directory.Reader
	state    State
}

// NewLine opens the line that Init has prepared.
func NewLine(token Token, store directory.Store, state State) (*Line, error) {
	signer, err := openSigner(token)
	if err != nil {
		return nil, err
	}
	verifier := directory.NewVerifier(signer.Public())
	guard := memory.NewGuard(store, state.Dir, verifier)
	reader := directory.NewReader(guard, verifier, directory.ReaderOptions{})
	return &Line{token: token, store: guard, guard: guard, signer: signer, verifier: verifier, reader: reader,
		state: state}, nil
}

// Manufacturer is the RFC 7638 thumbprint of the line's first signing key.
func (l *Line) Manufacturer() string { return l.signer.KeyID() }

// ParsePrimes takes one of hsmkeys.Primes.
func ParsePrimes(text string) (hsmkeys.Primes, error) {
	p := hsmkeys.Primes(text)
	if p != hsmkeys.PrimesAuto && p != hsmkeys.PrimesX931 {
		return "", fmt.Errorf("auto or x931, not %q", text)
	}
	return p, nil
}

// A LotSpec says what lot to make.
type LotSpec struct {
	Lot       string
	Range     directory.Range
	Bits      int
	Suite     kme.Suite
	ShardSize int
	Primes    hsmkeys.Primes
	Validity  time.Duration // of the lot's lists of revoked devices; 0: directory.DefaultValidity
}

// Validate refuses what no token could make a lot of.
func (s LotSpec) Validate() error {
	return cmp.Or(directory.CheckValidity(s.validity()), s.manifest("any").ValidateSpec(s.Bits))
}

func (s LotSpec) validity() time.Duration { return cmp.Or(s.Validity, directory.DefaultValidity) }

// made says whether a manifest is of a lot of this kind.
func (s LotSpec) made(m *directory.Manifest) bool {
	return slices.Equal(m.Ranges, []directory.Range{s.Range}) && m.PublicKey().N.BitLen() == s.Bits &&
		m.Suite == s.Suite && m.ShardSize == s.ShardSize
}

// manifest is the lot's, without what its key brings.
func (s LotSpec) manifest(manufacturer string) *directory.Manifest {
	return &directory.Manifest{
		Lot: s.Lot, Manufacturer: manufacturer, Suite: s.Suite, E: kme.PublicExponent,
		Ranges: []directory.Range{s.Range}, ShardSize: s.ShardSize, Created: time.Now().UTC().Truncate(time.Second),
	}
}

// CreateLot tries the token, makes a lot's key in it, checks it, and publishes the lot's manifest, and then its first
// list of revoked devices. A run that was interrupted before the manifest was out is finished with the key that it
// made; one that was interrupted after it, with its list.
func (l *Line) CreateLot(ctx context.Context, spec LotSpec) (*directory.Manifest, error) {
	if err := spec.Validate(); err != nil { // before a key is spent on it
		return nil, err
	}
	if err := refuseWeak(ctx, l.token); err != nil {
		return nil, err
	}
	m := spec.manifest(l.Manufacturer())
	earlier, err := l.publishedLots(ctx)
	if err != nil {
		return nil, err
	}
	for _, other := range earlier {
		if other.Name == m.Lot {
			return l.begun(ctx, spec)
		}
		if r := m.Overlap(&directory.Manifest{Ranges: other.Ranges}); r != nil {
			return nil, fmt.Errorf("the IMEIs from %s%06d on are in lot %s already (%d from %s%06d): choose "+
				"another range", spec.Range.TAC, spec.Range.First, other.Name, r.Count, r.TAC, r.First)
		}
	}
	pub, mechanism, err := l.token.EnsureLotKey(ctx, l.lotKey(m.Lot), spec.Bits, spec.Primes)
	if err != nil {
		return nil, err
	}
	if err := weakkey.CommonFactors(pub.N, moduli(earlier)); err != nil {
		return nil, errors.Join(err, l.token.RemoveLotKey(ctx, l.lotKey(m.Lot)))
	}
	m.N, m.Mechanism, m.Wrapping = pub.N.Bytes(), mechanism, l.token.KeyWrapMechanism()
	if m.Suite == kme.SuiteBound {
		m.OAEP = kme.OAEPHash
	}
	if err := m.Validate(); err != nil {
		return nil, err
	}
	err = directory.Publish(ctx, l.store, directory.ManifestPath(m.Lot), l.signer, directory.TypeManifest, m)
	if err != nil {
		return nil, err
	}
	// The line remembers it now, so that whatever is refused later changes nothing.
	if _, err := l.publishedLots(ctx); err != nil {
		return nil, err
	}
	return m, l.beginRevocations(ctx, m, spec.validity())
}

// begun finishes a CreateLot whose manifest is published, if it was of this lot.
func (l *Line) begun(ctx context.Context, spec LotSpec) (*directory.Manifest, error) {
	m, err := l.Lot(ctx, spec.Lot)
	if err != nil {
		return nil, err
	}
	if bare, err := l.bare(ctx, m); err != nil {
		return nil, err
	} else if bare && spec.made(m) {
		return m, l.beginRevocations(ctx, m, spec.validity())
	}
	return nil, fmt.Errorf("lot %s exists: it was made on %s with %d devices; choose another name, or go on "+
		"with lot provision", m.Lot, m.Created.Format(time.RFC3339), m.Devices())
}

func (l *Line) beginRevocations(ctx context.Context, m *directory.Manifest, validity time.Duration) error {
	return directory.BeginRevocations(ctx, l.store, l.signer, m, time.Now(), validity)
}

// bare says whether nothing of a lot is published but its manifest, as an interrupted CreateLot leaves it. Where there
// are shards or parts, a list that is not there was taken away.
func (l *Line) bare(ctx context.Context, m *directory.Manifest) (bool, error) {
	if _, err := l.Revocations(ctx, m); !errors.Is(err, directory.ErrNotFound) {
		return false, nil // what is wrong with it is for others to say
	}
	for _, path := range []string{directory.ShardsPath(m.Lot), directory.RevocationPartsPath(m.Lot)} {
		if names, err := l.store.List(ctx, path); err != nil || len(names) > 0 {
			return false, err
		}
	}
	return true, nil
}

// Lot gives a lot's manifest, its signature verified.
func (l *Line) Lot(ctx context.Context, lot string) (*directory.Manifest, error) {
	return ReadLot(ctx, l.reader, lot)
}

// ReadLot gives a lot's manifest, its signature verified.
func ReadLot(ctx context.Context, r *directory.Reader, lot string) (*directory.Manifest, error) {
	m, err := r.Manifest(ctx, lot)
	return m, NoLot(lot, err)
}

// NoLot says what to do about a lot's manifest that is not in the directory. It gives any other error as it is.
func NoLot(lot string, err error) error {
	if errors.Is(err, directory.ErrNotFound) {
		return fmt.Errorf("the directory has no lot %s: check its name and the directory's, or make it with factory "+
			"lot create: %w", lot, err)
	}
	return err
}

// Sealed says whether a lot's key has been sealed in the token.
func (l *Line) Sealed(ctx context.Context, lot string) (bool, error) {
	return l.token.LotKeySealed(ctx, l.lotKey(lot))
}

// Seal makes a lot's key non-extractable for good: nobody can be granted the lot any more.
func (l *Line) Seal(ctx context.Context, lot string) error {
	if _, err := l.Lot(ctx, lot); err != nil {
		return err
	}
	if err := l.token.SealLotKey(ctx, l.lotKey(lot)); err != nil {
		return err
	}
	return l.state.recordSeal(lot)
}

// Grant has deliver give out a lot's key for an operator, under the operator's KEK, with the lot's manifest, signed.
// That it was granted is on record before it is given out, and is not if that fails. A revoked lot is never granted.
func (l *Line) Grant(ctx context.Context, lot, operator string, deliver func(jws []byte) error) error {
	jws, err := l.grant(ctx, lot, operator)
	if err != nil {
		return err
	}
	forget, err := l.state.recordGrant(operator, lot)
	if err != nil {
		return err
	}
	if err := deliver(jws); err != nil {
		return errors.Join(err, forget())
	}
	return nil
}

// WriteGrant is Grant to a file. One that has the same grant already is left as it is.
func (l *Line) WriteGrant(ctx context.Context, lot, operator, path string) (wrote bool, err error) {
	err = l.Grant(ctx, lot, operator, func(jws []byte) error {
		if have, err := durable.ReadFile(path); err == nil && l.sameGrant(have, jws) {
			return nil
		}
		wrote = true
		return durable.WriteNew(path, jws, 0o600)
	})
	return wrote, err
}

// sameGrant says whether two grants differ in nothing but the signature, which is never the same twice.
func (l *Line) sameGrant(a, b []byte) bool {
	var one, other handover.Grant
	return l.verifier.Verify(handover.TypeGrant, "the grant", a, &one) == nil &&
		l.verifier.Verify(handover.TypeGrant, "the grant", b, &other) == nil && reflect.DeepEqual(one, other)
}

func (l *Line) grant(ctx context.Context, lot, operator string) ([]byte, error) {
	m, err := l.usable(ctx, lot)
	if err != nil {
		return nil, err
	}
	if err := directory.CheckName(operator); err != nil {
		return nil, fmt.Errorf("the operator's name: %w", err)
	}
	if sealed, err := l.Sealed(ctx, lot); err != nil {
		return nil, err
	} else if sealed {
		return nil, fmt.Errorf("lot %s is sealed: its key cannot leave the token any more, not even wrapped", lot)
	}
	if err := l.token.ProveLotKey(ctx, l.lotKey(lot), m.PublicKey()); err != nil {
		return nil, fmt.Errorf("lot %s: %w", lot, err)
	}
	kek, err := newest(ctx, l.token, kekOf(l.Manufacturer(), operator))
	if err != nil {
		return nil, err
	}
	wrapped, err := l.token.WrapLotKey(ctx, l.lotKey(lot), kek)
	if errors.Is(err, hsmkeys.ErrNoKey) {
		return nil, fmt.Errorf("operator %s is not enrolled: run factory operator enroll first: %w", operator, err)
	}
	if err != nil {
		return nil, err
	}
	manifest, _, err := l.store.Read(ctx, directory.ManifestPath(lot))
	if err != nil {
		return nil, err
	}
	g := &handover.Grant{
		Operator: operator, KEK: kek.HexID(), Lot: lot, Algorithm: handover.A256KWP, Wrapped: wrapped,
		Manifest: string(manifest),
	}
	if err := g.Validate(); err != nil {
		return nil, err
	}
	return l.signer.Sign(handover.TypeGrant, g)
}

// usable gives the manifest of a lot that is not revoked.
func (l *Line) usable(ctx context.Context, lot string) (*directory.Manifest, error) {
	m, err := l.Lot(ctx, lot)
	if err != nil {
		return nil, err
	}
	list, err := l.Revocations(ctx, m)
	if err != nil {
		return nil, err
	}
	return m, list.Refusal()
}
