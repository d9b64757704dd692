package directory

import (
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/maypok86/otter/v2"
	"github.com/maypok86/otter/v2/stats"
	"golang.org/x/sync/singleflight"

	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/kme"
)

// ErrUnknownDevice: the device is in no shard of its lot, or not in the lot.
var ErrUnknownDevice = errors.New("the directory has no such device")

// ReaderOptions are a Reader's; the zero value of each stands for its default.
type ReaderOptions struct {
	CacheBytes    int64          // memory for device keys and for why devices were revoked, 64 MiB
	RevocationTTL time.Duration  // after which a list of revoked devices is read again, 1 minute
	Stats         stats.Recorder // counts hits and misses of the cache; may be nil
	NegativeTTL   time.Duration  // for how long a shard that was not there is not asked for again, 5 seconds

	// Overdue is called each time that a lot's list of revoked devices cannot be read, or is refused (a *RefusedError);
	// may be nil.
	Overdue func(Overdue)
}

// An Overdue is a list of revoked devices that should have been replaced by now.
type Overdue struct {
	Lot   string
	Since time.Time // when the list that serves on was read; zero if there is none
	Cause error     // of the last try
}

// fetchTimeout bounds a read that may outlive the caller who began it.
const fetchTimeout = 30 * time.Second

// A Reader gives what one manufacturer has published, verified. It may be used concurrently.
type Reader struct {
	store    Store
	verifier *Verifier
	o        ReaderOptions
	shards   *otter.Cache[shardKey, *packedShard]
	parts    *otter.Cache[shardKey, *storedPart] // of revocations
	flight   singleflight.Group                  // one read an object, however many ask

	mu          sync.Mutex
	revocations map[string]revocationList // by lot; guarded by mu
}

type shardKey struct {
	lot string
	n   int
}

// A packedShard is a verified shard in the memory that it needs: keys of one size in a row. One that is not in the
// store has none.
type packedShard struct {
	first int // position of the first key
	size  int // bytes a key
	keys  []byte
	pkg   Base64
}

// A revocationList is the last list that was read and believed, and what came of the last try to read it again: a
// try that fails does not make it younger.
type revocationList struct {
	list    *Revocations      // nil if none was read yet; it does not change
	sum     [sha256.Size]byte // of its JWS; zero if none is published
	fetched time.Time
	tried   time.Time
	err     error // of the last try
}

// NewReader reads the manufacturer's objects from store.
func NewReader(store Store, v *Verifier, o ReaderOptions) *Reader {
	if o.CacheBytes == 0 {
		o.CacheBytes = 64 << 20
	}
	if o.RevocationTTL == 0 {
		o.RevocationTTL = time.Minute
	}
	if o.NegativeTTL == 0 {
		o.NegativeTTL = 5 * time.Second
	}
	const overhead = 256 // of an entry, about
	return &Reader{
		store: store, verifier: v, o: o, revocations: map[string]revocationList{},
		shards: otter.Must(&otter.Options[shardKey, *packedShard]{
			StatsRecorder: o.Stats,
			MaximumWeight: uint64(o.CacheBytes - o.CacheBytes/8),
			Weigher:       func(_ shardKey, s *packedShard) uint32 { return uint32(len(s.keys) + overhead) },
			ExpiryCalculator: otter.ExpiryWritingFunc(func(e otter.Entry[shardKey, *packedShard]) time.Duration {
				if e.Value.keys == nil {
					return o.NegativeTTL
				}
				return 365 * 24 * time.Hour // a published shard never changes
			}),
		}),
		parts: otter.Must(&otter.Options[shardKey, *storedPart]{
			MaximumWeight: uint64(o.CacheBytes / 8),
			Weigher:       func(_ shardKey, p *storedPart) uint32 { return uint32(p.size + overhead) },
		}),
	}
}

