package directory

import (
	"cmp"
	"context"
	"crypto"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/kmehsm/kmehsm/directory/internal/flight"
	"github.com/kmehsm/kmehsm/directory/internal/packed"
	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/kme"
)

// ErrUnknownDevice: the device is in no shard of its lot, or not in the lot.
var ErrUnknownDevice = errors.New("the directory has no such device")

// ReaderOptions are a Reader's; the zero value of each stands for its default.
type ReaderOptions struct {
	Cache         *Cache        // of device keys and reasons of revocations; default: its own, of DefaultCacheBytes
	RevocationTTL time.Duration // after which a list of revoked devices is read again, 1 minute
	NegativeTTL   time.Duration // for how long a shard that was not there is not asked for again, 5 seconds
	ReadTimeout   time.Duration // for which a lookup waits for the store, 2 seconds
	Waiting       int           // lookups that wait for the store at a time, 128; more fail at once

	// MaxAge is for how long a list of revoked devices stays in use that cannot be read again, or is past its
	// next_update; then lookups of the lot's devices fail. 0: for ever.
	MaxAge time.Duration

	Strict bool   // lookups fail with ErrNotCurrent while a list is refused or cannot be read; not while it is late
	Memory Memory // keeps the last good list of each lot across restarts; may be nil

	// Overdue is called whenever a lot's list cannot be read again, is refused or is past its next_update; may be nil.
	Overdue func(Overdue)
}

// A Reader gives what one manufacturer has published, verified. It may be used concurrently.
type Reader struct {
	store    Store
	verifier *Verifier
	o        ReaderOptions
	cache    *Cache
	flights  flight.Group

	mu          sync.Mutex
	revocations map[string]revocationList // by lot; guarded by mu
	followed    map[string]bool           // lots; guarded by mu
	unfollow    context.CancelFunc        // ends Follow; guarded by mu
}

// NewReader reads the manufacturer's objects from store.
func NewReader(store Store, v *Verifier, o ReaderOptions) *Reader {
	o.RevocationTTL = cmp.Or(o.RevocationTTL, time.Minute)
	o.NegativeTTL = cmp.Or(o.NegativeTTL, 5*time.Second)
	o.ReadTimeout = cmp.Or(o.ReadTimeout, 2*time.Second)
	o.Waiting = cmp.Or(o.Waiting, 128)
	if o.Cache == nil {
		o.Cache = NewCache(DefaultCacheBytes, nil)
	}
	return &Reader{
		store: store, verifier: v, o: o, cache: o.Cache, revocations: map[string]revocationList{},
		flights: flight.Group{Timeout: o.ReadTimeout, Most: o.Waiting, Unavailable: ErrUnavailable},
	}
}

// Manifest reads a lot's manifest.
func (r *Reader) Manifest(ctx context.Context, lot string) (*Manifest, error) {
	if err := CheckName(lot); err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrNotFound) // nothing that stands there is a lot
	}
	jws, _, err := r.store.Read(ctx, ManifestPath(lot))
	if err != nil {
		return nil, err
	}
	return r.verifier.Manifest(lot, jws)
}

// Check reads a lot's manifest. Those who ask at once share a read, also one that does not end.
func (r *Reader) Check(ctx context.Context, lot string) error {
	read := func(ctx context.Context) (*Manifest, error) { return r.Manifest(ctx, lot) }
	_, err := flight.Do(ctx, &r.flights, ManifestPath(lot), read)
	return err
}

// Manifests reads the manifests of all lots.
func (r *Reader) Manifests(ctx context.Context) ([]*Manifest, error) {
	lots, err := r.store.List(ctx, "lots")
	if err != nil {
		return nil, err
	}
	var all []*Manifest
	for _, lot := range lots {
		switch m, err := r.Manifest(ctx, lot); {
		case err == nil:
			all = append(all, m)
		case !errors.Is(err, ErrNotFound): // its folder exists, but its manifest was never published
			return nil, err
		}
	}
	return all, nil
}

// ReadShard reads a shard from the store, not from the cache.
func (r *Reader) ReadShard(ctx context.Context, m *Manifest, n int) (*Shard, error) {
	jws, _, err := r.store.Read(ctx, ShardPath(m.Lot, n))
	if err != nil {
		return nil, err
	}
	return checked(r.verifier, TypeShard, ShardPath(m.Lot, n), jws, func(s *Shard) error { return s.check(m, n) })
}

