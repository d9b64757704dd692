// Package factory is the manufacturer's line: it makes lots and device keys in a token, writes injection packages,
// publishes public keys, and hands lot keys to operators.
//
// Every step can run twice. What a run has not finished, the next one finishes; what is published is never
// published a second time with other content.
package factory

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/pemkey"
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
	WrapEnrolled(ctx context.Context, k hsmkeys.Key) ([]byte, error)
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

var signingKey = hsmkeys.Key{Role: hsmkeys.RoleSigning}

// refuseWeak refuses a token that does not do what the secrecy of lot keys rests on.
func refuseWeak(ctx context.Context, token Token) error {
	weak, err := token.Weaknesses(ctx, hsmkeys.Factory)
	if err == nil && len(weak) > 0 {
		err = fmt.Errorf("the token was tried, and P and Q would not be safe in it: %s: use another token, or have its maker put this right; factory doctor says what follows",
			strings.Join(hsmkeys.Sentences(weak), "; "))
	}
	return err
}

// Init makes the token the manufacturer's and makes the signing key, unless that was done, and gives the public signing
// key as PEM: what operators pin. It refuses a token that could hold no lot.
func Init(ctx context.Context, token Token) (pem []byte, keyID string, created bool, err error) {
	if err := refuseWeak(ctx, token); err != nil {
		return nil, "", false, err
	}
	if created, err = token.Dedicate(ctx, hsmkeys.Dedication{Side: hsmkeys.Factory}); err != nil {
		return nil, "", false, err
	}
	made, err := token.EnsureSigningKey(ctx, signingKey)
	if err != nil {
		return nil, "", false, err
	}
	signer, err := openSigner(token)
	if err != nil {
		return nil, "", false, err
	}
	pem, err = pemkey.Encode(signer.Public())
	return pem, signer.KeyID(), created || made, err
}

// Keys are the keys that the line needs of its own, each in its newest generation: the signing key, and the injection
// keys of all fixtures, whose names are known once the signing key is there.
func Keys(ctx context.Context, token Token) (keys []hsmkeys.Key, err error) {
	signing, err := newest(ctx, token, signingKey)
	if err != nil {
		return nil, err
	}
	keys = append(keys, signing)
	signer, err := openSigner(token)
	if errors.Is(err, errNoSigningKey) {
		return keys, nil
	}
	if err != nil {
		return nil, err
	}
	fixtures, err := token.Fixtures(ctx, signer.KeyID())
	if err != nil {
		return nil, err
	}
	slices.Sort(fixtures)
	for _, name := range fixtures {
		injection, err := newest(ctx, token, injectionKey(signer.KeyID(), name))
		if err != nil {
			return nil, err
		}
		keys = append(keys, injection)
	}
	return keys, nil
}

// newest is the last generation of a key that the token has; the first if it has none.
func newest(ctx context.Context, token Token, k hsmkeys.Key) (hsmkeys.Key, error) {
	last := k
	for g := range k.Generations() {
		if has, err := token.Has(ctx, g); err != nil || !has {
			return last, err
		}
		last = g
	}
	return last, nil
}

// next checks that generation is one that a key has, or the one after, and gives it.
func next(ctx context.Context, token Token, k hsmkeys.Key, generation int) (hsmkeys.Key, error) {
	have, err := newest(ctx, token, k)
	if err != nil {
		return k, err
	}
	if now := max(have.Generation, 1); generation < 1 || generation > now+1 {
		return k, fmt.Errorf("%s has generation %d now: the next is %d", k.Label(), now, now+1)
	}
	if generation > hsmkeys.MaxGenerations {
		return k, fmt.Errorf("a key has %d generations at most", hsmkeys.MaxGenerations)
	}
	k.Generation = generation
	return k, nil
}