// Manifest reads a lot's manifest.
func (r *Reader) Manifest(ctx context.Context, lot string) (*Manifest, error) {
	if err := CheckName(lot); err != nil {
		return nil, err
	}
	jws, _, err := r.store.Read(ctx, ManifestPath(lot))
	if err != nil {
		return nil, err
	}
	return r.verifier.Manifest(lot, jws)
}

// Manifests reads the manifests of all lots.
func (r *Reader) Manifests(ctx context.Context) ([]*Manifest, error) {
	lots, err := r.store.List(ctx, "lots")
	if err != nil {
		return nil, err
	}
	var all []*Manifest
	for _, lot := range lots {
		m, err := r.Manifest(ctx, lot)
		if errors.Is(err, ErrNotFound) {
			continue // its folder was made, and its manifest never published
		}
		if err != nil {
			return nil, err
		}
		all = append(all, m)
	}
	return all, nil
}

// ReadShard reads a shard from the store, whatever the cache has.
func (r *Reader) ReadShard(ctx context.Context, m *Manifest, n int) (*Shard, error) {
	path := ShardPath(m.Lot, n)
	jws, _, err := r.store.Read(ctx, path)
	if err != nil {
		return nil, err
	}
	s := new(Shard)
	if err := r.verifier.Verify(TypeShard, path, jws, s); err != nil {
		return nil, err
	}
	if err := s.check(m, n); err != nil {
		return nil, refused(path, "%v", err)
	}
	return s, nil
}

// A Device is what the directory says of a device.
type Device struct {
	Shard   int
	Key     crypto.PublicKey // *ecdsa.PublicKey or *rsa.PublicKey, as the lot's suite has it: the one issued last
	Package Base64           // SHA-256 of the injection package with that key
	Revoked *Revocation      // nil if it is not
	History []Revocation     // how it came to that, in the order of time; none for most devices
	Lot     *LotRevocation   // its whole lot is revoked, the last of its history; nil if it is not
}

// Device looks a device of a lot up. It fails with ErrUnknownDevice, with the store's error, or with a *RefusedError. If
// the store cannot be reached, what was read before serves on.
func (r *Reader) Device(ctx context.Context, m *Manifest, imei kme.IMEI) (Device, error) {
	position, ok := m.Position(imei)
	if !ok {
		return Device{}, fmt.Errorf("%w: IMEI %s is not in lot %s", ErrUnknownDevice, imei, m.Lot)
	}
	n := position / m.ShardSize
	s, ok := r.shards.GetIfPresent(shardKey{m.Lot, n})
	if !ok {
		var err error
		if s, err = r.fetchShard(ctx, m, n); err != nil {
			return Device{}, err
		}
	}
	if s.keys == nil {
		return Device{}, fmt.Errorf("%w: shard %d of lot %s is not published", ErrUnknownDevice, n, m.Lot)
	}
	at := (position - s.first) * s.size
	key, err := unpack(m.Suite, s.keys[at:at+s.size])
	if err != nil {
		return Device{}, err
	}
	d := Device{Shard: n, Key: key, Package: s.pkg}
	if d.History, d.Lot, err = r.RevocationsOf(ctx, m, imei); err != nil {
		return Device{}, err
	}
	if w := d.Lot; w != nil {
		d.History = append(slices.Clip(d.History), Revocation{IMEI: imei, Reason: w.Reason, Time: w.Time})
	}
	for i, e := range d.History {
		if d.Revoked = &d.History[i]; e.Key != nil {
			d.Key, d.Package, d.Revoked = e.Key.Key, e.Package, nil
		}
	}
	return d, nil
}

// Revoked says whether a device of a lot is revoked, without a look at its key. It reads no more than the lot's list.
func (r *Reader) Revoked(ctx context.Context, m *Manifest, imei kme.IMEI) (bool, error) {
	list, err := r.revoked(ctx, m)
	if err != nil {
		return false, err
	}
	position, ok := m.Position(imei)
	return ok && list.revokes(position), nil
}

// Issued is how many keys the device was issued in the place of its first.
func (d Device) Issued() (n int) {
	for _, e := range d.History {
		if e.Key != nil {
			n++
		}
	}
	return n
}