// A Device is what the directory says about a device.
type Device struct {
	Shard   int
	Key     crypto.PublicKey // *ecdsa.PublicKey or *rsa.PublicKey, as the lot's suite has it: the one issued last
	Package strict.Base64    // SHA-256 of the injection package with that key
	Revoked *Revocation      // nil if it is not
	History []Revocation     // its revocations and new keys, in the order of time; none for most devices
	Lot     *LotRevocation   // the revocation of its whole lot, which is last in History; nil if there is none
}

// Device looks up a device of a lot. It fails with ErrUnknownDevice, with the store's error, or with a *RefusedError.
// If the store cannot be reached, what was read before stays in use.
func (r *Reader) Device(ctx context.Context, m *Manifest, imei kme.IMEI) (Device, error) {
	if d, ok, err := r.Cached(m, imei); ok {
		return d, err
	}
	return r.Fetch(ctx, m, imei)
}

// Cached is Device without waiting. ok is false if not everything is in memory.
func (r *Reader) Cached(m *Manifest, imei kme.IMEI) (d Device, ok bool, err error) {
	position, err := position(m, imei)
	if err != nil {
		return d, true, err
	}
	s, ok := r.cache.shards.GetIfPresent(cacheKey{reader: r, lot: m.Lot, n: position / m.ShardSize})
	if !ok {
		return d, false, nil
	}
	list, err := r.inMemory(m.Lot)
	if list == nil || err != nil {
		return d, err != nil, err
	}
	var history []Revocation
	if ref := list.ref(position / revocationPart); ref != nil {
		part, ok := r.cache.parts.GetIfPresent(cacheKey{reader: r, lot: m.Lot, n: ref.Part})
		if !ok || !part.satisfies(ref) {
			return d, false, nil
		}
		history = part.Of(imei)
	}
	d, err = newDevice(m, imei, position, s, history, list.Whole)
	return d, true, err
}

// Fetch is Device without Cached. It waits for ReadTimeout at most, and fails at once if Waiting callers wait already.
func (r *Reader) Fetch(ctx context.Context, m *Manifest, imei kme.IMEI) (Device, error) {
	position, err := position(m, imei)
	if err != nil {
		return Device{}, err
	}
	ctx, done, err := r.flights.Wait(ctx)
	if err != nil {
		return Device{}, err
	}
	defer done()
	s, err := r.shard(ctx, m, position/m.ShardSize)
	if err == nil {
		err = s.unpublished(m, position/m.ShardSize)
	}
	if err != nil {
		return Device{}, err
	}
	history, whole, err := r.RevocationsOf(ctx, m, imei)
	if err != nil {
		return Device{}, err
	}
	return newDevice(m, imei, position, s, history, whole)
}

func position(m *Manifest, imei kme.IMEI) (int, error) {
	position, ok := m.Position(imei)
	if !ok {
		return 0, fmt.Errorf("%w: IMEI %s is not in lot %s", ErrUnknownDevice, imei, m.Lot)
	}
	return position, nil
}

// newDevice makes a Device of its shard, its own revocations and its lot's.
func newDevice(m *Manifest, imei kme.IMEI, position int, s *packedShard, history []Revocation,
	whole *LotRevocation) (Device, error) {
	n := position / m.ShardSize
	if err := s.unpublished(m, n); err != nil {
		return Device{}, err
	}
	key, err := s.keys.At(position-s.first, m.Suite)
	if err != nil {
		return Device{}, err
	}
	d := Device{Shard: n, Key: key, Package: s.pkg, History: history, Lot: whole}
	if whole != nil {
		d.History = append(slices.Clip(history), Revocation{IMEI: imei, Reason: whole.Reason, Time: whole.Time})
	}
	for i, e := range d.History {
		if d.Revoked = &d.History[i]; e.Key != nil {
			d.Key, d.Package, d.Revoked = e.Key.Key, e.Package, nil
		}
	}
	return d, nil
}

// unpublished is the error of a shard that is not in the store.
func (s *packedShard) unpublished(m *Manifest, n int) error {
	if s.keys.Bytes() == 0 {
		return fmt.Errorf("%w: shard %d of lot %s is not published", ErrUnknownDevice, n, m.Lot)
	}
	return nil
}

// Issued is how many new keys the device was issued after its first.
func (d Device) Issued() (n int) {
	for _, e := range d.History {
		if e.Key != nil {
			n++
		}
	}
	return n
}

