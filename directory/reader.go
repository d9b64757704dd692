package directory

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/maypok86/otter/v2"
	"github.com/maypok86/otter/v2/stats"
	"golang.org/x/sync/errgroup"
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
	ReadTimeout   time.Duration  // for which a lookup waits for the store, 2 seconds
	Waiting       int            // lookups that wait for the store at a time, 128; more fail at once

	// MaxAge is for how long a list of revoked devices serves on that cannot be read again, or is past its next_update;
	// then nothing is said of the lot's devices any more. 0: for ever.
	MaxAge time.Duration

	// Memory keeps across restarts which list of each lot was believed last; nil: nothing does.
	Memory Memory

	// Overdue is called each time that a lot's list of revoked devices cannot be read again, is refused or is past its
	// next_update; may be nil.
	Overdue func(Overdue)
}

// A Memory keeps the mark of the last list of revoked devices of each lot, durably. Other processes may share it. A copy
// of the list itself serves after a restart, should the directory show none or an earlier one; it is as good as its mark.
type Memory interface {
	Last(ctx context.Context, lot string) (mark ListMark, found bool, err error)
	Note(ctx context.Context, lot string, mark ListMark) error
	Keep(lot string, jws []byte) error
	Kept(lot string) (jws []byte, err error)
}

// A ListMark says which list of revoked devices one is: of each version, a manufacturer publishes one.
type ListMark struct {
	Version int    `json:"version"`
	SHA256  Base64 `json:"sha256"` // of its JWS
}

// A Why is what is wrong with a list of revoked devices.
type Why string

const (
	Failed   Why = "failed"   // the store cannot be read
	Refused  Why = "refused"  // it is not the manufacturer's, or not a list of this lot
	Rollback Why = "rollback" // it is not the last one that was there
	Withheld Why = "withheld" // it is not there, and every lot has one
	Late     Why = "overdue"  // it is past its next_update
)

// An Overdue is a list of revoked devices that should have been replaced by now.
type Overdue struct {
	Lot   string
	Why   Why
	Since time.Time // when the list that serves on was read; zero if there is none
	Cause error     // of the last try
}

func overdueFor(lot string, since time.Time, cause error) Overdue {
	o := Overdue{lot, Failed, since, cause}
	var late *lateError
	var refused *RefusedError
	switch {
	case errors.As(cause, &late):
		o.Why = Late
	case errors.Is(cause, ErrNotFound):
		o.Why = Withheld
	case errors.As(cause, &refused):
		if o.Why = Refused; refused.Rollback {
			o.Why = Rollback
		}
	}
	return o
}

type lateError struct{ error }