// RevocationsOf gives a device's own revocations, and its lot's if that is revoked as a whole, without a look at its key.
func (r *Reader) RevocationsOf(ctx context.Context, m *Manifest, imei kme.IMEI) ([]Revocation, *LotRevocation, error) {
	list, err := r.revoked(ctx, m)
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

func (r *Reader) fetchShard(ctx context.Context, m *Manifest, n int) (*packedShard, error) {
	return oneFlight(ctx, &r.flight, ShardPath(m.Lot, n), func(ctx context.Context) (*packedShard, error) {
		// An earlier flight may have landed since the cache was asked.
		if landed, ok := r.shards.GetIfPresent(shardKey{m.Lot, n}); ok {
			return landed, nil
		}
		packed := new(packedShard)
		s, err := r.ReadShard(ctx, m, n)
		if err != nil && !errors.Is(err, ErrNotFound) {
			return nil, err
		}
		if err == nil {
			packed.first, _ = m.ShardRange(n)
			for _, k := range s.Keys {
				packed.keys = append(packed.keys, pack(k.Key)...)
			}
			packed.keys = slices.Clip(packed.keys)
			packed.size = len(packed.keys) / len(s.Keys)
			packed.pkg = s.Package
		}
		r.shards.Set(shardKey{m.Lot, n}, packed)
		return packed, nil
	})
}

// oneFlight runs f once for all who ask for key at a time. A caller whose context ends stops waiting, and the others do
// not suffer.
func oneFlight[T any](ctx context.Context, g *singleflight.Group, key string, f func(context.Context) (T, error)) (T, error) {
	result := g.DoChan(key, func() (got any, err error) {
		defer panics.Recover(&err) // the group's goroutine has it end the process
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), fetchTimeout)
		defer cancel()
		return f(ctx)
	})
	var none T
	select {
	case <-ctx.Done():
		return none, ctx.Err()
	case got := <-result:
		if got.Err != nil {
			return none, got.Err
		}
		return got.Val.(T), nil
	}
}

// revoked gives a lot's list of revoked devices, read RevocationTTL ago at most if it could be. If the store is
// away, or its list is refused, the last one stands.
func (r *Reader) revoked(ctx context.Context, m *Manifest) (*Revocations, error) {
	if list := r.freshList(m.Lot); list != nil {
		return list, nil
	}
	return oneFlight(ctx, &r.flight, RevocationsPath(m.Lot), func(ctx context.Context) (*Revocations, error) {
		if list := r.freshList(m.Lot); list != nil { // as in fetchShard
			return list, nil
		}
		r.mu.Lock()
		last := r.revocations[m.Lot] // which nobody else replaces: this is the one flight
		r.mu.Unlock()
		list, sum, err := r.nextList(ctx, m, last)
		now := time.Now()
		if err == nil {
			last.list, last.sum, last.fetched = list, sum, now
		}
		last.tried, last.err = now, err
		r.mu.Lock()
		r.revocations[m.Lot] = last
		r.mu.Unlock()
		if err != nil && r.o.Overdue != nil {
			r.o.Overdue(Overdue{m.Lot, last.fetched, err})
		}
		if last.list == nil {
			return nil, err
		}
		return last.list, nil
	})
}

// nextList reads a lot's list, which must be the last one or one that came after it.
func (r *Reader) nextList(ctx context.Context, m *Manifest,
	last revocationList) (list *Revocations, sum [sha256.Size]byte, err error) {
	defer panics.Recover(&err) // whatever comes from the store, the last list stands
	jws, _, err := r.store.Read(ctx, RevocationsPath(m.Lot))
	switch {
	case errors.Is(err, ErrNotFound):
		list = &Revocations{Lot: m.Lot}
	case err != nil:
		return nil, sum, err
	default:
		if sum = sha256.Sum256(jws); last.list != nil && sum == last.sum {
			return last.list, sum, nil
		}
		if list, err = parseRevocations(r.verifier, m, jws); err != nil {
			return nil, sum, err
		}
	}
	path := RevocationsPath(m.Lot)
	switch was := last.list; {
	case was == nil:
	case list.Version < was.Version || list.Version == was.Version && sum != last.sum:
		return nil, sum, refused(path, "it has version %d, and version %d was there before: "+askWhy,
			list.Version, was.Version)
	case was.Whole != nil && list.Whole == nil:
		return nil, sum, refused(path, "it does not revoke the whole lot, as version %d does, which is for good: "+askWhy,
			was.Version)
	}
	return list, sum, nil
}