// shard gives a shard, from the cache or the store. One that is not in the store has no keys.
func (r *Reader) shard(ctx context.Context, m *Manifest, n int) (*packedShard, error) {
	return flight.Do(ctx, &r.flights, ShardPath(m.Lot, n), func(ctx context.Context) (*packedShard, error) {
		// Another read may have ended since the cache was asked.
		if landed, ok := r.cache.shards.GetEntryQuietly(cacheKey{reader: r, lot: m.Lot, n: n}); ok {
			return landed.Value, nil
		}
		done, err := r.flights.Read()
		if err != nil {
			return nil, err
		}
		defer done()
		kept := new(packedShard)
		s, err := r.ReadShard(ctx, m, n)
		if err != nil && !errors.Is(err, ErrNotFound) {
			return nil, err
		}
		if err == nil {
			kept.first, _ = m.ShardRange(n)
			kept.keys = packed.Join(len(s.Keys), func(i int) crypto.PublicKey { return s.Keys[i].Key })
			kept.pkg = s.Package
		}
		r.cache.shards.Set(cacheKey{reader: r, lot: m.Lot, n: n}, kept)
		return kept, nil
	})
}

// RevocationsOf gives a device's own revocations, and that of its whole lot. It does not read the device's key.
func (r *Reader) RevocationsOf(ctx context.Context, m *Manifest, imei kme.IMEI) ([]Revocation, *LotRevocation, error) {
	list, err := r.Revocations(ctx, m)
	if err != nil {
		return nil, nil, err
	}
	position, ok := m.Position(imei)
	ref := list.ref(position / revocationPart)
	if !ok || ref == nil {
		return nil, list.Whole, nil
	}
	part, err := r.part(ctx, m, ref)
	if err != nil {
		return nil, nil, err
	}
	return part.Of(imei), list.Whole, nil
}

// ReadRevocations reads a lot's list of revoked devices from the store. If there is none, it fails with ErrNotFound.
func (r *Reader) ReadRevocations(ctx context.Context, m *Manifest) (*Revocations, error) {
	list, _, err := readRevocations(ctx, r.store, r.verifier, m)
	return list, err
}

// CompareRevocationPart reads a part of a lot's revocations from the store, not from the cache: the version that list
// names, or a later one. If neither list nor store has the part, it is empty, with version 0. complete is false if the
// part is later than list says: a run was killed after it wrote the part, or is under way.
func (r *Reader) CompareRevocationPart(ctx context.Context, m *Manifest, list *Revocations,
	n int) (part *RevocationPart, complete bool, err error) {
	p, err := readPart(ctx, r.store, r.verifier, m, n, list.ref(n))
	if err != nil {
		return nil, false, err
	}
	complete, err = list.compare(m, &p.RevocationPart)
	return &p.RevocationPart, complete, err
}

// RevocationParts gives the parts of a lot's revocations that the list names or the store has, and the names in the
// store that are no parts.
func (r *Reader) RevocationParts(ctx context.Context, m *Manifest,
	list *Revocations) (parts []int, strays []string, err error) {
	for _, ref := range list.Parts {
		parts = append(parts, ref.Part)
	}
	names, err := r.store.List(ctx, RevocationPartsPath(m.Lot))
	for _, name := range names {
		n, err := strconv.Atoi(name)
		path := RevocationPartsPath(m.Lot) + "/" + name
		if err != nil || n < 0 || n >= m.RevocationParts() || RevocationPartPath(m.Lot, n) != path {
			strays = append(strays, path)
		} else {
			parts = append(parts, n)
		}
	}
	slices.Sort(parts)
	return slices.Compact(parts), strays, err
}

// History reads a device's revocations from the store, not from the cache, also those that the list does not name yet.
func (r *Reader) History(ctx context.Context, m *Manifest, imei kme.IMEI) ([]Revocation, error) {
	list, err := r.ReadRevocations(ctx, m)
	if err != nil {
		return nil, err
	}
	position, ok := m.Position(imei)
	if !ok {
		return nil, nil
	}
	p, err := readPart(ctx, r.store, r.verifier, m, position/revocationPart, list.ref(position/revocationPart))
	if err != nil {
		return nil, err
	}
	return p.Of(imei), nil
}

// part gives the part of a lot's revocations that a list names, or a later one.
func (r *Reader) part(ctx context.Context, m *Manifest, ref *RevocationRef) (*storedPart, error) {
	key := cacheKey{reader: r, lot: m.Lot, n: ref.Part}
	if p, ok := r.cache.parts.GetIfPresent(key); ok && p.satisfies(ref) {
		return p, nil
	}
	object := fmt.Sprintf("%s %d", RevocationPartPath(m.Lot, ref.Part), ref.Version) // a later list wants a later part
	return flight.Do(ctx, &r.flights, object, func(ctx context.Context) (*storedPart, error) {
		done, err := r.flights.Read()
		if err != nil {
			return nil, err
		}
		defer done()
		p, err := readPart(ctx, r.store, r.verifier, m, ref.Part, ref)
		if err == nil {
			r.cache.parts.Set(key, p)
		}
		return p, err
	})
}