// RotateSigningKey makes a generation of the signing key, from 2 on; the one that there is already stays as it is. What
// is signed from then on carries the statements that lead to it from the first one, which readers go on pinning; the
// line goes on meanwhile, and the commands that are begun after this use the new key. The earlier keys stay in the
// token, to sign those statements.
func RotateSigningKey(ctx context.Context, token Token, generation int) (keyID string, created bool, err error) {
	if _, err := openSigner(token); err != nil {
		return "", false, err
	}
	k, err := next(ctx, token, signingKey, generation)
	if err != nil {
		return "", false, err
	}
	if created, err = token.EnsureSigningKey(ctx, k); err != nil {
		return "", false, err
	}
	signer, err := openSigner(token)
	if err != nil {
		return "", false, err
	}
	return signer.SigningKeyID(), created, nil
}

var errNoSigningKey = errors.New("the token has no signing key yet: run factory init first")

func openSigner(token Token) (*directory.Signer, error) {
	s, err := token.Signer(signingKey)
	if errors.Is(err, hsmkeys.ErrNoKey) {
		return nil, errNoSigningKey
	}
	if err != nil {
		return nil, err
	}
	signer, err := directory.NewSigner(s)
	for g := range signingKey.Generations() {
		if g.Generation == 1 {
			continue
		}
		if err != nil {
			return nil, err
		}
		s, serr := token.Signer(g)
		if errors.Is(serr, hsmkeys.ErrNoKey) {
			return signer, nil
		}
		if serr != nil {
			return nil, serr
		}
		signer, err = signer.Succeed(s)
	}
	return signer, err
}

func injectionKey(manufacturer, fixture string) hsmkeys.Key {
	return hsmkeys.Key{Role: hsmkeys.RoleInjection, Manufacturer: manufacturer, Name: fixture}
}

// A Line is one manufacturer's, on one token and one directory. All methods may be called concurrently, but two
// CreateLots at once may take the same IMEIs: one process at a time makes lots.
type Line struct {
	token    Token
	store    directory.Store
	signer   *directory.Signer
	verifier *directory.Verifier
	reader   *directory.Reader
}

// NewLine opens the line that Init has prepared.
func NewLine(token Token, store directory.Store) (*Line, error) {
	signer, err := openSigner(token)
	if err != nil {
		return nil, err
	}
	verifier := directory.NewVerifier(signer.Public())
	return &Line{token, store, signer, verifier, directory.NewReader(store, verifier, directory.ReaderOptions{})}, nil
}

// injection is the injection key, in its newest generation, of a fixture; of the only one if no name is given.
func (l *Line) injection(ctx context.Context, fixture string) (k hsmkeys.Key, err error) {
	all, err := l.token.Fixtures(ctx, l.Manufacturer())
	if err != nil {
		return k, err
	}
	slices.Sort(all)
	switch {
	case len(all) == 0:
		return k, errors.New("no fixture is enrolled, so nobody could inject the device keys: run factory fixture enroll first")
	case fixture == "" && len(all) == 1:
		fixture = all[0]
	case fixture == "":
		return k, fmt.Errorf("%d fixtures are enrolled, and injection packages are for one: say which with --fixture, of %s", len(all), strings.Join(all, ", "))
	case !slices.Contains(all, fixture):
		return k, fmt.Errorf("no fixture %s is enrolled, but %s: run factory fixture enroll %[1]s first", fixture, strings.Join(all, ", "))
	}
	return newest(ctx, l.token, injectionKey(l.Manufacturer(), fixture))
}

// Manufacturer is the RFC 7638 thumbprint of the line's first signing key.
func (l *Line) Manufacturer() string { return l.signer.KeyID() }

func (l *Line) lotKey(lot string) hsmkeys.Key {
	return hsmkeys.Key{Role: hsmkeys.RoleLot, Manufacturer: l.Manufacturer(), Name: lot}
}