// A Reader gives what one manufacturer has published, verified. It may be used concurrently.
type Reader struct {
	store    Store
	verifier *Verifier
	o        ReaderOptions
	shards   *otter.Cache[shardKey, *packedShard]
	parts    *otter.Cache[shardKey, *storedPart] // of revocations
	flight   singleflight.Group                  // one read an object, however many ask
	waiting  atomic.Int64                        // lookups that wait for the store
	reading  atomic.Int64                        // see begin

	mu          sync.Mutex
	revocations map[string]revocationList // by lot; guarded by mu
	followed    map[string]bool           // lots; guarded by mu
	unfollow    context.CancelFunc        // ends what Follow began; guarded by mu
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
	sum     [sha256.Size]byte // of its JWS
	noted   bool              // the Memory has it
	fetched time.Time
	tried   time.Time
	err     error // of the last try, or that the list is late
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
	if o.ReadTimeout == 0 {
		o.ReadTimeout = 2 * time.Second
	}
	if o.Waiting == 0 {
		o.Waiting = 128
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
	if d, ok, err := r.Cached(m, imei); ok {
		return d, err
	}
	return r.Fetch(ctx, m, imei)
}

// Cached is Device where all that it takes is in memory: it waits for nobody. ok is false where something is not.
func (r *Reader) Cached(m *Manifest, imei kme.IMEI) (d Device, ok bool, err error) {
	position, ok := m.Position(imei)
	if !ok {
		return d, true, fmt.Errorf("%w: IMEI %s is not in lot %s", ErrUnknownDevice, imei, m.Lot)
	}
	s, ok := r.shards.GetIfPresent(shardKey{m.Lot, position / m.ShardSize})
	if !ok {
		return d, false, nil
	}
	list, err := r.inMemory(m.Lot)
	if list == nil || err != nil {
		return d, err != nil, err
	}
	var part *storedPart
	if ref := list.ref(position / revocationPart); ref != nil {
		if part, ok = r.parts.GetIfPresent(shardKey{m.Lot, ref.Part}); !ok || !part.satisfies(ref) {
			return d, false, nil
		}
	}
	d, err = newDevice(m, imei, position, s, list, part)
	return d, true, err
}

// Fetch is Device where Cached has not all of it. So many wait for the store as Waiting says, each for ReadTimeout at
// most; one more fails at once.
func (r *Reader) Fetch(ctx context.Context, m *Manifest, imei kme.IMEI) (Device, error) {
	position, ok := m.Position(imei)
	if !ok {
		return Device{}, fmt.Errorf("%w: IMEI %s is not in lot %s", ErrUnknownDevice, imei, m.Lot)
	}
	defer r.waiting.Add(-1)
	if n := r.waiting.Add(1); n > int64(r.o.Waiting) {
		return Device{}, fmt.Errorf("%w: %d lookups wait for it already", ErrUnavailable, n-1)
	}
	ctx, cancel := context.WithTimeout(ctx, r.o.ReadTimeout)
	defer cancel()
	s, err := r.shard(ctx, m, position/m.ShardSize)
	if err == nil {
		err = s.unpublished(m, position/m.ShardSize)
	}
	if err != nil {
		return Device{}, err
	}
	list, part, err := r.revocationsAt(ctx, m, position)
	if err != nil {
		return Device{}, err
	}
	return newDevice(m, imei, position, s, list, part)
}

// newDevice is what a shard, the list of revoked devices and its part say of a device. part is nil where the list has
// none.
func newDevice(m *Manifest, imei kme.IMEI, position int, s *packedShard, list *Revocations,
	part *storedPart) (Device, error) {
	n := position / m.ShardSize
	if err := s.unpublished(m, n); err != nil {
		return Device{}, err
	}
	at := (position - s.first) * s.size
	key, err := unpack(m.Suite, s.keys[at:at+s.size])
	if err != nil {
		return Device{}, err
	}
	d := Device{Shard: n, Key: key, Package: s.pkg, Lot: list.Whole}
	if part != nil {
		d.History = part.Of(imei)
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

// unpublished is the error of a shard that is not in the store.
func (s *packedShard) unpublished(m *Manifest, n int) error {
	if s.keys == nil {
		return fmt.Errorf("%w: shard %d of lot %s is not published", ErrUnknownDevice, n, m.Lot)
	}
	return nil
}

// Revoked says whether a device of a lot is revoked, by the list in memory: it waits for nobody. Where there is none,
// nobody is known to be revoked, unless MaxAge is set: then that is an error, as is a list that is too old.
func (r *Reader) Revoked(m *Manifest, imei kme.IMEI) (bool, error) {
	r.mu.Lock()
	known := r.revocations[m.Lot]
	r.mu.Unlock()
	if err := r.tooOld(m.Lot, known); err != nil || known.list == nil {
		return false, err
	}
	position, ok := m.Position(imei)
	return ok && known.list.revokes(position), nil
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
	position, ok := m.Position(imei)
	if !ok {
		position = -1 // in no part
	}
	list, part, err := r.revocationsAt(ctx, m, position)
	if err != nil {
		return nil, nil, err
	}
	if part == nil {
		return nil, list.Whole, nil
	}
	return part.Of(imei), list.Whole, nil
}

// revocationsAt gives a lot's list, and the part with the device at a position; nil if there is none.
func (r *Reader) revocationsAt(ctx context.Context, m *Manifest, position int) (*Revocations, *storedPart, error) {
	list, err := r.list(ctx, m)
	if err != nil {
		return nil, nil, err
	}
	ref := list.ref(position / revocationPart)
	if position < 0 || ref == nil {
		return list, nil, nil
	}
	part, err := r.part(ctx, m, ref)
	return list, part, err
}

// shard gives a shard, from the cache or the store. One that is not in the store has no keys.
func (r *Reader) shard(ctx context.Context, m *Manifest, n int) (*packedShard, error) {
	return oneFlight(ctx, r, ShardPath(m.Lot, n), func(ctx context.Context) (*packedShard, error) {
		// An earlier flight may have landed since the cache was asked.
		if landed, ok := r.shards.GetEntryQuietly(shardKey{m.Lot, n}); ok {
			return landed.Value, nil
		}
		done, err := r.begin()
		if err != nil {
			return nil, err
		}
		defer done()
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

// begin admits a read of a shard or a part. Some stores, a file system over a network, cannot be told to give one up:
// it stays, and those who waited for it do not.
func (r *Reader) begin() (done func(), err error) {
	done = func() { r.reading.Add(-1) }
	if n := r.reading.Add(1); n > int64(r.o.Waiting) {
		done()
		return nil, fmt.Errorf("%w: it has not answered %d reads", ErrUnavailable, n-1)
	}
	return done, nil
}

// oneFlight runs f once for all who ask for key at a time, for ReadTimeout at most if f heeds its context. A caller
// whose context ends stops waiting, and the others do not suffer.
func oneFlight[T any](ctx context.Context, r *Reader, key string, f func(context.Context) (T, error)) (T, error) {
	result := r.flight.DoChan(key, func() (got any, err error) {
		defer panics.Recover(&err) // the group's goroutine has it end the process
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.o.ReadTimeout)
		defer cancel()
		return f(ctx)
	})
	var none T
	var err error
	select {
	case <-ctx.Done():
		err = ctx.Err()
	case got := <-result:
		if err = got.Err; err == nil {
			return got.Val.(T), nil
		}
	}
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("%w: it has not answered in time: %w", ErrUnavailable, err)
	}
	return none, err
}

// refreshAtOnce is how many lists of one manufacturer's are read at a time.
const refreshAtOnce = 8

// Follow has the lists of revoked devices of these lots, and of no others, read now and every RevocationTTL, in the
// background: no lookup waits for that of a list that is there. It is in the place of an earlier Follow, and goes on
// until the next one; without lots it ends.
func (r *Reader) Follow(lots []*Manifest) {
	ctx, cancel := context.WithCancel(context.Background())
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.unfollow != nil {
		r.unfollow()
	}
	r.unfollow, r.followed = cancel, map[string]bool{}
	for _, m := range lots {
		r.followed[m.Lot] = true
	}
	if len(lots) > 0 {
		go r.follow(ctx, lots)
	}
}

func (r *Reader) follow(ctx context.Context, lots []*Manifest) {
	for {
		var all errgroup.Group
		all.SetLimit(refreshAtOnce)
		for _, m := range lots {
			all.Go(func() error {
				if ctx.Err() == nil {
					r.Refresh(ctx, m) // what comes of it is told to Overdue
				}
				return nil
			})
		}
		all.Wait()
		select {
		case <-ctx.Done():
			return
		case <-time.After(r.o.RevocationTTL):
		}
	}
}

// Refresh reads a lot's list of revoked devices again, for ReadTimeout at most. If it fails, the last list stands, and
// is overdue.
func (r *Reader) Refresh(ctx context.Context, m *Manifest) error {
	return r.refresh(ctx, m, time.Now())
}

// refresh is Refresh, unless the list was read after asked.
func (r *Reader) refresh(ctx context.Context, m *Manifest, asked time.Time) error {
	short, cancel := context.WithTimeout(ctx, r.o.ReadTimeout)
	defer cancel()
	_, err := r.load(short, m, asked)
	if ctx.Err() != nil {
		return ctx.Err() // nobody asks any more
	}
	r.mu.Lock()
	known := r.revocations[m.Lot]
	r.mu.Unlock()
	var kept revocationList
	if err != nil && known.list == nil {
		kept = r.recall(ctx, m)
	}
	r.mu.Lock()
	known = r.revocations[m.Lot]
	if err == nil {
		err = known.err // it was taken, and is late
	} else {
		if known.list == nil {
			known = kept
		}
		known.tried, known.err = time.Now(), err
		r.revocations[m.Lot] = known
	}
	r.mu.Unlock()
	if err != nil && r.o.Overdue != nil {
		r.o.Overdue(overdueFor(m.Lot, known.fetched, err))
	}
	return err
}

// recall is the list that was believed last before a restart, if there is a copy; as old as its manufacturer says.
func (r *Reader) recall(ctx context.Context, m *Manifest) (kept revocationList) {
	if r.o.Memory == nil {
		return kept
	}
	mark, found, err := r.o.Memory.Last(ctx, m.Lot)
	if err != nil || !found {
		return kept
	}
	jws, err := r.o.Memory.Kept(m.Lot)
	sum := sha256.Sum256(jws)
	if err != nil || !bytes.Equal(sum[:], mark.SHA256) {
		return kept
	}
	if list, err := parseRevocations(r.verifier, m, jws); err == nil {
		kept = revocationList{list: list, sum: sum, noted: true, fetched: list.ThisUpdate}
	}
	return kept
}

// inMemory is the list that may be used unasked; nil if there is none. That of a lot that nobody follows is read again
// when RevocationTTL has passed.
func (r *Reader) inMemory(lot string) (*Revocations, error) {
	r.mu.Lock()
	known, followed := r.revocations[lot], r.followed[lot]
	r.mu.Unlock()
	if known.list == nil || !followed && time.Since(known.tried) >= r.o.RevocationTTL {
		return nil, nil
	}
	return known.list, r.tooOld(lot, known)
}

// tooOld refuses to say anything by a list of before MaxAge.
func (r *Reader) tooOld(lot string, known revocationList) error {
	now := time.Now()
	switch {
	case r.o.MaxAge == 0:
		return nil
	case known.list == nil:
		return fmt.Errorf("the list of revoked devices of lot %s was not read yet, and max_revocation_age is %s",
			lot, r.o.MaxAge)
	case now.Sub(known.fetched) > r.o.MaxAge || now.Sub(known.list.NextUpdate) > r.o.MaxAge:
		return fmt.Errorf("the list of revoked devices of lot %s was read %s and was good until %s, and "+
			"max_revocation_age is %s", lot, known.fetched.UTC().Format(time.RFC3339),
			known.list.NextUpdate.Format(time.RFC3339), r.o.MaxAge)
	}
	return nil
}

// list gives a lot's list of revoked devices. Who asks waits if there is none yet, or if nobody follows the lot and
// RevocationTTL has passed; if the store is away then, or its list is refused, the last one stands.
func (r *Reader) list(ctx context.Context, m *Manifest) (*Revocations, error) {
	asked := time.Now()
	if list, err := r.inMemory(m.Lot); list != nil {
		return list, err
	}
	r.mu.Lock()
	followed := r.followed[m.Lot]
	r.mu.Unlock()
	if followed {
		if list, err := r.load(ctx, m, asked); err != nil {
			return list, err
		}
	} else if err := r.refresh(ctx, m, asked); ctx.Err() != nil {
		return nil, err
	}
	r.mu.Lock()
	known := r.revocations[m.Lot]
	r.mu.Unlock()
	if known.list == nil {
		return nil, known.err
	}
	return known.list, r.tooOld(m.Lot, known)
}

// load reads a lot's list, and puts it in the place of the last one; unless an earlier flight has landed since the
// caller asked.
func (r *Reader) load(ctx context.Context, m *Manifest, asked time.Time) (*Revocations, error) {
	return oneFlight(ctx, r, RevocationsPath(m.Lot), func(ctx context.Context) (*Revocations, error) {
		r.mu.Lock()
		last := r.revocations[m.Lot]
		r.mu.Unlock()
		if last.list != nil && last.fetched.After(asked) {
			return last.list, nil
		}
		next, err := r.nextList(ctx, m, last)
		if err != nil {
			return nil, err
		}
		r.mu.Lock()
		r.revocations[m.Lot] = next
		r.mu.Unlock()
		return next.list, nil
	})
}

// nextList reads a lot's list, which must be the last one or one that came after it.
func (r *Reader) nextList(ctx context.Context, m *Manifest, last revocationList) (next revocationList, err error) {
	defer panics.Recover(&err) // whatever comes from the store, the last list stands
	path := RevocationsPath(m.Lot)
	jws, _, err := r.store.Read(ctx, path)
	if err != nil {
		return next, err
	}
	now := time.Now()
	next = revocationList{sum: sha256.Sum256(jws), fetched: now, tried: now}
	if last.list != nil && next.sum == last.sum {
		next.list, next.noted = last.list, last.noted
	} else if next.list, err = parseRevocations(r.verifier, m, jws); err != nil {
		return next, err
	}
	mark := ListMark{next.list.Version, next.sum[:]}
	if was := last.list; was != nil {
		if err := mark.follows(path, ListMark{was.Version, last.sum[:]}); err != nil {
			return next, err
		}
		if was.Whole != nil && next.list.Whole == nil {
			return next, rolledBack(path, "it does not revoke the whole lot, as version %d does, which is for good: "+askWhy,
				was.Version)
		}
	}
	if !next.noted {
		err := r.remember(ctx, m.Lot, path, mark)
		if errors.As(err, new(*RefusedError)) || err != nil && last.list == nil {
			return next, err
		}
		if err == nil && r.o.Memory != nil {
			err = r.o.Memory.Keep(m.Lot, jws)
		}
		// A later list is better than the last one, also if the memory is away.
		if next.noted = err == nil; err != nil {
			next.err = fmt.Errorf("the list was taken, and would be forgotten at a restart: %w", err)
		}
	}
	if late := next.list.Overdue(now); next.err == nil && late != nil {
		next.err = &lateError{late}
	}
	return next, nil
}

// follows refuses a list that came before last, or another of the same version.
func (l ListMark) follows(path string, last ListMark) error {
	if l.Version < last.Version || l.Version == last.Version && !bytes.Equal(l.SHA256, last.SHA256) {
		return rolledBack(path, "it has version %d, and version %d, another one, was there before: "+askWhy,
			l.Version, last.Version)
	}
	return nil
}

func rolledBack(object, format string, args ...any) error {
	return &RefusedError{Object: object, Reason: fmt.Sprintf(format, args...), Rollback: true}
}

// remember notes a list, unless it is the one that was noted last. Where another process has noted a later one, also
// at the same time, it is refused.
func (r *Reader) remember(ctx context.Context, lot, path string, mark ListMark) error {
	if r.o.Memory == nil {
		return nil
	}
	for tries := 0; ; tries++ {
		last, found, err := r.o.Memory.Last(ctx, lot)
		if err != nil {
			return err
		}
		if found {
			if err := mark.follows(path, last); err != nil || mark.Version == last.Version {
				return err
			}
		}
		if tries == 3 {
			return errors.New("what was noted of it is not there")
		}
		if err := r.o.Memory.Note(ctx, lot, mark); err != nil {
			return err
		}
	}
}

// Overdue gives the lists of revoked devices whose last try to read them has failed, or that are late.
func (r *Reader) Overdue() []Overdue {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []Overdue
	for lot, known := range r.revocations {
		if known.err != nil {
			all = append(all, overdueFor(lot, known.fetched, known.err))
		}
	}
	slices.SortFunc(all, func(a, b Overdue) int { return strings.Compare(a.Lot, b.Lot) })
	return all
}

// ReadRevocations reads a lot's list of revoked devices from the store. Where there is none, it fails with ErrNotFound.
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
	return oneFlight(ctx, r, flight, func(ctx context.Context) (*storedPart, error) {
		done, err := r.begin()
		if err != nil {
			return nil, err
		}
		defer done()
		p, err := readPart(ctx, r.store, r.verifier, m, ref.Part, ref)
		if err == nil {
			r.parts.Set(key, p)
		}
		return p, err
	})
}