// freshList is the list that may still be used unasked; nil if there is none.
func (r *Reader) freshList(lot string) *Revocations {
	r.mu.Lock()
	defer r.mu.Unlock()
	if known := r.revocations[lot]; time.Since(known.tried) < r.o.RevocationTTL {
		return known.list
	}
	return nil
}

// Overdue gives the lists of revoked devices whose last try to read them has failed.
func (r *Reader) Overdue() []Overdue {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []Overdue
	for lot, known := range r.revocations {
		if known.err != nil {
			all = append(all, Overdue{lot, known.fetched, known.err})
		}
	}
	slices.SortFunc(all, func(a, b Overdue) int { return strings.Compare(a.Lot, b.Lot) })
	return all
}

// ReadRevocations reads a lot's list of revoked devices from the store; none published is an empty one, of version 0.
func (r *Reader) ReadRevocations(ctx context.Context, m *Manifest) (*Revocations, error) {
	list, _, err := readRevocations(ctx, r.store, r.verifier, m)
	return list, err
}

// ReadRevocationPart reads a part of a lot's revocations from the store, whatever the cache has: the one that list
// names, or a later one. Where the store has none, and list neither, it is an empty one, of version 0.
func (r *Reader) ReadRevocationPart(ctx context.Context, m *Manifest, list *Revocations,
	n int) (*RevocationPart, error) {
	p, err := readPart(ctx, r.store, r.verifier, m, n, list.ref(n))
	if err != nil {
		return nil, err
	}
	return &p.RevocationPart, nil
}

// CompareRevocationPart is ReadRevocationPart, and what Compare of the list says of it.
func (r *Reader) CompareRevocationPart(ctx context.Context, m *Manifest, list *Revocations,
	n int) (part *RevocationPart, complete bool, err error) {
	if part, err = r.ReadRevocationPart(ctx, m, list, n); err == nil {
		complete, err = list.Compare(m, part)
	}
	return part, complete, err
}

// RevocationParts says which parts of a lot's revocations the list names or the store has, and which names the store
// has in their place that are none.
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

// History reads a device's revocations from the store, whatever the cache has; also those that the list does not name
// yet.
func (r *Reader) History(ctx context.Context, m *Manifest, imei kme.IMEI) ([]Revocation, error) {
	list, err := r.ReadRevocations(ctx, m)
	if err != nil {
		return nil, err
	}
	position, ok := m.Position(imei)
	if !ok {
		return nil, nil
	}
	p, err := r.ReadRevocationPart(ctx, m, list, position/revocationPart)
	if err != nil {
		return nil, err
	}
	return p.Of(imei), nil
}

// part gives the part of a lot's revocations that a list names, or a later one.
func (r *Reader) part(ctx context.Context, m *Manifest, ref *RevocationRef) (*storedPart, error) {
	key := shardKey{m.Lot, ref.Part}
	if p, ok := r.parts.GetIfPresent(key); ok && p.satisfies(ref) {
		return p, nil
	}
	flight := fmt.Sprintf("%s %d", RevocationPartPath(m.Lot, ref.Part), ref.Version) // a later list wants a later part
	return oneFlight(ctx, &r.flight, flight, func(ctx context.Context) (*storedPart, error) {
		p, err := readPart(ctx, r.store, r.verifier, m, ref.Part, ref)
		if err == nil {
			r.parts.Set(key, p)
		}
		return p, err
	})
}