func kekOf(manufacturer, operator string) hsmkeys.Key {
	return hsmkeys.Key{Role: hsmkeys.RoleKEK, Manufacturer: manufacturer, Name: operator}
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
	m := spec.manifest(l.Manufacturer())
	earlier, err := l.reader.Manifests(ctx)
	if err != nil {
		return nil, err
	}
	for _, other := range earlier {
		if other.Lot == m.Lot {
			if bare, err := l.bare(ctx, other); err != nil {
				return nil, err
			} else if bare && spec.made(other) {
				return other, l.beginRevocations(ctx, other, spec.validity())
			}
			return nil, fmt.Errorf("lot %s exists: it was made on %s with %d devices; choose another name, or go on with lot provision", m.Lot, other.Created.Format(time.RFC3339), other.Devices())
		}
		if r := m.Overlap(other); r != nil {
			return nil, fmt.Errorf("the IMEIs from %s%06d on are in lot %s already (%d from %s%06d): choose another range", spec.Range.TAC, spec.Range.First, other.Lot, r.Count, r.TAC, r.First)
		}
	}
	if err := refuseWeak(ctx, l.token); err != nil {
		return nil, err
	}
	pub, mechanism, err := l.token.EnsureLotKey(ctx, l.lotKey(m.Lot), spec.Bits, spec.Primes)
	if err != nil {
		return nil, err
	}
	err = weakkey.CommonFactors(pub.N, func(yield func(string, *big.Int) bool) {
		for _, other := range earlier {
			if !yield(other.Lot, other.PublicKey().N) {
				return
			}
		}
	})
	if err != nil {
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
	return m, l.beginRevocations(ctx, m, spec.validity())
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

// Refresh signs a lot's list of revoked devices anew, with a later next_update, good for validity; with 0, for as long
// as the last one was. begin publishes the first list of a lot that was made before lots had one from the start.
func (l *Line) Refresh(ctx context.Context, lot string, validity time.Duration,
	begin bool) (*directory.Revocations, error) {
	m, err := l.Lot(ctx, lot)
	if err != nil {
		return nil, err
	}
	if begin {
		err = l.beginRevocations(ctx, m, cmp.Or(validity, directory.DefaultValidity))
	} else {
		err = directory.RefreshRevocations(ctx, l.store, l.signer, m, time.Now(), validity)
	}
	if err != nil {
		return nil, err
	}
	return l.Revocations(ctx, m)
}

// Lots gives the manifests of all lots, their signatures verified.
func (l *Line) Lots(ctx context.Context) ([]*directory.Manifest, error) {
	return l.reader.Manifests(ctx)
}

// Lot gives a lot's manifest, its signature verified.
func (l *Line) Lot(ctx context.Context, lot string) (*directory.Manifest, error) {
	m, err := l.reader.Manifest(ctx, lot)
	if errors.Is(err, directory.ErrNotFound) {
		return nil, fmt.Errorf("the directory has no lot %s: make it with factory lot create, or check --directory: %w", lot, err)
	}
	return m, err
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
	return l.token.SealLotKey(ctx, l.lotKey(lot))
}

// Grant is a lot's key for an operator, under the operator's KEK, with the lot's manifest, signed. A revoked lot is
// granted to nobody.
func (l *Line) Grant(ctx context.Context, lot, operator string) ([]byte, error) {
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
	g := &directory.Grant{Operator: operator, KEK: kek.HexID(), Lot: lot, Algorithm: directory.A256KWP, Wrapped: wrapped, Manifest: string(manifest)}
	if err := g.Validate(); err != nil {
		return nil, err
	}
	return l.signer.Sign(directory.TypeGrant, g)
}

// Revoke publishes that devices of a lot are not to be trusted any more. Doing it again changes nothing, and finishes
// what a run that was interrupted has left. report gets the number of devices that are done; it may be nil.
func (l *Line) Revoke(ctx context.Context, lot string, imeis []kme.IMEI, reason string, report func(done int)) error {
	m, err := l.Lot(ctx, lot)
	if err != nil {
		return err
	}
	return directory.Revoke(ctx, l.store, l.signer, m, imeis, reason, time.Now(), report)
}

// RevokeLot publishes that no device of a lot is to be trusted any more, for good.
func (l *Line) RevokeLot(ctx context.Context, lot, reason string) error {
	m, err := l.Lot(ctx, lot)
	if err != nil {
		return err
	}
	return directory.RevokeLot(ctx, l.store, l.signer, m, reason, time.Now())
}

// Revocations gives a lot's list of revoked devices.
func (l *Line) Revocations(ctx context.Context, m *directory.Manifest) (*directory.Revocations, error) {
	return l.reader.ReadRevocations(ctx, m)
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

// ReissueFile is the name of the injection package of a device's n-th new key, counted from 1.
func ReissueFile(imei kme.IMEI, n int) string { return fmt.Sprintf("reissue-%s-%d.jsonl", imei, n) }

// Reissue gives a device that came back a new key, in an injection package of its own below out, and revokes the one
// that it had, for a fixture, as in ProvisionOptions. The reason names the return: with the same one again nothing
// changes, so that a run that was interrupted can be repeated.
func (l *Line) Reissue(ctx context.Context, lot string, imei kme.IMEI, reason, fixture, out string) (path string, err error) {
	m, err := l.usable(ctx, lot)
	if err != nil {
		return "", err
	}
	if reason, err = directory.CheckReason(reason); err != nil {
		return "", err
	}
	position, ok := m.Position(imei)
	if !ok {
		return "", fmt.Errorf("IMEI %s is not in lot %s", imei, lot)
	}
	shard := position / m.ShardSize
	issued, err := l.reader.ReadShard(ctx, m, shard)
	if errors.Is(err, directory.ErrNotFound) {
		return "", fmt.Errorf("IMEI %s was never issued a key: its shard is not published; provision the lot", imei)
	} else if err != nil {
		return "", err
	}
	earlier, err := l.reader.History(ctx, m, imei)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(out, lot)
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	n, had := 1, []uint64{issued.Keys[position%m.ShardSize].Fingerprint()}
	for _, e := range earlier {
		if e.Key == nil {
			continue
		}
		had = append(had, e.Key.Fingerprint())
		if e.Reason == reason {
			path = filepath.Join(dir, ReissueFile(imei, n))
			if err := checkReissue(lot, path, e); err != nil {
				return "", fmt.Errorf("%w: %s", err, bringBack(e.Package))
			}
			return path, nil
		}
		n++
	}
	path = filepath.Join(dir, ReissueFile(imei, n))
	// As with shards: the package is on disk before its key is published; one that is there was not published yet.
	line, hash, err := ReadReissue(path, lot, imei)
	if errors.Is(err, fs.ErrNotExist) {
		line, hash, err = l.makeReissue(ctx, m, imei, shard, fixture, path)
	} else if err != nil {
		err = fmt.Errorf("%w: its key was never published, so remove the file and run this again to make another one", err)
	} else if slices.Contains(had, line.PublicKey.Fingerprint()) {
		err = fmt.Errorf("%s has a key that the device had before: remove the file, and run this again to make another one", path)
	}
	if err != nil {
		return "", err
	}
	return path, directory.Reissue(ctx, l.store, l.signer, m, line.PublicKey, hash, reason, time.Now())
}

func (l *Line) makeReissue(ctx context.Context, m *directory.Manifest, imei kme.IMEI, shard int, fixture, path string) (
	line directory.InjectionLine, hash []byte, err error) {
	injection, err := l.injection(ctx, fixture)
	if err != nil {
		return line, nil, err
	}
	if line, err = l.makeLine(ctx, m, imei, shard, injection); err != nil {
		return line, nil, err
	}
	var file bytes.Buffer
	if err := line.Write(&file); err != nil {
		return line, nil, err
	}
	sum := sha256.Sum256(file.Bytes())
	return line, sum[:], durable.WriteFile(path, file.Bytes(), 0o600)
}

// ReadReissue reads the injection package of one device of a lot, and gives the SHA-256 of the file too.
func ReadReissue(path, lot string, imei kme.IMEI) (line directory.InjectionLine, hash []byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return line, nil, err
	}
	defer f.Close()
	sum, n := sha256.New(), 0
	for line, err = range directory.ReadInjection(io.TeeReader(f, sum)) {
		if n++; err != nil || n > 1 || line.IMEI != imei || line.Lot != lot {
			return line, nil, fmt.Errorf("%s is damaged, or not of IMEI %s", path, imei)
		}
	}
	if n == 0 {
		return line, nil, fmt.Errorf("%s is empty", path)
	}
	return line, sum.Sum(nil), nil
}

// reissues gives the keys that came in the place of others, each with the path of its package below dir.
func reissues(entries []directory.Revocation, dir string) iter.Seq2[string, directory.Revocation] {
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

// checkReissue refuses a package that is not the one of an entry of the revocations.
func checkReissue(lot, path string, e directory.Revocation) error {
	line, hash, err := ReadReissue(path, lot, e.IMEI)
	if err == nil && (!bytes.Equal(hash, e.Package) || line.PublicKey.Fingerprint() != e.Key.Fingerprint()) {
		err = fmt.Errorf("%s is not the package of the published key", path)
	}
	return err
}

// EnrollOperator makes an operator's KEK in the token, as the security officer, and wraps it for the operator's
// transport key. generation is that of the KEK: 0 for the newest, and one more than that to rotate it; an earlier one
// is for what was wrapped under it. It opens the token itself: nobody else in the process may have it open.
func EnrollOperator(ctx context.Context, tokenURI string, officer hsmkeys.PIN, operator string, transport *rsa.PublicKey, generation int) (e *directory.Enrolment, jws []byte, created bool, err error) {
	name := func(manufacturer string) hsmkeys.Key { return kekOf(manufacturer, operator) }
	created, err = enroll(ctx, tokenURI, officer, operator, name, transport, generation, func(kek hsmkeys.Key, wrapped []byte, s *directory.Signer) error {
		e = &directory.Enrolment{
			Manufacturer: kek.Manufacturer, Operator: operator, TransportKey: directory.RSAThumbprint(transport),
			KEK: kek.HexID(), Algorithm: directory.RSAOAEP, Wrapped: wrapped,
		}
		if err := e.Validate(); err != nil {
			return err
		}
		jws, err = s.Sign(directory.TypeEnrolment, e)
		return err
	})
	return e, jws, created, err
}

// EnrollFixture makes the injection key of a fixture that injects device keys, and wraps it for the fixture's RSA key,
// as EnrollOperator does for an operator. With one more than the newest generation, the packages made from then on are
// for that one.
func EnrollFixture(ctx context.Context, tokenURI string, officer hsmkeys.PIN, fixture string, key *rsa.PublicKey, generation int) (e *directory.FixtureEnrolment, created bool, err error) {
	name := func(manufacturer string) hsmkeys.Key { return injectionKey(manufacturer, fixture) }
	created, err = enroll(ctx, tokenURI, officer, fixture, name, key, generation, func(k hsmkeys.Key, wrapped []byte, s *directory.Signer) error {
		e = directory.NewFixtureEnrolment(fixture, k.HexID(), wrapped, s.Public())
		return nil
	})
	return e, created, err
}

func enroll(ctx context.Context, tokenURI string, officer hsmkeys.PIN, name string, named func(manufacturer string) hsmkeys.Key,
	to *rsa.PublicKey, generation int, done func(k hsmkeys.Key, wrapped []byte, s *directory.Signer) error,
) (created bool, err error) {
	if err := directory.CheckName(name); err != nil {
		return false, err
	}
	// The key is named after the manufacturer, whose signing key only a user's login shows; the security officer's
	// login ends that one.
	var k hsmkeys.Key
	err = withSigner(ctx, tokenURI, func(t Token, s *directory.Signer) (err error) {
		if k = named(s.KeyID()); generation > 0 {
			k, err = next(ctx, t, k, generation)
		} else {
			k, err = newest(ctx, t, k)
		}
		return err
	})
	if err != nil {
		return false, err
	}
	if created, err = hsmkeys.EnrollKey(ctx, tokenURI, officer, k, to); err != nil {
		return false, fmt.Errorf("enroll %s: %w", name, err)
	}
	return created, withSigner(ctx, tokenURI, func(t Token, s *directory.Signer) error {
		wrapped, err := t.WrapEnrolled(ctx, k)
		if err != nil {
			return err
		}
		return done(k, wrapped, s)
	})
}

func withSigner(ctx context.Context, tokenURI string, f func(Token, *directory.Signer) error) error {
	token, err := hsmkeys.OpenFactory(ctx, tokenURI, hsmkeys.Options{})
	if err != nil {
		return err
	}
	defer token.Close()
	signer, err := openSigner(token)
	if err != nil {
		return err
	}
	return f(token, signer)
}
